"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

import torch

from tests.cuda_on_cpu.harness import Partial, dtype_code
from vareid_ext.reference.viewpoint_aware_cross_entropy import label_error


def _rows(logits: Any) -> tuple[bool, Any, int]:
    """Whether there are logits, the memory they span, and the distance of their rows."""
    if logits is None:
        return False, None, 0
    columns = logits[:1].numel()
    if logits.shape[0] < 2:
        return True, logits.contiguous(), columns
    stride = logits.stride(0)
    return True, logits.as_strided(((logits.shape[0] - 1) * stride + columns,), (1,)), stride


def _labels(viewpoint_logits: Any, identity: Any, viewpoint: Any, mask: Any) -> tuple[Any, ...]:
    soft = viewpoint is not None and viewpoint.is_floating_point()
    views = 1 if viewpoint_logits is None else viewpoint_logits.shape[2]
    return views, identity, None if soft else viewpoint, viewpoint if soft else None, mask


def viewpoint_aware_cross_entropy_label_error(
    launch: Any, identity: Any, viewpoint: Any, mask: Any, K: int, V: int
) -> tuple[int, int]:
    return label_error(identity, viewpoint, mask, K, V)  # labels are on the host


def viewpoint_aware_cross_entropy_workspace_bytes(
    launch: Any, N: int, K: int, V: int, has_identity: bool, has_viewpoint: bool, cuda: bool
) -> int:
    return launch("cross_entropy_workspace_flat", N, K, int(has_identity), V if has_viewpoint else 0)


def viewpoint_aware_cross_entropy_forward(
    launch: Any, identity_logits: Any, viewpoint_logits: Any, identity: Any, viewpoint: Any, mask: Any,
    identity_loss: Any, viewpoint_loss: Any, statistics: Any, adaptive: bool, alpha: float, epsilon: float,
    reduction: int, label_error: Any, workspace: Any, place: Any,
) -> None:  # fmt: skip
    some = viewpoint_logits if identity_logits is None else identity_logits
    noted = torch.zeros(2, dtype=torch.int64)
    launch(
        "cross_entropy_forward_flat", *_rows(identity_logits), *_rows(viewpoint_logits),
        *_labels(viewpoint_logits, identity, viewpoint, mask), Partial(identity_loss), Partial(viewpoint_loss),
        Partial(statistics), adaptive, alpha, epsilon, dtype_code(some), some.shape[0], some.shape[1], reduction,
        Partial(noted), Partial(workspace),
    )  # fmt: skip
    assert noted.tolist() == [-1, -1], "a good label was noted as bad"


def viewpoint_aware_cross_entropy_backward(
    launch: Any, identity_upstream: Any, viewpoint_upstream: Any, identity_logits: Any, viewpoint_logits: Any,
    identity: Any, viewpoint: Any, mask: Any, statistics: Any, identity_grad: Any, viewpoint_grad: Any, reduction: int,
    place: Any,
) -> None:  # fmt: skip
    some = viewpoint_logits if identity_logits is None else identity_logits
    launch(
        "cross_entropy_backward_flat", *_rows(identity_logits), *_rows(viewpoint_logits),
        *_labels(viewpoint_logits, identity, viewpoint, mask), statistics, identity_upstream, viewpoint_upstream,
        identity_grad, viewpoint_grad, dtype_code(some), some.shape[0], some.shape[1], reduction,
    )  # fmt: skip
