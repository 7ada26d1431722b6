"""Centres that are divided among processes: whole in checkpoints, and one gradient's norm and one decision for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vareid_ext._processes import answering
from vareid_ext.losses import ViewpointAwareLoss
from vareid_ext.ops._sharded_cross_entropy import identity_range, largest_shard

_CHUNK_BYTES = 64 * 2**20  # of a process's rows that are gathered at once


class Shards:
    """The parameters of a method that are divided among processes by identity.

    Args:
        modules: the method, and its moving average where there is one; each :class:`vareid_ext.ViewpointAwareLoss` in
            them is divided here.
        group: the processes.

    Raises:
        ValueError: as :meth:`vareid_ext.ViewpointAwareLoss.shard_identities`.
    """

    def __init__(self, modules: Sequence[nn.Module], group: ProcessGroup) -> None:
        self.group = group
        self.identities: dict[str, int] = {}
        """K of each divided parameter, by its name in the method"""
        method = modules[0]
        for part in itertools.chain(*(module.modules() for module in modules)):
            if isinstance(part, ViewpointAwareLoss):
                part.shard_identities(group)
        for name, part in method.named_modules():
            if isinstance(part, ViewpointAwareLoss):
                self.identities |= {parameter: part.num_identities for parameter, _ in part.named_parameters(name)}
        parameters = dict(method.named_parameters())
        self._identities_of = {id(parameters[name]): K for name, K in self.identities.items()}

    def keep_out_of_averages(self, module: nn.Module) -> None:
        """Let DistributedDataParallel leave these parameters of a module as they are."""
        names = [name for name, parameter in module.named_parameters() if id(parameter) in self._identities_of]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)

    def whole(self, state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """A method's state, divided -> whole on the first process, on the CPU; all processes call this."""
        return self._of_method(state, prefix, self._gather)

    def own(self, state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """A method's state, whole -> what this process has of it."""
        return self._of_method(state, prefix, self._cut)

    def whole_optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer as :meth:`whole`."""
        return self._of_optimizer(optimizer, optimizer.state_dict(), self._gather)

    def own_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of an optimizer as :meth:`own`."""
        return self._of_optimizer(optimizer, state, self._cut)

    def _of_method(
        self, state: Mapping[str, Any], prefix: str, change: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Any]:
        of = {f"{prefix}{name}": K for name, K in self.identities.items()}
        return {name: change(value, of[name]) if name in of else value for name, value in state.items()}

    def _of_optimizer(
        self, optimizer: Optimizer, state: Mapping[str, Any], change: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        changed = {}
        for number, entries in state["state"].items():
            K = self._identities_of.get(id(parameters[number]))
            # What has a dimension has the parameter's: momenta, not the number of steps.
            changed[number] = entries if K is None else {
                name: change(value, K) if isinstance(value, Tensor) and value.dim() else value
                for name, value in entries.items()
            }  # fmt: skip
        return {**state, "state": changed}

    def _cut(self, whole: Tensor, identities: int) -> Tensor:
        first, end = identity_range(identities, self.group)
        return whole[first:end]

    def _gather(self, own: Tensor, identities: int) -> Tensor:
        """All rows on the first process, in pieces that a device has room for; on the others this process's own."""
        size, first = self.group.size(), self.group.rank() == 0
        most = largest_shard(identities, size)
        whole = torch.empty((size * most, *own.shape[1:]), dtype=own.dtype) if first else own
        rows = max(1, _CHUNK_BYTES // (own.element_size() * math.prod(own.shape[1:])))
        for begin in range(0, most, rows):
            count = min(rows, most - begin)
            piece = own.new_zeros((count, *own.shape[1:]))
            mine = own[begin : begin + count]
            piece[: len(mine)] = mine
            pieces = [torch.empty_like(piece) for _ in range(size)] if first else None
            with answering(self.group):
                dist.gather(piece, pieces, group=self.group, group_dst=0)
            for process, theirs in enumerate(pieces or ()):
                whole[process * most + begin : process * most + begin + count] = theirs.cpu()
        return whole[:identities] if first else own

    def _divided(self, parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of what all processes have, and those of what is divided."""
        gradients: tuple[list[Tensor], list[Tensor]] = [], []
        for parameter in parameters:
            if parameter.grad is not None:
                gradients[id(parameter) in self._identities_of].append(parameter.grad)
        return gradients

    def clip_norm(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        """As ``torch.nn.utils.clip_grad_norm_``: the norm is that of the gradients of all processes' centres."""
        shared, divided = self._divided(parameters)
        total = nn.utils.get_total_norm(shared + divided)
        if divided:
            of_all = nn.utils.get_total_norm(divided).double().square()
            with answering(self.group):
                dist.all_reduce(of_all, group=self.group)
            total = (nn.utils.get_total_norm(shared).double().square() + of_all).sqrt().to(total.dtype)
        nn.utils.clip_grads_with_norm_(parameters, most, total)

    def share_overflow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Where a process's centres have a gradient that is not finite, give all processes one.

        A loss scaler looks at the gradients of its own process; so all of them leave the step out.
        """
        shared, divided = self._divided(parameters)
        if not divided:
            return
        # NaN unless all are finite.
        nothing = sum((g.abs().amax() * 0 for g in divided if g.numel()), divided[0].new_zeros(()))
        with answering(self.group):
            dist.all_reduce(nothing, group=self.group)
        next(g for g in shared + divided if g.numel()).add_(nothing)
