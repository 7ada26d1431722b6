"""Representative calls of every row: their traffic stands in docs/kernels.md and is held by test_traffic.py; tests/gpu
runs them on a real GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import vareid_ext


@dataclass(frozen=True)
class Limit:
    """What a kernel promises about its traffic."""

    moved: float = 1.05  # bytes moved over the distinct bytes, at most
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


def _ranking(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        Q, G, rng = 4, 8192, torch.Generator().manual_seed(0)
        distances = torch.rand(Q, G, generator=rng)
        labels = [torch.randint(high, (size,), generator=rng) for high in (400, 6) for size in (Q, G)]
        results = vareid_ext.rank_queries(distances.to(device, dtype), *(label.to(device) for label in labels))
        return list(vars(results).values())

    return call


def _people(rows: int, D: int) -> Tensor:
    """Unit features of four images each."""
    noisy = _random(rows // 4, D).repeat_interleave(4, 0) + 0.7 * _random(rows, D, seed=1)
    return torch.nn.functional.normalize(noisy)


def _pairwise_distance(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    def call(device: torch.device) -> list[Tensor]:
        x = _random(64, 256).to(device, dtype)
        return [vareid_ext.pairwise_distance(x), vareid_ext.pairwise_distance(x, x[:32], metric="cosine")]

    return call


def _nearest_neighbors(device: torch.device) -> list[Tensor]:
    return list(vareid_ext.nearest_neighbors(_people(256, 64).to(device), k=21))


def _k_reciprocal(device: torch.device) -> list[Tensor]:
    x = _people(256, 64).to(device)
    return [vareid_ext.k_reciprocal_rerank(x[:64], x[64:])]


def _re_ranking(device: torch.device) -> list[Tensor]:
    x = _people(128, 64).double()
    d = (x[:, None] - x[None]).square().sum(-1).sqrt().float().to(device)
    return [vareid_ext.re_ranking(d[:32, 32:], d[:32, :32], d[32:, 32:])]


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
    "viewpoint_aware_cross_entropy": [
        Shape(
            f"N 16, K 751, V 3, {str(dtype).removeprefix('torch.')}",
            _cross_entropy(dtype),
            {
                "viewpoint_aware_cross_entropy_forward_kernel": Limit(),
                "viewpoint_aware_cross_entropy_backward_kernel": Limit(
                    moved=1.1
                ),  # 751 columns in bfloat16: labels show
                "viewpoint_aware_cross_entropy_finish_kernel": Limit(1.3, 0.3),  # a few values a row, one launch
            },
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "ranking": [
        Shape(
            f"Q 4, G 8192, {str(dtype).removeprefix('torch.')}",
            _ranking(dtype),
            {"ranking_forward_kernel": Limit(coalescing=0.88)},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "pairwise_distance": [
        Shape(f"M 64, D 256, {str(dtype).removeprefix('torch.')}", _pairwise_distance(dtype), {})
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "nearest_neighbors": [Shape("N 256, D 64, k 21", _nearest_neighbors, {})],
    "k_reciprocal": [Shape("Q 64, G 192, D 64", _k_reciprocal, {}), Shape("Q 32, G 96", _re_ranking, {})],
}
