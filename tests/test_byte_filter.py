"""Neighbours by way of products of 8 bits: the window, and results that are those of float32 products."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.factories import features
from tests.reranking_truth import squared_distances
from vareid_ext import _native
from vareid_ext.ops import _byte_filter, _filter, _progress
from vareid_ext.ops import nearest_neighbors as op
from vareid_ext.ops._shared_neighbors import exact_lists


@pytest.fixture(params=["places for all", "crowded"])
def rounded(monkeypatch, request):
    """Products of 8 bits however small the work, whether or not many rows have to be done again."""
    if not (_native.available("cpu") and _byte_filter.byte_products()):
        pytest.skip("this machine has no products of 8 bits")
    monkeypatch.setattr(_byte_filter, "_FEW_ROWS", 1)
    monkeypatch.setattr(_byte_filter, "_FEW_ELEMENTS", 1)
    if request.param == "places for all":
        monkeypatch.setattr(_byte_filter.ByteFilter, "suits", lambda *_: True)
        monkeypatch.setattr(_byte_filter.ByteFilter, "far_pairs", lambda *_: 0.0)
    return request.param


def sorted_truth(x, k):
    """All squared distances, and each row's k nearest."""
    expected = squared_distances(x.double().numpy(), x.double().numpy())
    return expected, np.argsort(expected, axis=1, kind="stable")[:, :k]


def scanned(x, y, k, block_rows):
    """The scan of one set against another, by 8-bit products if they pay."""
    filtered = _filter.Filter([x, y], ["x", "y"], "sqeuclidean")
    rounded = op._ways(filtered, [0], [1], k, block_rows)
    scan = op._Scan(filtered, [0], [1], k, "sqeuclidean", block_rows, rounded=rounded)
    op._one_sided_scan(filtered, scan, block_rows)
    return scan


EARLY = "with candidates measured early"  # as it is counted
HOSTILE = {
    "random": lambda: features(150, 40),
    "ragged": lambda: features(97, 19),
    "one element": lambda: features(70, 1),
    "equal": lambda: features(1, 33).expand(90, 33),
    "more duplicates than places": lambda: torch.cat([features(1, 30).expand(200, 30), features(60, 30, 1)]),
    "twice": lambda: features(60, 24).repeat(2, 1),
    "whole numbers": lambda: features(120, 6, levels=3),
    "near ties": lambda: features(1, 40) + 1e-6 * features(130, 40, 1),
    "far from the origin": lambda: features(100, 16) + 3000,
    "one large element": lambda: features(90, 50) + torch.eye(50)[3] * 1e4 * torch.sign(features(90, 1, 2)),
    "lengths of all sizes": lambda: features(90, 20) * torch.logspace(-18, 18, 90)[:, None],
    "zero rows": lambda: features(80, 12) * (torch.arange(80) % 3 > 0)[:, None],
    "subnormal": lambda: features(80, 12) * 1e-40,
    "subnormal beside 1": lambda: torch.cat([features(80, 12) * 1e-42, torch.ones(80, 1)], 1),
    "float64 near its limits": lambda: features(80, 12).double() * 1e307,
    "float16": lambda: features(80, 40).half(),
    "bfloat16": lambda: features(80, 40).bfloat16(),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_results_are_those_of_float32_products(rounded, name, metric, monkeypatch):
    x = HOSTILE[name]()
    if metric == "cosine" and name == "zero rows":
        x = x + 1
    y = x[torch.arange(x.shape[0]).flip(0)]
    got = [op._nearest_neighbors(x, other, k, metric, 64) for other in (None, y) for k in (1, 7, 40)]
    monkeypatch.setattr(_byte_filter.ByteFilter, "pays", staticmethod(lambda *_: False))
    expected = [op._nearest_neighbors(x, other, k, metric, 64) for other in (None, y) for k in (1, 7, 40)]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[0], theirs[0])


def test_a_sort_of_float64_distances_agrees(rounded):
    x = torch.cat([features(1100, 70), features(80, 70)])  # more than one block, and rows that occur twice
    _, index = op._nearest_neighbors(x, None, 21, "sqeuclidean", 0)
    expected = np.argsort(squared_distances(x.numpy(), x.numpy()), axis=1, kind="stable")[:, :21]
    assert np.array_equal(index.numpy(), expected)


