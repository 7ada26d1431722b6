"""The tests of the rows (``tests/test_<op>.py``) that take a ``backend``: one list of cases for every backend."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent.parent


def row_names() -> list[str]:
    """The rows that have CUDA kernels."""
    kernels = _TESTS.parent / "csrc" / "cuda"
    return sorted(p.stem for p in kernels.glob("*.cu") if (_TESTS / f"test_{p.stem}.py").exists())


def backend_tests(row: str) -> dict[str, Callable[..., Any]]:
    """The test functions of a row that take the fixture ``backend``, by name."""
    module = importlib.import_module(f"tests.test_{row}")
    return {
        name: function
        for name, function in vars(module).items()
        if name.startswith("test_") and callable(function) and "backend" in inspect.signature(function).parameters
    }
