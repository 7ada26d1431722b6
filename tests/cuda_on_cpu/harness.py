"""Calls the C++ launchers of the kernels, as the bindings do, on the CPU.

``Launcher`` copies tensors into device memory, calls a launcher by its name with its own C++ signature (device and
stream are supplied), turns a defect into :class:`KernelDefect` and copies the outputs back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.cuda_on_cpu.library import Library, Traffic, package, planted

__all__ = [
    "ORDERS", "Everywhere", "InOut", "KernelDefect", "Launcher", "LauncherError", "Library", "Partial", "Traffic",
    "Workspace", "dtype_code", "package", "planted", "spanned",
]  # fmt: skip

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
    ) -> int | None:
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
        if nbytes == 0:
            return None  # as PyTorch has it for empty tensors
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


def spanned(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The memory that dense rows span, whatever lies between them, and how far apart they begin."""
    count, columns = rows.shape
    stride = rows.stride(0) if count > 1 else columns
    return rows.as_strided(((count - 1) * stride + columns if count else 0,), (1,)), stride


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
    """A launcher that makes every call in every build and five thread orders; the results must agree bit for bit.

    The checker goes first: it names a defect that would end the process elsewhere (a misaligned access, say).
    """

    def __init__(self, libraries: Callable[[str], Library] = package) -> None:
        plan = [*(("checker", order) for order in ORDERS), ("asan", "forward"), ("fast", "reverse")]
        self._launchers = [Launcher(libraries(flavour), order) for flavour, order in plan]

    def __call__(self, function: str, *arguments: Any) -> int | None:
        first, *others = self._launchers
        result, expected = self._run(first, function, arguments)
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
    # A clone: an empty tensor counts as contiguous whatever its strides, which view() does not take.
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
