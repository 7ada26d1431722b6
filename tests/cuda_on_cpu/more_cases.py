"""Cases beside those of ``tests/test_<op>.py``: sizes at which a kernel goes through its loops more than once, so that
every barrier has something to order. Functions are named ``test_<row>__...`` and take ``backend`` as the rows' own do.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

import vareid_ext
from tests.bfloat16 import products_of_bfloat16
from vareid_ext.ops import k_reciprocal as k_reciprocal_op
from vareid_ext.ops import nearest_neighbors as nearest_op
from vareid_ext.ops import pairwise_distance as pairwise_op
from vareid_ext.reference import k_reciprocal as k_reciprocal_reference


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _distances(Q: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rooted distances of points on a line, far ones first: the lists of later rows overflow again and again."""
    x = torch.arange(Q + G, dtype=torch.float64).flip(0) ** 1.25
    d = (x[:, None] - x[None]).abs().float()
    return d[:Q, Q:].contiguous(), d[:Q, :Q].contiguous(), d[Q:, Q:].contiguous()


def test_pairwise_distance__several_blocks_of_a_set_against_itself(backend: str) -> None:
    x = _random(70, 9)
    with mock.patch.object(pairwise_op, "block_side", return_value=24):
        got = vareid_ext.pairwise_distance(x)
    torch.testing.assert_close(got.double(), torch.cdist(x.double(), x.double()), rtol=2e-5, atol=2e-6)


