"""Re-ranking from lists: against re-ranking from features where all is listed, else against the definition on lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import feature_array
from tests.large.memory import peak_memory
from tests.reranking_truth import expanded_sets, ranked, squared_distances
from tests.test_documentation import python_in, section
from vareid_ext import _native, k_reciprocal_from_neighbors, k_reciprocal_rerank
from vareid_ext.ops._filter import common_scale
from vareid_ext.ops.nearest_neighbors import joint_neighbors
from vareid_ext.retrieval.rerank.neighbor_lists import rerank_lists


def exact_lists(x, Q, k):
    """index, distance and row_max as re-ranking from features has them."""
    query, gallery = torch.from_numpy(x[:Q]), torch.from_numpy(x[Q:])
    scale = common_scale((query, gallery), float(np.abs(x).max()))
    return [part.numpy() for part in joint_neighbors(query, gallery, scale, k, 0, None, 64)[:3]]


def shuffled(index, distance, seed=0):
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(index.shape[1]), (len(index), 1)), axis=1)
    return np.take_along_axis(index, order, 1), np.take_along_axis(distance, order, 1)


def without_self(index, distance):
    others = index != np.arange(len(index))[:, None]
    assert (others.sum(1) == index.shape[1] - 1).all()
    return (part[others].reshape(len(index), -1) for part in (index, distance))


def final_of_lists(index, distance, Q, k1, k2, lambda_value, row_max):
    """Final distances [Q, G] by sets and loops, Inf for rows that take no part."""
    M = len(index)
    rank, d, weighs = [], np.zeros((M, M)), np.zeros(M, bool)
    for i in range(M):
        listed = {j: max(v, 0.0) for j, v in zip(index[i].tolist(), distance[i].tolist(), strict=True) if j >= 0}
        listed[i] = 0.0
        rank.append(sorted(listed, key=lambda j, listed=listed: (listed[j], j)))
        end = max(listed.values())
        d[i] = end
        d[i, list(listed)] = list(listed.values())
        top = row_max[i] if row_max is not None else end if len(listed) == M else 2 * end if end > 0 else 1
        d[i] = d[i] / top if top > 0 else 0
        weighs[i] = lambda_value * top > 0
    V = np.zeros((M, M))
    for i, members in enumerate(expanded_sets(rank, k1)):
        for j in members:
            V[i, j] = np.exp(-d[i, j])
        V[i] /= V[i].sum() or 1
    if k2 > 1:
        V = np.stack([V[rank[i][:k2]].mean(0) for i in range(M)])
    shared = np.stack([np.minimum(V[i], V[Q:]).sum(1) for i in range(Q)])
    final = (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * d[:Q, Q:]
    for q in range(Q):
        if weighs[q]:
            final[q, (shared[q] == 0) & ~np.isin(np.arange(Q, M), rank[q])] = np.inf
    return final


def assert_follows(index, distance, Q, topk, k1=4, k2=3, lambda_value=0.3, row_max=None):
    got, best = k_reciprocal_from_neighbors(
        index, distance, Q, k1=k1, k2=k2, lambda_value=lambda_value, row_max=row_max, topk=topk
    )
    expected = final_of_lists(index, distance, Q, k1, k2, lambda_value, row_max)
    np.testing.assert_allclose(got, np.sort(expected, 1)[:, :topk], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(best == -1, np.isinf(got))
    named = np.take_along_axis(expected, np.maximum(best, 0), 1)
    np.testing.assert_allclose(np.where(best < 0, np.inf, named), got, rtol=0, atol=1e-5)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in best)
    return got, best


def assert_same(got, expected):
    for part, right in zip(got, expected, strict=True):
        assert part.dtype == right.dtype
        np.testing.assert_array_equal(part, right)


X30 = feature_array(30, 4)
DUPLICATES = np.concatenate([np.repeat(feature_array(1, 6), 25, 0), feature_array(25, 6, 1)])
FEATURES = {
    "random": feature_array(50, 6),
    "tied": feature_array(60, 3, levels=3),
    "twice": np.concatenate([feature_array(25, 6), feature_array(25, 6)]),
    "many": DUPLICATES[np.random.default_rng(0).permutation(50)],
    "equal": np.repeat(feature_array(1, 4), 30, 0),
    "few": feature_array(5, 3),
    "far": feature_array(40, 5) * np.float32(1e-17),
}


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (6, 3, 0.0), (3, 1, 1.0), (2, 9, 0.5)])
@pytest.mark.parametrize(("name", "Q"), [("random", 1), ("few", 1), *((name, 4) for name in FEATURES)])
def test_lists_of_all_rows_give_what_features_give(name, Q, k1, k2, lambda_value):
    x = FEATURES[name]
    parameters = {"k1": k1, "k2": k2, "lambda_value": lambda_value, "topk": min(9, len(x) - Q)}
    index, distance, row_max = exact_lists(x, Q, len(x))
    expected = k_reciprocal_rerank(x[:Q], x[Q:], **parameters)
    assert_same(k_reciprocal_from_neighbors(index, distance, Q, row_max=row_max, **parameters), expected)
    index, distance = shuffled(index, distance)
    assert_same(k_reciprocal_from_neighbors(index, distance, Q, row_max=row_max, **parameters), expected)
    index, distance = without_self(index, distance)
    assert_same(k_reciprocal_from_neighbors(index, distance, Q, row_max=row_max, **parameters), expected)
    known, _ = k_reciprocal_from_neighbors(index, distance, Q, **parameters)
    np.testing.assert_allclose(known, expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("duplicates", [1, 2])
def test_lists_that_reach_beyond_what_is_shared_give_what_features_give(duplicates):
    """Groups far apart, each shorter than the lists."""
    group = feature_array(96 // duplicates, 5) + 100 * (np.arange(96 // duplicates) % 8)[:, None]
    x = np.concatenate([group] * duplicates).astype(np.float32)
    parameters = {"k1": 6, "k2": 3, "topk": 7}
    expected = k_reciprocal_rerank(x[:24], x[24:], **parameters)
    index, distance, row_max = exact_lists(x, 24, 18)
    assert_same(k_reciprocal_from_neighbors(index, distance, 24, row_max=row_max, **parameters), expected)
    index, distance = without_self(*shuffled(index, distance))
    assert_same(k_reciprocal_from_neighbors(index, distance, 24, row_max=row_max, **parameters), expected)


@pytest.mark.parametrize("name", FEATURES)
def test_some_queries_get_what_all_get(backend, name):
    x = FEATURES[name]
    Q = min(14, len(x) - 2)
    index, distance, row_max = exact_lists(x, Q, min(12, len(x)))
    whole = k_reciprocal_from_neighbors(index, distance, Q, k1=4, row_max=row_max, topk=2)
    cuts = sorted({0, 1, Q // 2, Q})
    shares = [(0, 0), *itertools.pairwise(cuts), (Q, Q)]
    parts = [k_reciprocal_from_neighbors(index, distance, Q, k1=4, row_max=row_max, topk=2, queries=s) for s in shares]
    assert [len(part[0]) for part in parts] == [end - begin for begin, end in shares]
    assert_same([np.concatenate(part) for part in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("k", [7, 10, 14, 20, 35, 60])
@pytest.mark.parametrize("name", ["random", "tied", "twice", "many", "equal"])
def test_where_no_count_is_above_0_the_result_is_that_of_features(name, k):
    """And of the counts each is what a count by sets says."""
    x, Q, parameters = FEATURES[name], 6, (4, 6, 3, 0.3)
    k = min(k, len(x))
    index, distance, row_max = exact_lists(x, Q, k)
    found = rerank_lists(index, distance, Q, *parameters, row_max, None)
    topk, k1, k2, lambda_value = parameters
    expected = k_reciprocal_rerank(x[:Q], x[Q:], topk=topk, k1=k1, k2=k2, lambda_value=lambda_value)
    listed = [set(row) for row in index.tolist()]
    members = expanded_sets(ranked(squared_distances(x, x)).tolist(), k1)
    assert found.unlisted == sum(len(set(of_row) - row) for of_row, row in zip(members, listed, strict=True))
    results = found.best.numpy()
    assert found.outside == sum(best < 0 or best + Q not in listed[q] for q in range(Q) for best in results[q])
    assert found.short == 0
    if found.unlisted == found.outside == 0:
        assert_same((found.distance.numpy(), results), expected)
    if k == len(x):
        assert found.unlisted == found.outside == 0
    index[3, 2:] = -1
    assert rerank_lists(index, distance, Q, *parameters, row_max, None).short == (1 if len(x) > 2 else 0)


@pytest.mark.parametrize("lambda_value", [0.0, 0.3])
def test_short_lists_follow_the_definition(backend, lambda_value):
    distance = squared_distances(feature_array(40, 4), feature_array(40, 4))
    index = ranked(distance)[:, :7]
    distance = np.take_along_axis(distance, index, 1)
    assert_follows(index, distance, 9, 3, lambda_value=lambda_value)
    assert_follows(index, distance, 9, 20, lambda_value=lambda_value)
    index[5, 2:] = index[30, :] = index[11, 3:] = -1
    assert_follows(index, distance, 9, 31, lambda_value=lambda_value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 8), st.integers(1, 16), st.integers(1, 7), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 999),
)  # fmt: skip
def test_any_lists_follow_the_definition(Q, G, k1, k2, lambda_value, seed):
    """Lists that miss rows, end early, are in no order, and lack the row itself or not."""
    M, rng = Q + G, np.random.default_rng(seed)
    x = feature_array(M, 3, seed, levels=None if seed % 2 else 3)
    every = squared_distances(x, x)
    K = min(M, max(k1 + 1, k2))
    k = int(rng.integers(K, M + 1))
    index = rng.permuted(np.tile(np.arange(M), (M, 1)), axis=1)[:, :k].astype(np.int32)
    for i in range(M if seed % 3 else 0):
        index[i, rng.integers(0, k + 1) :] = -1
    distance = np.where(index < 0, np.nan, np.take_along_axis(every, np.maximum(index, 0), 1))
    ascending = np.argsort(distance[0])  # one row at least rises
    index[0], distance[0] = index[0][ascending], distance[0][ascending]
    falls = np.diff(distance, axis=1)
    if (falls < 0).any() and not (falls > 0).any():
        return
    row_max = every.max(1) if seed % 5 else None
    assert_follows(index, distance, Q, int(rng.integers(1, G + 1)), k1, k2, lambda_value, row_max)


def test_who_has_found_nothing_gets_nothing():
    index, distance, _ = exact_lists(X30, 4, 8)
    index[index == 2] = index[2] = -1
    index = np.sort(index, 1)[:, ::-1].copy()  # -1 last
    distance = np.take_along_axis(squared_distances(X30, X30), np.maximum(index, 0), 1)
    got, best = assert_follows(index, distance, 4, 6)
    assert (best[2] == -1).all()
    assert np.isinf(got[2]).all()


def test_distances_may_be_in_any_unit():
    x = feature_array(40, 5)
    index, *values = exact_lists(x, 9, 12)
    distance, row_max = (part.astype(np.float64) for part in values)
    expected = k_reciprocal_from_neighbors(index, distance, 9, k1=4, row_max=row_max, topk=5)
    for unit in (2.0**-700, 2.0**700):
        got = k_reciprocal_from_neighbors(index, distance * unit, 9, k1=4, row_max=row_max * unit, topk=5)
        assert_same(got, expected)


def test_rounding_errors_are_no_distances():
    """A row's distance to itself is 0, and what lies slightly below 0 is, too."""
    x = FEATURES["twice"]
    index, distance, row_max = exact_lists(x, 9, 12)
    expected = k_reciprocal_from_neighbors(index, distance, 9, k1=4, row_max=row_max, topk=5)
    rough = np.where(distance == 0, -1e-6, distance).astype(np.float32)
    assert_same(k_reciprocal_from_neighbors(index, rough, 9, k1=4, row_max=row_max, topk=5), expected)
    rough = np.where(index == np.arange(len(index))[:, None], 0.01, distance).astype(np.float32)
    assert_same(k_reciprocal_from_neighbors(index, rough, 9, k1=4, row_max=row_max, topk=5), expected)


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


