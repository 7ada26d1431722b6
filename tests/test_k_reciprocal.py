"""Re-ranking against the definition with sets and loops, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import feature_array
from tests.reranking_truth import expanded_sets, ranked, rerank, squared_distances
from vareid_ext import KReciprocal, k_reciprocal_rerank, re_ranking, reference_backend
from vareid_ext.ops import k_reciprocal as op
from vareid_ext.reference import k_reciprocal as reference


def assert_right(x, Q, k1=20, k2=6, lambda_value=0.3):
    """From features, from matrices, and each query's best, against the definition."""
    distance = squared_distances(x, x)
    expected = rerank(distance, Q, k1, k2, lambda_value)
    parameters = {"k1": k1, "k2": k2, "lambda_value": lambda_value}
    got = k_reciprocal_rerank(x[:Q], x[Q:], **parameters)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    rooted = np.sqrt(distance)
    from_matrices = re_ranking(rooted[:Q, Q:], rooted[:Q, :Q], rooted[Q:, Q:], k1, k2, lambda_value)
    np.testing.assert_allclose(from_matrices, expected, rtol=0, atol=1e-5)
    k = min(5, x.shape[0] - Q)
    best, index = k_reciprocal_rerank(x[:Q], x[Q:], topk=k, **parameters)
    np.testing.assert_allclose(best, np.sort(expected, 1)[:, :k], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, index, 1), best, rtol=0, atol=1e-5)
    assert all(len(set(row)) == k for row in index.tolist())
    fit = KReciprocal(x[:Q], x[Q:], **parameters)
    rows = np.concatenate([fit.rows(begin, min(Q, begin + 7)) for begin in range(0, Q, 7)])
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(fit.matrix(), expected, rtol=0, atol=1e-5)
    again = fit.topk(k)  # now from the encodings that are there
    np.testing.assert_array_equal(again[0], best)
    np.testing.assert_array_equal(again[1], index)
    return got


@pytest.mark.parametrize(
    ("Q", "G", "D", "k1", "k2"), [(10, 40, 6, 20, 6), (1, 40, 4, 7, 3), (20, 1, 4, 5, 3), (1, 1, 3, 20, 6)]
)
def test_random_features_follow_the_definition(backend, Q, G, D, k1, k2):
    assert_right(feature_array(Q + G, D), Q, k1, k2)


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (2, 2), (3, 5), (9, 1), (40, 6), (5, 40), (100, 100)])
def test_neighbourhoods_of_any_size_follow_the_definition(backend, k1, k2):
    """Also beyond the number of rows, and without query expansion."""
    assert_right(feature_array(30, 5), 8, k1, k2)


@pytest.mark.parametrize("lambda_value", [0.0, 0.3, 1.0])
def test_any_lambda_value_follows_the_definition(backend, lambda_value):
    assert_right(feature_array(45, 5), 12, lambda_value=lambda_value)


def test_ties_go_by_index(backend):
    assert_right(feature_array(60, 3, levels=3), 15, 7, 3)


def test_images_that_occur_twice_follow_the_definition(backend):
    x = feature_array(30, 6)
    assert_right(np.concatenate([x, x]), 14, 6, 3)


def test_more_duplicates_than_k1_follow_the_definition(backend):
    x = np.concatenate([np.repeat(feature_array(1, 6), 25, 0), feature_array(25, 6, 1)])
    assert_right(x[np.random.default_rng(0).permutation(50)], 12, 6, 3)


def test_equal_rows_follow_the_definition(backend):
    got = assert_right(np.repeat(feature_array(1, 6), 40, 0), 10, 6, 3)
    assert np.isfinite(got).all()


def test_features_far_from_the_origin_follow_the_definition(backend):
    assert_right(feature_array(45, 5) + 1000, 12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 12), st.integers(1, 30), st.integers(1, 25), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99)
)
def test_any_small_problem_follows_the_definition(Q, G, k1, k2, lambda_value, seed):
    assert_right(feature_array(Q + G, 1 + seed % 4, seed, levels=None if seed % 2 else 4), Q, k1, k2, lambda_value)


def test_sets_are_the_definitions(backend):
    rank = ranked(squared_distances(feature_array(40, 3, levels=5), feature_array(40, 3, levels=5)))
    for k1 in (1, 4, 5, 20, 100):
        neighbor = torch.from_numpy(rank[:, : min(k1 + 1, 40)].astype(np.int32))
        indptr, index = op.k_reciprocal_robust_sets(neighbor, k1)
        got = [index[a:b].tolist() for a, b in itertools.pairwise(indptr)]
        assert got == [sorted(members) for members in expanded_sets(rank.tolist(), k1)]


