"""Viewpoint-aware cross-entropy of linear heads, from features and centres.

For each head, with features ``f [N, D]`` and centres ``C [K, V, D]`` (V = 1 for the identity head), the logits are
``x_ijk = f_i . C_jk``, or with ``normalize`` the hyper-sphere form ``x_ijk = scale cos(f_i, C_jk)``; the loss is that
of :mod:`vareid_ext.reference.viewpoint_aware_cross_entropy`. With ``g = d loss / d x`` (softmax - target)::

    d loss / d f_i  = sum_jk g_ijk C_jk        d loss / d C_jk = sum_i g_ijk f_i

and with ``normalize``, writing ``n(a) = a / |a|`` (0 for a zero vector) and ``P_a(b) = b - n(a) (n(a) . b)``::

    d loss / d f_i  = scale / |f_i|  P_{f_i}(sum_jk g_ijk n(C_jk))
    d loss / d C_jk = scale / |C_jk| P_{C_jk}(sum_i g_ijk n(f_i))

A zero vector has logits 0 and gradient 0. This module holds all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import viewpoint_aware_cross_entropy as rows
from vareid_ext.reference.angular_center import unit_vectors


def linear_logits(feature: Tensor, centers: Tensor, normalize: bool, scale: float) -> Tensor:
    """The logits [N, K, V] of ``feature [N, D]`` and ``centers [K, V, D]``, in the type they are computed in."""
    wide = accumulator_dtype(feature.dtype)
    f, C = feature.to(wide), centers.to(wide).flatten(0, 1)
    if normalize:
        f, C = scale * unit_vectors(f)[0], unit_vectors(C)[0]
    return (f @ C.T).unflatten(1, centers.shape[:2])


def linear_head(
    feature: Tensor,
    centers: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    adaptive: bool,
    alpha: float,
    epsilon: float,
    normalize: bool,
    scale: float,
    upstream: Tensor,
    first: int = 0,
    exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of one head.

    Args:
        feature: [N, D].
        centers: [K, V, D], of feature's dtype.
        identity, viewpoint, mask, adaptive, alpha, epsilon: as in
            :func:`vareid_ext.reference.viewpoint_aware_cross_entropy.cross_entropy_forward`.
        normalize: whether logits are cosines times ``scale``.
        scale: factor of the cosines.
        upstream: gradient of each row's loss, [N] or [].
        first: number of the first identity, where these are some of them.
        exchange: makes what :func:`vareid_ext.reference.viewpoint_aware_cross_entropy.summarise_rows` would give for
            all identities of what it gives for these.

    Returns:
        loss [N], gradient of feature [N, D] and of centers [K, V, D] (in their dtype).
    """
    wide = accumulator_dtype(feature.dtype)
    f, C = feature.to(wide), centers.to(wide).flatten(0, 1)
    logits = linear_logits(feature, centers, normalize, scale)
    summary = rows.summarise_rows(logits, identity, mask, first)
    others, own = summary if exchange is None else exchange(*summary)
    loss, statistics = rows.finish_rows(others, own, identity, viewpoint, mask, adaptive, alpha, epsilon)
    g = rows.cross_entropy_backward(upstream, logits, identity, viewpoint, mask, statistics, first).flatten(1)
    if normalize:
        (f_unit, f_inverse), (C_unit, C_inverse) = unit_vectors(f), unit_vectors(C)
        f_grad, C_grad = g @ C_unit, g.T @ f_unit
        f_grad = scale * f_inverse * (f_grad - f_unit * (f_unit * f_grad).sum(1, keepdim=True))
        C_grad = scale * C_inverse * (C_grad - C_unit * (C_unit * C_grad).sum(1, keepdim=True))
    else:
        f_grad, C_grad = g @ C, g.T @ f
    return loss.to(wide), f_grad.to(feature.dtype), C_grad.view(centers.shape).to(centers.dtype)
