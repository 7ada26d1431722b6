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
)
from vareid_ext.ops._operator import add_gradient, contiguous, define
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import angular_center as reference


def _empty_forward(W: Tensor, U: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (K, V, _), wide, new = U.shape, accumulator_dtype(W.dtype), W.new_empty
    return new((), dtype=wide), new((K, V), dtype=wide), new((K,), dtype=wide), new((K, V), dtype=wide)


def _native_forward(W: Tensor, U: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_forward(W, U, mask)
    _native.launch("angular_center_forward", *map(contiguous, (W, U, mask)), *outputs, on=W)
    return outputs


def _empty_backward(upstream: Tensor, W: Tensor, U: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, need_W, need_U = arguments  # a gradient that is not needed is empty: an operator has to return something
    return W.new_empty(W.shape if need_W else 0), U.new_empty(U.shape if need_U else 0)


def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, need_W, need_U = arguments
    grad_W, grad_U = reference.angular_center_backward(*given)
    return grad_W if need_W else grad_W.new_empty(0), grad_U if need_U else grad_U.new_empty(0)


def _native_backward(upstream: Tensor, W: Tensor, U: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *saved, need_W, need_U = arguments
    grad_W, grad_U = _empty_backward(upstream, W, U, *arguments)
    _native.launch(
        "angular_center_backward", upstream, *map(contiguous, (W, U, *saved)), grad_W if need_W else None,
        grad_U if need_U else None, on=W,
    )  # fmt: skip
    return grad_W, grad_U


_forward = define(
    "angular_center_forward(Tensor W, Tensor U, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_forward,
    reference=reference.angular_center_forward,
    native=_native_forward,
)
_backward = define(
    "angular_center_backward(Tensor upstream, Tensor W, Tensor U, Tensor? mask, Tensor cosine, Tensor identity_norm, "
    "Tensor viewpoint_norm, bool need_W, bool need_U) -> (Tensor, Tensor)",
    fake=_empty_backward,
    reference=_reference_backward,
    native=_native_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    need_W, need_U = ctx.needs_input_grad[:2]
    grad_W, grad_U = _backward(upstream, *ctx.saved_tensors, need_W, need_U)
    return grad_W if need_W else None, grad_U if need_U else None, None


add_gradient(_forward, _save, _differentiate)


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
        RuntimeError: double backward, forward-mode differentiation or ``torch.func.grad``.
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
    total = _forward(identity_centers, viewpoint_centers, mask)[0]
    if reduction == "sum":
        return total
    return total / (viewpoint_centers.shape[0] * viewpoint_centers.shape[1] if mask is None else mask.sum())