def test_k_reciprocal__matrices_with_long_lists(backend: str) -> None:
    matrices = _distances(40, 260)
    got = vareid_ext.re_ranking(*matrices, k1=7, k2=3)
    with vareid_ext.reference_backend():
        expected = vareid_ext.re_ranking(*matrices, k1=7, k2=3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_k_reciprocal__columns_of_several_tiles(backend: str) -> None:
    """Blocks of more than 32 rows and columns, and later blocks in which nothing is near."""
    near, far = _random(90, 3) * 0.01, _random(90, 3, seed=1) * 0.01 + 100
    query, gallery = torch.cat([near[:10], far[:10]]), torch.cat([near[10:], far[10:]])
    got = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2, block_rows=80)
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_k_reciprocal__blocks_whose_products_are_made_together(backend: str) -> None:
    """As on a GPU: strips of three blocks, the last one shorter, with and without the distances."""
    query, gallery = _random(21, 5), _random(140, 5, seed=1)
    with mock.patch.object(nearest_op, "strip_side", side_effect=lambda device, side: 3 * side):
        got = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2, block_rows=16)
        distance, index = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2, block_rows=16, topk=9)
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(query, gallery, k1=5, k2=2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(distance, expected.sort(dim=1).values[:, :9], rtol=1e-5, atol=1e-5)
    assert torch.equal(index, expected.sort(dim=1, stable=True).indices[:, :9])


def test_k_reciprocal__lists_of_more_rows_than_are_looked_up_at_once(backend: str) -> None:
    query, gallery = _random(10, 3), _random(50, 3, seed=1)
    got = vareid_ext.k_reciprocal_rerank(query, gallery, k1=3, k2=40)
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(query, gallery, k1=3, k2=40)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("others", [0, 20])
def test_k_reciprocal__best_of_queries_that_share_nothing(backend: str, others: int) -> None:
    """With more than k1 duplicates some encodings are empty; the best are then the nearest, or the first."""
    x = torch.cat([_random(1, 5).expand(12, 5), _random(others, 5, seed=1), _random(1, 5).expand(28, 5)])
    distance, index = vareid_ext.k_reciprocal_rerank(x[:12], x[12:], k1=5, k2=1, topk=4)
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(x[:12], x[12:], k1=5, k2=1, topk=4)
    torch.testing.assert_close(distance, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(index, expected[1])


@pytest.mark.parametrize(("rows", "columns", "entries"), [(5, 1, 3), (300, 200, 36000), (40, 1 << 20, 500), (3, 7, 0)])
def test_k_reciprocal__inverted_index(backend: str, rows: int, columns: int, entries: int) -> None:
    """One to three digits of the column, several tiles, rows and columns without entries."""
    rng = torch.Generator().manual_seed(0)
    cells = torch.randperm(min(rows * columns, 1 << 22), generator=rng)[:entries].sort().values
    cells = cells * (rows * columns // max(1, min(rows * columns, 1 << 22)))
    indptr = torch.zeros(rows + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(cells // columns, minlength=rows).cumsum(0)
    index, value = (cells % columns).to(torch.int32), torch.rand(cells.shape, generator=rng)
    for first in (0, rows // 2):
        start, owner, weight = k_reciprocal_op.k_reciprocal_invert(indptr, index, value, first, columns)
        expected = k_reciprocal_reference.invert(indptr, index, value, first, columns)
        assert torch.equal(start, expected[0])
        assert torch.equal(owner, expected[1])
        assert torch.equal(weight, expected[2])


def test_k_reciprocal__lists_that_end_early(backend: str) -> None:
    x = _random(40, 4).double()
    distance, index = (x[:, None] - x).square().sum(2).sort()
    distance, index = distance[:, :7], index[:, :7]
    index[5, 2:] = index[11, 3:] = -1
    got, _ = vareid_ext.k_reciprocal_from_neighbors(index, distance, 9, k1=4, k2=3, topk=20)
    with vareid_ext.reference_backend():
        expected, _ = vareid_ext.k_reciprocal_from_neighbors(index, distance, 9, k1=4, k2=3, topk=20)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_k_reciprocal__best_of_a_gallery_of_several_parts(backend: str) -> None:
    """More gallery rows than sums fit into shared memory."""
    rng = torch.Generator().manual_seed(0)
    Q, G, k = 2, 8300, 3
    query, gallery = torch.rand(Q, 1, generator=rng), torch.rand(G, 1, generator=rng)
    original, nearest = torch.sort((query - gallery.T).square(), dim=1, stable=True)
    cells = torch.randperm((Q + G) * 5, generator=rng)[: (Q + G) * 2].sort().values
    indptr = torch.zeros(Q + G + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(cells // 5, minlength=Q + G).cumsum(0)
    index, value = (cells % 5).to(torch.int32), torch.rand(cells.shape, generator=rng) / 5
    encodings = (indptr, index, value, *k_reciprocal_op.k_reciprocal_invert(indptr, index, value, Q, Q + G))
    args = (
        query, gallery, 1.0, nearest[:, :k].to(torch.int32), original[:, :k].contiguous(), torch.ones(Q + G),
        *encodings, 0.3,
    )  # fmt: skip
    distance, _ = k_reciprocal_op.k_reciprocal_topk(*args)
    with vareid_ext.reference_backend():
        expected, _ = k_reciprocal_op.k_reciprocal_topk(*args)
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-5)
    blended = (query - gallery.T).square()
    k_reciprocal_op.k_reciprocal_blend(blended, torch.ones(Q + G), *encodings, 0.3)
    torch.testing.assert_close(blended.sort(1).values[:, :k], expected, rtol=1e-5, atol=1e-5)


def test_nearest_neighbors__lists_that_overflow_in_later_blocks(backend: str) -> None:
    """Far rows first, so that every block brings nearer ones; also more candidates than the smaller lists hold."""
    x = torch.arange(150, dtype=torch.float32).flip(0)[:, None] ** 1.25
    for k in (3, 70):
        with mock.patch.object(nearest_op, "block_side", return_value=50):
            distance, index = vareid_ext.nearest_neighbors(x, k=k)
        expected = torch.sort((x.double() - x.double().T).square(), dim=1, stable=True)
        assert torch.equal(index, expected.indices[:, :k])
        torch.testing.assert_close(distance.double(), expected.values[:, :k], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("identities", "step"), [(2, 1.0), (40, 0.0), (7, 1e-6)])
def test_ranking__features(backend: str, identities: int, step: float, dtype: torch.dtype) -> None:
    """More matches than a block ranks at once, with ties; few matches; near ties that only float64 tells apart."""
    Q, G, D, rng = 3, 700 if identities == 2 else 300, 6, torch.Generator().manual_seed(3)
    x = torch.randint(3, (Q + G, D), generator=rng) * step + (_random(Q + G, D) if step == 0 else _random(1, D))
    identity, camera = (torch.randint(-1, high, (Q + G,), generator=rng) for high in (identities, 3))
    x = x.to(dtype)
    arguments = x[:Q], x[Q:], identity[:Q], identity[Q:], camera[:Q], camera[Q:]
    got = vareid_ext.rank_features(*arguments, junk_identity=0)
    with vareid_ext.reference_backend():
        expected = vareid_ext.rank_features(*arguments, junk_identity=0)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-13, atol=0)


def test_nearest_neighbors__products_of_bfloat16(backend: str) -> None:
    """Rows rounded and multiplied so; more near ties than places among them."""
    x = torch.cat([_random(9, 5), _random(1, 5, seed=1).expand(55, 5)])
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(stable=True)[1]
    with products_of_bfloat16():
        assert torch.equal(vareid_ext.nearest_neighbors(x, k=3)[1], expected[:, :3])


def test_k_reciprocal__products_of_bfloat16(backend: str) -> None:
    """The largest distances are those of pairs, but for a row from which most others are about as far."""
    x = torch.cat([_random(20, 5) * 1e-5 + 1, torch.full((1, 5), 60.0), _random(11, 5, seed=1)])
    with vareid_ext.reference_backend():
        expected = vareid_ext.k_reciprocal_rerank(x[:7], x[7:], k1=3, k2=2)
    with products_of_bfloat16(), mock.patch.object(nearest_op, "strip_side", lambda _, side: 2 * side):
        got = vareid_ext.k_reciprocal_rerank(x[:7], x[7:], k1=3, k2=2, block_rows=16)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