@pytest.mark.parametrize("block_rows", [1, 33, 64, 1000])
def test_blocks_and_threads_change_nothing(rounded, block_rows):
    x = torch.cat([features(90, 30), features(40, 30)])
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


def test_a_block_on_the_diagonal_is_whole_for_any_number_of_threads(rounded):
    """It has eight parts, as far as there are rows, or with more threads bands."""
    x = features(600, 40)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 4, 5, 9, 40):
            torch.set_num_threads(threads)
            for rows in (600, 290, 33):
                index = op._nearest_neighbors(x[:rows], None, 21, "sqeuclidean", 0)[1]
                assert np.array_equal(index.numpy(), sorted_truth(x[:rows], 21)[1])
    finally:
        torch.set_num_threads(before)


def assert_bounds_hold(scan, x, *, idle):
    """A scan of x with itself that kept all pairs: each distance is between its bounds, which are used unless idle."""
    lower, index, count = scan.candidates[:3]
    size = len(x)
    assert bool((count == size).all())
    lower = torch.empty(size, size).scatter_(1, index[:, :size].long(), lower[:, :size]).double()
    window = scan.left_bounds[1].double()[:, None] + scan.right_bounds[1].double()
    truth = torch.from_numpy(squared_distances(x.numpy(), x.numpy()))
    assert bool((lower <= truth).all())
    assert bool((truth <= lower + 2 * window).all())
    if not idle:
        assert float(((lower + window - truth) / window).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["random", "one large element", "lengths of all sizes", "centred", "sparse"])
@pytest.mark.parametrize("D", [3, 64, 2051])
def test_the_window_holds(monkeypatch, D, kind):
    """Every pair's distance lies between its bounds, and the bounds are not idle."""
    if not (_native.available("cpu") and _byte_filter.byte_products()):
        pytest.skip("this machine has no products of 8 bits")
    monkeypatch.setattr(_byte_filter, "_FEW_ROWS", 1)
    monkeypatch.setattr(_byte_filter, "_FEW_ELEMENTS", 1)
    x = features(60, D)
    if kind == "one large element":
        x[:, 0] = 100 * torch.sign(x[:, 0])
    elif kind == "lengths of all sizes":
        x = x * torch.logspace(-3, 3, 60)[:, None]
    elif kind == "centred":
        x = x + 50
    elif kind == "sparse":
        x = x.clamp_(min=1)
    monkeypatch.setattr(_byte_filter.ByteFilter, "suits", lambda *_: True)
    scan = scanned(x, x.clone(), 50, 64)  # there are places for all
    assert scan.rounded is not None
    assert_bounds_hold(scan, x, idle=kind == "sparse")


@pytest.mark.parametrize("equal", [False, True])
def test_rows_that_have_too_many_candidates_are_measured_or_done_again(monkeypatch, rounded, equal):
    """All rows within the window: they are measured, and done again where that does not tell them apart."""
    x = torch.ones(300, 40) + 0.1 * features(300, 40) + 10 * torch.sign(features(300, 1, 1))
    if equal:
        x = x[:2].repeat(150, 1)
    again = []
    rescan = op._Scan._rescan

    def counted(self, unsure, *arguments):
        again.append(unsure.numel())
        return rescan(self, unsure, *arguments)

    monkeypatch.setattr(op._Scan, "_rescan", counted)
    scan = scanned(x, x, 5, 64)
    assert (scan.rounded is None) == (rounded == "crowded")
    with _progress.counted() as counts:
        index, _ = scan.select(torch.float32)
    assert (sum(again) > 0) == equal
    assert counts["done again"] == sum(again)
    assert counts[EARLY] == (0 if scan.rounded is None else 300)
    assert np.array_equal(index.numpy(), sorted_truth(x, 5)[1])


