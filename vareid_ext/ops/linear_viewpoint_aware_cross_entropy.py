"""Losses from features as operators; see :mod:`vareid_ext.reference.linear_viewpoint_aware_cross_entropy`.

With the mean or the sum, forward also makes the gradients, while it has the logits; backward only multiplies them by
the upstream gradient, in place, the first time. A second backward pass through the same graph, and reduction "none"
(whose upstream gradient differs from row to row), compute the logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops import _linear_tiles as tiles
from vareid_ext.ops._checks import (
    autocast_enabled,
    check_count,
    check_dtype,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
    has_memory,
)
from vareid_ext.ops._labels import (
    check_label_values,
    check_labels,
    check_scalars,
    plain_identity,
    plain_viewpoint,
    reduce_rows,
    smoothing_arguments,
)
from vareid_ext.ops._operator import add_gradient, contiguous, define
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import linear_viewpoint_aware_cross_entropy as reference

MEMORY_BUDGET = 256 * 2**20
"""Bytes for the logits that exist at one time."""

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
_IDENTITY, _VIEWPOINT = 0, 1


def _mean_share(reduction: str, N: int) -> float:
    return 1 / N if reduction == "mean" else 1.0


def _later_share(feature: Tensor, reduction: str) -> float:
    """The part of the gradients' factor that backward applies.

    float16 gets the mean's 1/N only there, where the loss scale is known: the gradient of one of many classes, divided
    by N, would be below the smallest float16.
    """
    return _mean_share(reduction, feature.shape[0]) if feature.dtype == torch.float16 else 1.0


class _Call(NamedTuple):
    """The arguments that forward and backward have in common, in their order."""

    feature: Tensor
    identity_centers: Tensor
    viewpoint_centers: Tensor
    identity: Tensor
    viewpoint: Tensor
    mask: Tensor | None
    adaptive: bool
    alpha: float
    epsilon: float
    reduction: str
    normalize: bool
    scale: float
    chunk_rows: int
    budget: int
    want_feature: bool
    want_identity: bool
    want_viewpoint: bool


def _run_heads(
    call: _Call, upstreams: tuple[Tensor, Tensor], share: float, native: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Losses [N], feature gradients and centre gradients of both heads; gradients that are not wanted are empty."""
    K, V = call.viewpoint_centers.shape[:2]
    check_label_values(call.identity, call.viewpoint, K, V, call.mask)
    feature = call.feature.detach()
    heads = (
        tiles.Head(call.identity_centers.detach()[:, None], call.identity, None, None, call.adaptive, call.alpha,
                   call.epsilon, call.normalize, call.scale),
        tiles.Head(call.viewpoint_centers.detach(), call.identity, call.viewpoint, call.mask, True, call.alpha, 0.0,
                   call.normalize, call.scale),
    )  # fmt: skip
    losses, feature_gradients, centers_gradients = [], [], []
    with torch.no_grad(), torch.autocast(feature.device.type, enabled=False):
        for head, upstream, want_centers in zip(
            heads, upstreams, (call.want_identity, call.want_viewpoint), strict=True
        ):
            feature_gradient: Tensor | None
            centers_gradient: Tensor | None
            if native:
                head = head._replace(
                    centers=head.centers.contiguous(), identity=head.identity.contiguous(),
                    viewpoint=contiguous(head.viewpoint), mask=contiguous(head.mask),
                )  # fmt: skip
                loss, feature_gradient, centers_gradient = tiles.run_head(
                    feature.contiguous(), head, upstream, share, call.budget, call.chunk_rows, call.want_feature,
                    want_centers,
                )  # fmt: skip
            else:
                loss, feature_gradient, centers_gradient = reference.linear_head(feature, *head, upstream * share)
            losses.append(loss)
            feature_gradients.append(_or_empty(feature_gradient if call.want_feature else None, feature))
            centers_gradients.append(_or_empty(centers_gradient if want_centers else None, feature))
    if call.want_identity:
        centers_gradients[_IDENTITY] = centers_gradients[_IDENTITY][:, 0]
    return losses, feature_gradients, centers_gradients


def _or_empty(gradient: Tensor | None, some: Tensor) -> Tensor:
    return some.new_empty((0,)) if gradient is None else gradient


