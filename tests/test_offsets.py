"""Few rows that lie far apart: offsets beyond 2^31 elements, in arrays that take hardly any memory.

``tests/large`` has what needs the memory, and runs these cases on the CUDA kernels.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.factories import features
from tests.large.memory import BEYOND, reserved, running, spread
from vareid_ext import _native, identity_cross_entropy, viewpoint_aware_cross_entropy
from vareid_ext.metrics import evaluate_verification, rank_queries
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.retrieval import k_reciprocal_rerank, nearest_neighbors, pairwise_distance

DTYPES = [torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _kernels():
    with running("native"):
        yield


def assert_equal(found, expected):
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


def squared(x, y):
    return (x.double()[:, None] - y.double()[None]).square().sum(2)


def memory_mapped(path, rows):
    """The rows of :func:`spread`, as a slice of the columns of a file that is mostly holes."""
    count, columns = rows.shape
    stride = BEYOND // (count - 1) + columns
    array = np.memmap(path, dtype=rows.numpy().dtype, mode="w+", shape=(count, stride))
    array[:, -columns:] = rows.numpy()
    return array[:, -columns:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_pairwise_distance(dtype, metric):
    x, y = features(257, 19, 0, dtype), features(130, 19, 1, dtype, equal=3)
    far_x, far_y = spread(x), spread(y)
    assert (far_x.shape[0] - 1) * far_x.stride(0) >= BEYOND
    found = pairwise_distance(far_x, far_y, metric=metric)
    if metric == "euclidean":
        torch.testing.assert_close(found.double(), squared(x, y).sqrt(), rtol=1e-4, atol=1e-3)
    # The vendor's product of float32 rows that lie elsewhere may be rounded otherwise.
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0}
    torch.testing.assert_close(found, pairwise_distance(x, y, metric=metric), **close)
    torch.testing.assert_close(pairwise_distance(far_x, metric=metric), pairwise_distance(x, metric=metric), **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("equal", [3, 290])  # 290: more near ties than places, so that rows are done again
def test_nearest_neighbors(dtype, equal):
    x, y = features(65, 19, 0, dtype), features(400, 19, 1, dtype, equal=equal)
    far_x, far_y = spread(x), spread(y)
    distance, index = nearest_neighbors(far_x, far_y, k=5)
    order = torch.sort(squared(x, y), dim=1, stable=True)
    assert torch.equal(index, order.indices[:, :5])
    torch.testing.assert_close(distance.double(), order.values[:, :5], rtol=1e-6, atol=1e-6)
    for metric in ("euclidean", "cosine"):
        assert_equal(nearest_neighbors(far_y, k=7, metric=metric), nearest_neighbors(y, k=7, metric=metric))


def test_k_reciprocal_rerank():
    query, gallery = features(33, 19, 0, torch.float16), features(300, 19, 1, torch.float16, equal=30)
    far = spread(query), spread(gallery)
    expected = k_reciprocal_rerank(query, gallery, k1=7, k2=3)
    torch.testing.assert_close(k_reciprocal_rerank(*far, k1=7, k2=3), expected, rtol=0, atol=0)
    assert_equal(k_reciprocal_rerank(*far, k1=7, k2=3, topk=9), k_reciprocal_rerank(query, gallery, k1=7, k2=3, topk=9))


def test_result_with_rows_far_apart():
    query, gallery = features(33, 19, 0, torch.float32), features(300, 19, 1, torch.float32)
    out = spread(torch.zeros(33, 300))
    k_reciprocal_rerank(query, gallery, k1=7, k2=3, out=out)
    torch.testing.assert_close(out, k_reciprocal_rerank(query, gallery, k1=7, k2=3), rtol=0, atol=1e-6)


def test_memory_mapped_features(tmp_path):
    query, gallery = features(33, 19, 0, torch.float16), features(300, 19, 1, torch.float16)
    far = memory_mapped(tmp_path / "query", query), memory_mapped(tmp_path / "gallery", gallery)
    assert far[1].base.size > BEYOND
    expected = k_reciprocal_rerank(query, gallery, k1=7, k2=3)
    torch.testing.assert_close(torch.from_numpy(k_reciprocal_rerank(*far, k1=7, k2=3)), expected, rtol=0, atol=0)
    for have, want in zip(nearest_neighbors(*far, k=4), nearest_neighbors(query, gallery, k=4), strict=True):
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("identities", [2, 40])  # many matches, few matches
def test_ranking(dtype, identities):
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(37, 700, generator=generator).to(dtype)
    query, gallery = torch.arange(37) % identities, torch.arange(700) % identities
    cameras = torch.arange(37) % 3, torch.arange(700) // 40 % 4
    found = rank_queries(spread(distances), query, gallery, *cameras)
    for q in (0, 18, 36):
        kept = ~((gallery == query[q]) & (cameras[1] == cameras[0][q]))
        order = torch.sort(distances[q][kept].double(), stable=True).indices
        ranks = (gallery[kept][order] == query[q]).nonzero()[:, 0].double() + 1
        precision = (torch.arange(1, len(ranks) + 1) / ranks).mean()
        assert found.average_precision[q] == pytest.approx(float(precision), rel=1e-12)
        assert found.first_match_rank[q] == ranks[0]
    expected = rank_queries(distances, query, gallery, *cameras)
    assert_equal(vars(found).values(), vars(expected).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verification(dtype):
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(37, 700, generator=generator).to(dtype)
    query, gallery = torch.arange(37) % 20 - 1, torch.arange(700) % 20 - 1
    found = evaluate_verification(spread(distances), query, gallery, recommend_fpr=0.01, resamples=3)
    kept = (query != -1)[:, None] & (gallery != -1)
    match = (query[:, None] == gallery) & kept
    assert (found.num_matches, found.num_non_matches) == (int(match.sum()), int((kept & ~match).sum()))
    for point in (*found.points, found.recommended.point):
        for pairs, rate in ((match, point.tpr), (kept & ~match, point.fpr)):
            assert rate == pytest.approx(float((distances[pairs] <= point.threshold).double().mean()), rel=1e-12)
    expected = evaluate_verification(distances, query, gallery, recommend_fpr=0.01, resamples=3)
    assert found.as_dict() == expected.as_dict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    z, s = torch.randn(5, 401, generator=generator).to(dtype), torch.randn(5, 401, 3, generator=generator).to(dtype)
    y, v = torch.tensor([0, 400, 7, 399, 1]), torch.tensor([0, 2, -1, 1, 2])

    def run(z, s):
        z, s = z.detach().requires_grad_(), s.detach().requires_grad_()
        losses = viewpoint_aware_cross_entropy(z, s, y, v, reduction="sum")
        alone = identity_cross_entropy(z, y, smoothing="none", reduction="sum")
        return *losses, alone, *torch.autograd.grad(losses[0] + losses[1], (z, s))

    found = run(spread(z), spread(s))
    expected = torch.nn.functional.cross_entropy(z.double(), y, reduction="sum")
    torch.testing.assert_close(found[2].detach().double(), expected, rtol=1e-5, atol=0)
    assert_equal(found, run(z, s))


def test_sparse_rows():
    """The stages of re-ranking on a matrix whose entries begin beyond element 2^31."""
    shift, launch = BEYOND + 13, functools.partial(_native.launch, on=torch.empty(0))
    query, gallery = features(20, 19, 0, torch.float32), features(90, 19, 1, torch.float32)
    M = 110
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(M, M, generator=generator) < 0.2
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
    index = present.nonzero()[:, 1].to(torch.int32)
    value = torch.rand(index.shape[0], generator=generator)
    row_max = torch.rand(M, generator=generator) + 1
    neighbor = torch.stack([torch.randperm(M, generator=generator)[:8] for _ in range(M)]).to(torch.int32)
    near = torch.rand(M, 8, generator=generator)

    def moved(array):
        far = reserved(shift + array.shape[0], array.dtype)
        far[shift:] = array
        return far

    far_indptr, far_index, far_value = indptr + shift, moved(index), moved(value)
    workspace = torch.empty(1 << 20, dtype=torch.uint8)

    out = reserved(shift + index.shape[0], torch.float32)
    launch("k_reciprocal_listed_distance", query, None, gallery, None, neighbor, near, far_indptr, far_index, out)
    expected = stages.listed_distance(query, gallery, 1.0, neighbor, near, indptr, index)
    torch.testing.assert_close(out[shift:], expected, rtol=0, atol=0)

    launch("k_reciprocal_encode", far_indptr, far_value, row_max, out)
    weights = torch.exp(-value.double() / row_max[present.nonzero()[:, 0]].double())
    sums = torch.zeros(M, dtype=torch.float64).index_add_(0, present.nonzero()[:, 0], weights)
    torch.testing.assert_close(out[shift:].double(), weights / sums[present.nonzero()[:, 0]], rtol=1e-6, atol=1e-9)

    new_indptr, new_index, new_value = stages.k_reciprocal_query_expansion(neighbor, 3, indptr, index, value)
    found = torch.empty_like(indptr)
    given = neighbor, 3, far_indptr, far_index, far_value
    launch("k_reciprocal_query_expansion", *given, found, None, None, workspace)
    assert torch.equal(found, new_indptr)
    far_new_index, far_new_value = (reserved(shift + new_index.shape[0], t) for t in (torch.int32, torch.float32))
    launch("k_reciprocal_query_expansion", *given, new_indptr + shift, far_new_index, far_new_value, workspace)
    assert_equal((far_new_index[shift:], far_new_value[shift:]), (new_index, new_value))

    inverted = stages.k_reciprocal_invert(indptr, index, value, 20, M)
    far_inverted = stages.k_reciprocal_invert(far_indptr, far_index, far_value, 20, M)
    assert_equal(far_inverted, inverted)

    distance = torch.rand(20, 90, generator=generator)
    expected = distance.clone()
    stages.k_reciprocal_blend(expected, row_max, indptr, index, value, *inverted, 0.3)
    stages.k_reciprocal_blend(distance, row_max, far_indptr, far_index, far_value, *far_inverted, 0.3)
    torch.testing.assert_close(distance, expected, rtol=0, atol=0)
