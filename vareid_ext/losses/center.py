"""The center loss: features are drawn to a centre of their identity, which follows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vareid_ext._processes import whole_batch


class CenterLoss(nn.Module):
    """Mean over the batch of ``|feature - centre of its identity|^2`` (Wen et al., ECCV 2016: half the sum of them).

    In training mode every call also moves the centres: ``center -= rate * gradient`` of the unweighted loss, which is
    an SGD of their own that the loss's weight does not slow down (Luo et al., CVPRW 2019). So the centres are a buffer
    that no optimizer sees, drawn from a normal distribution.

    Args:
        num_identities: K, at least 1.
        feature_dim: D, at least 1.
        rate: learning rate of the centres, at least 0.

    Attributes:
        centers: float32 [K, D].

    Raises:
        ValueError: an argument outside what is allowed.
    """

    centers: Tensor

    def __init__(self, num_identities: int, feature_dim: int, *, rate: float = 0.5) -> None:
        super().__init__()
        for name, count in (("num_identities", num_identities), ("feature_dim", feature_dim)):
            if count < 1:
                raise ValueError(f"{name}: {count!r} was given; allowed are values from 1")
        if not 0 <= rate < float("inf"):
            raise ValueError(f"rate: {rate!r} was given; allowed are finite values from 0")
        self.rate = rate
        self.register_buffer("centers", torch.randn(num_identities, feature_dim))

    def forward(self, feature: Tensor, identity: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
        """The loss of a batch before the centres move.

        Args:
            feature: floating point [N, D]; computed in the centres' dtype.
            identity: integer [N] in [0, K).
            group: processes that have a share of the batch each, and all call this; the centres, the same in all of
                them, follow the images of all. None: the batch is all here.

        Returns:
            Scalar tensor, the mean over this process's images; 0 for an empty batch, which moves nothing.

        Raises:
            TypeError: ``group`` is none.
            ValueError: shapes that do not fit; this process is no member of the group.
            IndexError: an identity out of range, on the CPU.
        """
        if feature.shape != (*identity.shape, self.centers.shape[1]) or identity.ndim != 1:
            raise ValueError(
                f"feature, identity: {list(feature.shape)}, {list(identity.shape)} were given; allowed are "
                f"[N, {self.centers.shape[1]}] and [N]"
            )
        difference = feature.to(self.centers.dtype) - self.centers[identity]
        if self.training:
            moved, steps = whole_batch(identity, group), whole_batch(difference.detach(), group)
            self.centers.index_add_(0, moved, steps * (2 * self.rate / max(len(moved), 1)))
        return difference.square().sum() / max(len(feature), 1)
