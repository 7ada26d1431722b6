"""Metrics from features, re-ranked or not, and the viewpoint protocols, against the functions they are made of."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import people
from tests.large.memory import RERANKED_METRICS, RERANKING, peak_memory
from tests.reranking_truth import squared_distances
from vareid_ext import (
    KReciprocal,
    _native,
    evaluate_cross_viewpoint,
    evaluate_features,
    evaluate_ranking,
    evaluate_single_viewpoint,
    k_reciprocal_rerank,
    nearest_neighbors,
    pairwise_distance,
    rank_features,
    rank_queries,
    ranked_lists,
)
from vareid_ext.metrics import evaluate_drawn_gallery
from vareid_ext.metrics import features as features_module
from vareid_ext.ops import _progress
from vareid_ext.ops.ranking import ranking_features
from vareid_ext.retrieval import RERANKERS, Reranker, fit_reranker


def assert_equal_results(got, expected, tolerance=0.0):
    for name, value in vars(expected).items():
        np.testing.assert_allclose(
            np.asarray(getattr(got, name)), np.asarray(value), rtol=0, atol=tolerance, err_msg=name
        )


def truth(query, gallery, *labels, metric="sqeuclidean", **options):
    """By the definition, on float64 sums of squared differences."""
    x, y = query.double().numpy(), gallery.double().numpy()
    if metric == "cosine":
        x, y = (z / np.sqrt((z**2).sum(1, keepdims=True)) for z in (x, y))
    return rank_queries(squared_distances(x, y), *labels, **options)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_streaming_equals_the_whole_matrix(backend, metric, dtype):
    query, gallery, *labels = people(0, 23, 60, dtype=dtype)
    expected = truth(query, gallery, *labels, metric=metric)
    for block_rows in (None, 1, 7):
        got = rank_features(query, gallery, *labels, metric=metric, block_rows=block_rows)
        assert_equal_results(got, expected, 1e-15)
    assert evaluate_features(query, gallery, *labels, metric=metric).mAP == pytest.approx(expected.metrics().mAP)


def test_eight_whole_numbers_are_ranked_as_the_definition_ranks_them(backend):
    """Their mean is none, so float32 products of centred features tell equal distances apart."""
    query, gallery = torch.tensor([[2.0], [1.0]]), torch.tensor([[2.0], [1], [0], [0], [2], [3], [2], [1]])
    labels = [0, 1], [2, 2, 0, 1, 2, 1, 1, 1]
    assert evaluate_features(query, gallery, *labels).mAP == pytest.approx(0.3, abs=1e-15)
    distances = pairwise_distance(query, gallery, metric="sqeuclidean")
    assert evaluate_ranking(distances, *labels).mAP == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("largest", [3, 127, 1919])
def test_whole_keypoints_are_ranked_as_in_float64(backend, largest):
    rng = np.random.default_rng(largest)
    sizes = 40, 1500
    query, gallery = (torch.from_numpy(rng.integers(0, largest + 1, (n, 34))).float() for n in sizes)
    labels = [rng.integers(0, 60, n) for n in sizes] + [rng.integers(0, 3, n) for n in sizes]
    labels[1][::4] = -1
    expected = truth(query, gallery, *labels)
    kept = labels[1] != -1
    for block_rows in (None, 1, 6):
        assert_equal_results(rank_features(query, gallery, *labels, block_rows=block_rows), expected, 1e-15)
        without = rank_features(
            query, gallery[torch.from_numpy(kept)], labels[0], labels[1][kept], labels[2], labels[3][kept],
            block_rows=block_rows,
        )  # fmt: skip
        assert_equal_results(without, expected, 1e-15)


def test_near_ties_are_ranked_as_nearest_neighbors_orders_them():
    """Two narrow clusters: float32 does not tell the distances from one to the other apart."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (
        torch.randn(1, 48, generator=generator) + 1e-6 * torch.randn(n, 48, generator=generator) for n in (40, 300)
    )
    labels = torch.arange(40) % 7, torch.arange(300) % 7
    _, order = nearest_neighbors(query, gallery, k=300)
    position = torch.empty_like(order).scatter_(1, order, torch.arange(300).expand(40, 300)).double()
    assert_equal_results(rank_features(query, gallery, *labels), rank_queries(position, *labels))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 999), st.integers(1, 12), st.integers(1, 150), st.integers(1, 40), st.integers(1, 5),
    st.sampled_from(["levels", "pixels", "normal", "offset", "near"]), st.sampled_from([None, -1, 0]),
)  # fmt: skip
def test_any_features_are_ranked_as_in_float64(seed, Q, G, D, identities, kind, junk):
    """Ties and near ties, many and few matches, images left out by camera and as junk."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((Q + G, D))
    values = {
        "levels": rng.integers(0, 4, (Q + G, D)), "pixels": rng.integers(0, 2000, (Q + G, D)), "normal": normal,
        "offset": normal + 100, "near": rng.standard_normal(D) + 1e-6 * normal,
    }[kind]  # fmt: skip
    x = torch.from_numpy(values).float()
    labels = [rng.integers(-1, identities, n) for n in (Q, G)] + [rng.integers(-1, 2, n) for n in (Q, G)]
    expected = truth(x[:Q], x[Q:], *labels, junk_identity=junk)
    assert_equal_results(rank_features(x[:Q], x[Q:], *labels, junk_identity=junk), expected)


def test_threads_and_a_second_run_change_nothing():
    query, gallery, *labels = people(11, 200, 900, identities=4)
    query, gallery = query.round(), gallery.round()
    expected, before = truth(query, gallery, *labels), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_equal_results(rank_features(query, gallery, *labels), expected)
    finally:
        torch.set_num_threads(before)


def test_the_operator_passes_opcheck():
    query, gallery, *labels = people(12, 6, 30)
    tensors = [torch.from_numpy(label) for label in labels]
    tensors[2:] = [torch.stack([camera, camera // 2], 1) for camera in tensors[2:]]
    torch.library.opcheck(ranking_features, (query, gallery, "sqeuclidean", *tensors, -1, 4))
    torch.library.opcheck(ranking_features, (query, gallery, "cosine", *tensors[:2], None, None, None, 9))


@pytest.mark.parametrize(
    "options", [True, {"k1": 7, "k2": 1, "lambda_value": 0.0}, {"k1": 3, "k2": 4, "lambda_value": 1.0}]
)
@pytest.mark.parametrize(
    ("Q", "G", "scale"), [(20, 70, 1.0), (60, 3, 1.0), (1, 30, 1.0), (9, 30, 2.0**30), (9, 30, 2.0**-40)]
)
def test_reranked_metrics_are_those_of_the_reranked_matrix(Q, G, scale, options):
    query, gallery, *labels = people(1, Q, G, identities=2, scale=scale)
    matrix = k_reciprocal_rerank(query, gallery, **({} if options is True else options))
    expected = rank_queries(matrix, *labels)
    fit = fit_reranker(options, query, gallery)
    assert_equal_results(rank_features(query, gallery, *labels, rerank=options), expected)
    for block_rows in (1, 8, Q):
        streamed = rank_features(query, gallery, *labels, rerank=options, block_rows=block_rows)
        assert_equal_results(streamed, expected)
        assert_equal_results(rank_features(query, gallery, *labels, rerank=fit, block_rows=block_rows), expected)
        assert_equal_results(rank_queries(fit.rows, *labels, block_rows=block_rows), expected)


class Recorded(Reranker):
    """Squared distances, and what was asked."""

    def __init__(self, query, gallery, *, times=1.0):
        super().__init__(query, gallery)
        self.times, self.asked = times, []

    def distances(self, begin, end):
        self.asked.append((begin, end))
        return self.times * pairwise_distance(self.query[begin:end], self.gallery, metric="sqeuclidean")


def test_reranking_streams_when_asked_to():
    query, gallery, *labels = people(2, 25, 80)
    fit = Recorded(query, gallery)
    rank_features(query, gallery, *labels, rerank=fit, block_rows=8)
    assert fit.asked == [(0, 8), (8, 16), (16, 24), (24, 25)]


def test_a_new_reranker_is_found_by_its_name(monkeypatch):
    query, gallery, *labels = people(2, 25, 80)
    monkeypatch.setitem(RERANKERS, "recorded", Recorded)
    plain = rank_features(query, gallery, *labels)
    reverse = rank_features(query, gallery, *labels, rerank={"method": "recorded", "times": -1.0})
    assert_equal_results(rank_features(query, gallery, *labels, rerank="recorded"), plain)
    assert bool((reverse.average_precision != plain.average_precision).any())
    assert_equal_results(rank_features(query, gallery, *labels, rerank="recorded", block_rows=7), plain)
    for name in RERANKERS:
        assert 0 < evaluate_features(query, gallery, *labels, rerank=name).mAP <= 1
    with pytest.raises(ValueError, match=r"rerank: 'k1' was given; allowed keys are method, times"):
        rank_features(query, gallery, *labels, rerank={"method": "recorded", "k1": 3})


def test_the_documented_reranker_works_by_its_name(monkeypatch):
    """`QueryExpansion` of docs/extending.md, against the same in NumPy, with junk that must not be averaged."""
    section = (Path(__file__).parents[1] / "docs" / "extending.md").read_text().partition("## A re-ranker\n")[2]
    names = {}
    exec(section.partition("```python\n")[2].partition("```")[0], names)
    with pytest.raises(ValueError, match="rerank: 'query_expansion' was given; allowed are 'k_reciprocal'"):
        evaluate_features(torch.zeros(2, 3), torch.zeros(2, 3), [1, 2], [1, 2], rerank="query_expansion")
    monkeypatch.setitem(RERANKERS, "query_expansion", names["QueryExpansion"])
    query, gallery, *labels = people(2, 25, 80)
    labels[1][::5] = -1
    kept = gallery[torch.from_numpy(labels[1] != -1)].numpy()
    order = np.argsort(squared_distances(query, kept), axis=1, kind="stable")[:, :3]
    expanded = (query.numpy() + kept[order].sum(1)) / 4
    expected = rank_queries(squared_distances(expanded, gallery), *labels)
    for block_rows in (None, 7):
        options = {"method": "query_expansion", "k": 3}
        assert_equal_results(rank_features(query, gallery, *labels, rerank=options, block_rows=block_rows), expected)


def test_every_reranker_stands_in_the_file_of_its_name():
    for name, kind in RERANKERS.items():
        assert kind.__module__ == f"vareid_ext.retrieval.rerank.{name}"
        assert issubclass(kind, Reranker)


def test_a_fitted_reranker_fits_its_features_only():
    query, gallery, query_identity, gallery_identity, *cameras = people(3, 12, 60)
    fit = KReciprocal(query, gallery)
    with pytest.raises(ValueError, match=r"rerank: was fitted to \(12, 60\) rows; .* \(12, 9\)"):
        rank_features(query, gallery[:9], query_identity, gallery_identity[:9], rerank=fit)
    gallery_identity[:7] = -1
    labels = query_identity, gallery_identity, *cameras
    with pytest.raises(ValueError, match=r"\(12, 60\) rows; query and gallery without junk have \(12, 53\)"):
        rank_features(query, gallery, *labels, rerank=fit)
    got = rank_features(query, gallery, *labels, rerank=KReciprocal(query, gallery[7:]))
    assert_equal_results(got, rank_features(query, gallery, *labels, rerank=True))
    got = rank_features(query, gallery, *labels, rerank=fit, junk_identity=None)
    assert_equal_results(got, rank_features(query, gallery, *labels, rerank=True, junk_identity=None))


def test_streamed_reranking_holds_neither_the_matrix_nor_the_gallery_again():
    """Beyond the plan only the block that is ranked; the matrix would take 122 MiB, the features 3 MiB."""
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    plan, used = peak_memory(RERANKING.format(Q=4000, G=8000, D=64), RERANKED_METRICS)
    assert used <= plan + 3 * (4 * 100 * 8000) + (4 << 20)


def lists_by_definition(distances, query_identity, gallery_identity, query_camera, gallery_camera, queries, top, junk):
    """The first of each query's sorted row that the protocol leaves in, one image after another."""
    lists = []
    for q in queries:
        found = []
        for g in sorted(range(len(gallery_identity)), key=lambda g: (distances[q][g], g)):
            same = query_identity[q] == gallery_identity[g]
            if gallery_identity[g] == junk:
                continue
            if query_camera is not None and same and query_camera[q] == gallery_camera[g] != -1:
                continue
            found.append(g)
        lists.append(found[:top])
    return lists


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 999), st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.integers(1, 12),
    st.sampled_from([None, -1, 0]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_ranked_lists_follow_the_definition(seed, Q, G, identities, top, junk, cameras, rerank):
    """Features of few levels: ties abound. Junk, cameras that are not known, lists longer than the gallery."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 3, (Q + G, 4))).float()
    query, gallery = x[:Q], x[Q:]
    labels = [rng.integers(-1, identities, n) for n in (Q, G)] + [rng.integers(-1, 2, n) for n in (Q, G)]
    labels = labels if cameras else [*labels[:2], None, None]
    queries, kept = rng.integers(0, Q, 5).tolist(), np.flatnonzero(labels[1] != junk)
    if len(kept) == 0:
        with pytest.raises(ValueError, match="gallery_identity: every image has the junk identity"):
            ranked_lists(query, gallery, *labels, queries=queries, junk_identity=junk)
        return
    distances = np.full((Q, G), np.inf)
    fit = KReciprocal(query, gallery[torch.from_numpy(kept)])
    distances[:, kept] = fit.matrix() if rerank else squared_distances(x[:Q], gallery[torch.from_numpy(kept)])
    if rerank:
        for q in queries:  # what single rows give, whose products may round otherwise
            distances[q, kept] = fit.rows(q, q + 1)[0]
    expected = lists_by_definition(distances, *labels, queries, top, junk)
    got = ranked_lists(query, gallery, *labels, queries=queries, top=top, rerank=rerank, junk_identity=junk)
    assert [found.tolist() for found in got] == expected
    assert all(found.dtype == torch.int64 for found in got)


@pytest.mark.parametrize("rerank", [False, True])
def test_ranked_lists_agree_with_the_ranking_results(rerank):
    query, gallery, query_identity, gallery_identity, *cameras = people(14, 30, 90)
    query_identity[:3] = 99  # has no match
    results = rank_features(query, gallery, query_identity, gallery_identity, *cameras, rerank=rerank)
    fit = KReciprocal(query, gallery) if rerank else False
    lists = ranked_lists(
        query, gallery, query_identity, gallery_identity, *cameras, queries=np.arange(30) % 2 == 0, top=90, rerank=fit
    )
    assert len(lists) == 15
    for q, found in zip(range(0, 30, 2), lists, strict=True):
        match = gallery_identity[found] == query_identity[q]
        assert match.sum() == results.num_matches[q]
        first = np.flatnonzero(match)[0] + 1 if match.any() else 0
        assert first == results.first_match_rank[q]


def test_ranked_lists_of_no_query_and_of_other_kinds_of_arrays():
    query, gallery, *labels = people(14, 30, 90)
    assert ranked_lists(query, gallery, *labels, queries=[]) == []
    found = ranked_lists(query.numpy(), gallery.numpy(), *labels, queries=[-1, 4], top=3)
    assert [type(one) for one in found] == [np.ndarray] * 2
    assert [one.tolist() for one in found] == [
        one.tolist() for one in ranked_lists(query, gallery, *labels, queries=torch.tensor([29, 4]), top=3)
    ]
    for queries, message in (([30], "queries: index 30"), ([True] * 3, r"queries: shape \(3,\)")):
        with pytest.raises(ValueError, match=message):
            ranked_lists(query, gallery, *labels, queries=queries)
    with pytest.raises(ValueError, match="top: 0"):
        ranked_lists(query, gallery, *labels, queries=[1], top=0)
    with pytest.raises(ValueError, match="metric: 'cosine'"):
        ranked_lists(query, gallery, *labels, queries=[1], metric="cosine", rerank=True)


def test_junk_enters_no_neighbourhood():
    query, gallery, query_identity, gallery_identity, query_camera, gallery_camera = people(3, 12, 60)
    gallery_identity[::3] = -1
    kept = gallery_identity != -1
    labels = (query_identity, gallery_identity, query_camera, gallery_camera)
    clean = (query_identity, gallery_identity[kept], query_camera, gallery_camera[kept])
    for rerank in (False, True):
        got = rank_features(query, gallery, *labels, rerank=rerank)
        expected = rank_features(query, gallery[torch.from_numpy(kept)], *clean, rerank=rerank)
        assert_equal_results(got, expected)
    gallery[57] = torch.nan  # junk, too: the error names it by its number among all
    for rerank in (False, True):
        with pytest.raises(ValueError, match="gallery: row 57"):
            rank_features(query, gallery, *labels, rerank=rerank)
    gallery[57] = 0
    with_junk = k_reciprocal_rerank(query, gallery)[:, torch.from_numpy(kept)]
    assert not torch.allclose(with_junk, k_reciprocal_rerank(query, gallery[torch.from_numpy(kept)]))


def test_results_come_in_the_callers_kind_of_array(tmp_path, capsys):
    query, gallery, *labels = people(4, 10, 40)
    expected = evaluate_features(query, gallery, *labels)
    assert isinstance(expected.cmc, torch.Tensor)
    np.save(tmp_path / "q.npy", query)
    np.save(tmp_path / "g.npy", gallery)
    mapped = [np.load(tmp_path / name, mmap_mode="r") for name in ("q.npy", "g.npy")]
    got = evaluate_features(*mapped, *labels, progress=True, rerank=False)
    assert isinstance(got.cmc, np.ndarray)
    assert got.mAP == expected.mAP
    assert "ranking" in capsys.readouterr().err
    quiet = evaluate_features(*mapped, *labels)
    assert capsys.readouterr().err == ""
    assert quiet.mINP == expected.mINP


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(4)}, ValueError, "query: shape"),
        ({"gallery": torch.zeros(9, 3)}, ValueError, "gallery: features of 3 elements"),
        ({"gallery": torch.zeros(9, 4).double()}, TypeError, "gallery: dtype"),
        ({"query": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "query: dtype"),
        ({"query_identity": [1, 2]}, ValueError, "query_identity: length 2 was given, expected 5"),
        ({"gallery_identity": [1, 2]}, ValueError, "gallery_identity: length 2 was given, expected 9"),
        ({"query_camera": [1] * 5}, ValueError, "gallery_camera: is missing"),
        ({"metric": "manhattan"}, ValueError, "metric: 'manhattan'"),
        ({"rerank": {"k3": 1}}, ValueError, "rerank: 'k3'"),
        ({"rerank": 20}, TypeError, "rerank: int"),
        ({"rerank": None}, TypeError, "rerank: NoneType"),
        ({"rerank": "mine"}, ValueError, "rerank: 'mine' was given; allowed are 'k_reciprocal'"),
        ({"rerank": {"method": ["mine"]}}, ValueError, "rerank: .'mine'. was given"),
        ({"rerank": {"k1": 0}}, ValueError, "k1: 0"),
        ({"rerank": {"k2": 0}, "block_rows": 2}, ValueError, "k2: 0"),
        ({"rerank": {"lambda_value": 5}, "block_rows": 2}, ValueError, "lambda_value: 5 was given"),
        ({"rerank": {"k1": 2.5}, "block_rows": 2}, TypeError, "k1: float"),
        ({"rerank": True, "metric": "cosine"}, ValueError, "metric: 'cosine'"),
        ({"block_rows": 0}, ValueError, "block_rows: 0"),
        ({"block_rows": 2.5}, TypeError, "block_rows: float"),
        ({"junk_identity": "x"}, TypeError, "junk_identity: str"),
        ({"max_rank": 0}, ValueError, "max_rank"),
        ({"max_rank": 2**31}, ValueError, "max_rank"),
        ({"max_rank": 2**70}, ValueError, "max_rank"),
        ({"block_rows": 2**70}, ValueError, "block_rows"),
        ({"rerank": {"k1": 2**70}}, ValueError, "k1"),
        ({"query": torch.rand(5, 4, device="meta"), "gallery": torch.rand(9, 4, device="meta")}, ValueError, "query"),
        ({"query": torch.nested.nested_tensor([torch.rand(5, 4)])}, TypeError, "query"),
        ({"query_identity": torch.ones(5, dtype=torch.int64, device="meta")}, ValueError, "query_identity"),
        ({"query": torch.full((5, 4), float("nan"))}, ValueError, "query: row 0 holds NaN or Inf"),
        ({"gallery": torch.eye(9, 4), "metric": "cosine"}, ValueError, "gallery: row 4 is all zeros"),
        ({"gallery_identity": [-1] * 9, "rerank": True}, ValueError, "every image has the junk identity"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "query": torch.rand(5, 4),
        "gallery": torch.rand(9, 4),
        "query_identity": [1] * 5,
        "gallery_identity": [1] * 9,
    }
    with pytest.raises(error, match=message):
        evaluate_features(**{**arguments, **change})


@pytest.mark.parametrize("rerank", [False, True])
def test_a_bad_row_is_named_before_any_block_is_made(rerank):
    query, gallery, *labels = people(8, 12, 20)
    query[7, 3] = torch.nan
    done = []
    with _progress.listen(done.append), pytest.raises(ValueError, match="query: row 7 holds NaN or Inf"):
        evaluate_features(query, gallery, *labels, rerank=rerank, block_rows=2)
    assert done == []


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_unit_of_the_features_does_not_matter(metric, scale):
    """Squares of 2^-100 vanish in float32 and those of 2^100 overflow."""
    query, gallery, *labels = people(9, 15, 40)
    expected = rank_features(query, gallery, *labels, metric=metric)
    assert_equal_results(rank_features(query * scale, gallery * scale, *labels, metric=metric), expected)


@pytest.mark.parametrize("rerank", [False, True])
def test_the_smallest_float32_numbers_are_features(rerank):
    query, gallery, *labels = people(9, 15, 40)
    query, gallery = (8 * query).round(), (8 * gallery).round()
    expected = rank_features(query, gallery, *labels, rerank=rerank)
    for block_rows in (None, 4):
        got = rank_features(
            query * 2.0**-149, gallery * 2.0**-149, *labels, rerank=rerank, block_rows=block_rows
        )  # fmt: skip
        assert_equal_results(got, expected, 1e-12)


@pytest.mark.parametrize("rerank", [False, True])
@pytest.mark.parametrize("constant", [3.0, 2.0**100])
def test_a_large_constant_element_does_not_matter(rerank, constant):
    query, gallery, *labels = people(9, 15, 40)
    expected = rank_features(query, gallery, *labels, rerank=rerank)
    query, gallery = (torch.cat([x * 2.0**-90, torch.full_like(x[:, :1], constant)], 1) for x in (query, gallery))
    for block_rows in (None, 4):
        got = rank_features(query, gallery, *labels, rerank=rerank, block_rows=block_rows)
        assert_equal_results(got, expected, 1e-12)


def views(seed, N=240, identities=8):
    feature, _, identity, _, camera, _ = people(seed, N, 1, identities)
    rng = np.random.default_rng(seed)
    return feature, identity, rng.integers(-1, 3, N), camera


def test_cross_viewpoint_is_each_view_against_the_rest():
    feature, identity, viewpoint, camera = views(5)
    identity[::11] = -1
    got = evaluate_cross_viewpoint(feature, identity, viewpoint, camera, max_rank=10)
    assert list(got) == [0, 1, 2]
    for view, metrics in got.items():
        query = (viewpoint == view) & (identity != -1)
        gallery = (viewpoint != view) & (viewpoint >= 0) & (identity != -1)
        expected = evaluate_ranking(
            torch.cdist(feature[query].double(), feature[gallery].double()).numpy(),
            identity[query], identity[gallery], camera[query], camera[gallery], max_rank=10,
        )  # fmt: skip
        assert metrics.mAP == pytest.approx(expected.mAP, abs=1e-9)
        assert metrics.num_queries == expected.num_queries == query.sum()
        np.testing.assert_allclose(metrics.cmc, expected.cmc)


def test_single_viewpoint_draws_one_query_of_each_identity():
    feature, identity, viewpoint, _ = views(6)
    asked = []
    original = features_module.rank_features

    def recorded(query, gallery, query_identity, gallery_identity, *rest, **options):
        asked.append((query, gallery, np.asarray(query_identity)))
        return original(query, gallery, query_identity, gallery_identity, *rest, **options)

    features_module.rank_features = recorded
    try:
        got = evaluate_single_viewpoint(feature, identity, viewpoint, repeats=4, seed=3)
    finally:
        features_module.rank_features = original
    assert list(got) == [0, 1, 2]
    for view, draws in got.items():
        members = feature[viewpoint == view]
        for run, (query, gallery, query_identity) in zip(draws.runs, asked[4 * view : 4 * view + 4], strict=True):
            assert sorted(query_identity) == sorted(set(identity[viewpoint == view]))
            together = torch.cat([query, gallery])
            assert len(together) == len(members)
            assert torch.equal(together.sort(0).values, members.sort(0).values)
            assert run.num_queries == len(query)
        assert len({tuple(query.sum(1).tolist()) for query, *_ in asked[4 * view : 4 * view + 4]}) > 1
        assert draws.mean()["mAP"] == pytest.approx(statistics.fmean(run.mAP for run in draws.runs))
        assert draws.std()["rank1"] == pytest.approx(statistics.pstdev(run.rank1 for run in draws.runs))
    again = evaluate_single_viewpoint(feature, identity, viewpoint, repeats=4, seed=3)
    assert again[1].mean() == got[1].mean()
    assert evaluate_single_viewpoint(feature, identity, viewpoint, repeats=4, seed=4)[1].mean() != got[1].mean()


@pytest.mark.parametrize("rerank", [False, {"k1": 5, "k2": 2}])
def test_a_drawn_gallery_is_one_image_of_each_and_each_draw_an_evaluation_of_its_own(rerank):
    generator = np.random.default_rng(5)
    identity = generator.permutation(np.repeat([4, 9, 11, 12, 30, -1], [1, 7, 2, 13, 5, 6]))
    camera = generator.integers(-1, 3, len(identity))
    clothes = generator.integers(0, 3, len(identity))
    feature = torch.from_numpy(generator.standard_normal((len(identity), 6)).astype(np.float32)).round(decimals=1)
    options = {"exclude": "identity&camera&clothes", "rerank": rerank}
    got = evaluate_drawn_gallery(feature, identity, camera, columns={"clothes": clothes}, repeats=6, seed=3, **options)
    kept = np.flatnonzero(identity != -1)
    galleries = set()
    for seed, run in enumerate(got.runs, start=3):
        first = {}  # the first of each identity in the order that the seed gives
        for place in np.random.default_rng(seed).permutation(len(kept)):
            first.setdefault(identity[kept[place]], kept[place])
        gallery = np.array(sorted(first.values()))
        query = np.array([i for i in kept if i not in gallery])
        assert len(gallery) == 5
        expected = evaluate_features(
            feature[query], feature[gallery], identity[query], identity[gallery], camera[query], camera[gallery],
            columns={"clothes": (clothes[query], clothes[gallery])}, **options,
        )  # fmt: skip
        assert run.as_dict() == expected.as_dict()
        assert run.num_queries == 28 - 5
        galleries.add(tuple(gallery))
    assert len(galleries) == 6
    assert got.mean()["mAP"] == pytest.approx(statistics.fmean(run.mAP for run in got.runs))
    everybody = evaluate_drawn_gallery(feature, identity, repeats=1, junk_identity=None)
    assert everybody.runs[0].num_queries == 34 - 6
    for name, value in (("repeats", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}: {value}"):
            evaluate_drawn_gallery(feature, identity, **{name: value})
    with pytest.raises(ValueError, match="no identity has two images, so that none is left to ask"):
        evaluate_drawn_gallery(feature, np.arange(len(feature)))


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_viewpoint_protocols_return_the_callers_kind(kind):
    feature, identity, viewpoint, camera = views(5)
    feature = feature.numpy() if kind is np.ndarray else feature
    cross = evaluate_cross_viewpoint(feature, identity, viewpoint, camera)
    single = evaluate_single_viewpoint(feature, identity, viewpoint, repeats=2)
    assert {type(metrics.cmc) for metrics in cross.values()} == {kind}
    assert {type(run.cmc) for draws in single.values() for run in draws.runs} == {kind}


def rows(printed):
    """The rows of a printed table, by name, as {column: number}; the name may be missing."""
    header, rule, *lines = printed.splitlines()
    assert len(header) <= 100
    assert set(rule) == {"\u2500", " "}
    columns = header.split()[1:]
    cells = [line.replace(" ± ", "±").replace(" of ", "/").split() for line in lines]
    assert {len(line) - len(columns) for line in cells} <= {0, 1}
    return {
        row[0] if len(row) > len(columns) else "": dict(zip(columns, row[-len(columns) :], strict=True))
        for row in cells
    }


def test_results_print_as_a_short_table():
    feature, identity, viewpoint, camera = views(5)
    cross = evaluate_cross_viewpoint(feature, identity, viewpoint, camera, max_rank=7)
    table = rows(str(cross))
    assert list(table) == ["front", "side", "back"]
    assert list(table["side"]) == ["queries", "mAP", "mINP", "rank1", "rank5"]
    for metrics, row in zip(cross.values(), table.values(), strict=True):
        assert rows(str(metrics)) == {"": row}
        for name, value in metrics.as_dict().items():
            assert float(row[name]) == pytest.approx(100 * value, abs=0.005 + 1e-9)
    single = evaluate_single_viewpoint(feature, identity, np.where(viewpoint == 2, 5, viewpoint), repeats=3)
    table = rows(str(single))
    assert list(table) == ["front", "side", "5"]
    for draws, row in zip(single.values(), table.values(), strict=True):
        assert rows(str(draws)) == {"": row}
        assert row["draws"] == "3"
        for name, value in draws.mean().items():
            mean, std = map(float, row[name].split("±"))
            assert mean == pytest.approx(100 * value, abs=0.005 + 1e-9)
            assert std == pytest.approx(100 * draws.std()[name], abs=0.005 + 1e-9)
    query, gallery, query_identity, *others = people(0, 23, 60)
    query_identity[:4] = 99
    assert rows(str(evaluate_features(query, gallery, query_identity, *others)))[""]["queries"] == "19/23"


def test_viewpoint_protocols_refuse_what_they_cannot_do():
    feature, identity, viewpoint, camera = views(7)
    with pytest.raises(ValueError, match="viewpoint: length 3"):
        evaluate_cross_viewpoint(feature, identity, viewpoint[:3])
    with pytest.raises(ValueError, match="camera: length 2"):
        evaluate_single_viewpoint(feature, identity, viewpoint, camera[:2])
    with pytest.raises(ValueError, match="no image has a known viewpoint"):
        evaluate_single_viewpoint(feature, identity, np.full(240, -1))
    with pytest.raises(ValueError, match="only 2 occurs"):
        evaluate_cross_viewpoint(feature, identity, np.full(240, 2))
    for name, value in (("repeats", 0), ("repeats", 2**40), ("seed", -1), ("seed", 2**70)):
        with pytest.raises(ValueError, match=f"{name}: {value}"):
            evaluate_single_viewpoint(feature, identity, viewpoint, **{name: value})
    with pytest.raises(ValueError, match="no gallery is left"):
        evaluate_single_viewpoint(feature, np.arange(240), np.zeros(240, dtype=int))
    with pytest.raises(TypeError, match="viewpoint: dtype"):
        evaluate_cross_viewpoint(feature, identity, viewpoint * 1.0)
