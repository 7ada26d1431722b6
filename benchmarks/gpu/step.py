"""What the steps share beside their records: the device and the clock."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vareid_ext import _native

DRY_RUN = os.environ.get("VAREID_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu") if DRY_RUN else torch.device("cuda", 0)


def check_native() -> None:
    """Ends the program where the device would run plain PyTorch and not the kernels."""
    state = _native.backends()[DEVICE.type]
    if state != "native":
        sys.exit(f"the kernels do not run on {DEVICE.type}: {state}")


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Mark:
    """A point in the device's time: a CUDA event, or the wall clock on the CPU."""

    def __init__(self) -> None:
        self._event = None if DRY_RUN else torch.cuda.Event(enable_timing=True)
        self._time = 0.0

    def record(self) -> None:
        """Mark where the device's stream is now."""
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def elapsed_time(self, end: Mark) -> float:
        """Milliseconds from here to a later mark, both of them reached."""
        if self._event is not None and end._event is not None:
            return self._event.elapsed_time(end._event)
        return (end._time - self._time) * 1e3


class Clock:
    """Times single calls, after a flush of the GPU's caches."""

    def __init__(self) -> None:
        self._flush = None if DRY_RUN else torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one call, its launches from the host included where they take longer than the device."""
        if self._flush is not None:
            self._flush.zero_()
        begin, end = Mark(), Mark()
        begin.record()
        run()
        end.record()
        synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, contenders: Sequence[Callable[[], Any]], budget: float, most: int = 30) -> list[float]:
        """Median seconds of each, in turn: a round to warm up, then 1 to ``most`` as the budget in seconds allows."""
        times: list[list[float]] = [[] for _ in contenders]
        for run in contenders:
            run()
        synchronize()
        stop = time.monotonic() + budget
        for index in range(1 if DRY_RUN else most):
            if index and time.monotonic() > stop:
                break
            for run, taken in zip(contenders, times, strict=True):
                taken.append(self.seconds(run))
        return [statistics.median(taken) for taken in times]


def peak_mebibytes(run: Callable[[], Any]) -> float | None:
    """MiB that a call takes on the GPU at its peak beyond what was there before; None on the CPU."""
    if DRY_RUN:
        run()
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
