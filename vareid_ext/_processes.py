"""What several processes do together: the few things that torch.distributed leaves to its callers."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process of a group has ended, or did not answer within the group's time limit."""


@contextlib.contextmanager
def answering(group: ProcessGroup) -> Iterator[None]:
    """A block of calls to torch.distributed, whose own errors name sockets.

    Raises:
        LostProcessError: another process did not take part.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostProcessError):
            raise
        raise LostProcessError(
            f"group: of its {group.size()} processes one has ended or did not answer within the group's time limit, "
            f"seen by process {group.rank()}: {str(error).splitlines()[0]}"
        ) from error


def share(total: int, process: int, processes: int) -> tuple[int, int]:
    """Begin and end of the share that one of several processes has of `total` things: in order, as even as can be."""
    return total * process // processes, total * (process + 1) // processes


def together(group: ProcessGroup, action: Callable[[], T]) -> list[T]:
    """What every process's `action` gives, which can be pickled, by process.

    All raise the error of the first process that has one, so that none is left waiting for the others.

    Args:
        group: the processes; all of them call this.
        action: looks at this process's own arguments, say; it does not talk to the others.

    Raises:
        LostProcessError: another process did not take part.
    """
    mine: tuple[T | None, Exception | None]
    try:
        mine = action(), None
    except Exception as error:
        mine = None, error
    outcomes: list[Any] = [None] * group.size()
    with answering(group):
        dist.all_gather_object(outcomes, mine, group=group)
    errors = [error for _, error in outcomes if error is not None]
    if errors:
        raise errors[0]
    return [value for value, _ in outcomes]


def agreed(group: ProcessGroup, **values: Any) -> None:
    """ValueError, the same on all processes, where one has another value than the first, by the argument's name."""
    theirs = together(group, lambda: values)
    for name, (process, other) in itertools.product(values, enumerate(theirs)):
        if other[name] != theirs[0][name]:
            raise ValueError(
                f"{name}: process {process} has {other[name]!r} and process 0 has {theirs[0][name]!r}; allowed is one "
                "for all processes"
            )


def first_does(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """What `action` gives on the first process, which alone does it; all have its result, or raise its error.

    Args:
        group: the processes; all of them call this. None for this one alone.
        action: its result can be pickled.

    Raises:
        LostProcessError: another process did not take part.
    """
    if group is None:
        return action()
    outcome: list[Any] = [(None, None)]
    if group.rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            outcome = [(None, error)]
    with answering(group):
        dist.broadcast_object_list(outcome, group_src=0, group=group)
    value, failed = outcome[0]
    if failed is not None:
        raise failed
    return value


def check_member(group: Any) -> None:
    """TypeError unless ``group`` is one of processes; ValueError unless this process is a member of it."""
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:  # new_group's, to those outside
        raise ValueError("group: this process is no member of the group; only its members may call this")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group: {type(group).__name__} was given; a torch.distributed.ProcessGroup is needed, or None")


def gather_rows(rows: Tensor, group: ProcessGroup) -> list[Tensor]:
    """The rows of every process [n_p, ...], by process; of one dtype and shape but for their number.

    Raises:
        ValueError: dtypes or shapes differ; on all processes.
        LostProcessError: another process did not take part.
    """
    # What other rows would be like goes along as a number: to exchange them would abort a process.
    kind = zlib.crc32(repr((rows.dtype, rows.shape[1:])).encode())
    sizes = [torch.empty(2, dtype=torch.int64, device=rows.device) for _ in range(group.size())]
    with answering(group):
        dist.all_gather(sizes, sizes[0].new_tensor([rows.shape[0], kind]), group=group)
    counts, kinds = zip(*(size.tolist() for size in sizes), strict=True)
    if len(set(kinds)) > 1:
        like = together(
            group, lambda: f"{str(rows.dtype).removeprefix('torch.')} [n, {', '.join(map(str, rows.shape[1:]))}]"
        )
        raise ValueError(f"rows: the processes have {', '.join(like)}; allowed is one dtype and shape, but for n")
    parts = [rows.new_empty((max(counts), *rows.shape[1:])) for _ in counts]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    with answering(group):
        dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


class _WholeBatch(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        parts = gather_rows(rows, group)
        context.group, context.begin = group, sum(len(part) for part in parts[: group.rank()])
        context.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous().clone()
        with answering(context.group):
            dist.all_reduce(whole, group=context.group)
        return whole[context.begin : context.begin + context.count], None


def whole_batch(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all processes [N, ...], in order of the processes, of each one's [n_p, ...]; differentiable.

    The gradient of each process's rows is the sum over the processes of the gradients of what they make of the whole.
    """
    if group is None:
        return rows
    check_member(group)
    return _WholeBatch.apply(rows, group)


@dataclass(frozen=True)
class BatchShare:
    """The images of a training batch that this process has, of those that the processes of a group have together."""

    group: ProcessGroup
    begin: int
    """its first image's place in the batch"""
    end: int
    """the place behind its last image's"""
    total: int
    """images of the batch"""

    @property
    def fraction(self) -> float:
        """Of the batch."""
        return (self.end - self.begin) / self.total

    def mean(self, values: Tensor) -> Tensor:
        """Means over the batch of values that are means over this process's images; not differentiable."""
        whole = values.detach() * self.fraction
        with answering(self.group):
            dist.all_reduce(whole, group=self.group)
        return whole


def drawn(share: BatchShare | None, rows: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Random rows of a batch's images: drawn for the batch of all processes by each of them, which takes its own.

    So the random number generators of all processes stay the same, and N processes compute what one would.

    Args:
        share: of the batch; None for all of it.
        rows: of this process's images, as many of each image, one image's after the other's.
        draw: makes so many rows.

    Raises:
        ValueError: `rows` is not a multiple of the number of images.
    """
    if share is None:
        return draw(rows)
    own = share.end - share.begin
    if rows % own:
        raise ValueError(f"rows: {rows} was given; allowed are multiples of the {own} images of this process")
    of_each = rows // own
    return draw(share.total * of_each)[share.begin * of_each : share.end * of_each]
