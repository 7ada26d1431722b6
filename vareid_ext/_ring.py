"""Rows that go from process to process: round a ring, or to where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext._processes import answering

Addressed = Sequence[tuple[int, Tensor]]


def check_group(group: ProcessGroup, device: torch.device, name: str) -> None:
    """ValueError unless the processes of ``group`` can send tensors of this device to each other."""
    backend = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",")).get(device.type)
    if backend is None or (device.type == "cuda" and backend == "gloo"):
        needed = "nccl" if device.type == "cuda" else "gloo"
        raise ValueError(
            f"{name}: is on {device}, but group's backend for {device.type} is {backend}; {needed} is needed "
            '(on GPUs, init_process_group("cpu:gloo,cuda:nccl") gives both)'
        )


def begin_exchange(sent: Addressed, received: Addressed, group: ProcessGroup) -> Callable[[], None]:
    """Begins to send tensors to processes and to fill contiguous ones from processes; all that it gives is a wait.

    Every pair of processes names what goes between them in the same order. Empty tensors are not sent.
    """
    operations = [
        dist.P2POp(operation, _bytes(tensor), dist.get_global_rank(group, process), group)
        for operation, ends in ((dist.isend, sent), (dist.irecv, received))
        for process, tensor in ends
        if tensor.numel()
    ]
    with answering(group):
        works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        with answering(group):
            for work in works:
                work.wait()
        operations.clear()

    return wait


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def visits(
    own: Tensor,
    sizes: Sequence[int],
    group: ProcessGroup,
    rounds: int,
    first_row: Callable[[int, int], int] = lambda _process, _owner: 0,
) -> Iterator[tuple[int, Tensor]]:
    """The rows of this process and then of those behind it, each while the next are on their way.

    Args:
        own: [n_p, ...], of one dtype and shape everywhere but for the number of rows.
        sizes: n_p by process.
        group: the processes; all of them exhaust this.
        rounds: how many others' rows come by, 0 to one less than there are processes.
        first_row: of the last owner whose rows come by a process, the row from which on that process needs them.

    Yields:
        whose rows these are, and the rows, valid until the next.
    """
    processes, me = group.size(), group.rank()
    owner, rows = me, own
    for step in range(rounds):
        following, giver, taker = (owner + 1) % processes, (me + 1) % processes, (me - 1) % processes
        last = step == rounds - 1
        begin, taken = (first_row(me, following), first_row(taker, owner)) if last else (0, 0)
        coming = own.new_empty((sizes[following] - begin, *own.shape[1:]))
        wait = begin_exchange([(taker, rows[taken:])], [(giver, coming)], group)
        yield owner, rows
        wait()
        owner, rows = following, coming
    yield owner, rows


def moved(rows: Tensor, held: Sequence[int], wanted: Sequence[int], group: ProcessGroup) -> Tensor:
    """This process's rows under another division of all rows among the processes.

    Args:
        rows: those it holds, [held[p + 1] - held[p], ...].
        held: where each process's rows begin among all, and where the last one's end.
        wanted: the same of the other division.
        group: the processes; all of them call this.
    """
    if list(held) == list(wanted):
        return rows
    me, sent, received = group.rank(), [], []
    out = rows.new_empty((wanted[me + 1] - wanted[me], *rows.shape[1:]))
    for process in range(group.size()):
        begin, end = max(held[me], wanted[process]), min(held[me + 1], wanted[process + 1])
        given: Any = rows[begin - held[me] : end - held[me]] if begin < end else rows[:0]
        begin, end = max(held[process], wanted[me]), min(held[process + 1], wanted[me + 1])
        place = out[begin - wanted[me] : end - wanted[me]] if begin < end else out[:0]
        if process == me:
            place.copy_(given)
        else:
            sent.append((process, given))
            received.append((process, place))
    begin_exchange(sent, received, group)()
    return out
