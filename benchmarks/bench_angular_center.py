"""Angular center regularizer: forward and backward of ``0.1 * loss`` against copying and reading both centres."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Suite
from vareid_ext import angular_center_regularizer, reference_backend
from vareid_ext.reference.angular_center import angular_center


def run_case(suite: Suite, K: int, V: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(K, D, generator=generator).to(suite.device, dtype).requires_grad_()
    U = torch.randn(K, V, D, generator=generator).to(suite.device, dtype).requires_grad_()

    def drop_gradients() -> None:
        W.grad = U.grad = None

    def backward_of(loss: torch.Tensor) -> None:
        (0.1 * loss).backward()

    def ours() -> None:
        backward_of(angular_center_regularizer(W, U))

    @torch.no_grad()
    def forward() -> Any:
        return angular_center_regularizer(W, U)

    def closed_form() -> None:
        with reference_backend():
            backward_of(angular_center_regularizer(W, U))

    def autograd() -> None:
        backward_of(angular_center(W, U))

    @torch.no_grad()
    def clone() -> Any:
        return W.clone(), U.clone()

    @torch.no_grad()
    def total() -> Any:
        return W.sum(), U.sum()

    size = (W.numel() + U.numel()) * W.element_size()
    suite.case(
        f"K={K} V={V} D={D} {str(dtype).removeprefix('torch.')}",
        {"ours": ours, "clone": clone, "ours forward": forward, "sum": total, "closed form": closed_form,
         "reference": autograd},
        bytes_moved={"ours": 3 * size, "clone": 2 * size, "ours forward": size, "sum": size},
        setup=drop_gradients,
    )  # fmt: skip


def main() -> None:
    suite = Suite("bench_angular_center", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 100, 3, 256, torch.float32)
    else:
        run_case(suite, 10_000, 3, 2048, torch.float32)
        run_case(suite, 10_000, 3, 2048, torch.bfloat16)
        run_case(suite, 751, 3, 2048, torch.float32)
    suite.finish()


if __name__ == "__main__":
    main()
