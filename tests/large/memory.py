"""Large arrays: full of a pattern whose every value is known, or reserved and hardly used."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.backend import cuda_on_cpu
from tests.cuda_on_cpu.harness import InOut, Launcher, Partial, Workspace, package
from vareid_ext import _native

BEYOND = 1 << 31  # the first element that 32 bits with a sign do not reach
PERIOD = 1021  # prime: an index that is off by a power of two meets another value
BACKENDS = ["native", "cuda_on_cpu"]
_NORESERVE = 0x4000  # Linux's MAP_NORESERVE
_PEAK = """
import ctypes

def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

{prepare}
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = field("VmRSS")
{run}
print(field("VmHWM") - before)
"""


RERANKING = """
import torch
from benchmarks.retrieval import features
from vareid_ext import KReciprocal, rank_features, ranked_lists
from vareid_ext.retrieval import rerank_plan

Q, G, D = {Q}, {G}, {D}
x, identity, camera = features(Q, G, D)
query, gallery, labels = x[:Q], x[Q:], (identity[:Q], identity[Q:], camera[:Q], camera[Q:])
torch.randn(1024, D) @ torch.randn(D, 1024)
rank_features(query[:50], gallery[:150], identity[:50], identity[Q : Q + 150], rerank=True)
print(rerank_plan(Q, G, D).peak)
"""
RERANKED_METRICS = """
fit = KReciprocal(query, gallery)
rank_features(query, gallery, *labels, rerank=fit, block_rows=100).metrics()
ranked_lists(query, gallery, *labels, queries=range(6), rerank=fit)
ranked_lists(query, gallery, *labels, queries=range(6))
rank_features(query, gallery, *labels, block_rows=100).metrics()
"""
"""An evaluation with and without re-ranking, and some queries' lists, of features that :data:`RERANKING` makes."""


def need(gigabytes: float) -> None:
    """Skips the test unless the system has so much memory (10^9 bytes) to give, and some to spare."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
    except OSError:
        pytest.skip("needs Linux, to know how much memory is free")
    free = int(fields["MemAvailable"].split()[0]) * 1024 / 1e9
    if free < gigabytes + 1:
        pytest.skip(f"needs {gigabytes + 1:.1f} GB of free memory; there are {free:.1f}")


def peak_memory(prepare: str, run: str) -> list[int]:
    """What ``prepare`` prints, and the bytes that ``run`` takes at its peak beyond what ``prepare`` left.

    Both run in a process of their own. glibc's allocator keeps some MiB of what is freed, more in one run than in
    another; here it is told not to, so that what is measured is what is in use.
    """
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _PEAK.format(prepare=prepare, run=run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=environment)
    if "clear_refs" in done.stderr:
        pytest.skip("the system does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@dataclass(frozen=True)
class Periodic:
    """A tensor whose element number i, counted through it, is ``tile[i % PERIOD]``."""

    tensor: torch.Tensor
    tile: torch.Tensor

    def at(self, first: int, count: int) -> torch.Tensor:
        """``count`` elements from number ``first`` on, in float64 (or the tile's integers)."""
        values = self.tile[torch.arange(first, first + count) % PERIOD]
        return values.double() if values.is_floating_point() else values

    def counts(self) -> torch.Tensor:
        """How often each element of the tile occurs."""
        whole, rest = divmod(self.tensor.numel(), PERIOD)
        return whole + (torch.arange(PERIOD) < rest).double()


def periodic(shape: tuple[int, ...], tile: torch.Tensor) -> Periodic:
    """A tensor of this shape, filled with the tile over and over."""
    tensor = torch.empty(shape, dtype=tile.dtype)
    many = tile.repeat(4096)
    for part in tensor.view(-1).split(many.numel()):
        part.copy_(many[: part.numel()])
    return Periodic(tensor, tile)


def random_tile(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """PERIOD values of a normal distribution."""
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reserved(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are written to."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux, to reserve memory that is not there")
    size = elements * torch.empty((), dtype=dtype).element_size()
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        pytest.skip(f"the system does not reserve {size} bytes: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def spread(rows: torch.Tensor) -> torch.Tensor:
    """The same values, dense in every row, but rows so far apart that the last one lies beyond element 2^31."""
    stride = BEYOND // (rows.shape[0] - 1) // 8 * 8 + 8 + rows[0].numel()
    memory = reserved((rows.shape[0] - 1) * stride + rows[0].numel(), rows.dtype)
    view = memory.as_strided(rows.shape, (stride, *rows.stride()[1:]))
    return view.copy_(rows)


class Direct(Launcher):
    """A launcher without the harness's own device memory: kernels work on the tensors' memory, strides included."""

    def _place(self, argument, parameter, label, owned, outputs, number):
        if isinstance(argument, Workspace):
            argument = self._scratch = torch.empty(argument.nbytes, dtype=torch.uint8)
        tensor = argument.tensor if isinstance(argument, InOut | Partial) else argument
        if isinstance(argument, Partial) and tensor.numel() < 16:
            ctypes.memset(
                tensor.data_ptr(), 0xFF, tensor.nbytes
            )  # what stays unwritten comes back so from device memory too
        return tensor.data_ptr()


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Inside the block, operators run the compiled module's CPU kernels, or the CUDA kernels on the CPU."""
    if backend == "native":
        if not _native.available("cpu"):
            pytest.skip("needs the compiled module")
        context = nullcontext()
    else:
        if build.missing_reason():
            pytest.skip(build.missing_reason())
        context = cuda_on_cpu(Direct(package("fast")))
    with context:
        yield
