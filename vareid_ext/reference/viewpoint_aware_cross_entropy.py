"""Viewpoint-aware soft-label cross-entropy (VA-reID, AAAI 2020: the adaptive label L_y and VALSR L_v, print corrected).

One formula serves every head. The logits ``x [N, K, V]`` of sample i have one softmax ``r`` over all existing
(identity, view) subclasses; an identity head is the case V = 1. With ``y`` the identity, ``w [V]`` the distribution
over the views (one-hot for a known viewpoint, uniform over the existing views of y for an unknown one), ``E`` the
number of existing subclasses and ``E_y`` that of identity y::

    eps1 = alpha (1 - sum_k r[y, k])       adaptive; a constant (epsilon or 0) otherwise; 0 where E = E_y
    eps2 = alpha (1 - sum_k w[k] r[y, k])  0 where E_y = 1

    t[y, k]      = (1 - eps1 - eps2) w[k] + eps2 (1 - w[k]) / (E_y - 1)
    t[j != y, k] = eps1 / (E - E_y)

    loss_i = - sum t log r,      d loss_i / d x = r - t

The targets are constants in the gradient. A subclass that does not exist has probability, target and gradient 0, and
one whose target is 0 contributes 0 even where its log-probability is -inf. Half types are computed in float32.

A row is summarised by five numbers, ``statistics [5, N]`` in float64: the largest logit m, 1 / sum exp(x - m),
eps1 / (E - E_y), 1 - eps1 - eps2, and eps2 / (E_y - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.reference import accumulator_dtype

STATISTICS = 5


def view_distribution(
    identity: Tensor, viewpoint: Tensor | None, views: int, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The distribution ``w`` over the views of each sample.

    Args:
        identity: int64 [N].
        viewpoint: int64 [N] with -1 for unknown, a floating [N, V], or None where V = 1.
        views: V.
        mask: bool [K, V], the subclasses that exist; None for all.
        dtype: of the result.

    Returns:
        w [N, V].
    """
    if viewpoint is None:
        return torch.ones(identity.shape[0], 1, dtype=dtype, device=identity.device)
    if viewpoint.is_floating_point():
        return viewpoint.to(dtype)
    if mask is None:
        unknown = torch.full((1, views), 1 / views, dtype=dtype, device=identity.device)
    else:
        exists = mask[identity].to(dtype)
        unknown = exists / exists.sum(1, keepdim=True)
    one_hot = (torch.arange(views, device=identity.device) == viewpoint[:, None]).to(dtype)
    return torch.where((viewpoint < 0)[:, None], unknown, one_hot)


