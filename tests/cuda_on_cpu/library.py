"""A loaded shared object of kernels: its launchers, shared variables and counters, names and lines of its code."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import kernel_budget
from tests.cuda_on_cpu import build

# The runtime's C functions whose result or arguments are not plain ints: result, arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "allocate": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p),
    "release": (None, ctypes.c_void_p),
    "upload": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    "download": (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
    "shared_region": (None, ctypes.c_size_t, ctypes.c_size_t),
    "shared_variable": (None, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int),
    "expect": (None, ctypes.c_int, ctypes.c_void_p),
    "order": (None, ctypes.c_int, ctypes.c_uint64),
    "disable": (None, ctypes.c_char_p, ctypes.c_int),
    "export": (ctypes.c_char_p,),
    "call": (ctypes.c_char_p,),
    "sites": (ctypes.c_char_p,),
    "meetings": (ctypes.c_char_p,),
    "resumes": (ctypes.c_uint64,),
}


class Library:
    """One loaded shared object: its launchers, its shared variables, and the names of its code addresses."""

    def __init__(self, path: Path, flavour: str) -> None:
        self.path, self.flavour = path, flavour
        self._chains: dict[str, tuple[str, ...]] = {}
        self._lib = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(self._lib, f"cuda_on_cpu_{name}")
            function.restype, function.argtypes = result, arguments or None
        self.base = self._load_base()
        self.launchers: dict[str, tuple[int, list[str], str]] = {}
        for i in range(self._lib.cuda_on_cpu_exports()):
            signature = ctypes.c_char_p()
            name = self._lib.cuda_on_cpu_export(i, ctypes.byref(signature)).decode()
            parameters, result = (signature.value or b"").decode().split("->")
            self.launchers[name] = (i, parameters.split(",") if parameters else [], result)
        if flavour != "asan":
            self._declare_shared_variables()

    def _load_base(self) -> int:
        address = ctypes.cast(self._lib.cuda_on_cpu_exports, ctypes.c_void_p).value or 0
        return address - next(s.offset for s in self._symbols if s.name == "cuda_on_cpu_exports")

    @functools.cached_property
    def _symbols(self) -> list[_Symbol]:
        text = subprocess.run(
            ["nm", "-S", "-C", "--defined-only", str(self.path)], capture_output=True, text=True, check=True
        )
        found = []
        for line in text.stdout.splitlines():
            match = re.fullmatch(r"([0-9a-f]+) ([0-9a-f]+) (\w) (.*)", line)
            if match:
                found.append(_Symbol(int(match[1], 16), int(match[2], 16), match[3], match[4]))
        return sorted(found, key=lambda s: s.offset)

    def _declare_shared_variables(self) -> None:
        """Shared variables are the objects aligned to 32 KiB; whatever else lies between them is none of ours."""
        objects = [s for s in self._symbols if s.kind in "bBdDvV"]
        shared = [s for s in objects if s.offset % 32768 == 0 and s.kind in "bBvV"]
        if not shared:
            return
        first, last = shared[0].offset, shared[-1]
        end = -(-(last.offset + last.size) // 32768) * 32768
        end = min([end, *(s.offset for s in objects if s.offset >= last.offset + last.size)])
        self._lib.cuda_on_cpu_shared_region(first, end - first)
        for s in objects:
            if first <= s.offset < end:
                label = f"shared variable '{s.name.split('::')[-1]}'"
                self._lib.cuda_on_cpu_shared_variable(s.offset, s.size, label.encode(), s not in shared)

    def kernel_name(self, address: int) -> str:
        """The plain name of the kernel at an address, template arguments included."""
        offset = address - self.base
        symbol = next((s for s in self._symbols if s.offset == offset and s.kind in "tTwW"), None)
        if symbol is None:
            return f"kernel@{offset:#x}"
        return kernel_budget.short_name(symbol.name)

    def symbolise(self, text: str) -> str:
        """Replaces the code addresses of a defect's text by file and line."""

        def name(match: re.Match[str]) -> str:
            chain = self._chain(match[1])
            return chain[0] if len(chain) == 1 else f"{chain[0]} (called at {chain[-1]})"

        return re.sub(r"@0x([0-9a-f]+)", name, text)

    def _chain(self, offset: str) -> tuple[str, ...]:
        """File and line at a return address, and those of the calls into which g++ inlined it."""
        if offset not in self._chains:
            # one byte back lies in the call
            command = ["addr2line", "-i", "-C", "-e", str(self.path), hex(int(offset, 16) - 1)]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            lines = [re.sub(r" \(discriminator \d+\)", "", line).removeprefix(f"{build.ROOT}/") for line in lines]
            self._chains[offset] = tuple(line for line in lines if "cuda_on_cpu/include/" not in line) or ("?",)
        return self._chains[offset]

    def divergence(self) -> str:
        """Where threads came to one barrier or warp operation by different calls since the last call, or ""."""
        for line in self._lib.cuda_on_cpu_meetings().decode().splitlines():
            site, *paths = line.split("|")
            first, second = (
                [p for at in re.findall(r"@0x([0-9a-f]+)", path) for p in self._chain(at)] for path in paths
            )
            if first != second:
                different = next((a, b) for a, b in zip(first, second, strict=False) if a != b)
                return f"barrier divergence: threads came to {site} by calls at {' and '.join(different)}"
        return ""

    def set_order(self, order: str) -> None:
        kind, _, seed = order.partition(" ")
        self._lib.cuda_on_cpu_order(("forward", "reverse", "random").index(kind), int(seed or 0))

    def take_work(self) -> int:
        """How often the scheduler switched to a thread since the last call of this function."""
        return int(self._lib.cuda_on_cpu_resumes())

    def disable_barrier(self, site: tuple[str, int] | None) -> None:
        """Makes the barrier at (file, line) do nothing; None restores all."""
        if site is None:
            self._lib.cuda_on_cpu_disable(None, 0)
        else:
            self._lib.cuda_on_cpu_disable(site[0].encode(), site[1])

    def take_barrier_sites(self) -> frozenset[tuple[str, int]]:
        """(file, line) of every barrier that has run since the last call of this function."""
        places = (line.rpartition(":") for line in self._lib.cuda_on_cpu_sites().decode().splitlines())
        return frozenset((file, int(line)) for file, _, line in places)

    @contextmanager
    def measuring(self) -> Iterator[dict[str, Traffic]]:
        """Fills a dictionary, by kernel name, with the traffic of the launches made inside the block."""
        found: dict[str, Traffic] = {}
        self._lib.cuda_on_cpu_measure(1)
        try:
            yield found
        finally:
            values = (ctypes.c_uint64 * len(Traffic.__dataclass_fields__))()
            self._lib.cuda_on_cpu_traffic.restype = ctypes.c_void_p
            for i in range(self._lib.cuda_on_cpu_traffic_count()):
                kernel = self._lib.cuda_on_cpu_traffic(i, values)
                found[self.kernel_name(kernel)] = Traffic(*values)
            self._lib.cuda_on_cpu_measure(0)