def _forward_impl(native: bool, call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    one = call.feature.new_ones((), dtype=accumulator_dtype(call.feature.dtype))
    share = _mean_share(call.reduction, call.feature.shape[0]) / _later_share(call.feature, call.reduction)
    losses, feature_gradients, centers_gradients = _run_heads(call, (one, one), share, native)
    identity_loss, viewpoint_loss = (reduce_rows(loss, call.reduction) for loss in losses)
    return (
        identity_loss, viewpoint_loss, feature_gradients[0], feature_gradients[1], centers_gradients[0],
        centers_gradients[1],
    )  # fmt: skip


def _backward_impl(
    native: bool, identity_upstream: Tensor, viewpoint_upstream: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    upstreams = identity_upstream.contiguous(), viewpoint_upstream.contiguous()
    share = _mean_share(call.reduction, call.feature.shape[0])
    _, feature_gradients, centers_gradients = _run_heads(call, upstreams, share, native)
    if call.want_feature:
        feature_gradients[0] += feature_gradients[1]
    return feature_gradients[0], centers_gradients[0], centers_gradients[1]


def _empty_gradients(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    new = call.feature.new_empty
    return (
        new(call.feature.shape if call.want_feature else (0,)),
        new(call.identity_centers.shape if call.want_identity else (0,)),
        new(call.viewpoint_centers.shape if call.want_viewpoint else (0,)),
    )


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    feature_gradient, *centers_gradients = _empty_gradients(call)
    wide, shape = accumulator_dtype(call.feature.dtype), (call.feature.shape[0],) if call.reduction == "none" else ()
    losses = [call.feature.new_empty(shape, dtype=wide) for _ in range(2)]
    return *losses, feature_gradient, torch.empty_like(feature_gradient), *centers_gradients


_CALL = (
    "Tensor feature, Tensor identity_centers, Tensor viewpoint_centers, Tensor identity, Tensor viewpoint, "
    "Tensor? mask, bool adaptive, float alpha, float epsilon, str reduction, bool normalize, float scale, "
    "SymInt chunk_rows, SymInt budget, bool want_feature, bool want_identity, bool want_viewpoint"
)  # the fields of _Call
_forward = define(
    f"linear_viewpoint_aware_cross_entropy_forward({_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    reference=lambda *call: _forward_impl(False, _Call(*call)),
    native=lambda *call: _forward_impl(True, _Call(*call)),
)
_backward = define(
    "linear_viewpoint_aware_cross_entropy_backward(Tensor identity_upstream, Tensor viewpoint_upstream, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)",
    fake=lambda _identity, _viewpoint, *call: _empty_gradients(_Call(*call)),
    reference=lambda identity, viewpoint, *call: _backward_impl(False, identity, viewpoint, _Call(*call)),
    native=lambda identity, viewpoint, *call: _backward_impl(True, identity, viewpoint, _Call(*call)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.mode = inputs[6:14]
    ctx.reduction = inputs[9]
    made = any(inputs[14:17])
    ctx.gradients = output[2:] if made else None
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, identity_upstream: Tensor | None, viewpoint_upstream: Tensor | None, *_unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    feature, need = tensors[0], ctx.needs_input_grad[:3]
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is not None:
        made = _scaled(gradients, feature, ctx.reduction, identity_upstream, viewpoint_upstream, need)
        return *made, *(None,) * 14
    zero = feature.new_zeros(
        (feature.shape[0],) if ctx.reduction == "none" else (), dtype=accumulator_dtype(feature.dtype)
    )
    computed = _backward(
        zero if identity_upstream is None else identity_upstream,
        zero if viewpoint_upstream is None else viewpoint_upstream,
        *tensors, *ctx.mode, *need,
    )  # fmt: skip
    return *(gradient if wanted else None for gradient, wanted in zip(computed, need, strict=True)), *(None,) * 14


def _times(gradient: Tensor, upstream: Tensor, share: float) -> Tensor:
    """``gradient * upstream * share``: in place, but out of place while it is traced or batched.

    The kernel does nothing where the factor is 1, and looks at it where it lies.
    """
    factor = upstream if share == 1 else upstream * share
    if type(gradient) is not Tensor or not has_memory(upstream):
        return gradient * factor.to(gradient.dtype)
    if not (gradient.is_contiguous() and _native.available(gradient.device)):
        return gradient.mul_(factor)
    _native.launch("linear_viewpoint_aware_cross_entropy_scale", gradient, factor, on=gradient)
    return gradient


def _scaled(
    gradients: _Gradients,
    feature: Tensor,
    reduction: str,
    identity_upstream: Tensor | None,
    viewpoint_upstream: Tensor | None,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that forward made, times the upstream gradients."""
    share = _later_share(feature, reduction)
    feature_gradient: Tensor | None = None
    centers_gradients: list[Tensor | None] = [None, None]
    for h, upstream in enumerate((identity_upstream, viewpoint_upstream)):
        if upstream is None:
            continue
        if need[0]:
            part = _times(gradients[h], upstream, share)
            feature_gradient = part if feature_gradient is None else feature_gradient + part
        if need[1 + h]:
            centers_gradients[h] = _times(gradients[2 + h], upstream, share)
    return feature_gradient, centers_gradients[_IDENTITY], centers_gradients[_VIEWPOINT]


add_gradient(_forward, _save, _differentiate)


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in the type that autocast, where it is on, gives the operands of a linear layer."""
    if tensor.dtype != torch.float64 and autocast_enabled(tensor.device):
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def linear_viewpoint_aware_cross_entropy(
    feature: Tensor,
    identity_centers: Tensor,
    viewpoint_centers: Tensor,
    identity: Tensor,
    viewpoint: Tensor,
    *,
    smoothing: str = "adaptive",
    alpha: float = 0.2,
    epsilon: float = 0.1,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    scale: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both losses of VA-reID from features and centres, without ever holding all logits: ``(L_y, L_v)``.

    Equivalent to :func:`vareid_ext.viewpoint_aware_cross_entropy` of the logits ``feature @ identity_centers.T`` and
    ``feature @ viewpoint_centers.T`` (or of ``scale`` times the cosines), in chunks whose logits stay within 256 MiB
    beside the gradients, however many identities there are (but at least a row, or 16 identities of the batch). See
    :mod:`vareid_ext.reference.linear_viewpoint_aware_cross_entropy`.

    Args:
        feature: [N, D], float32, float64, float16 or bfloat16. Under autocast, features and centres are cast as for a
            linear layer; products follow PyTorch's settings (TF32, say), losses are computed in float32 or wider.
        identity_centers: W [K, D], of feature's dtype (any under autocast) and device.
        viewpoint_centers: U [K, V, D], likewise.
        identity: integer [N] in [0, K).
        viewpoint: integer [N] in [0, V), -1 for unknown; or a distribution over the views, floating [N, V].
        smoothing: of L_y: "adaptive", "uniform" or "none". L_v is always adaptive.
        alpha: coefficient of the adaptive smoothing of L_y and of L_v, in [0, 0.5).
        epsilon: constant of the uniform mode of L_y, in [0, 1).
        mask: bool [K, V], the subclasses that exist; None for all. It concerns L_v.
        reduction: "mean", "sum" or "none". With "none" backward computes the logits again.
        normalize: whether logits are cosines of features and centres, times ``scale``; zero vectors have cosine 0.
        scale: factor of the cosines, finite and above 0; only with ``normalize``.
        chunk_rows: rows of a chunk, at least 1 (in half types each chunk rounds the centres' gradients once more); None
            to let the memory budget decide.

    Returns:
        (L_y, L_v), each [] or [N] (none); float64 for float64 features, else float32. They share one node of the graph.

    Raises:
        TypeError, ValueError, IndexError: as :func:`vareid_ext.viewpoint_aware_cross_entropy`.
    """
    check_floating("feature", feature)
    check_floating("identity_centers", identity_centers)
    check_floating("viewpoint_centers", viewpoint_centers)
    for name, centers in (("identity_centers", identity_centers), ("viewpoint_centers", viewpoint_centers)):
        check_same_device(name, centers, "feature", feature)
    feature, identity_centers, viewpoint_centers = map(_autocast, (feature, identity_centers, viewpoint_centers))
    check_shape("feature", feature, ("N", "D"))
    N, D = feature.shape
    check_shape("identity_centers", identity_centers, ("K", D))
    K = identity_centers.shape[0]
    check_shape("viewpoint_centers", viewpoint_centers, (K, "V", D))
    V = viewpoint_centers.shape[1]
    for name, centers in (("identity_centers", identity_centers), ("viewpoint_centers", viewpoint_centers)):
        check_dtype(name, centers, feature.dtype)
    check_scalars(smoothing, alpha, epsilon, reduction)
    check_labels("feature", feature, (N, K, V), identity, viewpoint, mask, reduction, alpha)
    check_flag("normalize", normalize)
    check_number("scale", scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: {scale} was given; it must be finite and above 0")
    if scale != 1 and not normalize:
        raise ValueError(f"scale: {scale} was given, but it has an effect only with normalize=True")
    if chunk_rows is not None:
        chunk_rows = check_count("chunk_rows", chunk_rows, 1)
    in_forward = torch.is_grad_enabled() and reduction != "none"
    identity_loss, viewpoint_loss, *_ = _forward(
        feature, identity_centers, viewpoint_centers, plain_identity(identity), plain_viewpoint(viewpoint), mask,
        *smoothing_arguments(smoothing, alpha, epsilon), reduction, normalize, float(scale), chunk_rows or 0,
        MEMORY_BUDGET, in_forward and feature.requires_grad, in_forward and identity_centers.requires_grad,
        in_forward and viewpoint_centers.requires_grad,
    )  # fmt: skip
    return identity_loss, viewpoint_loss
