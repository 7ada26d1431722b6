"""The batch-hard triplet term of the local branch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext._processes import whole_batch


def batch_hard_triplet(
    feature: Tensor, identity: Tensor, *, margin: float = 0.3, group: ProcessGroup | None = None
) -> Tensor:
    """Mean over the batch of ``max(0, margin + hardest positive - hardest negative)`` in Euclidean distance.

    The hardest positive is the farthest image of the same identity (the image itself where it is the only one), the
    hardest negative the nearest image of another (Hermans et al., 2017). Images without a negative contribute 0.

    Args:
        feature: floating point [N, D]; computed in float32 or wider.
        identity: integer [N].
        margin: >= 0.
        group: processes that have a share of the batch each, [n, D] and [n], and all call this; the hardest are found
            among the images of all of them. None: the batch is all here.

    Returns:
        Scalar tensor, the mean over this process's images; 0 for an empty batch. The gradients of all processes' losses
        flow into `feature`.

    Raises:
        TypeError: ``group`` is none.
        ValueError: shapes that do not fit, a negative margin; this process is no member of the group.
    """
    if feature.ndim != 2 or identity.shape != feature.shape[:1]:
        raise ValueError(
            f"feature [N, D] and identity [N] were expected, got {list(feature.shape)}, {list(identity.shape)}"
        )
    if not margin >= 0:
        raise ValueError(f"margin: {margin!r} was given; allowed are values >= 0")
    feature = feature if feature.dtype == torch.float64 else feature.float()
    others, of_others = whole_batch(feature, group), whole_batch(identity, group)
    if len(feature) == 0:
        return others.sum() * 0
    squared = (feature[:, None] - others[None]).square().sum(2)
    # The root's gradient is infinite at 0, where the distance to oneself lies.
    distance = torch.where(squared > 0, squared.clamp(min=1e-12).sqrt(), 0.0)
    same = identity[:, None] == of_others[None]
    positive = distance.masked_fill(~same, -torch.inf).amax(1)
    negative = distance.masked_fill(same, torch.inf).amin(1)
    return torch.relu(margin + positive - negative).mean()
