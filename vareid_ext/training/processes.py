"""The processes that torchrun starts, which train one model together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Store

from vareid_ext import _processes
from vareid_ext._processes import answering, share
from vareid_ext.data import Batch, collate
from vareid_ext.training.signals import Signals

T = TypeVar("T")

_TIME_LIMIT = timedelta(hours=2)
"""How long a process waits for the others: the first one reads the data set, and ranks the features, alone."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them; without a group, this one alone."""

    group: ProcessGroup | None = None
    store: Store | None = None
    """where they leave messages for one another"""
    on_machine: int = 0
    """this one's number among those of its machine, which is that of its GPU"""

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """Which one this is."""
        return 0 if self.group is None else self.group.rank()

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def first_does(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first process, which alone does it; all have its result, or raise its error."""
        return _processes.first_does(self.group, action)

    def all_do(self, action: Callable[[], T]) -> T:
        """What `action` gives on this process; where it fails on one, all raise that error."""
        if self.group is None:
            return action()
        done: list[T] = []
        _processes.together(self.group, lambda: done.append(action()))
        return done[0]

    def share(self, total: int) -> tuple[int, int]:
        """Begin and end of this process's share of so many things."""
        return share(total, self.rank, self.size)

    def agree(self, values: Tensor, fraction: float, signal: int) -> tuple[list[float], int]:
        """What all log and decide by: the means over the batch of values of each process, and a signal that came.

        Args:
            values: [n], means over this process's images.
            fraction: of the batch that these are.
            signal: the number of the signal that this process has received, 0 for none.

        Returns:
            The means, and a signal that a process has received.
        """
        if self.group is None:
            return values.tolist(), signal
        came = values.new_tensor([number == signal for number in Signals.NUMBERS])
        both = torch.cat([values * fraction, came])
        with answering(self.group):
            dist.all_reduce(both, group=self.group)
        numbers = both.tolist()
        counts = zip(Signals.NUMBERS, numbers[len(values) :], strict=True)
        return numbers[: len(values)], next((number for number, count in counts if count > 0), 0)

    def to_first(self, value: T) -> list[T]:
        """The values of all processes, on the first one; nothing on the others."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        with answering(self.group):
            dist.gather_object(value, values, group=self.group, group_dst=0)
        return values or []

    def whole(self, batch: Batch) -> Batch:
        """On the first process, the batch of all of them; on the others their own share."""
        return collate(self.to_first(batch.to("cpu")) or [batch])

    def as_the_first(self, module: torch.nn.Module) -> None:
        """Give the buffers of a module the values that they have on the first process."""
        if self.group is not None:
            with answering(self.group):
                for buffer in module.buffers():
                    dist.broadcast(buffer, group=self.group, group_src=0)

    def say(self, message: str) -> None:
        """Print an error to standard error, unless another process has said the very same."""
        if self.store is not None:
            key = f"said/{hashlib.sha256(message.encode()).hexdigest()}"
            with contextlib.suppress(RuntimeError):  # the store may have ended with the process that kept it
                if self.store.add(key, 1) > 1:
                    return
        print(message, file=sys.stderr)


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torchrun, all of which call this; without torchrun, or with one process, this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    on_machine = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(on_machine % torch.cuda.device_count())
    server, rank, size = next(iter(dist.rendezvous("env://", timeout=_TIME_LIMIT)))
    # On one machine it is the same server after a restart, with what the last start has left there; several machines
    # count their restarts differently, and torchrun gives them a new one (--rdzv-backend c10d).
    start = restarts()[0] if os.environ.get("GROUP_WORLD_SIZE") == "1" else 0
    store = dist.PrefixStore(f"vareid/{start}", server)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIME_LIMIT)
    yield Processes(dist.group.WORLD, store, on_machine)
    # After an error the others may still be at work; the process's end ends the group.
    dist.destroy_process_group()


def launch() -> str | None:
    """What names the torchrun that started this process: its run, process and time of start; None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    parent = os.getppid()
    with contextlib.suppress(OSError):
        return f"{run} {parent} {Path(f'/proc/{parent}/stat').read_text().rpartition(')')[2].split()[19]}"
    return f"{run} {parent}"


def restarts() -> tuple[int, int]:
    """How often torchrun has started the processes again, and how often it may."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
