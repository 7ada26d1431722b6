"""Cases beside those of ``tests/test_<op>.py``: sizes at which a kernel goes through its loops more than once, so that
every barrier has something to order. Functions are named ``test_<row>__...`` and take ``backend`` as the rows' own do.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

import vareid_ext
from vareid_ext.ops import pairwise_distance as pairwise_op


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _distances(Q: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rooted distances of points on a line, far ones first: the lists of later rows overflow again and again."""
    x = torch.arange(Q + G, dtype=torch.float64).flip(0) ** 1.25
    d = (x[:, None] - x[None]).abs().float()
    return d[:Q, Q:].contiguous(), d[:Q, :Q].contiguous(), d[Q:, Q:].contiguous()


def test_pairwise_distance__several_blocks_of_a_set_against_itself(backend: str) -> None:
    x = _random(70, 9)
    with mock.patch.object(pairwise_op, "BLOCK_ROWS", 24):
        got = vareid_ext.pairwise_distance(x)
    torch.testing.assert_close(got.double(), torch.cdist(x.double(), x.double()), rtol=2e-5, atol=2e-6)


def test_k_reciprocal__matrices_with_long_lists(backend: str) -> None:
    matrices = _distances(40, 260)
    got = vareid_ext.re_ranking(*matrices, k1=7, k2=3)
    with vareid_ext.reference_backend():
        expected = vareid_ext.re_ranking(*matrices, k1=7, k2=3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_k_reciprocal__more_rows_than_a_block_has_threads(backend: str) -> None:
    query, gallery = _random(4, 2), _random(1030, 2, seed=1)
    got = vareid_ext.k_reciprocal_rerank(query, gallery, k1=3, k2=2)
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(query, gallery, k1=3, k2=2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_k_reciprocal__columns_of_several_tiles(backend: str) -> None:
    """Blocks of more than 32 rows and columns, and later blocks in which nothing is near."""
    near, far = _random(90, 3) * 0.01, _random(90, 3, seed=1) * 0.01 + 100
    query, gallery = torch.cat([near[:10], far[:10]]), torch.cat([near[10:], far[10:]])
    got = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2, block_rows=80)
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
