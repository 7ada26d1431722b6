"""The tests of the rows (``tests/test_<op>.py``) that take a ``backend``: one list of cases for every backend."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
class Case:
    """A test of a row with the arguments of one of its parameter sets."""

    id: str
    test: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def fixtures(self) -> set[str]:
        """The fixtures that it takes beside ``backend``."""
        return set(inspect.signature(self.test).parameters) - {"backend", *self.arguments}

    def run(self, request: pytest.FixtureRequest) -> None:
        """Run it as part of another test, which has the fixture ``backend`` of its own."""
        fixtures = {name: request.getfixturevalue(name) for name in ("backend", *sorted(self.fixtures))}
        self.test(**fixtures, **self.arguments)


def cases(row: str) -> Iterator[Case]:
    """Every case of the row's tests."""
    for name, test in backend_tests(row).items():
        axes = [_axis(mark) for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        for choice in itertools.product(*axes):
            ids = "-".join(label for label, _ in choice)
            arguments = {key: value for _, values in choice for key, value in values.items()}
            yield Case(f"{row}: {name.removeprefix('test_')}{ids and f': {ids}'}", test, arguments)


def parameters(*, without: Sequence[str] = ()) -> list[Any]:
    """The cases of all rows, for ``pytest.mark.parametrize``, but for tests whose names contain a word of `without`."""
    return [
        pytest.param(
            case, id=case.id, marks=[m for m in getattr(case.test, "pytestmark", []) if m.name != "parametrize"]
        )
        for row in row_names()
        for case in cases(row)
        if not any(word in case.test.__name__ for word in without)
    ]


def _axis(mark: pytest.Mark) -> list[tuple[str, dict[str, Any]]]:
    """The parameter sets of a mark, each with its part of the test's id."""
    names, ids = mark.args[0], mark.kwargs.get("ids")
    names = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
    axis = []
    for place, given in enumerate(mark.args[1]):
        values = given.values if isinstance(given, type(pytest.param(0))) else (given,) if len(names) == 1 else given
        labels = [
            ids(value) if callable(ids) else value.__name__ if isinstance(value, type) else str(value)
            if isinstance(value, (str, int, float, tuple, torch.dtype, type(None))) else f"{name}{place}"
            for name, value in zip(names, values, strict=True)
        ]  # fmt: skip
        label = ids[place] if isinstance(ids, (list, tuple)) else "-".join(labels)
        axis.append((label, dict(zip(names, values, strict=True))))
    return axis


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
            for case in cases(row):
                if not case.fixtures and not any(w in case.test.__name__ for w in ("opcheck", "compile", "gradcheck")):
                    case.test(backend="cuda_on_cpu", **case.arguments)
    return sorted(calls, key=lambda call: call.work)
