"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

import torch

from tests.cuda_on_cpu.harness import InOut, Partial, dtype_code, spanned


def _viewpoint(viewpoint: Any) -> tuple[Any, Any]:
    soft = viewpoint is not None and viewpoint.is_floating_point()
    return (None, viewpoint) if soft else (viewpoint, None)


def linear_viewpoint_aware_cross_entropy_parts(launch: Any, N: int, columns: int, cuda: bool) -> int:
    return launch("linear_viewpoint_aware_cross_entropy_parts_cuda", N, columns)


def linear_viewpoint_aware_cross_entropy_summarise(
    launch: Any, logits: Any, scale: Any, identity: Any, mask: Any, summaries: Any, own_logits: Any, K: int, V: int,
    first: int, first_part: int, place: Any,
) -> None:  # fmt: skip
    memory, stride = spanned(logits)
    N, columns = logits.shape
    launch(
        "linear_summarise_flat", memory, stride, scale, N, K, V, first, columns // V, identity, mask, InOut(summaries),
        summaries.shape[1], first_part, InOut(own_logits), dtype_code(logits),
    )  # fmt: skip


def linear_viewpoint_aware_cross_entropy_finish(
    launch: Any, summaries: Any, own_logits: Any, identity: Any, viewpoint: Any, mask: Any, loss: Any, statistics: Any,
    adaptive: bool, alpha: float, epsilon: float, K: int, label_error: Any, place: Any,
) -> None:  # fmt: skip
    noted = torch.zeros(1, dtype=torch.int64)
    launch(
        "linear_finish_flat", summaries, summaries.shape[1], own_logits, identity.shape[0], K, own_logits.shape[0],
        identity, *_viewpoint(viewpoint), mask, adaptive, alpha, epsilon, statistics, loss, Partial(noted),
        dtype_code(loss),
    )  # fmt: skip
    assert noted.tolist() == [-1], "a good label was noted as bad"


def linear_viewpoint_aware_cross_entropy_gradient(
    launch: Any, logits: Any, scale: Any, identity: Any, viewpoint: Any, mask: Any, statistics: Any, upstream: Any,
    share: float, K: int, V: int, first: int, place: Any,
) -> None:  # fmt: skip
    memory, stride = spanned(logits)
    N, columns = logits.shape
    launch(
        "linear_gradient_flat", InOut(memory), stride, scale, N, K, V, first, columns // V, identity,
        *_viewpoint(viewpoint), mask, statistics, upstream, upstream.dim(), share, dtype_code(logits),
    )  # fmt: skip


def linear_viewpoint_aware_cross_entropy_inverse_norms(launch: Any, x: Any, inverse: Any, place: Any) -> None:
    launch("linear_viewpoint_aware_cross_entropy_inverse_norms_cuda", x, inverse, *x.shape, dtype_code(x))


def linear_viewpoint_aware_cross_entropy_project(launch: Any, x: Any, inverse: Any, grad: Any, place: Any) -> None:
    launch("linear_viewpoint_aware_cross_entropy_project_cuda", x, inverse, InOut(grad), *x.shape, dtype_code(x))


def linear_viewpoint_aware_cross_entropy_scale(launch: Any, grad: Any, factor: Any, place: Any) -> None:
    launch("linear_viewpoint_aware_cross_entropy_scale_cuda", InOut(grad), factor, grad.numel(), dtype_code(grad))
