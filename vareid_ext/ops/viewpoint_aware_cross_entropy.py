"""Soft-label cross-entropy as operators; see :mod:`vareid_ext.reference.viewpoint_aware_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import check_dtype, check_floating, check_same_device, check_shape, refuse_forward_mode
from vareid_ext.ops._labels import (
    REDUCTION,
    check_batch,
    check_identity,
    check_label_values,
    check_mask,
    check_scalars,
    check_transformed_labels,
    check_viewpoint,
    label_error_slot,
    plain_viewpoint,
    reduce_rows,
    transforms_active,
    warn_of_alpha,
)
from vareid_ext.reference import viewpoint_aware_cross_entropy as reference
from vareid_ext.reference.angular_center import accumulator_dtype

_IDENTITY, _VIEWPOINT = 0, 1


def _anchor(identity_logits: Tensor | None, viewpoint_logits: Tensor | None) -> Tensor:
    present = identity_logits if identity_logits is not None else viewpoint_logits
    assert present is not None
    return present


@torch.library.custom_op("vareid::viewpoint_aware_cross_entropy_forward", mutates_args=())
def _forward(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    smoothing: str,
    alpha: float,
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    some = _anchor(identity_logits, viewpoint_logits)
    statistics = some.new_zeros((2, reference.STATISTICS, identity.shape[0]), dtype=torch.float64)
    identity_loss, viewpoint_loss = (some.new_empty((0,), dtype=accumulator_dtype(some.dtype)) for _ in range(2))
    if identity_logits is not None:
        check_label_values(identity, None, identity_logits.shape[1], 1, None)
        constant = epsilon if smoothing == "uniform" else 0.0
        loss, statistics[_IDENTITY] = reference.cross_entropy_forward(
            identity_logits[:, :, None], identity, None, None, smoothing == "adaptive", alpha, constant
        )
        identity_loss = reduce_rows(loss, reduction)
    if viewpoint_logits is not None:
        _, K, V = viewpoint_logits.shape
        check_label_values(identity, viewpoint, K, V, mask)
        loss, statistics[_VIEWPOINT] = reference.cross_entropy_forward(
            viewpoint_logits, identity, viewpoint, mask, True, alpha, 0.0
        )
        viewpoint_loss = reduce_rows(loss, reduction)
    return identity_loss, viewpoint_loss, statistics


@torch.library.custom_op("vareid::viewpoint_aware_cross_entropy_backward", mutates_args=())
def _backward(
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


@_forward.register_fake
def _(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    smoothing: str,
    alpha: float,
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    some = _anchor(identity_logits, viewpoint_logits)
    wide, N = accumulator_dtype(some.dtype), identity.shape[0]
    present = (N,) if reduction == "none" else ()
    return (
        some.new_empty((0,) if identity_logits is None else present, dtype=wide),
        some.new_empty((0,) if viewpoint_logits is None else present, dtype=wide),
        some.new_empty((2, reference.STATISTICS, N), dtype=torch.float64),
    )


@_backward.register_fake
def _(
    identity_upstream: Tensor | None,
    viewpoint_upstream: Tensor | None,
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    *_arguments: Any,
) -> tuple[Tensor, Tensor]:
    some = _anchor(identity_logits, viewpoint_logits)
    return (
        some.new_empty((0,) if identity_logits is None else identity_logits.shape),
        some.new_empty((0,) if viewpoint_logits is None else viewpoint_logits.shape),
    )


def _dense_rows(logits: Tensor | None) -> Tensor | None:
    """The logits themselves where each row is dense, else a dense copy."""
    if logits is None or logits.is_contiguous() or logits.shape[0] == 0 or logits[0].is_contiguous():
        return logits
    return logits.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _native_forward(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    smoothing: str,
    alpha: float,
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    some = _anchor(identity_logits, viewpoint_logits)
    N, K = some.shape[:2]
    V = 1 if viewpoint_logits is None else viewpoint_logits.shape[2]
    check_label_values(identity, viewpoint, K, V, mask)
    module, view, threads = _native.module(), _native.view, torch.get_num_threads()
    wide, shape = accumulator_dtype(some.dtype), (N,) if reduction == "none" else ()
    identity_loss = some.new_empty((0,) if identity_logits is None else shape, dtype=wide)
    viewpoint_loss = some.new_empty((0,) if viewpoint_logits is None else shape, dtype=wide)
    statistics = some.new_empty((2, reference.STATISTICS, N), dtype=torch.float64)
    if identity_logits is None or viewpoint_logits is None:
        statistics.zero_()  # an absent head's part stays 0
    workspace = some.new_empty(
        module.viewpoint_aware_cross_entropy_workspace_bytes(
            N, K, V, identity_logits is not None, viewpoint_logits is not None, some.is_cuda
        ),
        dtype=torch.uint8,
    )
    module.viewpoint_aware_cross_entropy_forward(
        view(_dense_rows(identity_logits)), view(_dense_rows(viewpoint_logits)), view(identity.contiguous()),
        view(_contiguous(viewpoint)), view(_contiguous(mask)), view(identity_loss), view(viewpoint_loss),
        view(statistics), smoothing == "adaptive", alpha, epsilon if smoothing == "uniform" else 0.0,
        REDUCTION.index(reduction), view(label_error_slot(some.device)), view(workspace), threads, _stream(some),
    )  # fmt: skip
    return identity_loss, viewpoint_loss, statistics


def _native_backward(
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
    some, view = _anchor(identity_logits, viewpoint_logits), _native.view
    identity_grad = some.new_empty((0,) if identity_logits is None else identity_logits.shape)
    viewpoint_grad = some.new_empty((0,) if viewpoint_logits is None else viewpoint_logits.shape)
    _native.module().viewpoint_aware_cross_entropy_backward(
        view(_contiguous(identity_upstream)), view(_contiguous(viewpoint_upstream)),
        view(_dense_rows(identity_logits)), view(_dense_rows(viewpoint_logits)), view(identity.contiguous()),
        view(_contiguous(viewpoint)), view(_contiguous(mask)), view(statistics.contiguous()),
        view(identity_grad), view(viewpoint_grad), REDUCTION.index(reduction), torch.get_num_threads(), _stream(some),
    )  # fmt: skip
    return identity_grad, viewpoint_grad


def _stream(tensor: Tensor) -> int:
    return _native.stream(tensor) if tensor.is_cuda else 0


for _device_type in ("cpu", "cuda"):
    _native.register(_forward, _device_type)(_native_forward)
    _native.register(_backward, _device_type)(_native_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _smoothing, _alpha, _epsilon, ctx.reduction = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, identity_upstream: Tensor | None, viewpoint_upstream: Tensor | None, _unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    identity_logits, viewpoint_logits, *rest = ctx.saved_tensors
    if identity_upstream is None or not ctx.needs_input_grad[0]:
        identity_logits = None
    if viewpoint_upstream is None or not ctx.needs_input_grad[1]:
        viewpoint_logits = None
    if identity_logits is None and viewpoint_logits is None:
        return (None,) * 9
    run = _native.shortcut(_backward, identity_upstream, viewpoint_upstream, identity_logits, viewpoint_logits, *rest)
    identity_grad, viewpoint_grad = run(
        identity_upstream if identity_logits is not None else None,
        viewpoint_upstream if viewpoint_logits is not None else None,
        identity_logits, viewpoint_logits, *rest, ctx.reduction,
    )  # fmt: skip
    return (
        None if identity_logits is None else identity_grad,
        None if viewpoint_logits is None else viewpoint_grad,
        *(None,) * 7,
    )


def _refuse_double_backward(ctx: Any, *_grads: Tensor) -> None:
    raise RuntimeError("cross-entropy: double backward is not supported (its gradient is a closed form)")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_double_backward)


class _Losses(torch.autograd.Function):
    """``_forward`` with its registered gradient, but without the operator's layers in the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _native.shortcut(_forward, *inputs[:5])(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *upstreams)