@pytest.mark.parametrize("equal", [False, True])
def test_one_place_more_than_neighbours_suffices(rounded, monkeypatch, equal):
    monkeypatch.setattr(op, "capacity", lambda k, rounded=False: k + 1)
    x = features(2, 40).repeat(60, 1) if equal else features(120, 40)
    _, index = op._nearest_neighbors(x, None, 5, "sqeuclidean", 64)
    assert np.array_equal(index.numpy(), sorted_truth(x, 5)[1])


def assert_joint_lists_are_those_of_float64(x, nearest):
    query, gallery = x[:33], x[33:]
    out = None if nearest else torch.empty(len(query), len(gallery))
    index, distance, row_max, best, _ = op.joint_neighbors(query, gallery, 1.0, 12, nearest, out, 32)
    expected, order = sorted_truth(x, 12)
    assert np.array_equal(index.numpy(), order)
    np.testing.assert_allclose(distance, np.take_along_axis(expected, order, 1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(row_max, expected.max(1), rtol=1e-6, atol=1e-12)
    crossed = expected[:33, 33:]
    if nearest:
        assert np.array_equal(best.numpy(), np.argsort(crossed, axis=1, kind="stable")[:, :nearest])
    else:
        np.testing.assert_allclose(out, crossed, rtol=1e-6, atol=1e-5 * (x.double().square().sum(1).max()))


@pytest.mark.parametrize("nearest", [0, 9])
@pytest.mark.parametrize("name", ["random", "twice", "whole numbers", "far from the origin", "zero rows", "float16"])
def test_joint_lists_and_largest_distances_are_those_of_float64(rounded, name, nearest):
    assert_joint_lists_are_those_of_float64(HOSTILE[name](), nearest)


def test_largest_distances_are_measured_in_float64(rounded):
    """To the last bit, whatever the blocks, the threads and the rows that are asked for; so is the kept block."""
    x = features(300, 530) * torch.linspace(0.5, 2, 300)[:, None]
    if rounded == "crowded":  # not here
        assert op.pairs_pay([x[:90], x[90:]], "sqeuclidean", 1.0, 300)
    squared = torch.from_numpy(squared_distances(x.double().numpy(), x.double().numpy()))
    expected, kept = squared.amax(1).float(), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for side in (32, 100, 1024):
                for out in (None, torch.empty(90, 210)):
                    row_max = op.joint_neighbors(x[:90], x[90:], 1.0, 5, 0, out, side)[2]
                    kept += [] if out is None else [out]
                    torch.testing.assert_close(row_max, expected, rtol=2e-7, atol=0)
                    assert torch.equal(row_max, op.joint_neighbors(x[:90], x[90:], 1.0, 9, 0, None, 64)[2])
            edges = op.edges(90, 210, 32)
            rows = op.neighbors_of_rows(x[:90], x[90:], 1.0, 5, "sqeuclidean", edges[2], edges[6], 32)
            whole = op.joint_neighbors(x[:90], x[90:], 1.0, 5, 0, None, 32)
            for ours, theirs in zip(rows, whole, strict=False):
                assert torch.equal(ours, theirs[edges[2] : edges[6]])
        torch.testing.assert_close(kept[0].double(), squared[:90, 90:], rtol=1e-6, atol=1e-6 * float(squared.max()))
        assert all(torch.equal(out, kept[0]) for out in kept)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reached", [0, 1, 7, 60])
def test_known_lists_spare_what_they_do_not_reach(rounded, reached):
    x, y, k = features(60, 40), features(60, 40, 1).repeat(2, 1), 12
    expected, index = torch.from_numpy(squared_distances(x.double().numpy(), y.double().numpy())).sort(
        dim=1, stable=True
    )
    reach = expected[:, reached].float().nextafter(torch.tensor(torch.inf)) if reached else torch.full((60,), -1.0)
    distance, number = exact_lists(x, y, k, "sqeuclidean", 1.0, True, reach)
    near = number >= 0
    assert bool((near >= (expected[:, :k] <= reach[:, None])).all())
    assert torch.equal(number[near].long(), index[:, :k][near])
    torch.testing.assert_close(distance[near], expected[:, :k][near])
    assert bool(distance[~near].isinf().all())
    assert bool(near.all()) == (reached == 60)


def assert_a_gallery_grows(x, steps):
    lists = torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0, dtype=torch.float64), torch.empty(0)
    rows = 0
    for step in (*steps, x.shape[0] - sum(steps)):
        lists = op.extended_neighbors(x[:rows], x[rows : rows + step], 1.0, min(30, rows + step), *lists)
        rows += step
        expected, order = sorted_truth(x[:rows], lists[0].shape[1])
        assert np.array_equal(lists[0].numpy(), order)
        np.testing.assert_allclose(lists[1], np.take_along_axis(expected, order, 1), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lists[2], expected.max(1), rtol=1e-6)


@pytest.mark.parametrize("name", ["random", "twice", "whole numbers", "more duplicates than places"])
def test_a_gallery_that_grows(rounded, name):
    assert_a_gallery_grows(HOSTILE[name](), (40, 3, 0))


def test_progress_and_counts(rounded):
    x = features(180, 30)
    done = []
    with _progress.listen(done.append), _progress.counted() as counts:
        op.joint_neighbors(x[:30], x[30:], 1.0, 7, 0, torch.empty(30, 150), 32)
    assert sum(done) == 180 * 181 // 2
    if rounded == "places for all":
        assert counts[f"rows filtered by products of 8 bits ({_byte_filter.byte_products()})"] == 180
    assert sum(counts.values()) == 180 + counts["done again"]  # in so small a set there are places for all


def test_rows_that_are_measured_early_are_counted(rounded):
    """Those of a cluster that runs past the places, which the window does not tell apart, and no others."""
    if rounded == "crowded":
        pytest.skip("these are filtered by products of float32")
    x = features(80, 40).repeat_interleave(5, 0)  # whose five nearest lie in one block
    x[:100] = x[0] + 1e-3 * features(100, 40, 1)
    cluster, few = x[:100], x[200:240]
    nearer = cluster[0] + 0.1 * (cluster - cluster[0]).repeat(2, 1)
    followed = torch.cat([x[100:], cluster, nearer])  # whose places the nearer ones take
    for rows, y, expected in ((x, None, 100), (x, followed, 100), (few, few, 0)):
        with _progress.counted() as counts:
            op._nearest_neighbors(rows, y, 5, "sqeuclidean", 100)
        assert counts[EARLY] == expected


def test_some_rows_far_from_all_keep_float32_products(rounded):
    """They would be measured against most others, which takes longer; few enough of them do not matter."""
    if rounded == "places for all":
        pytest.skip("whether it pays is not asked")
    x = features(1100, 40)
    assert scanned(x, x, 5, 64).rounded is not None
    x[::11] *= 30
    assert scanned(x, x, 5, 64).rounded is None


def test_few_rows_or_elements_keep_float32_products():
    rows = features(200, 128)
    usable = _native.available("cpu") and _byte_filter.byte_products() != ""
    for x, few, pays in ((rows, 200, usable), (rows, 20, False), (rows[:, :60], 200, False)):
        assert _byte_filter.ByteFilter.pays(x, few) == pays


@pytest.mark.parametrize(
    ("used", "broken", "message"),
    [(0, 1, "names AVX512-VNNI .* products of float32"), (1, 2, r"names AMX-INT8 .* 8 bits \(AVX512-VNNI\)")],
)
def test_a_machine_that_names_what_it_cannot_do_is_told_of_once(monkeypatch, used, broken, message):
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    x = features(150, 128)
    expected = op._nearest_neighbors(x, None, 5, "sqeuclidean", 0)
    real = _native.module()
    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    if real.byte_products()[0] < used:
        pytest.skip("this machine has no products of 8 bits")
    monkeypatch.setattr(_native, "_module", SimpleNamespace(**{**names, "byte_products": lambda: (used, broken)}))
    monkeypatch.setattr(_byte_filter, "_warned", False)
    with pytest.warns(RuntimeWarning, match=message):
        got = op._nearest_neighbors(x, None, 5, "sqeuclidean", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op._nearest_neighbors(x, None, 5, "sqeuclidean", 0)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
