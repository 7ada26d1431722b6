"""Metrics from features, re-ranked or not, and the viewpoint protocols, against the functions they are made of."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reranking_truth import squared_distances
from vareid_ext import (
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
    reference_backend,
)
from vareid_ext.metrics import features as features_module
from vareid_ext.metrics.ranking import QueryRanking
from vareid_ext.ops import _progress
from vareid_ext.ops.ranking import _gpu_features, ranking_features


def people(seed, Q, G, identities=6, D=16, dtype=torch.float32, scale=1.0):
    """Features that cluster by identity, with the identities and cameras of both sides."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((identities, D))
    query_identity, gallery_identity = rng.integers(0, identities, Q), rng.integers(0, identities, G)

    def draw(identity):
        return torch.from_numpy((centers[identity] + rng.standard_normal((len(identity), D))) * scale).to(dtype)

    cameras = rng.integers(0, 3, Q), rng.integers(0, 3, G)
    return draw(query_identity), draw(gallery_identity), query_identity, gallery_identity, *cameras


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


@pytest.fixture(params=["as registered", "as on a GPU"])
def kernel(request, monkeypatch):
    """Runs a test twice: with this device's kernel, and with that of a GPU, whose parts run anywhere."""
    if request.param == "as on a GPU":
        if not _native.available("cpu"):
            pytest.skip(_native.backends()["cpu"])
        monkeypatch.setattr(features_module, "ranking_features", _gpu_features)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_streaming_equals_the_whole_matrix(backend, kernel, metric, dtype):
    query, gallery, *labels = people(0, 23, 60, dtype=dtype)
    expected = truth(query, gallery, *labels, metric=metric)
    for block_rows in (None, 1, 7):
        got = rank_features(query, gallery, *labels, metric=metric, block_rows=block_rows)
        assert_equal_results(got, expected, 1e-15)
    assert evaluate_features(query, gallery, *labels, metric=metric).mAP == pytest.approx(expected.metrics().mAP)


def test_eight_whole_numbers_are_ranked_as_the_definition_ranks_them(backend, kernel):
    """Their mean is none, so float32 products of centred features tell equal distances apart."""
    query, gallery = torch.tensor([[2.0], [1.0]]), torch.tensor([[2.0], [1], [0], [0], [2], [3], [2], [1]])
    labels = [0, 1], [2, 2, 0, 1, 2, 1, 1, 1]
    assert evaluate_features(query, gallery, *labels).mAP == pytest.approx(0.3, abs=1e-15)
    distances = pairwise_distance(query, gallery, metric="sqeuclidean")
    assert evaluate_ranking(distances, *labels).mAP == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("largest", [3, 127, 1919])
def test_whole_keypoints_are_ranked_as_in_float64(backend, kernel, largest):
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


def test_near_ties_are_ranked_as_nearest_neighbors_orders_them(kernel):
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
    if _native.available("cpu"):
        vectors = [torch.from_numpy(label) for label in labels]
        assert_equal_results(
            QueryRanking(*_gpu_features(x[:Q], x[Q:], "sqeuclidean", *vectors, junk, 5)), expected, 1e-15
        )


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


def test_opcheck():
    query, gallery, *labels = people(12, 6, 30)
    tensors = [torch.from_numpy(label) for label in labels]
    torch.library.opcheck(ranking_features, (query, gallery, "sqeuclidean", *tensors, -1, 4))
    torch.library.opcheck(ranking_features, (query, gallery, "cosine", *tensors[:2], None, None, None, 9))


@pytest.mark.parametrize(
    "options", [True, {"k1": 7, "k2": 1, "lambda_value": 0.0}, {"k1": 3, "k2": 4, "lambda_value": 1.0}]
)
@pytest.mark.parametrize(
    ("Q", "G", "scale"), [(20, 70, 1.0), (60, 3, 1.0), (1, 30, 1.0), (9, 30, 2.0**30), (9, 30, 2.0**-40)]
)
def test_reranked_rows_equal_the_reranked_matrix(Q, G, scale, options, monkeypatch):
    query, gallery, *labels = people(1, Q, G, identities=2, scale=scale)
    keywords = {} if options is True else options
    matrix = k_reciprocal_rerank(query, gallery, **keywords)
    rows = features_module._reranked_rows(query, gallery, **features_module.rerank_options(options))
    for step in (1, 8, Q):
        blocks = [rows(begin, min(Q, begin + step)) for begin in range(0, Q, step)]
        torch.testing.assert_close(torch.cat(blocks), matrix, rtol=0, atol=1e-5)
    with reference_backend():
        torch.testing.assert_close(rows(0, Q), matrix, rtol=0, atol=1e-5)
    assert_equal_results(rank_features(query, gallery, *labels, rerank=options), rank_queries(matrix, *labels))


def test_reranking_streams_when_asked_to(monkeypatch):
    query, gallery, *labels = people(2, 25, 80)
    asked = []
    plain = features_module.RowDistances.__call__

    def recorded(self, begin, end):
        asked.append(end - begin)
        return plain(self, begin, end)

    monkeypatch.setattr(features_module.RowDistances, "__call__", recorded)
    monkeypatch.setattr(features_module, "k_reciprocal_rerank", None)
    streamed = rank_features(query, gallery, *labels, rerank={"k1": 10}, block_rows=8)
    assert asked == [8, 8, 8, 1]
    monkeypatch.undo()
    whole = rank_features(query, gallery, *labels, rerank={"k1": 10})
    assert_equal_results(streamed, whole)


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


def test_kinds_of_arrays(tmp_path, capsys):
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