def _losses(
    identity_logits: Tensor | None,
    viewpoint_logits: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    smoothing: str,
    alpha: float,
    epsilon: float,
    reduction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The losses of the heads that have logits, by the operator, or composed where torch.func asks for it."""
    identity = identity.to(torch.int64)
    viewpoint = None if viewpoint is None else plain_viewpoint(viewpoint)
    if not transforms_active():
        refuse_forward_mode("cross-entropy", *(x for x in (identity_logits, viewpoint_logits) if x is not None))
        run = _forward if torch.compiler.is_compiling() else _Losses.apply
        identity_loss, viewpoint_loss, _ = run(
            identity_logits, viewpoint_logits, identity, viewpoint, mask, smoothing, alpha, epsilon, reduction
        )
        return identity_loss, viewpoint_loss
    composed: list[Tensor | None] = [None, None]
    if identity_logits is not None:
        check_transformed_labels(identity, None, identity_logits.shape[1], 1, None)
        constant = epsilon if smoothing == "uniform" else 0.0
        composed[_IDENTITY] = reference.differentiable(
            identity_logits[:, :, None], identity, None, None, smoothing == "adaptive", alpha, constant
        )
    if viewpoint_logits is not None:
        _, K, V = viewpoint_logits.shape
        check_transformed_labels(identity, viewpoint, K, V, mask)
        composed[_VIEWPOINT] = reference.differentiable(viewpoint_logits, identity, viewpoint, mask, True, alpha, 0.0)
    identity_rows, viewpoint_rows = (None if loss is None else reduce_rows(loss, reduction) for loss in composed)
    return identity_rows, viewpoint_rows


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
    loss, _ = _losses(logits, None, identity, None, None, smoothing, alpha, epsilon, reduction)
    assert loss is not None
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
    N, K, V = logits.shape
    check_identity(identity, N, "logits", logits)
    check_viewpoint(viewpoint, N, V, "logits", logits)
    check_mask(mask, K, V, "logits", logits)
    check_scalars("adaptive", alpha, 0.0, reduction)
    check_batch(N, K * V, reduction, "logits")
    warn_of_alpha(alpha, V)
    _, loss = _losses(None, logits, identity, viewpoint, mask, "adaptive", alpha, 0.0, reduction)
    assert loss is not None
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
    V = viewpoint_logits.shape[2]
    check_identity(identity, N, "identity_logits", identity_logits)
    check_viewpoint(viewpoint, N, V, "identity_logits", identity_logits)
    check_mask(mask, K, V, "identity_logits", identity_logits)
    check_scalars(smoothing, alpha, epsilon, reduction)
    check_batch(N, K * V, reduction, "identity_logits")
    warn_of_alpha(alpha, V)
    identity_loss, viewpoint_loss = _losses(
        identity_logits, viewpoint_logits, identity, viewpoint, mask, smoothing, alpha, epsilon, reduction
    )
    assert identity_loss is not None
    assert viewpoint_loss is not None
    return identity_loss, viewpoint_loss
