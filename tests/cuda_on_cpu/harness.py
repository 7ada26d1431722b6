"""Calls the C++ launchers of the kernels, as the bindings do, on the CPU.

``Launcher`` copies tensors into device memory, calls a launcher by its name with its own C++ signature (device and
stream are supplied), turns a defect into :class:`KernelDefect` and copies the outputs back.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.cuda_on_cpu import build

ORDERS = ("forward", "reverse", "random 1", "random 2", "random 3")
_STREAM = 0x5EED  # a launcher that ignores its stream is found out
_DEVICE = 1
_DTYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "uint16", torch.bfloat16: "uint16",
    torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8",
    torch.bool: "bool",
}  # fmt: skip
_SAME_BYTES = {"bool": {"uint8"}, "uint8": {"bool", "int8"}, "int32": {"uint32"}, "int64": {"uint64"}}


class KernelDefect(AssertionError):  # noqa: N818 (it is no fault of the harness)
    """What the checker or a sanitizer found, with file and line."""


class LauncherError(RuntimeError):
    """The exception that a launcher itself threw."""


@dataclass(frozen=True)
class InOut:
    """An argument that the kernel reads and writes."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Partial:
    """An output of which the kernel may leave parts unwritten (these come back as 0xff bytes)."""

    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class Workspace:
    """Scratch memory; the same object passed to several calls is the same memory, contents kept."""

    nbytes: int


class _Value(ctypes.Union):
    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("real", ctypes.c_double))


class Library:
    """One loaded shared object: its launchers, its shared variables, and the names of its code addresses."""

    def __init__(self, path: Path, flavour: str) -> None:
        self.path, self.flavour = path, flavour
        self._chains: dict[str, tuple[str, ...]] = {}
        self._lib = ctypes.CDLL(str(path))
        self._lib.cuda_on_cpu_allocate.restype = ctypes.c_void_p
        self._lib.cuda_on_cpu_allocate.argtypes = [ctypes.c_size_t, ctypes.c_char_p]
        self._lib.cuda_on_cpu_release.argtypes = [ctypes.c_void_p]
        self._lib.cuda_on_cpu_upload.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._lib.cuda_on_cpu_download.restype = ctypes.c_int64
        self._lib.cuda_on_cpu_download.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._lib.cuda_on_cpu_call.restype = ctypes.c_char_p
        self._lib.cuda_on_cpu_export.restype = ctypes.c_char_p
        self._lib.cuda_on_cpu_sites.restype = ctypes.c_char_p
        self._lib.cuda_on_cpu_meetings.restype = ctypes.c_char_p
        self._lib.cuda_on_cpu_resumes.restype = ctypes.c_uint64
        self._lib.cuda_on_cpu_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._lib.cuda_on_cpu_disable.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._lib.cuda_on_cpu_expect.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._lib.cuda_on_cpu_shared_region.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self._lib.cuda_on_cpu_shared_variable.argtypes = [
            ctypes.c_size_t,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_int,
        ]
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
        name = symbol.name.replace("(anonymous namespace)::", "").replace("vareid::", "")
        name = name.removeprefix("void ")
        depth = 0
        for i, c in enumerate(name):  # cut the parameter list
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                return name[:i]
        return name

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


