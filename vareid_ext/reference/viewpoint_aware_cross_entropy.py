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


def _is_own(identity: Tensor, identities: int, first: int) -> Tensor:
    """bool [N, K, 1]: which subclasses of the identities from `first` on belong to the sample's."""
    numbers = torch.arange(first, first + identities, device=identity.device)
    return (numbers == identity[:, None])[:, :, None]


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
    others, own = summarise_rows(logits, identity, mask)
    loss, statistics = finish_rows(others, own, identity, viewpoint, mask, adaptive, alpha, epsilon)
    return loss.to(accumulator_dtype(logits.dtype)), statistics


def summarise_rows(logits: Tensor, identity: Tensor, mask: Tensor | None, first: int = 0) -> tuple[Tensor, Tensor]:
    """What each row's loss needs of some identities' logits.

    Args:
        logits: x [N, k, V] of the identities [first, first + k), of which there may be none.
        identity, mask: of all K identities, as in :func:`cross_entropy_forward`.
        first: number of the first of these identities.

    Returns:
        others [N, 4]: of the subclasses of other identities the largest logit (-inf where there is none), the sum of
        exp(x - largest), the sum of the logits, and how many exist; and own [N, V], the logits of the sample's
        identity, 0 where that is not here. Both float64.
    """
    identities = logits.shape[1]
    here = None if mask is None else mask[first : first + identities]
    x, is_own = _wide(logits, here), _is_own(identity, identities, first)
    other = ~is_own if here is None else ~is_own & here
    other = other.expand(x.shape)
    nothing = x.new_full((x.shape[0], 1), -torch.inf)
    largest = torch.cat([nothing, x.masked_fill(~other, -torch.inf).flatten(1)], 1).amax(1)
    shift = torch.where(largest == -torch.inf, 0, largest)[:, None, None]
    total, of_logits, count = (
        torch.where(other, values, 0).flatten(1).sum(1, dtype=torch.float64)
        for values in ((x - shift).exp(), x, torch.ones_like(x))
    )
    own = torch.where(is_own, logits, 0).sum(1, dtype=torch.float64)
    return torch.stack([largest.double(), total, of_logits, count], 1), own


def merge_summaries(others: Tensor) -> Tensor:
    """One summary [N, 4] of each row, of any number [N, parts, 4] of different identities each."""
    nothing = others.new_tensor([-torch.inf, 0, 0, 0]).expand(others.shape[0], 1, 4)
    others = torch.cat([nothing, others], 1)
    largest = others[:, :, 0].amax(1, keepdim=True)
    scale = torch.where(others[:, :, 0] == largest, 1, (others[:, :, 0] - largest).exp())
    total = (others[:, :, 1] * scale).sum(1, keepdim=True)
    return torch.cat([largest, total, others[:, :, 2:].sum(1)], 1)


def finish_rows(
    others: Tensor,
    own: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    adaptive: bool,
    alpha: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The loss [N] and the statistics [5, N], float64, of what :func:`summarise_rows` gives for all identities."""
    V = own.shape[1]
    largest_other, total_of_others, sum_of_others, existing_of_others = others.unbind(1)
    exists = _existing_views(identity, V, mask)
    w = view_distribution(identity, viewpoint, V, mask, torch.float64)
    own = own.masked_fill(~exists, -torch.inf)

    largest = torch.maximum(largest_other, own.amax(1))
    shifted = own - largest[:, None]
    terms = shifted.exp()
    of_identity, of_view = terms.sum(1), (w * terms).sum(1)
    scale = torch.where(largest_other == largest, 1, (largest_other - largest).exp())
    total = of_identity + total_of_others * scale

    existing_of_identity = exists.sum(1)
    identity_error, view_error = ((1 - part / total).clamp(min=0) for part in (of_identity, of_view))
    eps1 = alpha * identity_error if adaptive else torch.full_like(total, epsilon)
    eps1 = torch.where(existing_of_others > 0, eps1, 0)
    eps2 = torch.where(existing_of_identity > 1, alpha * view_error, 0)
    other = eps1 / existing_of_others.clamp(min=1)
    spread = eps2 / (existing_of_identity - 1).clamp(min=1)
    statistics = torch.stack([largest, 1 / total, other, 1 - eps1 - eps2, spread])

    target = _own_target(w, statistics, exists)
    own_part = torch.where(target == 0, 0, target * shifted).sum(1)
    others_part = torch.where(other > 0, other * (sum_of_others - existing_of_others * largest), 0)
    return total.log() - others_part - own_part, statistics


def cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    first: int = 0,
) -> Tensor:
    """``(r - t) * upstream``: the gradient [N, k, V] with respect to the logits, in their dtype.

    Args:
        upstream: gradient of each row's loss, [N], or [] for one that all rows share.
        logits: x [N, k, V] of the identities [first, first + k); identity, viewpoint and mask as in
            :func:`cross_entropy_forward`.
        statistics: float64 [5, N] of :func:`cross_entropy_forward`.
        first: number of the first of these identities.
    """
    N, identities, V = logits.shape
    here = None if mask is None else mask[first : first + identities]
    x = _wide(logits, here)
    largest, inverse = (statistics[column, :, None, None].to(x.dtype) for column in range(2))
    probability = (x - largest).exp() * inverse
    gradient = probability - _target(identity, viewpoint, mask, statistics, identities, V, x.dtype, first)
    gradient = gradient * upstream.to(x.dtype).expand(N)[:, None, None]
    return (gradient if here is None else torch.where(here, gradient, 0)).to(logits.dtype)


def _target(
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    identities: int,
    V: int,
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """t [N, k, V] of the identities [first, first + k), from the statistics."""
    w = view_distribution(identity, viewpoint, V, mask, dtype)
    own = _own_target(w, statistics, _existing_views(identity, V, mask))
    target = torch.where(_is_own(identity, identities, first), own[:, None], statistics[2, :, None, None].to(dtype))
    return target if mask is None else torch.where(mask[first : first + identities], target, 0)


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
