"""Every row's own cases, run by its CUDA kernels: checker in five thread orders, sanitizers, fast build."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_on_cpu import build, rows
from tests.cuda_on_cpu.backend import cuda_on_cpu
from tests.cuda_on_cpu.harness import Everywhere


@pytest.fixture
def backend() -> Iterator[str]:
    if build.missing_reason():
        pytest.skip(build.missing_reason())
    with Everywhere() as launcher, cuda_on_cpu(launcher):
        yield "cuda_on_cpu"


@pytest.mark.parametrize("case", rows.parameters())
def test_kernels(case: rows.Case, request: pytest.FixtureRequest, backend: str) -> None:
    case.run(request)
