"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

import torch

from tests.cuda_on_cpu.harness import dtype_code
from vareid_ext import angular_center_regularizer


def angular_center_forward(
    launch: Any, W: Any, U: Any, mask: Any, loss: Any, cosine: Any, identity_norm: Any, viewpoint_norm: Any,
    threads: int, stream: int,
) -> None:  # fmt: skip
    K, V, D = U.shape
    launch(
        "angular_center_forward_cuda", W, U, mask, loss, cosine, identity_norm, viewpoint_norm, dtype_code(W), K, V, D
    )


def angular_center_backward(
    launch: Any, upstream: Any, W: Any, U: Any, mask: Any, cosine: Any, identity_norm: Any, viewpoint_norm: Any,
    grad_W: Any, grad_U: Any, threads: int, stream: int,
) -> None:  # fmt: skip
    K, V, D = U.shape
    launch(
        "angular_center_backward_cuda", upstream, W, U, mask, cosine, identity_norm, viewpoint_norm, grad_W, grad_U,
        dtype_code(W), K, V, D,
    )  # fmt: skip


def representative() -> dict[str, Any]:
    """Calls whose traffic stands in docs/kernels.md, by their shape."""

    def call() -> None:
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(64, 1024, generator=generator).requires_grad_()
        U = torch.randn(64, 3, 1024, generator=generator).requires_grad_()
        angular_center_regularizer(W, U).backward()

    return {"K 64, V 3, D 1024, float32": call}
