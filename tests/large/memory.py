"""Large arrays: full of a pattern whose every value is known, or reserved and hardly used."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

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
