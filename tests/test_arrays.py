"""One rule on kinds of arrays: any mix of them on one device, and results of the first argument's kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vareid_ext import (
    evaluate_cross_viewpoint,
    evaluate_features,
    evaluate_ranking,
    evaluate_single_viewpoint,
    k_reciprocal_from_neighbors,
    k_reciprocal_rerank,
    nearest_neighbors,
    pairwise_distance,
    rank_features,
    re_ranking,
)

_RNG = np.random.default_rng(0)
QUERY, GALLERY = (_RNG.standard_normal((rows, 6)).astype(np.float32) for rows in (8, 30))
QUERY_IDENTITY, GALLERY_IDENTITY = np.arange(8) % 4, np.arange(30) % 4
DISTANCE, INDEX = nearest_neighbors(GALLERY, k=9)
Q_G, Q_Q, G_G = (pairwise_distance(x, y) for x, y in ((QUERY, GALLERY), (QUERY, None), (GALLERY, None)))


class Foreign:
    """An array of a library that speaks DLPack and nothing else."""

    def __init__(self, value):
        self._tensor = torch.from_numpy(value)

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


def with_gradient(value):
    tensor = torch.from_numpy(value.copy())
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


KINDS = {"numpy": np.asarray, "torch": torch.from_numpy, "gradient": with_gradient, "dlpack": Foreign}
FUNCTIONS = {
    "pairwise_distance": (pairwise_distance, QUERY, GALLERY),
    "nearest_neighbors": (lambda x, y: nearest_neighbors(x, y, k=3)[0], QUERY, GALLERY),
    "k_reciprocal_rerank": (k_reciprocal_rerank, QUERY, GALLERY),
    "topk": (lambda x, y: k_reciprocal_rerank(x, y, topk=3)[0], QUERY, GALLERY),
    "k_reciprocal_from_neighbors": (
        lambda x, y: k_reciprocal_from_neighbors(x, y, 8, k1=5, k2=3, topk=3)[0], INDEX, DISTANCE,
    ),
    "row_max": (
        lambda x, y: k_reciprocal_from_neighbors(x, DISTANCE, 8, k1=5, k2=3, row_max=y, topk=3)[0],
        INDEX, 2 * DISTANCE[:, -1],
    ),
    "re_ranking, q_q": (lambda x, y: re_ranking(x, y, G_G), Q_G, Q_Q),
    "re_ranking, g_g": (lambda x, y: re_ranking(x, Q_Q, y), Q_G, G_G),
    "rank_features": (
        lambda x, y: rank_features(x, y, QUERY_IDENTITY, GALLERY_IDENTITY).average_precision, QUERY, GALLERY,
    ),
    "evaluate_features": (lambda x, y: evaluate_features(x, GALLERY, y, GALLERY_IDENTITY).cmc, QUERY, QUERY_IDENTITY),
    "reranked": (
        lambda x, y: evaluate_features(x, y, QUERY_IDENTITY, GALLERY_IDENTITY, rerank=True).cmc, QUERY, GALLERY,
    ),
    "evaluate_ranking": (lambda x, y: evaluate_ranking(x, y, GALLERY_IDENTITY).cmc, Q_G, QUERY_IDENTITY),
    "blocks": (
        lambda x, y: evaluate_ranking([x, y], [*QUERY_IDENTITY, *QUERY_IDENTITY], GALLERY_IDENTITY).cmc, Q_G, Q_G,
    ),
    "cross-viewpoint": (
        lambda x, y: evaluate_cross_viewpoint(x, GALLERY_IDENTITY, y)[1].cmc, GALLERY, np.arange(30) % 3,
    ),
    "single-viewpoint": (
        lambda x, y: evaluate_single_viewpoint(x, GALLERY_IDENTITY, y)[1].runs[0].cmc, GALLERY, np.arange(30) // 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kinds_may_be_mixed_and_the_first_one_is_returned(name):
    function, *values = FUNCTIONS[name]
    expected = np.asarray(function(*values))
    for first, second in itertools.product(KINDS, repeat=2):
        result = function(KINDS[first](values[0]), KINDS[second](values[1]))
        assert isinstance(result, np.ndarray if first == "numpy" else torch.Tensor), (first, second)
        given = torch.as_tensor(result).detach()
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-6, err_msg=f"{first}, {second}")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", [evaluate_single_viewpoint, evaluate_cross_viewpoint, evaluate_ranking])
def test_nested_tensors_are_named(function):
    nested = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(2, 4)])
    with pytest.raises(TypeError, match=r"^(feature|distances): "):
        function(nested, QUERY_IDENTITY, GALLERY_IDENTITY)
