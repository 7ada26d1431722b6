"""The compiled module: the only place that imports it, and the only place that says why it is missing."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.utils.dlpack import to_dlpack

from vareid_ext._version import NATIVE_INTERFACE, __version__

_MODULE_NAME = "_vareid_native"
_F = TypeVar("_F", bound=Callable[..., Any])


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and one sentence that says why not."""
    try:
        module = importlib.import_module(_MODULE_NAME)
    except ModuleNotFoundError as error:
        if error.name != _MODULE_NAME:
            raise
        return None, "the compiled module is not installed (run `pip install .` in the source folder)"
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    found = (getattr(module, "version", "?"), getattr(module, "interface", -1))
    if found != (__version__, NATIVE_INTERFACE):
        return None, (
            f"the compiled module is stale: it is version {found[0]} with interface {found[1]}, the Python package is "
            f"version {__version__} with interface {NATIVE_INTERFACE} (run `pip install .` again)"
        )
    return module, ""


_module, _missing_reason = _load()
# Of the process, not of a thread: the backward pass on a GPU runs in threads of autograd.
_forced_reference = 0
_forced_reference_lock = threading.Lock()
_told: set[str] = set()
_kernels: dict[tuple[torch.library.CustomOpDef, str], Callable[..., Any]] = {}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _environment_choice() -> str:
    choice = os.environ.get("VAREID_BACKEND", "auto").strip().lower() or "auto"
    if choice not in ("auto", "reference"):
        raise ValueError(f"VAREID_BACKEND: {choice!r} was given; allowed are 'auto' and 'reference'")
    return choice


_environment_reference = _environment_choice() == "reference"


@contextlib.contextmanager
def reference_backend() -> Iterator[None]:
    """Run every op inside the ``with`` block as plain PyTorch, as ``VAREID_BACKEND=reference`` does for a process.

    It holds for every thread until the block ends. The backward pass of a result follows the setting in force when
    ``backward`` runs.
    """
    global _forced_reference
    with _forced_reference_lock:
        _forced_reference += 1
    try:
        yield
    finally:
        with _forced_reference_lock:
            _forced_reference -= 1


def reference_forced() -> bool:
    """Whether the environment or :func:`reference_backend` asks for plain PyTorch."""
    return _environment_reference or _forced_reference > 0


def loaded() -> bool:
    """Whether the compiled module is there, whatever backend is in force."""
    return _module is not None


def module() -> Any:
    """The compiled module; RuntimeError where it is missing."""
    if _module is None:
        raise RuntimeError(_missing_reason)
    return _module


_cuda_reasons: dict[int, str] = {}  # by device, of those that were asked about


def _cuda_reason(device: int) -> str:
    """ "" if the CUDA kernels can run on a device, else why they cannot."""
    if _module is None:
        return _missing_reason
    if not _module.with_cuda:
        return (
            "the compiled module was built without CUDA (VAREID_CUDA=OFF, or no usable nvcc at build time); "
            "python -m vareid_ext.doctor says what to type"
        )
    if device not in _cuda_reasons:
        _cuda_reasons[device] = str(_module.cuda_unusable_reason(device))
    return _cuda_reasons[device]


def _with_index(device: torch.device | str) -> torch.device:
    """The device; "cuda" is the current one."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def unavailable_reason(device: torch.device | str) -> str:
    """Why plain PyTorch runs for tensors of this device now, or "" if native kernels do. "cuda" is the current GPU."""
    if reference_forced():
        return "plain PyTorch was asked for (VAREID_BACKEND=reference or reference_backend())"
    device = _with_index(device)
    if device.type == "cpu":
        return _missing_reason
    if device.type == "cuda":
        return _cuda_reason(device.index)
    return f"there are no native kernels for device type {device.type!r}"


def backends() -> dict[str, str]:
    """Which native backends are loaded, and why the others are not.

    Returns:
        ``{"cpu": ..., "cuda": ...}``; each value is ``"native"``, or the reason why plain PyTorch runs instead. "cuda"
        is the current GPU; ``python -m vareid_ext.doctor`` asks every one.
    """
    return {device_type: unavailable_reason(device_type) or "native" for device_type in ("cpu", "cuda")}


def available(device: torch.device | str) -> bool:
    """Whether native kernels run for tensors of this device now; where they cannot, the reason is told once."""
    reason = unavailable_reason(device)
    if reason and not reference_forced():
        _tell_once(f"vareid_ext: plain PyTorch runs on {_with_index(device)}: {reason}")
    return not reason


def _device_of(args: tuple[Any, ...], device_type: str) -> torch.device | str:
    """The device of this type on which the arguments lie: one GPU may run the kernels where another cannot."""
    if device_type == "cpu":
        return device_type
    found = (a.device for a in args if isinstance(a, torch.Tensor) and a.device.type == device_type)
    return next(found, device_type)


def register(op: torch.library.CustomOpDef, device_type: str) -> Callable[[_F], _F]:
    """Register a function as the native kernel of ``op`` on a device type.

    Where the native backend is missing or plain PyTorch is forced, the op's default implementation (the reference)
    runs in its place, so a kernel needs no such test of its own. A kernel may return NotImplemented to say that it does
    not cover this input (a dtype, say); the reference runs then too.
    """
    reference = op._init_fn

    def decorate(kernel: _F) -> _F:
        def run(*args: Any, **kwargs: Any) -> Any:
            if available(_device_of(args, device_type)):
                result = kernel(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return reference(*args, **kwargs)

        op.register_kernel(device_type)(run)
        _kernels[op, device_type] = run
        return kernel

    return decorate


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its values: it is no subclass, not batched by a transform and not lazy."""
    return (
        type(tensor) in _PLAIN and torch._C._has_storage(tensor) and not tensor.is_neg() and not tensor._is_zerotensor()
    )


def shortcut(op: torch.library.CustomOpDef, *tensors: torch.Tensor | None) -> Callable[..., Any]:
    """What runs ``op`` on these tensors: its kernel at once where nobody can tell the difference, else the operator.

    The operator's layers in the dispatcher cost more than a small kernel. They are needed where a gradient is to be
    recorded, a compiler or a dispatch mode (fake tensors, tracing) looks on, or a tensor is not plain.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return op
    present = [tensor for tensor in tensors if tensor is not None]
    if not all(map(is_plain, present)):
        return op
    return _kernels.get((op, present[0].device.type), op)


def view(tensor: torch.Tensor | None) -> Any:
    """A tensor as the compiled module takes it (a DLPack capsule that shares its memory); None stays None."""
    return None if tensor is None else to_dlpack(tensor.detach() if tensor.requires_grad else tensor)


def stream(tensor: torch.Tensor) -> int:
    """The handle of the current stream of a CUDA tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
