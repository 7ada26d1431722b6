"""A network whose batches several processes share, so that they compute what one process would."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules._functions import SyncBatchNorm as BatchNormOnCuda
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from vareid_ext._processes import BatchShare, answering, drawn


def share_batches(network: nn.Module, share: BatchShare, *, batch_norm: bool = True) -> None:
    """Make a network one of several that are trained on a share of each batch, without a change to its parameters.

    In training mode its batch norms then normalise by mean and variance of the whole batch, and its dropouts draw for
    the whole batch. All processes call it in the same order, forward and backward.

    Args:
        network: may have been shared before; then its share changes.
        share: what this process has of every batch.
        batch_norm: False leaves the batch norms with the statistics of this process's images.

    Raises:
        ValueError: a batch norm or dropout of another kind than those of torch and timm.
    """
    from timm.layers import BatchNormAct2d, DropPath

    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
    dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath)
    for name, module in network.named_modules():
        if isinstance(module, _SharedBatchNorm | _SharedDropout):
            module.share = share
        elif isinstance(module, _BatchNorm):
            if batch_norm:
                _change(module, name, _SharedBatchNorm, norms, share, "run.sync_batch_norm: true")
        elif isinstance(module, (_DropoutNd, DropPath)):
            _change(module, name, _SharedDropout, dropouts, share, "a batch shared by processes")


def _change(module: nn.Module, name: str, shared: type, known: tuple[type, ...], share: BatchShare, what: str) -> None:
    kind: Any = type(module)
    if kind not in known:
        allowed = ", ".join(one.__name__ for one in known)
        raise ValueError(f"{what} was given, and {name} is a {kind.__name__}; allowed are {allowed}")
    module.__class__ = _subclass(shared, kind)
    module.share = share  # type: ignore[assignment]


@functools.cache
def _subclass(shared: type, kind: type) -> Any:
    return type(f"Shared{kind.__name__}", (shared, kind), {})


class _SharedBatchNorm(nn.Module):
    """A batch norm by mean and variance of the batch of all processes, which may have different numbers of images."""

    share: BatchShare

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        factor, mean, var = self.momentum, None, None
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked) if factor is None else factor
            mean, var = self.running_mean, self.running_var
        group = self.share.group
        if x.is_cuda:
            x = BatchNormOnCuda.apply(x, self.weight, self.bias, mean, var, self.eps, factor, group, group.size())
        else:
            x = _normalised(x, self.weight, self.bias, mean, var, self.eps, factor, group)
        return self.act(self.drop(x)) if hasattr(self, "act") else x


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    eps: float, factor: float, group: ProcessGroup,
) -> Tensor:  # fmt: skip
    """What torch's SyncBatchNorm computes, which knows CUDA alone."""
    wide = x if x.dtype == torch.float64 else x.float()
    others, shape = [d for d in range(x.ndim) if d != 1], [1, -1, *[1] * (x.ndim - 2)]
    own = wide.new_full((1,), x.numel() // x.shape[1])
    total = _Sum.apply(torch.cat([wide.sum(others), own]), group)
    count = total[-1].detach()
    mean = total[:-1] / count
    centred = wide - mean.view(shape)
    var = _Sum.apply(centred.square().sum(others), group) / count
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.detach().to(running_mean.dtype), factor)
        running_var.lerp_((var.detach() * (count / (count - 1))).to(running_var.dtype), factor)
    result = centred * (var + eps).rsqrt().view(shape)
    if weight is not None and bias is not None:
        result = result * weight.view(shape) + bias.view(shape)
    return result.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        context.group = group
        return _summed(values, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], context.group), None


def _summed(values: Tensor, group: ProcessGroup) -> Tensor:
    total = values.contiguous().clone()
    with answering(group):
        dist.all_reduce(total, group=group)
    return total


class _SharedDropout(nn.Module):
    """A dropout that draws for the batch of all processes."""

    share: BatchShare

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)

        def factors(rows: int) -> Tensor:
            # All but Dropout draw once for what a dimension of length 1 stands for.
            of_one = x.shape[1:] if isinstance(self, nn.Dropout) else [*x.shape[1:2], *[1] * (x.ndim - 2)]
            ones = torch.ones(rows, *of_one, dtype=x.dtype, device=x.device)
            # The order of drawing is that of memory.
            last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            return super(_SharedDropout, self).forward(ones.to(memory_format=torch.channels_last) if last else ones)

        return x * drawn(self.share, len(x), factors)