def _wide(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits in the type they are computed in; -inf where a subclass does not exist."""
    wide = logits.to(accumulator_dtype(logits.dtype))
    return wide if mask is None else wide.masked_fill(~mask, -torch.inf)


def _existing_views(identity: Tensor, views: int, mask: Tensor | None) -> Tensor:
    """bool [N, V]: the views of each sample's identity that exist."""
    if mask is None:
        return torch.ones(identity.shape[0], views, dtype=torch.bool, device=identity.device)
    return mask[identity]


def _is_own(identity: Tensor, identities: int) -> Tensor:
    """bool [N, K, 1]: which subclasses belong to the sample's identity."""
    return (torch.arange(identities, device=identity.device) == identity[:, None])[:, :, None]


def _own(values: Tensor, identity: Tensor) -> Tensor:
    """The values [N, V] of each sample's identity, of ``values [N, K, V]``."""
    return values.gather(1, identity[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]


def _own_target(w: Tensor, statistics: Tensor, exists: Tensor) -> Tensor:
    """t[y, k] [N, V]."""
    own, spread = statistics[3, :, None].to(w.dtype), statistics[4, :, None].to(w.dtype)
    return torch.where(exists, own * w + spread * (1 - w), 0)


def cross_entropy_forward(
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    adaptive: bool,
    alpha: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The loss of every row and what its closed-form gradient needs.

    Args:
        logits: x [N, K, V].
        identity: int64 [N] in [0, K).
        viewpoint: int64 [N] with -1 for unknown, floating [N, V], or None where V = 1.
        mask: bool [K, V], the subclasses that exist; None for all.
        adaptive: whether eps1 is adaptive.
        alpha: coefficient of the adaptive eps1 and of eps2.
        epsilon: eps1 where it is not adaptive.

    Returns:
        loss [N] (float64 for float64 logits, else float32) and statistics [5, N] (float64).
    """
    _, K, V = logits.shape
    x = _wide(logits, mask)
    exists = _existing_views(identity, V, mask)
    w = view_distribution(identity, viewpoint, V, mask, x.dtype)
    is_own = _is_own(identity, K)

    largest = x.flatten(1).amax(1)
    shifted = x - largest[:, None, None]
    total = shifted.exp().flatten(1).sum(1)
    own_shifted = _own(shifted, identity)
    own_probability = own_shifted.exp() / total[:, None]

    existing_of_identity = exists.sum(1)
    existing_of_others = (K * V if mask is None else mask.sum()) - existing_of_identity
    identity_error = (1 - own_probability.sum(1)).clamp(min=0)
    view_error = (1 - (w * own_probability).sum(1)).clamp(min=0)
    eps1 = alpha * identity_error if adaptive else torch.full_like(total, epsilon)
    eps1 = torch.where(existing_of_others > 0, eps1, 0)
    eps2 = torch.where(existing_of_identity > 1, alpha * view_error, 0)
    other = eps1 / existing_of_others.clamp(min=1)
    spread = eps2 / (existing_of_identity - 1).clamp(min=1)
    statistics = torch.stack([largest, 1 / total, other, 1 - eps1 - eps2, spread]).to(torch.float64)

    counted = ~is_own & (other > 0)[:, None, None]
    if mask is not None:
        counted = counted & mask
    sum_of_others = torch.where(counted, shifted, 0).flatten(1).sum(1)
    target = _own_target(w, statistics, exists)
    own_part = torch.where(target == 0, 0, target * own_shifted).sum(1)
    loss = total.log() - torch.where(other > 0, other * sum_of_others, 0) - own_part
    return loss, statistics


def cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
) -> Tensor:
    """``(r - t) * upstream``: the gradient [N, K, V] with respect to the logits, in their dtype.

    Args:
        upstream: gradient of each row's loss, [N], or [] for one that all rows share.
        logits: x [N, K, V]; identity, viewpoint and mask as in :func:`cross_entropy_forward`.
        statistics: float64 [5, N] of :func:`cross_entropy_forward`.
    """
    N, K, V = logits.shape
    x = _wide(logits, mask)
    largest, inverse = (statistics[column, :, None, None].to(x.dtype) for column in range(2))
    probability = (x - largest).exp() * inverse
    gradient = probability - _target(identity, viewpoint, mask, statistics, K, V, x.dtype)
    gradient = gradient * upstream.to(x.dtype).expand(N)[:, None, None]
    return (gradient if mask is None else torch.where(mask, gradient, 0)).to(logits.dtype)


def _target(
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    K: int,
    V: int,
    dtype: torch.dtype,
) -> Tensor:
    """t [N, K, V], from the statistics."""
    w = view_distribution(identity, viewpoint, V, mask, dtype)
    own = _own_target(w, statistics, _existing_views(identity, V, mask))
    target = torch.where(_is_own(identity, K), own[:, None], statistics[2, :, None, None].to(dtype))
    return target if mask is None else torch.where(mask, target, 0)


def soft_target(
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    adaptive: bool = True,
    alpha: float = 0.2,
    epsilon: float = 0.1,
) -> Tensor:
    """The targets ``t [N, K, V]`` of the loss, dense: what a plain soft-label cross-entropy would be given.

    Arguments as in :func:`cross_entropy_forward`; the result has the type the logits are computed in.
    """
    _, K, V = logits.shape
    _, statistics = cross_entropy_forward(logits.detach(), identity, viewpoint, mask, adaptive, alpha, epsilon)
    return _target(identity, viewpoint, mask, statistics, K, V, accumulator_dtype(logits.dtype))


def label_error(identity: Tensor, viewpoint: Tensor | None, mask: Tensor | None, K: int, V: int) -> tuple[int, int]:
    """What is wrong with labels, arguments as in :func:`cross_entropy_forward`: (code, row), or (0, 0).

    Codes: 1 identity out of range, 2 viewpoint out of range, 3 viewpoint on a view that the mask excludes, 4 weights
    that are negative or do not sum to 1 within 1e-4, 5 no view exists for an identity (which is the row). Of several
    errors the first of identities, mask and viewpoints, and there the first row.
    """
    bad = (identity < 0) | (identity >= K)
    if bool(bad.any()):
        return 1, int(bad.nonzero()[0])
    if mask is not None and not bool(mask.any(1).all()):
        return 5, int((~mask.any(1)).nonzero()[0])
    if viewpoint is None:
        return 0, 0
    if viewpoint.is_floating_point():
        code = 4 * ~((viewpoint >= 0).all(1) & ((viewpoint.sum(1) - 1).abs() <= 1e-4))
        used = viewpoint > 0
    else:
        code = 2 * ((viewpoint < -1) | (viewpoint >= V))
        used = viewpoint[:, None] == torch.arange(V, device=viewpoint.device)
    if mask is not None:
        code = torch.where((code == 0) & (used & ~mask[identity]).any(1), 3, code)
    bad = code != 0
    row = int(bad.int().argmax()) if bad.numel() else 0
    return int(code[row]) if bad.numel() else 0, row
