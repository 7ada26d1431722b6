"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import dtype_code


def angular_center_forward(
    launch: Any, W: Any, U: Any, mask: Any, loss: Any, cosine: Any, identity_norm: Any, viewpoint_norm: Any,
    place: Any,
) -> None:  # fmt: skip
    K, V, D = U.shape
    launch(
        "angular_center_forward_cuda", W, U, mask, loss, cosine, identity_norm, viewpoint_norm, dtype_code(W), K, V, D
    )


def angular_center_backward(
    launch: Any, upstream: Any, W: Any, U: Any, mask: Any, cosine: Any, identity_norm: Any, viewpoint_norm: Any,
    grad_W: Any, grad_U: Any, place: Any,
) -> None:  # fmt: skip
    K, V, D = U.shape
    launch(
        "angular_center_backward_cuda", upstream, W, U, mask, cosine, identity_norm, viewpoint_norm, grad_W, grad_U,
        dtype_code(W), K, V, D,
    )  # fmt: skip
