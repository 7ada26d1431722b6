"""Runs the package's operators on the real CUDA kernels while the tests keep their tensors on the CPU: each call of the
compiled module moves its tensors to the GPU and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

from vareid_ext import _native


def missing_reason() -> str:
    """Why the CUDA kernels cannot run here, or ""."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    reason = _native.backends()["cuda"]
    return "" if reason == "native" else reason


class OnGpu:
    """Stands for ``_vareid_native``: runs each function on copies of its tensors on the GPU."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.endswith("_labels_fit"):  # labels are on the host: Python's own checks follow
            return lambda *_: False
        return functools.partial(self._call, getattr(self._module, name))

    @staticmethod
    def _call(function: Callable[..., Any], *arguments: Any) -> Any:
        if not any(isinstance(a, torch.Tensor) for a in arguments):
            return function(*arguments)
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        # the stream is the last argument of every function that launches kernels
        stream = torch.cuda.current_stream().cuda_stream
        result = function(*[to_dlpack(a) if isinstance(a, torch.Tensor) else a for a in moved[:-1]], stream)
        torch.cuda.synchronize()
        for argument, copy in zip(arguments, moved, strict=True):
            if isinstance(argument, torch.Tensor):
                argument.copy_(copy)
        return result


def _no_view(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


@contextmanager
def on_gpu() -> Iterator[None]:
    """Inside the block, operators on CPU tensors run the real CUDA kernels."""
    before = _native._module, _native.view
    _native._module, _native.view = OnGpu(_native.module()), _no_view  # type: ignore[assignment]
    try:
        yield
    finally:
        _native._module, _native.view = before  # type: ignore[assignment]
