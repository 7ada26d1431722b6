"""Runs the package's operators on the CUDA kernels, executed by the CPU: the compiled module is replaced by one whose
functions are the launchers' adapters in ``launchers/<op>.py``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vareid_ext import _native


@functools.cache
def adapters() -> dict[str, Callable[..., Any]]:
    """The compiled module's functions that have an adapter, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for path in sorted((Path(__file__).parent / "launchers").glob("[a-z]*.py")):
        module = importlib.import_module(f"tests.cuda_on_cpu.launchers.{path.stem}")
        found.update({k: v for k, v in vars(module).items() if k.startswith(path.stem)})
    return found


class CompiledModule:
    """Stands for ``_vareid_native``: each function calls its adapter with a launcher."""

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self._launcher = launcher

    def byte_products(self) -> tuple[int, int]:
        """No: a GPU's features are never filtered by them, and these tensors only look like a CPU's."""
        return 0, 0

    def pairwise_distance_strip_bytes(self, D: int) -> int:
        """Nor are there strips of products on a GPU."""
        return 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in adapters():
            raise AttributeError(f"{name} has no adapter in tests/cuda_on_cpu/launchers (see its README)")
        return functools.partial(adapters()[name], self._launcher)


def _tensors(value: Any) -> Any:
    """Arguments as the adapters take them."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, value)


@contextmanager
def cuda_on_cpu(launcher: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, operators on CPU tensors run the CUDA kernels through ``launcher``."""
    before = _native._module, _native._missing_reason, _native.capsule
    _native._module, _native._missing_reason, _native.capsule = CompiledModule(launcher), "", _tensors  # type: ignore[assignment]
    try:
        yield
    finally:
        _native._module, _native._missing_reason, _native.capsule = before  # type: ignore[assignment]
