"""The cases of ``tests/test_offsets.py``, run by the CUDA kernels, and results with rows that lie far apart."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_on_cpu.harness import dtype_code, package
from tests.large.memory import Direct, running, spread
from tests.test_offsets import *  # noqa: F403
from vareid_ext.ops import k_reciprocal as stages

SQUARED = 1  # the metric's number


@pytest.fixture(autouse=True)
def _kernels():
    with running("cuda_on_cpu"):
        yield


@pytest.fixture
def launch():
    return Direct(package("fast"))


def points(rows, seed, D=9):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def test_blocks_of_distances(launch):
    x, y = points(70, 0), points(45, 1)
    (rows, D), columns = x.shape, y.shape[0]
    sets = (x, None, rows, D, y, None, columns, D, dtype_code(x), D)
    norms = x.square().sum(1), y.square().sum(1)
    expected = (x.double()[:, None] - y.double()[None]).square().sum(2)
    block, mirror = spread(x @ y.T), spread(torch.zeros(columns, rows))
    launch(
        "pairwise_distance_block_cuda", block, block.stride(0), *sets, *norms, SQUARED, 1.0, mirror, mirror.stride(0)
    )
    torch.testing.assert_close(block.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mirror.T, block, rtol=0, atol=0)
    block = spread(torch.zeros(rows, columns))
    launch("pairwise_distance_tiled_cuda", x, y, block, block.stride(0), *sets, *norms, SQUARED, 1.0)
    torch.testing.assert_close(block.double(), expected, rtol=1e-5, atol=1e-5)


def test_blocks_of_products(launch):
    """Scanned for their rows and columns, and once more: as the same block does whose rows are close together."""
    x, k, capacity, rows = points(115, 2), 5, 48, 70
    total, columns = x.shape[0], x.shape[0] - rows
    norm, window = x.square().sum(1), torch.full((total,), 1e-4)
    products = x[:rows] @ x[rows:].T
    found = []
    for block in (products.clone(), spread(products)):
        state = [
            torch.zeros(total, capacity), torch.zeros(total, capacity, dtype=torch.int32),
            torch.zeros(total, dtype=torch.int32), torch.full((total,), torch.inf), torch.full((total,), torch.inf),
            torch.zeros(total),
        ]  # fmt: skip
        launch(
            "nearest_neighbors_scan_cuda", block, block.stride(0), rows, columns, 0, rows, norm, window, norm, window,
            *state, capacity, k, True, False,
        )  # fmt: skip
        index, distance = torch.zeros(rows, k, dtype=torch.int32), torch.zeros(rows, k)
        launch(
            "nearest_neighbors_rescan_cuda", block, block.stride(0), torch.arange(rows), rows, x, None, rows, 9, None,
            None, 0, 9, x[rows:], None, columns, 9, None, None, 0, 9, 0, 9, SQUARED, 1.0, norm, window, norm[rows:],
            window[rows:], torch.full((rows,), torch.inf), k, index, distance, 0,
        )  # fmt: skip
        launch(
            "nearest_neighbors_scan_cuda", block, block.stride(0), rows, columns, 0, rows, norm, window, norm, window,
            *state, capacity, k, False, True,
        )  # fmt: skip
        found.append([block, index, distance, *state])
    exact = torch.sort((x[:rows].double()[:, None] - x[None, rows:].double()).square().sum(2), stable=True)
    assert torch.equal(found[1][1].long(), exact.indices[:, :k])
    torch.testing.assert_close(found[1][0].double().sort(1).values, exact.values, rtol=1e-5, atol=1e-5)
    assert_equal(found[1], found[0])  # noqa: F405


def test_blend_of_rows_far_apart(launch):
    Q, G, generator = 20, 90, torch.Generator().manual_seed(0)
    present = torch.rand(Q + G, Q + G, generator=generator) < 0.2
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
    index = present.nonzero()[:, 1].to(torch.int32)
    value, row_max = torch.rand(index.shape[0], generator=generator), torch.rand(Q + G, generator=generator) + 1
    distance = torch.rand(Q, G, generator=generator)
    far = spread(distance)
    inverted = stages.k_reciprocal_invert(indptr, index, value, Q, Q + G)
    launch("k_reciprocal_blend_cuda", far, far.stride(0), Q, G, row_max, indptr, index, value, *inverted, 0.3)
    stages.k_reciprocal_blend(distance, row_max, indptr, index, value, *inverted, 0.3)
    torch.testing.assert_close(far, distance, rtol=0, atol=0)
