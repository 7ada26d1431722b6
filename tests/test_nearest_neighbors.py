"""Exact neighbours against a stable sort of float64 distances, above all where float32 gets the order wrong."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.factories import features
from tests.reranking_truth import squared_distances
from vareid_ext import _native, nearest_neighbors
from vareid_ext.ops import _filter
from vareid_ext.ops import nearest_neighbors as op
from vareid_ext.retrieval.distance import rows_in_block


def assert_exact(x, y, k, metric="sqeuclidean"):
    distance, index = nearest_neighbors(x, y, k=k, metric=metric)
    wide_x, wide_y = x.double().numpy(), (x if y is None else y).double().numpy()
    if metric == "cosine":
        wide_x = wide_x / np.sqrt((wide_x**2).sum(1, keepdims=True))
        wide_y = wide_y / np.sqrt((wide_y**2).sum(1, keepdims=True))
    expected = squared_distances(wide_x, wide_y)
    order = np.argsort(expected, axis=1, kind="stable")[:, :k]
    assert np.array_equal(index.numpy(), order)
    value = np.take_along_axis(expected, order, 1)
    value = np.sqrt(value) if metric == "euclidean" else value / 2 if metric == "cosine" else value
    np.testing.assert_allclose(distance.double().numpy(), value, rtol=2e-7, atol=1e-14)
    assert bool((distance.diff(dim=1) >= 0).all())
    return distance, index


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize(("M", "N", "D", "k"), [(1, 1, 1, 1), (7, 30, 5, 4), (30, 20, 33, 20), (5, 64, 16, 1)])
def test_neighbours_of_random_rows_are_exact(backend, metric, M, N, D, k):
    assert_exact(features(M, D), features(N, D, 1), k, metric)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_a_set_against_itself_finds_each_row_first(backend, metric):
    distance, index = assert_exact(features(50, 12), None, 21, metric)
    assert torch.equal(index[:, 0], torch.arange(50))
    assert bool((distance[:, 0] == 0).all())


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_rows_that_occur_twice_go_by_index(backend, metric):
    x = features(30, 24)
    assert_exact(torch.cat([x, x]), None, 9, metric)


def test_near_ties_in_float32_are_told_apart(backend):
    """Distances that differ by less than float32 products resolve; an unrefined version gets hundreds of them wrong."""
    base = features(1, 40)
    x = (base + 1e-6 * features(60, 40, 1)).repeat(1, 1)
    x = torch.cat([x, x + 10 * features(1, 40, 2)])
    assert_exact(x, None, 7)


def test_equal_rows_go_by_index(backend):
    x = features(1, 6).expand(70, 6)
    distance, index = assert_exact(x, None, 5)
    assert torch.equal(index, torch.arange(5).expand(70, 5))
    assert bool((distance == 0).all())


def test_more_duplicates_than_places_are_exact(backend):
    """A cluster of near ties that runs past the kept candidates: those rows are done again whole."""
    x = torch.cat([features(1, 8).expand(80, 8), features(20, 8, 1)])[torch.randperm(100, generator=torch.Generator())]
    assert_exact(x, None, 6)
    assert_exact(features(4, 8, 2), x, 6)


def test_whole_numbers_tie_everywhere(backend):
    x = torch.randint(0, 2, (60, 6), generator=torch.Generator().manual_seed(0)).float()
    assert_exact(x, None, 12)


def test_features_far_from_the_origin_are_exact(backend):
    assert_exact(features(40, 16) + 3000, None, 11)
    assert_exact(features(40, 16) + 3000, features(30, 16, 1) + 3000, 11)


def test_two_clusters_that_centring_does_not_help_are_exact(backend):
    sign = torch.sign(features(50, 1, 3))
    assert_exact(features(50, 8) * 1e-3 + 20 * sign, None, 9)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_values_far_from_one_are_exact(backend, factor):
    x = features(30, 8)
    _, index = nearest_neighbors(x * factor, k=5)
    assert torch.equal(index, torch.from_numpy(np.argsort(squared_distances(x * factor, x * factor), 1)[:, :5]))


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize(("constant", "unit"), [(1.0, 1e-25), (-1e30, 1e-4), (0.1, 2.0**-148)])
def test_a_large_constant_element_does_not_matter(backend, metric, constant, unit):
    """Differences that a product of float32 elements does not see at all."""
    x = torch.cat([features(50, 6) * unit, torch.full((50, 1), constant)], dim=1)
    x[7] = x[3]
    distance, index = nearest_neighbors(x[:20], x, k=9, metric=metric)
    expected = squared_distances(x[:20].numpy(), x.numpy())
    order = np.argsort(expected, axis=1, kind="stable")[:, :9]
    assert np.array_equal(index.numpy(), order)
    value = np.take_along_axis(expected, order, 1)
    value = np.sqrt(value) if metric == "euclidean" else value
    np.testing.assert_allclose(distance, value.astype(np.float32), rtol=2e-7, atol=2e-45)


@pytest.mark.parametrize(
    ("metric", "unit"), [("euclidean", 2.0**1020), ("euclidean", 2.0**-1074), ("sqeuclidean", 2.0**-500)]
)
def test_squares_beyond_float64_are_compared(metric, unit):
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    levels = torch.randint(0, 6, (40, 5), generator=torch.Generator().manual_seed(0)).double()
    expected, order = nearest_neighbors(levels, k=7, metric=metric)
    distance, index = nearest_neighbors(levels * unit, k=7, metric=metric)
    assert torch.equal(index, order)
    expected = expected * unit if metric == "euclidean" else expected * unit * unit
    torch.testing.assert_close(distance, expected, rtol=1e-15, atol=1e-323)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_exact(backend, dtype):
    distance, _ = assert_exact(features(40, 16).to(dtype), None, 8)
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_rows_that_are_not_contiguous_are_exact(backend):
    x = features(40, 30)
    assert_exact(x[:, ::2], x[::2, ::2], 4)
    assert_exact(x[::2], None, 4)
    assert_exact(features(16, 30).T, None, 4)


def test_no_rows_have_no_neighbours(backend):
    distance, index = nearest_neighbors(torch.zeros(0, 3), features(4, 3), k=2)
    assert distance.shape == index.shape == (0, 2)


@pytest.mark.parametrize("block_rows", [1, 7, 16, 33, 64, 1000])
def test_blocks_and_threads_change_nothing(block_rows):
    x = torch.cat([features(40, 9), features(40, 9)])
    distance, index = op._nearest_neighbors(x, None, 13, "sqeuclidean", 1024)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for y in (None, x):
                got = op._nearest_neighbors(x, y, 13, "sqeuclidean", block_rows)
                assert torch.equal(got[0], distance)
                assert torch.equal(got[1], index)
    finally:
        torch.set_num_threads(before)


def test_any_k_is_exact():
    x = features(2100, 4)
    assert_exact(x[:50], x, 2048)
    assert_exact(x[:50], x, 2100)  # beyond the native limit


def test_rows_of_several_blocks_are_exact():
    """More than one block of products, and thresholds that tighten while blocks go by."""
    x = torch.cat([features(1300, 32), features(200, 32)])
    assert_exact(x, None, 21)


@pytest.mark.parametrize("multiprocessors", [8, 46, 108, 132, 148, 300])
def test_blocks_of_products_fill_a_gpu(monkeypatch, multiprocessors):
    """Whole rounds of tiles of 128 x 128: the last round, half empty on average, is at most an eighth of the work."""
    found = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    side = _filter.block_side(torch.device("cuda", 0))
    tiles = (side // 128) ** 2
    rounds = -(-tiles // multiprocessors)
    assert tiles / (rounds * multiprocessors) >= 0.85
    assert 4 * side**2 <= 256 << 20
    assert _filter.block_side(torch.device("cpu")) == 1024
    rows, on_cpu = (rows_in_block(1000, torch.device(name)) for name in ("cuda:0", "cpu"))
    assert on_cpu == (1 << 23) // 1000
    assert rows == max(on_cpu, 2 * side**2 // 1000)


@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["as they are", "centred"])
def test_rows_looked_at_at_once_change_nothing(monkeypatch, offset):
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    x = features(2500, 9) + offset
    few = _filter.Filter([x[:300], x[300:]], ["x", "y"], "sqeuclidean")
    monkeypatch.setattr(_filter, "rows_at_once", lambda part: 1000)
    many = _filter.Filter([x[:300], x[300:]], ["x", "y"], "sqeuclidean")
    torch.testing.assert_close(many.norm, few.norm, rtol=1e-6, atol=0)
    assert (few.center is None) == (offset == 0)
    if offset:
        torch.testing.assert_close(many.center, few.center, rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.3, 1e3])
@pytest.mark.parametrize("D", [3, 64, 2048])
def test_the_window_holds(D, offset):
    """The proven bound on a product's error, and that it is not idle: some errors reach a hundredth of it."""
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    x = features(60, D)
    x[::3] *= 50
    x += offset
    filtered = _filter.Filter([x], ["x"], "sqeuclidean")
    product = filtered.block(0, 0, 60, 0) @ filtered.block(0, 0, 60, 1).T
    approximate = filtered.norm.double()[:, None] + filtered.norm.double() - 2 * product.double()
    error = (approximate - torch.from_numpy(squared_distances(x.numpy(), x.numpy()))).abs()
    window = filtered.window.double()[:, None] + filtered.window.double()
    assert bool((error <= window).all())