class Launcher:
    """Calls launchers of one library under one thread order: ``run("f_cuda", tensor, ..., 3, 0.5)``.

    Arguments follow the C++ signature without the device and stream at its end. A ``const`` pointer takes an input
    tensor or None; any other pointer takes a tensor to be filled (every element must be written), or :class:`InOut`,
    :class:`Partial`, :class:`Workspace` or None. Tensors lie on the CPU and are contiguous.
    """

    def __init__(self, library: Library, order: str = "forward") -> None:
        self.library, self.order = library, order
        self._lib = library._lib
        self._workspaces: dict[int, tuple[Workspace, int]] = {}

    def __str__(self) -> str:
        return f"the {self.library.flavour} build in {self.order} order"

    def __call__(self, function: str, *arguments: Any) -> int | None:
        if function not in self.library.launchers:
            known = ", ".join(sorted(self.library.launchers)) or "none"
            raise ValueError(f"no launcher {function!r} is exported (launchers/<op>.cpp); known are: {known}")
        index, parameters, result = self.library.launchers[function]
        supplied: list[Any] = list(arguments)
        if parameters[-2:] == ["int32", "void*"] and len(arguments) == len(parameters) - 2:
            supplied += [_DEVICE, _STREAM]
            self._lib.cuda_on_cpu_expect(_DEVICE, _STREAM)
        else:
            self._lib.cuda_on_cpu_expect(0, None)
        if len(supplied) != len(parameters):
            raise ValueError(f"{function}: {len(arguments)} arguments were given for ({', '.join(parameters)})")
        values = (_Value * max(1, len(parameters)))()
        owned: list[int] = []
        outputs: list[tuple[int, torch.Tensor, int, bool]] = []
        try:
            for i, (parameter, argument) in enumerate(zip(parameters, supplied, strict=True)):
                label = f"argument {i + 1} of {function} ({parameter})"
                if not parameter.endswith("*") or (isinstance(argument, int) and argument == _STREAM):
                    _set_scalar(values[i], parameter, argument, label)
                elif argument is not None:
                    values[i].pointer = self._place(argument, parameter, label, owned, outputs, i)
            self.library.set_order(self.order)
            returned = ctypes.c_int64()
            error = self._lib.cuda_on_cpu_call(index, values, ctypes.byref(returned)).decode()
            self._raise(function, error)
            for pointer, tensor, number, complete in outputs:
                self._fetch(function, pointer, tensor, number, complete)
        finally:
            for pointer in owned:
                self._lib.cuda_on_cpu_release(pointer)
        return None if result == "void" else returned.value

    def _place(
        self, argument: Any, parameter: str, label: str, owned: list[int], outputs: list[Any], number: int
    ) -> int:
        if isinstance(argument, Workspace):
            if id(argument) not in self._workspaces:
                self._workspaces[id(argument)] = (argument, self._allocate(argument.nbytes, label))
            return self._workspaces[id(argument)][1]
        tensor = argument.tensor if isinstance(argument, InOut | Partial) else argument
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{label}: a tensor, None, InOut, Partial or Workspace is needed, not {type(argument).__name__}"
            )
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{label}: the tensor must lie on the CPU and be contiguous")
        element = parameter.removeprefix("const ").removesuffix("*")
        given = _DTYPES[tensor.dtype]
        if element not in ("void", given) and element not in _SAME_BYTES.get(given, ()):
            raise TypeError(f"{label}: a {tensor.dtype} tensor was given")
        nbytes = tensor.numel() * tensor.element_size()
        pointer = self._allocate(nbytes, label)
        owned.append(pointer)
        constant = parameter.startswith("const ")
        if constant or isinstance(argument, InOut):
            self._lib.cuda_on_cpu_upload(pointer, tensor.data_ptr(), nbytes, constant)
        if not constant:
            outputs.append((pointer, tensor, number, not isinstance(argument, Partial)))
        return pointer

    def _allocate(self, nbytes: int, label: str) -> int:
        pointer = self._lib.cuda_on_cpu_allocate(nbytes, label.encode())
        if not pointer:
            raise MemoryError(f"{label}: {nbytes} bytes do not fit into the harness's device memory")
        return pointer

    def _fetch(self, function: str, pointer: int, tensor: torch.Tensor, number: int, complete: bool) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        unwritten = self._lib.cuda_on_cpu_download(tensor.data_ptr(), pointer, nbytes)
        if complete and unwritten >= 0:
            raise KernelDefect(
                f"{function}: unwritten output: element {unwritten // tensor.element_size()} of argument "
                f"{number + 1}, shape {tuple(tensor.shape)}, was never written"
            )

    def _raise(self, function: str, error: str) -> None:
        defect = self.library.divergence()
        if error.startswith("CUDA-on-CPU defect: "):
            defect = error.removeprefix("CUDA-on-CPU defect: ")
        if defect:
            text = self.library.symbolise(defect)
            raise KernelDefect(f"{function} ({self.library.flavour} build, {self.order} order): {text}")
        if error:
            raise LauncherError(f"{function}: {error}")

    def close(self) -> None:
        for _, pointer in self._workspaces.values():
            self._lib.cuda_on_cpu_release(pointer)
        self._workspaces.clear()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dtype_code(tensor: torch.Tensor) -> int:
    """The number of the tensor's element type in csrc/dtype.h."""
    return (torch.float32, torch.float64, torch.float16, torch.bfloat16).index(tensor.dtype)


def _set_scalar(value: _Value, parameter: str, argument: Any, label: str) -> None:
    if parameter.endswith("*"):
        value.pointer = argument
    elif parameter.startswith("float"):
        value.real = float(argument)
    elif isinstance(argument, float):
        raise TypeError(f"{label}: {argument!r} was given")
    else:
        value.integer = int(argument)


class Everywhere:
    """A launcher that makes every call in every build and several thread orders; the results must agree bit for bit.

    The fast build goes first and says how much work the call is: a call of more than ``LARGE`` thread switches is
    checked in one thread order only, one of more than ``HUGE`` is not checked beyond its result.
    """

    LARGE, HUGE = 1_000_000, 20_000_000

    def __init__(self, libraries: Callable[[str], Library] = package) -> None:
        plan = [("fast", "reverse"), *(("checker", order) for order in ORDERS), ("asan", "forward")]
        self._launchers = [Launcher(libraries(flavour), order) for flavour, order in plan]

    def __call__(self, function: str, *arguments: Any) -> int | None:
        first = self._launchers[0]
        first.library.take_work()
        result, expected = self._run(first, function, arguments)
        work = first.library.take_work()
        others = self._launchers[1:] if work <= self.LARGE else self._launchers[1:2] if work <= self.HUGE else []
        for launcher in others:
            _, outputs = self._run(launcher, function, arguments)
            for i, (a, b) in enumerate(zip(expected, outputs, strict=True)):
                if a is not None and not torch.equal(_bits(a), _bits(b)):
                    raise KernelDefect(f"{function}: argument {i + 1} differs between {first} and {launcher}")
        for argument, output in zip(arguments, expected, strict=True):
            if output is not None and not torch.equal(_bits(_tensor(argument)), _bits(output)):
                _tensor(argument).copy_(output)
        return result

    def _run(self, launcher: Launcher, function: str, arguments: tuple[Any, ...]) -> tuple[int | None, list[Any]]:
        copies = [_copy_output(argument) for argument in arguments]
        return launcher(function, *copies), [_tensor(copy) for copy in copies]

    def close(self) -> None:
        for launcher in self._launchers:
            launcher.close()

    def __enter__(self) -> Everywhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tensor(argument: Any) -> Any:
    if isinstance(argument, InOut | Partial):
        return argument.tensor
    return argument if isinstance(argument, torch.Tensor) else None


def _copy_output(argument: Any) -> Any:
    if isinstance(argument, InOut | Partial):
        return type(argument)(argument.tensor.clone())
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