INDEX, DISTANCE, ROW_MAX = exact_lists(X30, 6, 8)
BAD = {
    "type": ({"index": INDEX.tolist()}, TypeError, r"^index: list was given"),
    "index dtype": ({"index": INDEX.astype(np.float32)}, TypeError, r"^index: dtype float32 .* int32, int64$"),
    "distance dtype": ({"distance": DISTANCE.astype(np.float16)}, TypeError, r"^distance: dtype float16 .* float64$"),
    "row_max dtype": ({"row_max": ROW_MAX.astype(np.int64)}, TypeError, r"^row_max: dtype int64"),
    "index shape": ({"index": INDEX[0]}, ValueError, r"^index: shape \[8\]"),
    "no columns": ({"index": INDEX[:, :0], "distance": DISTANCE[:, :0]}, ValueError, r"^index: shape \[30, 0\]"),
    "one row": ({"index": INDEX[:1], "distance": DISTANCE[:1]}, ValueError, r"^index: shape \[1, 8\]"),
    "distance shape": ({"distance": DISTANCE[:, :7]}, ValueError, r"^distance: shape \[30, 7\]"),
    "row_max shape": ({"row_max": ROW_MAX[:9]}, ValueError, r"^row_max: shape \[9\]"),
    "beyond": ({"index": changed(INDEX, (3, 1), 30)}, ValueError, r"^index: row 3 names a row .* 0 to 29"),
    "below": ({"index": changed(INDEX, (4, 1), -2)}, ValueError, r"^index: row 4 names a row"),
    "twice": ({"index": changed(INDEX, (5, 1), INDEX[5, 4])}, ValueError, r"^index: row 5 lists a row twice"),
    "hole": ({"index": changed(INDEX, (6, 2), -1)}, ValueError, r"^index: row 6 has -1 before its end"),
    "NaN": ({"distance": changed(DISTANCE, (7, 2), np.nan)}, ValueError, r"^distance: row 7 holds NaN"),
    "Inf": ({"distance": changed(DISTANCE, (7, 2), np.inf)}, ValueError, r"^distance: row 7 holds NaN"),
    "negative": ({"distance": changed(DISTANCE, (8, 0), -0.1)}, ValueError, r"^distance: row 8 holds a negative"),
    "similarity": ({"distance": 1 - DISTANCE / 2}, ValueError, r"^distance: no row's values rise.* similarities"),
    "num_query": ({"num_query": 30}, ValueError, r"^num_query: 30 was given; allowed are 1 to 29"),
    "no query": ({"num_query": 0}, ValueError, r"^num_query: 0"),
    "queries": ({"queries": (0, 7)}, ValueError, r"^queries: 7 was given; allowed are 0 to 6"),
    "queries turned": ({"queries": (3, 2)}, ValueError, r"^queries: 3 was given; allowed are 0 to 2"),
    "topk": ({"topk": 25}, ValueError, r"^topk: 25 was given; allowed are 1 to 24"),
    "k1": ({"k1": 8}, ValueError, r"^index: lists of 8 rows were given; k1 and k2 need 9"),
    "k2": ({"k2": 10}, ValueError, r"^index: lists of 8 .* need 10, or 9 where no row lists itself"),
    "lambda_value": ({"lambda_value": 1.5}, ValueError, r"^lambda_value: 1.5"),
    "row_max": ({"row_max": changed(ROW_MAX, 9, DISTANCE[9].max() / 2)}, ValueError, r"^row_max: row 9 has .* lists"),
    "row_max NaN": ({"row_max": changed(ROW_MAX, 9, np.nan)}, ValueError, r"^row_max: row 9 is NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    wrong, error, message = BAD[name]
    given = {"index": INDEX, "distance": DISTANCE, "num_query": 6, "k1": 4, "k2": 3, "topk": 5, **wrong}
    with pytest.raises(error, match=message):
        k_reciprocal_from_neighbors(**given)


def test_lists_without_the_row_itself_may_be_one_shorter():
    others = without_self(INDEX, DISTANCE)
    got = k_reciprocal_from_neighbors(*others, 6, k1=7, topk=5, row_max=ROW_MAX)
    assert_same(got, k_reciprocal_from_neighbors(INDEX, DISTANCE, 6, k1=7, topk=5, row_max=ROW_MAX))


def test_memory_grows_with_the_lists_alone():
    """Lists of 60 of 60,000 points on a circle take less than a third of what a bit for each pair would."""
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    entries, used = peak_memory(
        """
import torch
from vareid_ext import k_reciprocal_from_neighbors

def lists(M):
    step = torch.arange(1, 31, dtype=torch.int32)
    index = (torch.arange(M, dtype=torch.int32)[:, None] + torch.cat([step, -step])) % M
    return index, torch.cat([step, step]).float().square().expand(M, 60).contiguous()

k_reciprocal_from_neighbors(*lists(300), 30, topk=50)
index, distance = lists(60000)
row_max = torch.full((60000,), 9e8)
print(index.numel())
""",
        "k_reciprocal_from_neighbors(index, distance, 2000, topk=50, row_max=row_max)",
    )
    assert used <= 24 * entries + 1000 * 60000 + (64 << 20)
    assert 3 * used < 60000**2 / 8


# ---- the lists of other programs


X = feature_array(300, 16) + 2 * feature_array(30, 16, 1)[np.arange(300) % 30]
X /= np.linalg.norm(X, axis=1, keepdims=True)
SOUGHT = {"k1": 6, "k2": 3, "topk": 8}


def agreement(rows, others):
    return np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(rows, others, strict=True)])


