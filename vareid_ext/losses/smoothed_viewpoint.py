"""Cross-entropy over (identity, viewpoint) pairs with fixed shares for the pair, the identity and all pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def smoothed_viewpoint_cross_entropy(
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor,
    *,
    mask: Tensor,
    other_views: float = 0.3,
    all_pairs: float = 0.1,
) -> Tensor:
    """Mean over the batch of ``-sum target log softmax`` over the existing pairs.

    The target gives `all_pairs` to all existing pairs alike, `other_views` to the identity's other views alike, and the
    rest to the pair itself, which also gets `other_views` where the identity has no other view.

    Args:
        logits: floating point [N, K, V]; computed in float32 or wider.
        identity: integer [N] in [0, K).
        viewpoint: integer [N] in [0, V), -1 for unknown: the views of the identity alike; or a distribution [N, V].
        mask: bool [K, V], the pairs that exist.
        other_views: at least 0, with `all_pairs` below 1.
        all_pairs: at least 0.

    Returns:
        Scalar tensor.

    Source: printed by the training logs of VA-reID's authors, with 0.6, 0.3 and 0.1.
    """
    if not (other_views >= 0 and all_pairs >= 0 and other_views + all_pairs < 1):
        raise ValueError(
            f"other_views, all_pairs: {other_views}, {all_pairs} were given; allowed are values >= 0, together < 1"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    exists = mask[identity].to(logits.dtype)  # [N, V]
    views = exists.sum(1, keepdim=True)
    if viewpoint.dim() == 2:
        own = viewpoint.to(logits.dtype)
    else:
        own = torch.nn.functional.one_hot(viewpoint.clamp(min=0), logits.shape[2]).to(logits.dtype)
        own = torch.where(viewpoint[:, None] < 0, exists / views, own)
    others = torch.where(views > 1, (1 - own) * exists / (views - 1).clamp(min=1), own)
    target = (1 - other_views - all_pairs) * own + other_views * others
    existing = logits.masked_fill(~mask, 0)
    of_identity = existing[torch.arange(len(identity), device=logits.device), identity]
    expected = (target * of_identity).sum(1) + all_pairs * existing.sum((1, 2)) / mask.sum()
    return (logits.masked_fill(~mask, -torch.inf).flatten(1).logsumexp(1) - expected).mean()