def test_half_rounds_to_even():
    assert [reference.half_k(k) for k in (1, 2, 3, 4, 5, 7, 20)] == [0, 1, 2, 2, 2, 4, 10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_features_follows_the_definition(backend, dtype):
    x = torch.from_numpy(feature_array(40, 8)).to(dtype)
    got = k_reciprocal_rerank(x[:10], x[10:], k1=7, k2=3)
    wide = x.double().numpy()
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, rerank(squared_distances(wide, wide), 10, 7, 3, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_dtype_of_matrices_follows_the_definition(backend, dtype):
    """The order is that of the values given, rounded as they are."""
    d = np.sqrt(squared_distances(feature_array(40, 4), feature_array(40, 4))).astype(dtype)
    got = re_ranking(d[:10, 10:], d[:10, :10], d[10:, 10:], 7, 3, 0.3)
    np.testing.assert_allclose(got, rerank(d.astype(np.float64) ** 2, 10, 7, 3, 0.3), rtol=0, atol=1e-5)


def product_distances(x, y, kind):
    """As common tools make them from float32 products: rounding leaves diagonals and entries below 0."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if kind == "cosine":
        x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
        return (1 - x @ y.T).numpy()
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1, keepdim=True).T
    return squares.addmm(x, y.T, alpha=-2).numpy()


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_rounding_below_zero_is_taken_as_zero(backend, kind):
    x = 5 * feature_array(60, 256)
    x[40:] = x[:20]  # images that occur twice
    x[40:, 0] += 1e-5
    d = product_distances(x, x, kind)
    assert -1e-3 * d.max() < d.min() < 0
    d = np.minimum(d, d.T)
    got = re_ranking(d[:20, 20:], d[:20, :20], d[20:, 20:], 7, 3, 0.3)
    clipped = np.maximum(d, 0).astype(np.float64)
    np.testing.assert_allclose(got, rerank(clipped**2, 20, 7, 3, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_units_do_not_matter(backend, factor):
    x = feature_array(40, 5)
    expected = rerank(squared_distances(x, x), 10, 7, 3, 0.3)
    scaled = x.astype(np.float64) * factor
    before = scaled.copy()
    np.testing.assert_allclose(k_reciprocal_rerank(scaled[:10], scaled[10:], k1=7, k2=3), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scaled, before)
    for smaller in (1, 1e-280):  # 1e-310 has no reciprocal
        d = np.sqrt(squared_distances(x, x)) * (factor * smaller)
        got = re_ranking(d[:10, 10:], d[:10, :10], d[10:, 10:], 7, 3)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("constant", "unit", "dtype"),
    [
        (1.0, 2.0**-83, np.float32), (-3e38, 1.0, np.float32), (0.1, 2.0**-148, np.float32),
        (0.1, 2.0**-14, np.float32), (1e30, 2.0**-99, np.float64), (1e300, 2.0**-20, np.float64),
        (0.0, 2.0**-1074, np.float64), (0.0, 2.0**1020, np.float64),
    ],
)  # fmt: skip
def test_differences_far_below_the_features_count(backend, constant, unit, dtype):
    """Whole numbers beside a constant element: their distances are the same in every unit."""
    levels = feature_array(40, 5, levels=6)
    x = (levels.astype(np.float64) * unit).astype(dtype)
    x = np.insert(x, 2, np.full(40, constant, dtype), axis=1)
    expected = rerank(squared_distances(levels, levels), 10, 7, 3, 0.3)
    np.testing.assert_allclose(k_reciprocal_rerank(x[:10], x[10:], k1=7, k2=3), expected, rtol=0, atol=1e-5)
    best, _ = k_reciprocal_rerank(x[:10], x[10:], k1=7, k2=3, topk=30)
    np.testing.assert_allclose(best, np.sort(expected, 1), rtol=0, atol=1e-5)


def test_rows_of_very_different_length_follow_the_definition(backend):
    x = feature_array(40, 5).astype(np.float64) * 1e-30
    x[3] *= 1e60
    expected = rerank(squared_distances(x, x), 10, 7, 3, 0.3)
    narrow = x.astype(np.float32)
    for part in (x, narrow):
        np.testing.assert_allclose(k_reciprocal_rerank(part[:10], part[10:], k1=7, k2=3), expected, rtol=0, atol=1e-5)


def test_matrices_may_have_row_maxima_far_apart(backend):
    """A row of distances below 1e-19, whose squares float32 does not hold, among others of about 1."""
    d = np.sqrt(squared_distances(feature_array(40, 5), feature_array(40, 5))).astype(np.float32)
    d[4] *= 1e-30  # what its column says is within a thousandth of the largest: not asymmetry
    d[:, 4] = 1e-30 * d[:, 5]
    d[4, 4] = 0
    got = re_ranking(d[:10, 10:], d[:10, :10], d[10:, 10:], 7, 3, 0.3)
    whole = np.block([[d[:10, :10], d[:10, 10:]], [d[:10, 10:].T, d[10:, 10:]]]).astype(np.float64)
    np.testing.assert_allclose(got, rerank(whole**2, 10, 7, 3, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_rows", [1, 9, 64])
def test_blocks_change_nothing(block_rows):
    x = feature_array(50, 6)
    expected = k_reciprocal_rerank(x[:13], x[13:], k1=7)
    np.testing.assert_allclose(
        k_reciprocal_rerank(x[:13], x[13:], k1=7, block_rows=block_rows), expected, rtol=0, atol=2e-6
    )


def test_stages_agree_with_the_reference(backend):
    """Each operator for itself, so that an error has an address."""
    x = torch.from_numpy(feature_array(50, 6))
    neighbor = torch.from_numpy(ranked(squared_distances(x, x))[:, :8].astype(np.int32))
    near = torch.from_numpy(np.sort(squared_distances(x, x), 1)[:, :8].astype(np.float32))
    row_max = torch.from_numpy(squared_distances(x, x).max(1).astype(np.float32))
    indptr, index = op.k_reciprocal_robust_sets(neighbor, 7)
    distance = op.listed_distance(x[:12], x[12:], 1.0, neighbor, near, indptr, index)
    value = op.k_reciprocal_encode(indptr, distance, row_max)
    expanded = op.k_reciprocal_query_expansion(neighbor, 3, indptr, index, value)
    final = torch.from_numpy(squared_distances(x[:12], x[12:]).astype(np.float32))
    inverted = op.k_reciprocal_invert(*expanded, 12, 50)
    op.k_reciprocal_blend(final, row_max, *expanded, *inverted, 0.3)
    some = torch.from_numpy(squared_distances(x[5:9], x[12:]).astype(np.float32))
    op.k_reciprocal_blend(some, row_max[5:], expanded[0][5:], *expanded[1:], *inverted, 0.3)
    assert torch.equal(some, final[5:9])
    with reference_backend():
        assert torch.equal(op.k_reciprocal_robust_sets(neighbor, 7)[1], index)
        expected = op.listed_distance(x[:12], x[12:], 1.0, neighbor, near, indptr, index)
        torch.testing.assert_close(distance, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(value, op.k_reciprocal_encode(indptr, distance, row_max), rtol=1e-6, atol=0)
        again = op.k_reciprocal_query_expansion(neighbor, 3, indptr, index, value)
        assert torch.equal(again[0], expanded[0])
        assert torch.equal(again[1], expanded[1])
        torch.testing.assert_close(again[2], expanded[2], rtol=1e-6, atol=0)
        for got, expected in zip(inverted, op.k_reciprocal_invert(*expanded, 12, 50), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pairs_that_are_in_no_list_are_measured(backend, scale):
    """However many a row has of them."""
    x, M = torch.from_numpy(feature_array(140, 33)), 140
    counts = torch.tensor([0, 1, 2, 3, 4, 63, 64, 65, 66, 67, 128, 130, M]).repeat(11)[:M]
    columns = [(torch.arange(count) + i) % M for i, count in enumerate(counts)]
    neighbor = torch.stack([(torch.arange(M) + 1) % M, (torch.arange(M) + 66) % M], 1)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    expected = torch.from_numpy(squared_distances(x, x)).mul_(scale**2).float()
    near = expected.gather(1, neighbor)
    got = op.listed_distance(x[:50], x[50:], scale, neighbor.int(), near, indptr, torch.cat(columns).int())
    rows = torch.arange(M).repeat_interleave(counts)
    torch.testing.assert_close(got, expected[rows, torch.cat(columns)], rtol=2e-7, atol=0)


def test_the_operators_pass_opcheck():
    x = torch.from_numpy(feature_array(20, 4))
    neighbor = torch.from_numpy(ranked(squared_distances(x, x))[:, :6].astype(np.int32))
    near, row_max = torch.rand(20, 6), torch.rand(20) + 1
    torch.library.opcheck(op.k_reciprocal_robust_sets, (neighbor, 5))
    indptr, index = op.k_reciprocal_robust_sets(neighbor, 5)
    torch.library.opcheck(op.listed_distance, (x[:5], x[5:], 1.0, neighbor, near, indptr, index))
    value = torch.rand(index.shape)
    torch.library.opcheck(op.k_reciprocal_encode, (indptr, value, row_max))
    torch.library.opcheck(op.k_reciprocal_query_expansion, (neighbor, 3, indptr, index, value))
    torch.library.opcheck(op.k_reciprocal_invert, (indptr, index, value, 5, 20))
    encodings = (indptr, index, value, *op.k_reciprocal_invert(indptr, index, value, 5, 20))
    torch.library.opcheck(op.k_reciprocal_blend, (torch.rand(5, 15), row_max, *encodings, 0.3))
    nearest = torch.arange(4, dtype=torch.int32).repeat(5, 1)
    torch.library.opcheck(
        op.k_reciprocal_topk,
        (x[:5], x[5:], 1.0, nearest, torch.rand(5, 4), row_max, *encodings, 0.3, 3),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(op.matrix_neighbors, (torch.rand(5, 15), torch.rand(5, 5), torch.rand(15, 15), 6))