def test_lists_of_faiss():
    faiss = pytest.importorskip("faiss")
    exact = k_reciprocal_rerank(X[:60], X[60:], **SOUGHT)
    flat = faiss.IndexFlatL2(16)
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatL2(16), 16, 8)
    inverted.train(X)
    inverted.nprobe = 4
    for search, least in ((flat, 0.98), (inverted, 0.9)):
        search.add(X)
        distance, index = search.search(X, 40)
        farthest = 4 - search.search(-X, 1)[0][:, 0]
        _, best = k_reciprocal_from_neighbors(index, distance, 60, row_max=farthest, **SOUGHT)
        assert agreement(best, exact[1]) > least
    product = faiss.IndexFlatIP(16)
    product.add(X)
    similarity, index = product.search(X, 40)
    with pytest.raises(ValueError, match=r"^distance: no row's values rise"):
        k_reciprocal_from_neighbors(index, similarity, 60, **SOUGHT)
    _, best = k_reciprocal_from_neighbors(index, 2 - 2 * similarity, 60, **SOUGHT)
    assert agreement(best, exact[1]) > 0.95


def test_the_documented_use_of_faiss():
    pytest.importorskip("faiss")
    names = {"query": X[:60], "gallery": X[60:]}
    exec(python_in(section("docs/your-own-data.md", "Re-rank the lists of another index")), names)
    _, exact = k_reciprocal_rerank(X[:60], X[60:], topk=8)
    assert names["gallery_row"].shape == (60, 100)
    assert agreement(names["gallery_row"][:, :8], exact) > 0.95


def test_lists_of_qdrant():
    qdrant = pytest.importorskip("qdrant_client")
    client = qdrant.QdrantClient(":memory:")
    models = qdrant.models
    client.create_collection("x", vectors_config=models.VectorParams(size=16, distance=models.Distance.EUCLID))
    client.upsert("x", [models.PointStruct(id=i, vector=row.tolist()) for i, row in enumerate(X)])
    found = [client.query_points("x", query=row.tolist(), limit=40).points for row in X]
    index = np.array([[point.id for point in points] for points in found])
    distance = np.array([[point.score for point in points] for points in found]) ** 2
    _, best = k_reciprocal_from_neighbors(index, distance, 60, **SOUGHT)
    _, exact = k_reciprocal_rerank(X[:60], X[60:], **SOUGHT)
    assert agreement(best, exact) > 0.98
