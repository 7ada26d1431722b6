"""Representative calls of every row: their traffic is held by test_traffic.py; tests/gpu
runs them on a real GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

import vareid_ext
from tests.cuda_on_cpu.backend import CompiledModule
from vareid_ext import _native
from vareid_ext.ops import pairwise_distance as pairwise_op
from vareid_ext.ops.linear_viewpoint_aware_cross_entropy import linear_viewpoint_aware_cross_entropy
from vareid_ext.ops.verification import verification_accepted, verification_histogram, verification_refine


@dataclass(frozen=True)
class Limit:
    """What a kernel promises about its traffic."""

    moved: float = 1.05  # bytes moved over the least, at most: minima.py's or, where it has none, the distinct bytes
    coalescing: float = 0.95  # ideal over actual 32-byte sectors, at least
    wavefronts: float = 1.05  # shared-memory wavefronts over the ideal, at most


@dataclass(frozen=True, eq=False)
class Shape:
    """One call: its sizes, the function that makes it on a device and returns the results, and the kernels' limits."""

    name: str
    call: Callable[[torch.device], list[Tensor]]
    limits: Mapping[str, Limit]  # by the kernel's name without template arguments


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _leaf(tensor: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(device, dtype).requires_grad_()


def _angular_center(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        W, U = _leaf(_random(64, 1024), device, dtype), _leaf(_random(64, 3, 1024, seed=1), device, dtype)
        loss = vareid_ext.angular_center_regularizer(W, U)
        loss.backward()
        assert W.grad is not None
        assert U.grad is not None
        return [loss.detach(), W.grad, U.grad]

    return call


def _cross_entropy(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        N, K, V = 16, 751, 3
        rng = torch.Generator().manual_seed(2)
        z, s = _leaf(_random(N, K), device, dtype), _leaf(_random(N, K, V, seed=1), device, dtype)
        identity, viewpoint = torch.randint(K, (N,), generator=rng), torch.randint(-1, V, (N,), generator=rng)
        L_y, L_v = vareid_ext.viewpoint_aware_cross_entropy(z, s, identity.to(device), viewpoint.to(device))
        (L_y + L_v).backward()
        assert z.grad is not None
        assert s.grad is not None
        return [L_y.detach(), L_v.detach(), z.grad, s.grad]

    return call


def _linear_cross_entropy(normalize: bool) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        N, K, V, D = 16, 751, 3, 32
        rng = torch.Generator().manual_seed(2)
        feature = _leaf(_random(N, D), device)
        W, U = _leaf(_random(K, D, seed=1), device), _leaf(_random(K, V, D, seed=2), device)
        identity, viewpoint = torch.randint(K, (N,), generator=rng), torch.randint(-1, V, (N,), generator=rng)
        L_y, L_v = linear_viewpoint_aware_cross_entropy(
            feature, W, U, identity.to(device), viewpoint.to(device), normalize=normalize,
            scale=10.0 if normalize else 1.0,
        )  # fmt: skip
        (2 * (L_y + L_v)).backward()  # so that the gradients are multiplied
        assert feature.grad is not None
        assert W.grad is not None
        assert U.grad is not None
        return [L_y.detach(), L_v.detach(), feature.grad, W.grad, U.grad]

    return call


def _ranking(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        Q, G, rng = 4, 8192, torch.Generator().manual_seed(0)
        distances = torch.rand(Q, G, generator=rng)
        labels = [torch.randint(high, (size,), generator=rng) for high in (400, 6) for size in (Q, G)]
        results = vareid_ext.rank_queries(distances.to(device, dtype), *(label.to(device) for label in labels))
        return list(vars(results).values())

    return call


def _ranked_features(device: torch.device) -> list[Tensor]:
    Q, G, D, rng = 4, 4096, 64, torch.Generator().manual_seed(0)
    labels = [torch.randint(high, (size,), generator=rng).to(device) for high in (400, 6) for size in (Q, G)]
    results = vareid_ext.rank_features(_random(Q, D).to(device), _random(G, D, seed=1).to(device), *labels)
    return list(vars(results).values())


def _verification(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        Q, G, rng = 8, 8192, torch.Generator().manual_seed(0)
        distances = torch.rand(Q, G, generator=rng).to(device, dtype)
        labels = [torch.randint(high, (size,), generator=rng).to(device) for high in (400, 6) for size in (Q, G)]
        labels[2:] = [camera[:, None] for camera in labels[2:]]
        results = [*verification_histogram(distances, *labels, -1), verification_accepted(distances, *labels, -1, 0.1)]
        if dtype == torch.float32:
            results.append(verification_refine(distances, *labels, -1, [15500, 15747], 1))  # from 0.015 and 0.1 on
        return results

    return call


def _pairwise_distance(device: torch.device) -> list[Tensor]:
    return [vareid_ext.pairwise_distance(_random(128, 256).to(device), _random(192, 256, seed=1).to(device))]


def _small_pairwise_distance(device: torch.device) -> list[Tensor]:
    """A block that a GPU gets from the package's own kernel alone; on the CPU only if that one executes the kernels."""
    executed = isinstance(_native._module, CompiledModule)
    pairs = pairwise_op._TILED_PAIRS["cuda" if executed else device.type]
    with mock.patch.dict(pairwise_op._TILED_PAIRS, {device.type: pairs}):
        return [vareid_ext.pairwise_distance(_random(96, 128).to(device), _random(160, 128, seed=1).to(device))]


def _nearest_neighbors(device: torch.device) -> list[Tensor]:
    x, y = _random(64, 128).to(device), _random(256, 128, seed=1).to(device)
    index, distance = vareid_ext.nearest_neighbors(x, y, k=10)
    return [index, distance]


def _near_ties(device: torch.device) -> list[Tensor]:
    """A cluster of equal rows that runs past the kept candidates, in half precision: its rows are done again."""
    x = torch.cat([_random(1, 128).expand(90, 128), _random(102, 128, seed=1)]).to(device, torch.bfloat16)
    index, distance = vareid_ext.nearest_neighbors(x, k=10)
    return [index, distance]


def _people(Q: int, G: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of people who are seen 26 times each on average, as in Market-1501."""
    centers, rng = _random(-(-(Q + G) // 26), D), torch.Generator().manual_seed(3)
    x = centers[torch.randint(centers.shape[0], (Q + G,), generator=rng)] + _random(Q + G, D, seed=1)
    return x[:Q].to(device), x[Q:].to(device)


def _rerank(device: torch.device) -> list[Tensor]:
    query, gallery = _people(48, 304, 64, device)
    return [vareid_ext.k_reciprocal_rerank(query, gallery)]


def _rerank_topk(device: torch.device) -> list[Tensor]:
    query, gallery = _people(48, 304, 64, device)
    return list(vareid_ext.k_reciprocal_rerank(query, gallery, topk=10))


def _rerank_matrices(device: torch.device) -> list[Tensor]:
    x = torch.cat(_people(48, 304, 64, device))
    d = vareid_ext.pairwise_distance(x, metric="euclidean")
    return [vareid_ext.re_ranking(d[:48, 48:], d[:48, :48], d[48:, 48:])]


_LINEAR = {
    "linear_viewpoint_aware_cross_entropy_summarise_kernel": Limit(),
    "linear_viewpoint_aware_cross_entropy_finish_kernel": Limit(),
    "linear_viewpoint_aware_cross_entropy_gradient_kernel": Limit(),
    "linear_viewpoint_aware_cross_entropy_scale_kernel": Limit(),
}
# Cosines: every row of logits reads the inverse norms of the centres again, from the cache.
_COSINE = {
    "linear_viewpoint_aware_cross_entropy_summarise_kernel": Limit(moved=1.95),
    "linear_viewpoint_aware_cross_entropy_finish_kernel": Limit(),
    "linear_viewpoint_aware_cross_entropy_gradient_kernel": Limit(moved=1.5),
    "linear_viewpoint_aware_cross_entropy_inverse_norms_kernel": Limit(),
    "linear_viewpoint_aware_cross_entropy_project_kernel": Limit(),
    "linear_viewpoint_aware_cross_entropy_scale_kernel": Limit(),
}

# Retrieval: each stage within 1.2 of the bytes that a row working alone must move (minima.py has the formulas), and at
# least 80 % coalesced where rows are sparse.
_SPARSE = Limit(1.2, 0.8)
_FEATURES = {"pairwise_distance_max_abs_kernel": Limit(), "pairwise_distance_norm_kernel": Limit()}
_NEIGHBORS = {
    **_FEATURES,
    # What a warp may take from is read again, from the first-level cache; in blocks as small as these that is all.
    "nearest_neighbors_scan_rows_kernel": Limit(2.0, 0.8),
    "nearest_neighbors_select_kernel": Limit(1.2, 0.9),
}
_ENCODED = {
    "k_reciprocal_sets_kernel": _SPARSE,
    "k_reciprocal_robust_sets_kernel": _SPARSE,
    "k_reciprocal_prefix_kernel": _SPARSE,
    "k_reciprocal_encode_kernel": _SPARSE,
    "k_reciprocal_query_expansion_kernel": _SPARSE,
    "k_reciprocal_owner_kernel": _SPARSE,
    "k_reciprocal_digits_kernel": _SPARSE,
    "k_reciprocal_sort_kernel": Limit(1.2, 0.8, 1.5),  # entries go to their places in shared memory
    "k_reciprocal_start_kernel": _SPARSE,
}
_RERANK = {
    **_NEIGHBORS,
    **_ENCODED,
    "nearest_neighbors_scan_columns_kernel": Limit(1.2),
    "k_reciprocal_listed_distance_kernel": Limit(1.2, 0.8),
    # Whose sums meet in a bank depends on the data.
    "k_reciprocal_blend_kernel": Limit(1.2, 0.8, 3),
    "k_reciprocal_topk_kernel": Limit(1.25, 0.8, 3),
}

REPRESENTATIVE: dict[str, list[Shape]] = {
    "angular_center": [
        Shape(
            f"K 64, V 3, D 1024, {str(dtype).removeprefix('torch.')}",
            _angular_center(dtype),
            {
                "angular_center_forward_kernel": Limit(),
                "angular_center_sum_kernel": Limit(),
                "angular_center_backward_kernel": Limit(),
            },
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "k_reciprocal": [
        Shape("Q 48, G 304, D 64, float32", _rerank, _RERANK),
        Shape("Q 48, G 304, D 64, topk 10, float32", _rerank_topk, _RERANK),
        Shape(
            "Q 48, G 304, three matrices, float32",
            _rerank_matrices,
            {
                **_FEATURES,
                **_RERANK,
                "pairwise_distance_block_kernel": Limit(1.2),
                "k_reciprocal_matrix_neighbors_kernel": Limit(1.2, 0.8, 1.3),
            },
        ),
    ],
    "nearest_neighbors": [
        Shape("64 x 256, D 128, k 10, float32", _nearest_neighbors, _NEIGHBORS),
        Shape(
            "192 x 192, D 128, k 10, 90 equal rows, bfloat16",
            _near_ties,
            {
                **_NEIGHBORS,
                "pairwise_distance_prepare_kernel": Limit(),
                "nearest_neighbors_rescan_kernel": Limit(1.2, 0.9, 1.2),
            },
        ),
    ],
    "pairwise_distance": [
        Shape(
            "128 x 192, D 256, float32", _pairwise_distance, {**_FEATURES, "pairwise_distance_block_kernel": Limit(1.2)}
        ),
        Shape(
            "96 x 160, D 128, float32, one kernel",
            _small_pairwise_distance,
            {**_FEATURES, "pairwise_distance_tiled_kernel": Limit()},
        ),
    ],
    "linear_viewpoint_aware_cross_entropy": [
        Shape("N 16, K 751, V 3, D 32, float32", _linear_cross_entropy(False), _LINEAR),
        Shape("N 16, K 751, V 3, D 32, float32, cosines", _linear_cross_entropy(True), _COSINE),
    ],
    "viewpoint_aware_cross_entropy": [
        Shape(
            f"N 16, K 751, V 3, {str(dtype).removeprefix('torch.')}",
            _cross_entropy(dtype),
            {
                "viewpoint_aware_cross_entropy_forward_kernel": Limit(),
                "viewpoint_aware_cross_entropy_backward_kernel": Limit(),
                "viewpoint_aware_cross_entropy_finish_kernel": Limit(),
            },
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    # Where features are ranked, every query reads the norms and bounds of all images again, from the cache.
    "ranking": [
        Shape(
            f"Q 4, G 8192, {str(dtype).removeprefix('torch.')}",
            _ranking(dtype),
            {"ranking_kernel": Limit(coalescing=0.88)},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    + [
        Shape(
            "features: Q 4, G 4096, D 64",
            _ranked_features,
            {"ranking_kernel": Limit(moved=3.2, coalescing=0.88, wavefronts=1.1), **_FEATURES},
        )
    ],
    # Lanes whose distances have one first digit add to one count, one after the other.
    "verification": [
        Shape(
            f"Q 8, G 8192, {str(dtype).removeprefix('torch.')}",
            _verification(dtype),
            {
                "verification_histogram_kernel": Limit(coalescing=0.87, wavefronts=2.9),
                "verification_refine_kernel": Limit(),
                "verification_accepted_kernel": Limit(),
            },
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
}
