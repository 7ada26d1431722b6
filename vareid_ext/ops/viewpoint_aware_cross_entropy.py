"""Soft-label cross-entropy as operators; see :mod:`vareid_ext.reference.viewpoint_aware_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import check_dtype, check_floating, check_same_device, check_shape
from vareid_ext.ops._labels import (
    REDUCTION,
    check_batch,
    check_identity,
    check_label_values,
    check_labels,
    check_scalars,
    label_error_slot,
    plain_identity,
    plain_viewpoint,
    reduce_rows,
    smoothing_arguments,
)
from vareid_ext.ops._operator import add_gradient, contiguous, define
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import viewpoint_aware_cross_entropy as reference

_IDENTITY, _VIEWPOINT = 0, 1
_DENSE = torch.contiguous_format


def _anchor(identity_logits: Tensor | None, viewpoint_logits: Tensor | None) -> Tensor:
    present = identity_logits if identity_logits is not None else viewpoint_logits
    assert present is not None
    return present


def _empty_losses(
    identity_logits: Tensor | None, viewpoint_logits: Tensor | None, identity: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the losses of both heads, empty where a head is absent, and for the statistics."""
    some = _anchor(identity_logits, viewpoint_logits)
    N, wide = identity.shape[0], accumulator_dtype(some.dtype)
    shape = (N,) if arguments[-1] == "none" else ()
    return (
        some.new_empty((0,) if identity_logits is None else shape, dtype=wide),
        some.new_empty((0,) if viewpoint_logits is None else shape, dtype=wide),
        some.new_empty((2, reference.STATISTICS, N), dtype=torch.float64),
    )


