"""Angular center regularizer as an operator; the formula is in :mod:`vareid_ext.reference.angular_center`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_same_device,
    check_shape,
    refuse_forward_mode,
)
from vareid_ext.ops._labels import transforms_active
from vareid_ext.reference import angular_center as reference


@torch.library.custom_op("vareid::angular_center_forward", mutates_args=())
def _forward(
    identity_centers: Tensor, viewpoint_centers: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.angular_center_forward(identity_centers, viewpoint_centers, mask)


@torch.library.custom_op("vareid::angular_center_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    identity_centers: Tensor,
    viewpoint_centers: Tensor,
    mask: Tensor | None,
    cosine: Tensor,
    identity_norm: Tensor,
    viewpoint_norm: Tensor,
    need_identity: bool,
    need_viewpoint: bool,
) -> tuple[Tensor, Tensor]:
    # A gradient that is not needed comes back empty: an operator has to return something.
    grad_W, grad_U = reference.angular_center_backward(
        upstream, identity_centers, viewpoint_centers, mask, cosine, identity_norm, viewpoint_norm
    )
    return grad_W if need_identity else grad_W.new_empty(0), grad_U if need_viewpoint else grad_U.new_empty(0)


@_forward.register_fake
def _(
    identity_centers: Tensor, viewpoint_centers: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K, V, _ = viewpoint_centers.shape
    wide = reference.accumulator_dtype(identity_centers.dtype)
    new = identity_centers.new_empty
    return new((), dtype=wide), new((K, V), dtype=wide), new((K,), dtype=wide), new((K, V), dtype=wide)


@_backward.register_fake
def _(
    upstream: Tensor,
    identity_centers: Tensor,
    viewpoint_centers: Tensor,
    mask: Tensor | None,
    cosine: Tensor,
    identity_norm: Tensor,
    viewpoint_norm: Tensor,
    need_identity: bool,
    need_viewpoint: bool,
) -> tuple[Tensor, Tensor]:
    return (
        identity_centers.new_empty(identity_centers.shape if need_identity else 0),
        viewpoint_centers.new_empty(viewpoint_centers.shape if need_viewpoint else 0),
    )


def _stream(tensor: Tensor) -> int:
    return _native.stream(tensor) if tensor.is_cuda else 0


def _native_forward(
    identity_centers: Tensor, viewpoint_centers: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W, U = identity_centers.contiguous(), viewpoint_centers.contiguous()
    mask = None if mask is None else mask.contiguous()
    (K, V, _), wide = U.shape, reference.accumulator_dtype(W.dtype)
    loss, cosine = W.new_empty((), dtype=wide), W.new_empty((K, V), dtype=wide)
    identity_norm, viewpoint_norm = W.new_empty((K,), dtype=wide), W.new_empty((K, V), dtype=wide)
    view = _native.view
    _native.module().angular_center_forward(
        view(W), view(U), view(mask), view(loss), view(cosine), view(identity_norm), view(viewpoint_norm),
        torch.get_num_threads(), _stream(W),
    )  # fmt: skip
    return loss, cosine, identity_norm, viewpoint_norm


def _native_backward(
    upstream: Tensor,
    identity_centers: Tensor,
    viewpoint_centers: Tensor,
    mask: Tensor | None,
    cosine: Tensor,
    identity_norm: Tensor,
    viewpoint_norm: Tensor,
    need_identity: bool,
    need_viewpoint: bool,
) -> tuple[Tensor, Tensor]:
    W, U = identity_centers.contiguous(), viewpoint_centers.contiguous()
    mask = None if mask is None else mask.contiguous()
    grad_W, grad_U = W.new_empty(W.shape if need_identity else 0), U.new_empty(U.shape if need_viewpoint else 0)
    view = _native.view
    _native.module().angular_center_backward(
        view(upstream), view(W), view(U), view(mask), view(cosine.contiguous()), view(identity_norm.contiguous()),
        view(viewpoint_norm.contiguous()), view(grad_W if need_identity else None),
        view(grad_U if need_viewpoint else None), torch.get_num_threads(), _stream(W),
    )  # fmt: skip
    return grad_W, grad_U


for _device_type in ("cpu", "cuda"):
    _native.register(_forward, _device_type)(_native_forward)
    _native.register(_backward, _device_type)(_native_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    need_identity, need_viewpoint = ctx.needs_input_grad[:2]
    grad_W, grad_U = _backward(upstream, *ctx.saved_tensors, need_identity, need_viewpoint)
    return grad_W if need_identity else None, grad_U if need_viewpoint else None, None


def _refuse_double_backward(ctx: Any, *_grads: Tensor) -> None:
    raise RuntimeError("angular_center_regularizer: double backward is not supported (its gradient is a closed form)")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_double_backward)


def angular_center_regularizer(
    identity_centers: Tensor, viewpoint_centers: Tensor, *, mask: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Angular center regularizer: pulls every viewpoint centre towards the centre of its identity.

    Equivalent to ``sum over existing (j, k) of (1 - cos(W_j, U_jk))``; see
    :mod:`vareid_ext.reference.angular_center` for the formula, its gradients and the source.

    Args:
        identity_centers: W [K, D], float32, float64, float16 or bfloat16.
        viewpoint_centers: U [K, V, D], of W's dtype and device.
        mask: bool [K, V], the (identity, viewpoint) pairs that exist; None for all. The centres of the others are
            neither read nor moved.
        reduction: "sum" (as printed in the paper) or "mean" (over the existing pairs; NaN where there are none).

    Returns:
        A scalar in [0, 2 K V] (sum) or [0, 2] (mean); float64 for float64 centres, else float32. A zero vector has
        cosine 0 and gradient 0. NaN and Inf in an existing pair give NaN.

    Raises:
        TypeError: a dtype that is not floating, or two that differ.
        ValueError: shapes, devices or the reduction do not fit.
        RuntimeError: forward-mode differentiation or double backward, except by ``torch.func``.
    """
    check_floating("identity_centers", identity_centers)
    check_shape("identity_centers", identity_centers, ("K", "D"))
    K, D = identity_centers.shape
    check_shape("viewpoint_centers", viewpoint_centers, (K, "V", D))
    check_dtype("viewpoint_centers", viewpoint_centers, identity_centers.dtype)
    check_same_device("viewpoint_centers", viewpoint_centers, "identity_centers", identity_centers)
    check_choice("reduction", reduction, ("sum", "mean"))
    if mask is not None:
        check_shape("mask", mask, (K, viewpoint_centers.shape[1]))
        check_dtype("mask", mask, torch.bool)
        check_same_device("mask", mask, "identity_centers", identity_centers)
    if transforms_active():
        total = reference.angular_center(identity_centers, viewpoint_centers, mask)
    else:
        refuse_forward_mode("angular_center_regularizer", identity_centers, viewpoint_centers)
        total = _forward(identity_centers, viewpoint_centers, mask)[0]
    if reduction == "sum":
        return total
    return total / (viewpoint_centers.shape[0] * viewpoint_centers.shape[1] if mask is None else mask.sum())
