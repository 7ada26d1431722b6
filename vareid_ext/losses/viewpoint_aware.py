"""The losses as a module that owns the identity and viewpoint centres."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vareid_ext._processes import check_member, gather_rows, whole_batch
from vareid_ext.ops._checks import (
    autocast_enabled,
    check_count,
    check_dtype,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
    check_values,
)
from vareid_ext.ops._labels import (
    check_batch,
    check_labels,
    check_scalars,
    plain_identity,
    plain_viewpoint,
    smoothing_arguments,
    warn_of_alpha,
)
from vareid_ext.ops._sharded_cross_entropy import identity_range, sharded_losses, sum_of_shards
from vareid_ext.ops.angular_center import angular_center_regularizer
from vareid_ext.ops.linear_viewpoint_aware_cross_entropy import (
    MEMORY_BUDGET,
    linear_viewpoint_aware_cross_entropy,
)
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy, viewpoint_aware_cross_entropy

_LINEAR_FROM_BYTES = 64 * 2**20  # of logits: above this, not holding them is faster, and memory stays bounded
_MOST_DIM = 1 << 20  # with fewer than 2^31 subclasses, the centres' size in bytes then fits into 64 bits
_INITIAL_STD = 0.001  # of the centres: small, so that training starts from a uniform prediction


class LossParts(NamedTuple):
    """The scalar losses of a batch; a part that is switched off is 0."""

    total: Tensor
    """identity + view_weight * viewpoint + beta * regularizer; the one to differentiate."""
    identity: Tensor
    """L_y (or LSR, or plain cross-entropy), not weighted."""
    viewpoint: Tensor
    """L_v, not weighted."""
    regularizer: Tensor
    """L_R, sum form, not weighted."""


class ViewpointAwareLoss(nn.Module):
    """The VA-reID loss ``L_y + view_weight * L_v + beta * L_R`` on features, with its centres as parameters.

    The two heads are bias-free: identity logits are ``feature @ W.T``, viewpoint logits ``feature @ U.T``. Where the
    logits of a batch would take more than 64 MiB, they are never held at once
    (:func:`vareid_ext.linear_viewpoint_aware_cross_entropy`). The switches
    give the ablations of the paper: Xent (smoothing="none", neither viewpoint nor regularizer), LSR
    (smoothing="uniform"), L_y (smoothing="adaptive"), L_y + L_v, L_y + L_R, and all.

    Args:
        num_identities: K, at least 1; K V below 2^31.
        feature_dim: D, 1 to 2^20.
        num_viewpoints: V, at least 2.
        alpha: coefficient of the adaptive labels, in [0, 0.5).
        beta: weight of the regularizer.
        view_weight: weight of L_v; may be changed between steps (``loss.view_weight = 0.3``).
        mask: bool [K, V], the (identity, viewpoint) pairs that occur in the training set; None for all. Every identity
            needs one. Kept as a buffer.
        smoothing: of the identity loss: "adaptive", "uniform" or "none".
        epsilon: constant of the uniform mode, in [0, 1).
        use_viewpoint: whether L_v is part of the loss.
        use_regularizer: whether L_R is part of the loss.

    Attributes:
        identity_centers: W [K, D].
        viewpoint_centers: U [K, V, D], or None where neither L_v nor L_R is used.
        group: the processes that the centres are divided among (:meth:`shard_identities`); None: all are here.

    Raises:
        ValueError, TypeError: a size, a scalar or the mask does not fit.
    """

    mask: Tensor | None
    group: ProcessGroup | None = None

    def __init__(
        self,
        num_identities: int,
        feature_dim: int,
        *,
        num_viewpoints: int = 3,
        alpha: float = 0.2,
        beta: float = 0.1,
        view_weight: float = 1.0,
        mask: Tensor | None = None,
        smoothing: str = "adaptive",
        epsilon: float = 0.1,
        use_viewpoint: bool = True,
        use_regularizer: bool = True,
    ) -> None:
        super().__init__()
        check_count("feature_dim", feature_dim, 1, _MOST_DIM)
        check_count("num_viewpoints", num_viewpoints, 2)
        check_count("num_identities", num_identities, 1, ((1 << 31) - 1) // num_viewpoints)
        for name, weight in (("beta", beta), ("view_weight", view_weight)):
            check_number(name, weight)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: {weight} was given; it must be finite and at least 0")
        check_scalars(smoothing, alpha, epsilon, "mean")
        check_flag("use_viewpoint", use_viewpoint)
        check_flag("use_regularizer", use_regularizer)
        if use_viewpoint:
            warn_of_alpha(alpha, num_viewpoints)
        if mask is not None:
            check_shape("mask", mask, (num_identities, num_viewpoints))
            check_dtype("mask", mask, torch.bool)
            check_values("mask", mask)
            empty = ~mask.any(1)
            if bool(empty.any()):
                raise ValueError(f"mask: identity {int(empty.nonzero()[0, 0])} has no existing viewpoint")
            mask = mask.clone()
        self.num_identities, self.feature_dim, self.num_viewpoints = num_identities, feature_dim, num_viewpoints
        self.alpha, self.beta, self.view_weight = alpha, beta, view_weight
        self.smoothing, self.epsilon = smoothing, epsilon
        self.use_viewpoint, self.use_regularizer = use_viewpoint, use_regularizer
        self.register_buffer("mask", mask)
        self.identity_centers = nn.Parameter(torch.empty(num_identities, feature_dim))
        self.viewpoint_centers = (
            nn.Parameter(torch.empty(num_identities, num_viewpoints, feature_dim))
            if use_viewpoint or use_regularizer
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all centres anew from a normal distribution of mean 0 and standard deviation 0.001."""
        nn.init.normal_(self.identity_centers, std=_INITIAL_STD)
        if self.viewpoint_centers is not None:
            nn.init.normal_(self.viewpoint_centers, std=_INITIAL_STD)

    def shard_identities(self, group: ProcessGroup) -> None:
        """Divide the centres among processes: each keeps those of a range of identities, all their views among them.

        From then on :meth:`forward` is called by all processes at once, each with its own images; the losses it gives
        are those of all of them together, the same on every process. The rest of the network may be in a
        DistributedDataParallel, which must leave the centres out; what it averages over the processes fits these
        gradients. Call this before the optimizer is made, with the same centres on all processes. A second backward
        pass through the same losses is an error.

        Args:
            group: the processes. The first ones have ceil(K / their number) identities each; the last may have none.

        Raises:
            TypeError: not a group.
            ValueError: this process is no member of it; there are fewer identities than processes; the centres are
                divided already.
        """
        check_member(group)
        if self.group is not None:
            raise ValueError("group: the centres are divided among processes already")
        if self.num_identities < group.size():
            raise ValueError(
                f"num_identities: {self.num_identities} was given; {group.size()} processes need one each at least"
            )
        first, end = identity_range(self.num_identities, group)
        self.group = group
        self.identity_centers = nn.Parameter(self.identity_centers.detach()[first:end].clone())
        if self.viewpoint_centers is not None:
            self.viewpoint_centers = nn.Parameter(self.viewpoint_centers.detach()[first:end].clone())

    def extra_repr(self) -> str:
        """The sizes and switches, for ``print(module)``."""
        return (
            f"{self.num_identities}, {self.feature_dim}, num_viewpoints={self.num_viewpoints}, alpha={self.alpha}, "
            f"beta={self.beta}, view_weight={self.view_weight}, smoothing={self.smoothing!r}, epsilon={self.epsilon}, "
            f"use_viewpoint={self.use_viewpoint}, use_regularizer={self.use_regularizer}"
        )

    def forward(self, feature: Tensor, identity: Tensor, viewpoint: Tensor | None = None) -> LossParts:
        """The losses of a batch, averaged over it (L_R: summed over the centres).

        Args:
            feature: [N, D], the post-BN feature; N, of all processes together, at least 1. Of the centres' dtype (any
                under autocast) and device.
            identity: integer [N] in [0, K).
            viewpoint: integer [N] in [0, V), -1 for unknown; or a distribution over the views, floating [N, V].
                Needed where L_v is used, else ignored.

        Returns:
            The total and its parts, scalars.

        Raises:
            TypeError, ValueError, IndexError: as :func:`vareid_ext.viewpoint_aware_cross_entropy`.
        """
        check_floating("feature", feature)
        check_shape("feature", feature, ("N", self.feature_dim))
        if self.group is None:
            check_batch(feature.shape[0], self.num_identities, "mean", "feature")
        check_same_device("feature", feature, "identity_centers", self.identity_centers)
        if not autocast_enabled(feature.device):
            check_dtype("feature", feature, self.identity_centers.dtype)
        zero = torch.zeros((), device=feature.device)
        viewpoint_loss = regularizer = zero
        if self.use_viewpoint and viewpoint is None:
            raise ValueError("viewpoint: None was given; use_viewpoint=True needs a label for each sample")
        if self.group is not None:
            identity_loss, *others = self._sharded_losses(feature, identity, viewpoint, self.group)
            viewpoint_loss = others[0] if others else zero
        elif self.use_viewpoint:
            assert viewpoint is not None
            identity_loss, viewpoint_loss = self._both_losses(feature, identity, viewpoint)
        else:
            identity_loss = identity_cross_entropy(
                nn.functional.linear(feature, self.identity_centers), identity, smoothing=self.smoothing,
                alpha=self.alpha, epsilon=self.epsilon,
            )  # fmt: skip
        total = identity_loss
        if self.use_viewpoint:
            total = total + self.view_weight * viewpoint_loss
        if self.use_regularizer:
            assert self.viewpoint_centers is not None
            regularizer = self._regularizer(self.viewpoint_centers)
            total = total + self.beta * regularizer
        return LossParts(total, identity_loss, viewpoint_loss, regularizer)

    def _both_losses(self, feature: Tensor, identity: Tensor, viewpoint: Tensor) -> tuple[Tensor, Tensor]:
        """(L_y, L_v), from logits where these are small, else without holding them."""
        W, U = self.identity_centers, self.viewpoint_centers
        assert U is not None
        logits = feature.shape[0] * self.num_identities * (1 + self.num_viewpoints)
        if logits * feature.element_size() > _LINEAR_FROM_BYTES:
            return linear_viewpoint_aware_cross_entropy(
                feature, W, U, identity, viewpoint, smoothing=self.smoothing, alpha=self.alpha, epsilon=self.epsilon,
                mask=self.mask,
            )  # fmt: skip
        viewpoint_logits = nn.functional.linear(feature, U.flatten(0, 1))
        return viewpoint_aware_cross_entropy(
            nn.functional.linear(feature, W), viewpoint_logits.unflatten(1, (self.num_identities, self.num_viewpoints)),
            identity, viewpoint, smoothing=self.smoothing, alpha=self.alpha, epsilon=self.epsilon, mask=self.mask,
        )  # fmt: skip

    def _sharded_losses(
        self, feature: Tensor, identity: Tensor, viewpoint: Tensor | None, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        """(L_y,) or (L_y, L_v) of the images of all processes."""
        shape = (feature.shape[0], self.num_identities, self.num_viewpoints)
        viewpoint = viewpoint if viewpoint is not None else torch.full_like(identity, -1)
        check_labels("feature", feature, shape, identity, viewpoint, self.mask, "sum", self.alpha)
        everyone = whole_batch(feature.to(self.identity_centers.dtype), group)
        identity, viewpoint = (
            torch.cat(gather_rows(label, group)) for label in (plain_identity(identity), plain_viewpoint(viewpoint))
        )
        check_batch(len(everyone), self.num_identities, "mean", "feature")
        return sharded_losses(
            everyone, self.identity_centers, self.viewpoint_centers if self.use_viewpoint else None, identity,
            viewpoint, self.mask, smoothing=smoothing_arguments(self.smoothing, self.alpha, self.epsilon),
            num_identities=self.num_identities, group=group, budget=MEMORY_BUDGET,
        )  # fmt: skip

    def _regularizer(self, viewpoint_centers: Tensor) -> Tensor:
        """L_R of all centres."""
        if self.group is None:
            return angular_center_regularizer(self.identity_centers, viewpoint_centers, mask=self.mask)
        first, end = identity_range(self.num_identities, self.group)
        mask = None if self.mask is None else self.mask[first:end]
        return sum_of_shards(
            angular_center_regularizer(self.identity_centers, viewpoint_centers, mask=mask), self.group
        )
