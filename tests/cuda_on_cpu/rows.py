"""The tests of the rows (``tests/test_<op>.py``) that take a ``backend``: one list of cases for every backend."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda_on_cpu import backend, more_cases
from tests.cuda_on_cpu.harness import Launcher, _copy_output, package

_TESTS = Path(__file__).resolve().parent.parent
# A call larger than this is not worth replaying once for each barrier.
_REPLAYED_BYTES, _REPLAYED_SWITCHES = 4 << 20, 3_000_000


def row_names() -> list[str]:
    """The rows that have CUDA kernels."""
    kernels = _TESTS.parent / "csrc" / "cuda"
    return sorted(p.stem for p in kernels.glob("*.cu") if (_TESTS / f"test_{p.stem}.py").exists())


def backend_tests(row: str) -> dict[str, Callable[..., Any]]:
    """The test functions of a row that take the fixture ``backend``, by name: its own, and those of more_cases.py."""
    own = vars(importlib.import_module(f"tests.test_{row}"))
    more = {n.replace(f"test_{row}__", "test_", 1): f for n, f in vars(more_cases).items() if f"test_{row}__" in n}
    return {
        name: function
        for name, function in {**own, **more}.items()
        if name.startswith("test_") and callable(function) and "backend" in inspect.signature(function).parameters
    }


@dataclass(frozen=True)
class Call:
    """One call of a launcher that a row's tests made."""

    function: str
    arguments: tuple[Any, ...]
    work: int  # thread switches
    sites: frozenset[tuple[str, int]]  # the barriers it ran

    def replay(self, launcher: Launcher) -> None:
        """Makes the call again; KernelDefect if anything is wrong with it."""
        launcher(self.function, *map(_copy_output, self.arguments))


def recorded_calls(row: str) -> list[Call]:
    """The launcher calls that the row's tests make, smallest first; large ones are left out.

    The checker build runs them: it raises where another one might end the process.
    """
    calls: list[Call] = []
    library = package("checker")
    with Launcher(library) as launcher:

        def record(function: str, *arguments: Any) -> Any:
            kept = tuple(map(_copy_output, arguments))
            library.take_work()
            library.take_barrier_sites()
            result = launcher(function, *arguments)
            work = library.take_work()
            size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, torch.Tensor))
            if work <= _REPLAYED_SWITCHES and size <= _REPLAYED_BYTES:
                calls.append(Call(function, kept, work, library.take_barrier_sites()))
            return result

        with backend.cuda_on_cpu(record):
            for test in backend_tests(row).values():
                for arguments in _parameter_sets(test):
                    test(backend="cuda_on_cpu", **arguments)
    return sorted(calls, key=lambda call: call.work)


def _parameter_sets(test: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a parametrised test; none for a test that takes other fixtures or compiles."""
    if any(word in test.__name__ for word in ("opcheck", "compile", "gradcheck")):
        return
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name in ("skip", "skipif", "slow"):
            return
        if mark.name == "parametrize":
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
            values = [
                v.values if isinstance(v, type(pytest.param(0))) else (v,) if len(names) == 1 else v
                for v in mark.args[1]
            ]
            axes.append([dict(zip(names, v, strict=True)) for v in values])
    known = {name for axis in axes for case in axis[:1] for name in case} | {"backend"}
    if set(inspect.signature(test).parameters) != known:
        return
    for choice in itertools.product(*axes):
        yield {name: value for case in choice for name, value in case.items()}
