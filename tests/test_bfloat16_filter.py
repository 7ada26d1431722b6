"""Neighbours by way of products of bfloat16, which here are emulated: rows are rounded, and multiplied in float32."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from tests.bfloat16 import products_of_bfloat16
from tests.factories import features
from tests.reranking_truth import squared_distances
from tests.test_byte_filter import (
    HOSTILE,
    assert_a_gallery_grows,
    assert_bounds_hold,
    assert_joint_lists_are_those_of_float64,
    sorted_truth,
)
from vareid_ext import _native, k_reciprocal_rerank
from vareid_ext.ops import _bfloat16_filter, _filter, _progress, _shared_neighbors
from vareid_ext.ops import nearest_neighbors as op

MORE = {
    "a large constant element": lambda: torch.cat([features(80, 12) * 1e-4, torch.full((80, 1), -1e30)], 1),
    "rows of bfloat16's own": lambda: features(80, 24).bfloat16().float(),
    "elements at the range's end": lambda: features(80, 24).sign() * 2.0**20,
}


@pytest.fixture(params=[True])
def rounded(request, monkeypatch):
    """Products of bfloat16; with the parameter False, where they suit."""
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    monkeypatch.setattr(op, "strip_side", lambda _, side: 3 * side)
    with products_of_bfloat16(always=request.param):
        yield


def products_of_float32():
    return mock.patch.object(_bfloat16_filter, "_has_products", return_value=False)


@pytest.mark.parametrize("name", [*HOSTILE, *MORE])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_results_are_those_of_float32_products(rounded, name, metric):
    x = (HOSTILE | MORE)[name]()
    if metric == "cosine" and name == "zero rows":
        x = x + 1
    y = x[torch.arange(x.shape[0]).flip(0)]
    cases = [(other, k, side) for other in (None, y) for k, side in ((1, 64), (7, 33), (40, 1000))]
    with _progress.counted() as counts:
        got = [op._nearest_neighbors(x, other, k, metric, side) for other, k, side in cases]
    assert counts["rows filtered by products of bfloat16"] == 6 * len(x)
    with products_of_float32():
        expected = [op._nearest_neighbors(x, other, k, metric, 64) for other, k, _ in cases]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("kind", ["random", "lengths of all sizes", "centred", "sparse"])
@pytest.mark.parametrize("D", [3, 64, 2051])
def test_the_window_holds(rounded, D, kind):
    """Every pair's distance lies between its bounds, and the bounds are not idle."""
    x = features(60, D)
    if kind == "lengths of all sizes":
        x = x * torch.logspace(-3, 3, 60)[:, None]
    elif kind == "centred":
        x = x + 50
    elif kind == "sparse":
        x = x.clamp_(min=1)
    filtered = _filter.Filter([x, x.clone()], ["x", "y"], "sqeuclidean")
    scan = op.one_sided_scan(filtered, 50, "sqeuclidean", 64)  # there are places for all
    assert isinstance(scan.rounded, _bfloat16_filter.BFloat16Filter)
    assert_bounds_hold(scan, x, idle=kind == "sparse")


@pytest.mark.parametrize("nearest", [0, 9])
@pytest.mark.parametrize(
    "name",
    ["random", "equal", "twice", "more duplicates than places", "whole numbers", "far from the origin", "float16"],
)
def test_joint_lists_and_largest_distances_are_those_of_float64(rounded, name, nearest):
    assert_joint_lists_are_those_of_float64(HOSTILE[name](), nearest)


def test_largest_distances_are_measured_in_float64(rounded):
    """To the last bit, whatever the blocks and the rows that are asked for; those of few pairs, and those of many."""
    x = features(200, 130) + torch.linspace(0, 4, 130)
    many = torch.cat([x, x.new_full((1, 130), 60)])
    many[:60] = 1 + 1e-5 * many[:60]  # from the last row all of these are about as far
    for rows, again in ((x, 0), (many, 1)):
        expected = torch.from_numpy(squared_distances(rows.double().numpy(), rows.double().numpy()).max(1)).float()
        for side in (32, 1024):
            for out in (None, torch.empty(60, len(rows) - 60)):
                with _progress.counted() as counts:
                    row_max = op.joint_neighbors(rows[:60], rows[60:], 1.0, 5, 0, out, side)[2]
                assert counts["largest distances done again"] == again
                sure = len(rows) - again
                torch.testing.assert_close(row_max[:sure], expected[:sure], rtol=2e-7, atol=0)
                torch.testing.assert_close(row_max, expected, rtol=1e-6, atol=0)
    edges = op.edges(60, 140, 32)
    begin, end = edges[1], edges[4]
    found = op.neighbors_of_rows(x[:60], x[60:], 1.0, 5, "sqeuclidean", begin, end, 32)
    whole = op.joint_neighbors(x[:60], x[60:], 1.0, 5, 0, None, 32)
    for ours, theirs in zip(found, whole, strict=False):
        assert torch.equal(ours, theirs[begin:end])


