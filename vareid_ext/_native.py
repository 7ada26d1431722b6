"""The compiled module: the only place that imports it, and the only place that says why it is missing."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

from vareid_ext._version import NATIVE_INTERFACE, __version__

_MODULE_NAME = "_vareid_native"


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
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
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


def _with_index(device: torch.device) -> torch.device:
    """The device; "cuda" is the current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def unavailable_reason(device: torch.device | str) -> str:
    """Why plain PyTorch runs for tensors of this device now, or "" if native kernels do. "cuda" is the current GPU."""
    if reference_forced():
        return "plain PyTorch was asked for (VAREID_BACKEND=reference or reference_backend())"
    device = torch.device(device)
    if device.type == "cpu":
        return _missing_reason
    if device.type == "cuda":
        return _cuda_reason(_with_index(device).index)
    return f"there are no native kernels for device type {device.type!r}"


def backends() -> dict[str, str]:
    """Which native backends are loaded, and why the others are not.

    Returns:
        ``{"cpu": ..., "cuda": ...}``; each value is ``"native"``, or the reason why plain PyTorch runs instead. "cuda"
        is the current GPU; ``python -m vareid_ext.doctor`` asks every one.
    """
    return {device_type: unavailable_reason(device_type) or "native" for device_type in ("cpu", "cuda")}


def available(device: torch.device | str) -> bool:
    """Whether native kernels run for tensors of this device now; where they cannot, a warning says why, once."""
    reason = unavailable_reason(device)
    if reason and not reference_forced():
        _warn_once(f"vareid_ext: plain PyTorch runs on {_with_index(torch.device(device))}: {reason}")
    return not reason


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def with_fallback(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs ``kernel`` where the device of the first tensor has native kernels, else ``reference``.

    A kernel may return NotImplemented to say that it does not cover this input (a dtype, say); the reference runs then
    too.
    """

    def run(*args: Any) -> Any:
        if available(next(filter(_is_tensor, args)).device):
            result = kernel(*args)
            if result is not NotImplemented:
                return result
        return reference(*args)

    return run


def capsule(value: Any) -> Any:
    """A tensor as the compiled module takes it: a DLPack capsule that shares its memory. Anything else stays."""
    if isinstance(value, torch.Tensor):
        return to_dlpack(value)
    return tuple(map(capsule, value)) if isinstance(value, (tuple, list)) else value


def launch(name: str, *arguments: Any, on: torch.Tensor) -> None:
    """Calls a function of the compiled module with tensors, numbers and tuples of them.

    Args:
        name: of the function.
        arguments: what it takes before its place.
        on: a tensor on whose device it runs, in PyTorch's number of threads or on PyTorch's current stream.
    """
    place = (torch.get_num_threads(), 0, 0)
    if on.is_cuda:
        place = (1, on.device.index, torch.cuda.current_stream(on.device).cuda_stream)
    getattr(module(), name)(*map(capsule, arguments), place)
