"""The losses of linear heads whose centres are divided among processes by identity.

Every process has the features of the whole batch and the centres of a range of identities. For each sample it
summarises the logits that it makes (largest, sum of exponentials, sum and number of those of other identities; the
logits of the sample's own identity where it is here), and these 4 + V numbers are all that the processes exchange:
with everybody's, each finishes the rows of :mod:`vareid_ext.reference.viewpoint_aware_cross_entropy` by itself, and
makes the gradients of its own centres and of what they contribute to the features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vareid_ext import _native
from vareid_ext._processes import answering
from vareid_ext.ops import _linear_tiles as tiles
from vareid_ext.ops._labels import check_label_values, reduce_rows
from vareid_ext.ops._operator import contiguous
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import linear_viewpoint_aware_cross_entropy as reference
from vareid_ext.reference.viewpoint_aware_cross_entropy import merge_summaries


def largest_shard(identities: int, processes: int) -> int:
    """How many identities the first processes own each; the last ones own what is left, or none."""
    return -(-identities // processes)


def identity_range(identities: int, group: ProcessGroup) -> tuple[int, int]:
    """First and end of the identities whose centres a process owns, divided as DTensor's ``Shard(0)`` does."""
    most = largest_shard(identities, group.size())
    return min(identities, group.rank() * most), min(identities, (group.rank() + 1) * most)


class ShardedLosses(NamedTuple):
    """What defines the losses; labels are those of the whole batch, of all K identities."""

    identity: Tensor
    viewpoint: Tensor | None
    mask: Tensor | None
    adaptive: bool
    alpha: float
    epsilon: float
    num_identities: int
    group: ProcessGroup
    budget: int

    def exchange(self, summaries: Tensor, own_logits: Tensor) -> tuple[Tensor, Tensor]:
        """One summary of each process, and the own logits of the process that has them."""
        mine = torch.cat([merge_summaries(summaries), own_logits], 1)
        theirs = [torch.empty_like(mine) for _ in range(self.group.size())]
        with answering(self.group):
            dist.all_gather(theirs, mine, group=self.group)
        whole = torch.stack(theirs, 1)
        return merge_summaries(whole[:, :, :4])[:, None], whole[:, :, 4:].sum(1)

    def run(self, feature: Tensor, centers: Tensor, of_views: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of one head, and its gradients with respect to features and centres."""
        first, _ = identity_range(self.num_identities, self.group)
        most = largest_shard(self.num_identities, self.group.size())
        head = tiles.Head(
            centers, self.identity, self.viewpoint if of_views else None, self.mask if of_views else None,
            of_views or self.adaptive, self.alpha, 0.0 if of_views else self.epsilon, False, 1.0,
        )  # fmt: skip
        one, share = feature.new_ones((), dtype=accumulator_dtype(feature.dtype)), 1 / feature.shape[0]
        if _native.available(feature.device):
            shard = tiles.Shard(first, self.num_identities, most, self.exchange)
            loss, of_feature, of_centers = tiles.run_head(feature, head, one, share, self.budget, 0, True, True, shard)
            assert of_feature is not None
            assert of_centers is not None
        else:
            loss, of_feature, of_centers = reference.linear_head(feature, *head, one * share, first, self._merged)
        return reduce_rows(loss, "mean"), of_feature, of_centers

    def _merged(self, others: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        whole, own = self.exchange(others[:, None], own)
        return whole[:, 0], own


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: ShardedLosses, feature: Tensor, *centers: Tensor) -> tuple[Tensor, ...]:
        made = []
        with torch.autocast(feature.device.type, enabled=False):
            for of_views, head in enumerate(centers):
                made.append(losses.run(feature.detach().contiguous(), head.detach().contiguous(), bool(of_views)))
        ctx.group, ctx.gradients = losses.group, [gradients for _, *gradients in made]
        return tuple(loss for loss, *_ in made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "backward: it was called twice; the gradients of divided centres are made once, by forward"
            )
        total = torch.stack(upstreams)
        with answering(ctx.group):
            dist.all_reduce(total, group=ctx.group)
        mean = total / ctx.group.size()
        # In place: with many identities a second copy would take as much as the centres.
        of_feature = sum(gradient.mul_(by) for by, (gradient, _) in zip(total, gradients, strict=True))
        return None, of_feature, *(gradient.mul_(by) for by, (_, gradient) in zip(mean, gradients, strict=True))


class _SumOfShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, total = group, value.detach().clone()
        with answering(group):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        mean = upstream / ctx.group.size()
        with answering(ctx.group):
            dist.all_reduce(mean, group=ctx.group)
        return mean, None


def sum_of_shards(value: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every process's own part of a loss of its own centres; the gradient as in :func:`sharded_losses`."""
    total: Tensor = _SumOfShards.apply(value, group)
    return total


def sharded_losses(
    feature: Tensor,
    identity_centers: Tensor,
    viewpoint_centers: Tensor | None,
    identity: Tensor,
    viewpoint: Tensor | None,
    mask: Tensor | None,
    *,
    smoothing: tuple[bool, float, float],
    num_identities: int,
    group: ProcessGroup,
    budget: int,
) -> tuple[Tensor, ...]:
    """L_y, and L_v where there are centres of viewpoints: the means over the batch, the same on all processes.

    The gradients are those of the sum over processes of what each makes of the losses: of the features the part that
    this process's centres contribute, so that they have to be summed (as :func:`vareid_ext._processes.whole_batch`
    does); of the centres divided by the number of processes, as DistributedDataParallel divides the others'.

    Args:
        feature: [N, D], of the whole batch, the same on all processes, N at least 1.
        identity_centers: [k, D], those of :func:`identity_range`.
        viewpoint_centers: [k, V, D] of the same; None for L_y alone.
        identity, viewpoint: of the whole batch, int64, or float64 [N, V].
        mask: bool [K, V], whole.
        smoothing: as :func:`vareid_ext.ops._labels.smoothing_arguments` gives it.
        num_identities: K.
        group: the processes; all call this.
        budget: bytes for the logits that exist at one time.

    Raises:
        IndexError, ValueError: as :func:`vareid_ext.viewpoint_aware_cross_entropy`, on all processes.
        LostProcessError: another process did not take part.
    """
    V = 1 if viewpoint_centers is None else viewpoint_centers.shape[1]
    of_views = viewpoint_centers is not None
    check_label_values(identity, viewpoint if of_views else None, num_identities, V, mask if of_views else None)
    losses = ShardedLosses(
        identity.contiguous(), contiguous(viewpoint), contiguous(mask), *smoothing, num_identities, group, budget
    )
    heads = [identity_centers[:, None]] + ([viewpoint_centers] if viewpoint_centers is not None else [])
    made: tuple[Tensor, ...] = _Sharded.apply(losses, feature, *heads)
    return made