@dataclass(frozen=True)
class _Symbol:
    offset: int
    size: int
    kind: str
    name: str


@dataclass(frozen=True)
class Traffic:
    """What the launches of one kernel moved. Bytes are counted once for each warp request."""

    launches: int
    threads: int  # of a block, the most
    dynamic_shared: int  # bytes, the most
    bytes_loaded: int
    bytes_stored: int
    distinct_loaded: int
    distinct_stored: int
    requests: int
    sectors: int
    ideal_sectors: int
    shared_requests: int
    wavefronts: int
    ideal_wavefronts: int

    @property
    def moved_ratio(self) -> float:
        """Bytes moved over the distinct bytes among them; 1 is ideal."""
        return (self.bytes_loaded + self.bytes_stored) / max(1, self.distinct_loaded + self.distinct_stored)

    @property
    def coalescing(self) -> float:
        """Ideal over actual 32-byte sectors; 1 is ideal."""
        return self.ideal_sectors / max(1, self.sectors)

    @property
    def wavefront_ratio(self) -> float:
        """Shared-memory wavefronts over the ideal; 1 is free of bank conflicts."""
        return self.wavefronts / max(1, self.ideal_wavefronts)


@functools.cache
def package(flavour: str) -> Library:
    """The package's kernels in one flavour."""
    return Library(build.build_package(flavour), flavour)


@functools.cache
def planted(flavour: str) -> Library:
    """The harness's own example kernels in one flavour."""
    return Library(build.build_planted(flavour), flavour)