@pytest.mark.parametrize("name", ["random", "twice", "whole numbers", "more duplicates than places"])
def test_a_gallery_that_grows(rounded, name):
    assert_a_gallery_grows(HOSTILE[name](), (40, 3, 0))


@pytest.mark.parametrize("rounded", [False], indirect=True)
def test_rows_that_have_too_many_candidates_go_back_to_float32(rounded, monkeypatch):
    """All rows within the window: with places enough they are done again one by one, else all at once."""
    x = torch.ones(300, 40) + 0.1 * features(300, 40) + 10 * torch.sign(features(300, 1, 1))
    _, order = sorted_truth(x, 5)
    for suits in (False, True):
        if suits:
            monkeypatch.setattr(_bfloat16_filter.BFloat16Filter, "suits", lambda *_: True)
        with _progress.counted() as counts:
            _, index = op._nearest_neighbors(x, None, 5, "sqeuclidean", 64)
        assert np.array_equal(index.numpy(), order)
        assert counts[f"rows filtered by products of {'bfloat16' if suits else 'float32'}"] == 300
        assert (counts["done again"] > 150) == suits


@pytest.mark.parametrize("rounded", [False], indirect=True)
def test_the_trial_takes_features_with_room_and_no_others(rounded):
    x = features(300, 130)
    crowded = torch.ones(300, 130) + 0.1 * x + 10 * torch.sign(features(300, 1, 1))
    for rows, pays in ((x, True), (crowded, False)):
        filtered = _filter.Filter([rows], ["x"], "sqeuclidean")
        assert isinstance(op._ways(filtered, [0], [0], 21, 64), _bfloat16_filter.BFloat16Filter) == pays
        assert op.pairs_pay([rows], "sqeuclidean", 1.0, 300) == pays


def test_rows_of_two_processes_are_compared_for_both(rounded):
    """Lists and largest distances of some blocks among others, and the other way round."""
    x = torch.cat([features(70, 40), features(20, 40)])
    mine, theirs = ([_shared_neighbors._Block(a - first, b - first, a) for a, b in edges] for first, edges in
                    ((0, [(0, 20), (20, 40)]), (40, [(40, 60), (60, 90)])))  # fmt: skip
    filtered = _filter.Filter([x[:40], x[40:]], ["", ""], "sqeuclidean", 1.0)
    expected, _ = sorted_truth(x, 9)
    found = _shared_neighbors._compared(filtered, mine, theirs, 9, "sqeuclidean", True)
    for lists, truth, first in zip(found, (expected[:40, 40:], expected[40:, :40]), (40, 0), strict=True):
        order = np.argsort(truth, axis=1, kind="stable")[:, :9]
        assert np.array_equal(lists.number.numpy() - first, order)
        np.testing.assert_allclose(lists.distance, np.take_along_axis(truth, order, 1), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lists.row_max, truth.max(1), rtol=1e-6)


def test_reranking_is_that_of_float32(rounded):
    x = features(260, 40)
    got = [k_reciprocal_rerank(x[:60], x[60:], block_rows=50), *k_reciprocal_rerank(x[:60], x[60:], topk=70)]
    with products_of_float32():
        expected = [k_reciprocal_rerank(x[:60], x[60:], block_rows=50), *k_reciprocal_rerank(x[:60], x[60:], topk=70)]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("products", "D", "pairs", "pays"),
    [(1 << 28, 128, False, True), (1 << 27, 128, False, False), (1 << 40, 96, False, False),
     (1 << 40, 512, True, False), (1 << 40, 1024, True, True)],
)  # fmt: skip
def test_few_products_or_elements_keep_float32_and_so_does_a_cpu(products, D, pairs, pays):
    x = features(3, D)
    assert not _bfloat16_filter.BFloat16Filter.pays(x, products, pairs=pairs)
    with mock.patch.object(_bfloat16_filter, "_has_products", return_value=True):
        assert _bfloat16_filter.BFloat16Filter.pays(x, products, pairs=pairs) == pays