def _reference_forward(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    adaptive: bool,
    alpha: float,
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    identity_loss, viewpoint_loss, statistics = _empty_losses(identity_logits, viewpoint_logits, identity, reduction)
    statistics.zero_()
    _check_labels(identity_logits, viewpoint_logits, identity, viewpoint, mask)
    if identity_logits is not None:
        loss, statistics[_IDENTITY] = reference.cross_entropy_forward(
            identity_logits[:, :, None], identity, None, None, adaptive, alpha, epsilon
        )
        identity_loss = reduce_rows(loss, reduction)
    if viewpoint_logits is not None:
        loss, statistics[_VIEWPOINT] = reference.cross_entropy_forward(
            viewpoint_logits, identity, viewpoint, mask, True, alpha, 0.0
        )
        viewpoint_loss = reduce_rows(loss, reduction)
    return identity_loss, viewpoint_loss, statistics


def _native_forward(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    adaptive: bool,
    alpha: float,
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    some = _anchor(identity_logits, viewpoint_logits)
    K, V = _check_labels(identity_logits, viewpoint_logits, identity, viewpoint, mask)
    outputs = _empty_losses(identity_logits, viewpoint_logits, identity, reduction)
    if identity_logits is None or viewpoint_logits is None:
        outputs[2].zero_()  # an absent head's part stays 0
    workspace_bytes = _native.module().viewpoint_aware_cross_entropy_workspace_bytes(
        identity.shape[0], K, V, identity_logits is not None, viewpoint_logits is not None, some.is_cuda
    )
    workspace = some.new_empty(workspace_bytes, dtype=torch.uint8)
    label_error = label_error_slot(some.device) if some.is_cuda else None
    _native.launch(
        "viewpoint_aware_cross_entropy_forward", _dense_rows(identity_logits), _dense_rows(viewpoint_logits),
        identity.contiguous(), contiguous(viewpoint), contiguous(mask), *outputs, adaptive, alpha, epsilon,
        REDUCTION.index(reduction), label_error, workspace, on=some,
    )  # fmt: skip
    return outputs


def _empty_gradients(
    identity_upstream: Tensor | None,
    viewpoint_upstream: Tensor | None,
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    *_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Room for the gradients of both heads, empty where a head is absent."""
    empty = _anchor(identity_logits, viewpoint_logits).new_empty
    return (
        empty((0,)) if identity_logits is None else torch.empty_like(identity_logits, memory_format=_DENSE),
        empty((0,)) if viewpoint_logits is None else torch.empty_like(viewpoint_logits, memory_format=_DENSE),
    )


def _reference_backward(
    identity_upstream: Tensor | None,
    viewpoint_upstream: Tensor | None,
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    some = _anchor(identity_logits, viewpoint_logits)
    identity_grad, viewpoint_grad = some.new_empty((0,)), some.new_empty((0,))
    share = 1 / identity.shape[0] if reduction == "mean" else 1.0
    if identity_logits is not None and identity_upstream is not None:
        identity_grad = reference.cross_entropy_backward(
            identity_upstream * share, identity_logits[:, :, None], identity, None, None, statistics[_IDENTITY]
        )[:, :, 0]
    if viewpoint_logits is not None and viewpoint_upstream is not None:
        viewpoint_grad = reference.cross_entropy_backward(
            viewpoint_upstream * share, viewpoint_logits, identity, viewpoint, mask, statistics[_VIEWPOINT]
        )
    return identity_grad, viewpoint_grad


def _native_backward(
    identity_upstream: Tensor | None,
    viewpoint_upstream: Tensor | None,
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    *labels_and_statistics, reduction = arguments
    gradients = _empty_gradients(identity_upstream, viewpoint_upstream, identity_logits, viewpoint_logits)
    _native.launch(
        "viewpoint_aware_cross_entropy_backward", contiguous(identity_upstream), contiguous(viewpoint_upstream),
        _dense_rows(identity_logits), _dense_rows(viewpoint_logits), *map(contiguous, labels_and_statistics),
        *gradients, REDUCTION.index(reduction), on=gradients[0],
    )  # fmt: skip
    return gradients


def _check_labels(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
) -> tuple[int, int]:
    """K and V, after :func:`check_label_values`."""
    K = _anchor(identity_logits, viewpoint_logits).shape[1]
    V = 1 if viewpoint_logits is None else viewpoint_logits.shape[2]
    check_label_values(identity, viewpoint, K, V, mask)
    return K, V


def _dense_rows(logits: Tensor | None) -> Tensor | None:
    """The logits themselves where each row is dense, else a dense copy."""
    if logits is None or logits.is_contiguous() or logits.shape[0] == 0 or logits[0].is_contiguous():
        return logits
    return logits.contiguous()


_LOGITS_AND_LABELS = (
    "Tensor? identity_logits, Tensor? viewpoint_logits, Tensor identity, Tensor? viewpoint, Tensor? mask"
)
_forward = define(
    f"viewpoint_aware_cross_entropy_forward({_LOGITS_AND_LABELS}, bool adaptive, float alpha, float epsilon, "
    "str reduction) -> (Tensor, Tensor, Tensor)",
    fake=_empty_losses,
    reference=_reference_forward,
    native=_native_forward,
)
_backward = define(
    "viewpoint_aware_cross_entropy_backward(Tensor? identity_upstream, Tensor? viewpoint_upstream, "
    f"{_LOGITS_AND_LABELS}, Tensor statistics, str reduction) -> (Tensor, Tensor)",
    fake=_empty_gradients,
    reference=_reference_backward,
    native=_native_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _adaptive, _alpha, _epsilon, ctx.reduction = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, identity_upstream: Tensor | None, viewpoint_upstream: Tensor | None, _unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    identity_logits, viewpoint_logits, *rest = ctx.saved_tensors
    if identity_upstream is None or not ctx.needs_input_grad[0]:
        identity_logits = identity_upstream = None
    if viewpoint_upstream is None or not ctx.needs_input_grad[1]:
        viewpoint_logits = viewpoint_upstream = None
    if identity_logits is None and viewpoint_logits is None:
        return (None,) * 9
    identity_grad, viewpoint_grad = _backward(
        identity_upstream, viewpoint_upstream, identity_logits, viewpoint_logits, *rest, ctx.reduction
    )
    return (
        None if identity_logits is None else identity_grad,
        None if viewpoint_logits is None else viewpoint_grad,
        *(None,) * 7,
    )


add_gradient(_forward, _save, _differentiate)


def identity_cross_entropy(
    logits: Tensor,
    identity: Tensor,
    *,
    smoothing: str = "adaptive",
    alpha: float = 0.2,
    epsilon: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy over identities with the adaptive label of VA-reID (L_y), uniform smoothing (LSR), or none.

    Equivalent to ``-(target * log_softmax(logits, 1)).sum(1)`` with ``target = 1 - eps`` for the true identity and
    ``eps / (K - 1)`` for the others; eps is ``alpha (1 - softmax(logits)[identity])`` for each sample (adaptive),
    ``epsilon`` (uniform) or 0 (none), and a constant in the gradient. See
    :mod:`vareid_ext.reference.viewpoint_aware_cross_entropy`.

    Args:
        logits: [N, K], float32, float64, float16 or bfloat16; half types are computed in float32.
        identity: integer [N] in [0, K).
        smoothing: "adaptive", "uniform" or "none".
        alpha: coefficient of the adaptive mode, in [0, 0.5).
        epsilon: constant of the uniform mode, in [0, 1).
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, [] or [N] (none), at least 0; float64 for float64 logits, else float32. NaN or +Inf logits give NaN.

    Raises:
        TypeError, ValueError: dtype, shape, device or a scalar does not fit; the mean of an empty batch.
        IndexError: a label out of range (on CUDA without waiting for the device: the row's loss is NaN, and
            :func:`vareid_ext.raise_label_errors` or the next loss call raises).
    """
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", "K"))
    N, K = logits.shape
    check_identity(identity, N, "logits", logits)
    check_scalars(smoothing, alpha, epsilon, reduction)
    check_batch(N, K, reduction, "logits")
    smoothed = smoothing_arguments(smoothing, alpha, epsilon)
    loss: Tensor = _forward(logits, None, plain_identity(identity), None, None, *smoothed, reduction)[0]
    return loss


def viewpoint_cross_entropy(
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor,
    *,
    alpha: float = 0.2,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Viewpoint-aware label smoothing (VALSR, L_v): one softmax over all (identity, view) subclasses.

    See :mod:`vareid_ext.reference.viewpoint_aware_cross_entropy` for the formula and its source.

    Args:
        logits: [N, K, V], float32, float64, float16 or bfloat16; half types are computed in float32.
        identity: integer [N] in [0, K).
        viewpoint: integer [N] in [0, V), -1 for unknown; or a distribution over the views, floating [N, V],
            non-negative, its rows summing to 1 within 1e-4.
        alpha: coefficient of both adaptive smoothings, in [0, 0.5).
        mask: bool [K, V], the subclasses that exist; None for all. Every identity needs one.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, [] or [N] (none), at least 0; float64 for float64 logits, else float32. NaN or +Inf logits in an
        existing subclass give NaN; those of the others are not read.

    Raises:
        TypeError, ValueError: dtype, shape, device or a scalar does not fit; a view distribution or a mask that is
            impossible; the mean of an empty batch.
        IndexError: a label out of range (on CUDA without waiting for the device: the row's loss is NaN, and
            :func:`vareid_ext.raise_label_errors` or the next loss call raises).
    """
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", "K", "V"))
    check_scalars("adaptive", alpha, 0.0, reduction)
    check_labels("logits", logits, logits.shape, identity, viewpoint, mask, reduction, alpha)
    labels = plain_identity(identity), plain_viewpoint(viewpoint), mask
    loss: Tensor = _forward(None, logits, *labels, True, alpha, 0.0, reduction)[1]
    return loss


def viewpoint_aware_cross_entropy(
    identity_logits: Tensor,
    viewpoint_logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor,
    *,
    smoothing: str = "adaptive",
    alpha: float = 0.2,
    epsilon: float = 0.1,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Both losses of VA-reID in one launch: ``(L_y, L_v)``.

    Equivalent to ``identity_cross_entropy(identity_logits, identity, smoothing=..., alpha=..., epsilon=...)`` and
    ``viewpoint_cross_entropy(viewpoint_logits, identity, viewpoint, alpha=..., mask=...)``.

    Args:
        identity_logits: [N, K], float32, float64, float16 or bfloat16; half types are computed in float32.
        viewpoint_logits: [N, K, V], of the dtype and device of identity_logits.
        identity: integer [N] in [0, K).
        viewpoint: integer [N] in [0, V), -1 for unknown; or a distribution over the views, floating [N, V].
        smoothing: of L_y: "adaptive", "uniform" or "none". L_v is always adaptive.
        alpha: coefficient of the adaptive smoothing of L_y and of L_v, in [0, 0.5).
        epsilon: constant of the uniform mode of L_y, in [0, 1).
        mask: bool [K, V], the subclasses that exist; None for all. It concerns L_v.
        reduction: "mean", "sum" or "none".

    Returns:
        (L_y, L_v), each [] or [N] (none); float64 for float64 logits, else float32. They share one node of the graph:
        differentiate a combination of them, or pass ``retain_graph=True`` to the first of two backward calls.

    Raises:
        TypeError, ValueError, IndexError: as :func:`identity_cross_entropy` and :func:`viewpoint_cross_entropy`.
    """
    check_floating("identity_logits", identity_logits)
    check_shape("identity_logits", identity_logits, ("N", "K"))
    N, K = identity_logits.shape
    check_shape("viewpoint_logits", viewpoint_logits, (N, K, "V"))
    check_dtype("viewpoint_logits", viewpoint_logits, identity_logits.dtype)
    check_same_device("viewpoint_logits", viewpoint_logits, "identity_logits", identity_logits)
    check_scalars(smoothing, alpha, epsilon, reduction)
    check_labels(
        "identity_logits", identity_logits, viewpoint_logits.shape, identity, viewpoint, mask, reduction, alpha
    )
    labels = plain_identity(identity), plain_viewpoint(viewpoint), mask
    smoothed = smoothing_arguments(smoothing, alpha, epsilon)
    identity_loss, viewpoint_loss, _ = _forward(identity_logits, viewpoint_logits, *labels, *smoothed, reduction)
    return identity_loss, viewpoint_loss