@pytest.fixture
def on_this_machine(backend):
    """The backends, for tests that take minutes where the CUDA kernels run on the CPU."""
    return backend


@pytest.mark.parametrize("steps", [(40,), (1, 39), (25, 1, 14), (3, 3, 34)])
@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "far", "float16"])
def test_lists_of_a_gallery_that_grows_are_exact(on_this_machine, kind, k, steps):
    check_growth(kind, k, steps)


@pytest.mark.parametrize("kind", ["ties", "float16"])
def test_a_gallery_that_grows(backend, kind):
    check_growth(kind, 5, (25, 1, 14))


def check_growth(kind, k, steps):
    """Lists after each step are those of a sort of all distances."""
    x = features(
        40, 5, levels=3 if kind == "ties" else None, dtype=torch.float16 if kind == "float16" else torch.float32
    )
    if kind == "equal":  # more of them than there is room for candidates
        x = torch.cat([x, x[:1].expand(400, -1)])
        steps = (*steps, 400)
    x = x + 1000 if kind == "far" else x
    lists = torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0, dtype=torch.float64), torch.empty(0)
    rows = 0
    for step in steps:
        lists = op.extended_neighbors(x[:rows], x[rows : rows + step], 1.0, min(k, rows + step), *lists)
        rows += step
        expected = squared_distances(x[:rows].numpy(), x[:rows].numpy())
        order = np.argsort(expected, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(lists[0], order)
        np.testing.assert_allclose(lists[1], np.take_along_axis(expected, order, 1), rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(lists[2], expected.max(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "far"])
def test_lists_of_some_rows_are_those_of_all(backend, kind, dtype):
    """To the last bit, wherever the blocks are divided."""
    x = features(150, 5, levels=3 if kind == "ties" else None)
    x = (x[:1].expand(150, 5) if kind == "equal" else x + 100 if kind == "far" else x).to(dtype)
    query, gallery = x[:37], x[37:]
    edges = op.edges(37, 113, 16)
    assert edges[0] == 0
    assert edges[-1] == 150
    assert 37 in edges
    expected = op.joint_neighbors(query, gallery, 1.0, 9, 0, None, 16)[:3]
    for cuts in ((0, 150), (0, edges[1], edges[4], 150), edges):
        pieces = [
            op.neighbors_of_rows(query, gallery, 1.0, 9, "sqeuclidean", begin, end, 16)
            for begin, end in itertools.pairwise(cuts)
        ]
        for found, right in zip(map(torch.cat, zip(*pieces, strict=True)), expected, strict=True):
            assert found.dtype == right.dtype
            assert torch.equal(found, right)


@pytest.mark.parametrize(("metric", "scale"), [("cosine", 1.0), ("sqeuclidean", 2.0**-40)])
def test_lists_of_some_rows_that_have_factors(backend, metric, scale):
    """Of the query alone, of both, and of the gallery alone."""
    x = features(90, 4)
    x[40:60] = 3 * x[:20]
    wide = x.double() / x.double().norm(dim=1, keepdim=True) if metric == "cosine" else x.double()
    expected = squared_distances(wide.numpy(), wide.numpy()) / (2 if metric == "cosine" else 1)
    x = x / scale
    edges = op.edges(30, 60, 16)
    for begin, end in ((0, 30), (edges[1], edges[3]), (30, 90), (edges[4], 90)):
        index, distance, row_max = op.neighbors_of_rows(x[:30], x[30:], scale, 7, metric, begin, end, 16)
        order = np.argsort(expected, axis=1, kind="stable")[begin:end, :7]
        near = np.take_along_axis(expected[begin:end], order, 1)
        np.testing.assert_allclose(np.take_along_axis(expected[begin:end], index.numpy(), 1), near, rtol=0, atol=1e-15)
        np.testing.assert_allclose(distance, near, rtol=2e-7, atol=1e-14)
        np.testing.assert_allclose(row_max, expected.max(1)[begin:end], rtol=1e-5)


def test_the_operators_pass_opcheck():
    torch.library.opcheck(op._nearest_neighbors, (features(20, 6), None, 3, "sqeuclidean", 8))
    torch.library.opcheck(op._nearest_neighbors, (features(20, 6), features(9, 6, 1), 3, "cosine", 8))
    out = torch.empty(8, 12)
    lists = torch.arange(8, dtype=torch.int32)[:, None], torch.zeros(8, 1, dtype=torch.float64), torch.ones(8)
    torch.library.opcheck(op.extended_neighbors, (features(8, 6), features(12, 6, 1), 1.0, 5, *lists))
    torch.library.opcheck(op.neighbors_of_rows, (features(8, 6), features(12, 6, 1), 1.0, 5, "cosine", 4, 16, 4))
    torch.library.opcheck(op.joint_neighbors, (features(8, 6), features(12, 6, 1), 1.0, 5, 4, out, 8))


def test_arguments_that_do_not_fit_are_named(backend):
    x = features(5, 3)
    with pytest.raises(ValueError, match=r"k: 6 was given; allowed are 1 to 5, the number of rows of x"):
        nearest_neighbors(x, k=6)
    with pytest.raises(ValueError, match=r"k: 4 was given; allowed are 1 to 3, the number of rows of y"):
        nearest_neighbors(x, features(3, 3), k=4)
    with pytest.raises(ValueError, match=r"k: 0"):
        nearest_neighbors(x, k=0)
    with pytest.raises(ValueError, match="k: "):
        nearest_neighbors(x, k=2**70)
    with pytest.raises(TypeError, match=r"k: float"):
        nearest_neighbors(x, k=2.0)
    poisoned = x.clone()
    poisoned[4, 0] = torch.inf
    with pytest.raises(ValueError, match=r"y: row 4 holds NaN or Inf"):
        nearest_neighbors(x, poisoned, k=1)
    with pytest.raises(ValueError, match=r"x: row 0 is all zeros"):
        nearest_neighbors(x * 0, k=1, metric="cosine")
