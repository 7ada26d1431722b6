"""Every row's own cases on a real GPU, and what only a GPU has: streams, devices, dispatch by the tensor's device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.cuda_on_cpu import rows
from tests.cuda_on_cpu.representative import REPRESENTATIVE, Shape
from tests.gpu import gpu_backend
from tests.gpu.gpu_backend import DEVICE

pytestmark = pytest.mark.skipif(
    bool(gpu_backend.missing_reason()), reason=gpu_backend.missing_reason() or "a GPU is here"
)
SHAPES = [pytest.param(shape, id=f"{row}: {shape.name}") for row, shapes in REPRESENTATIVE.items() for shape in shapes]


@pytest.fixture
def backend() -> Iterator[str]:
    with gpu_backend.on_gpu():
        yield "cuda"


# Compilers and opcheck do not run under the fixture's mode: test_gpu_uses.py has them, on tensors of the device.
@pytest.mark.parametrize("case", rows.parameters(without=("compile", "opcheck")))
def test_kernels(case: rows.Case, request: pytest.FixtureRequest, backend: str) -> None:
    case.run(request)


def _assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], device: torch.device) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.device == device
        # the default tolerances of the dtype, on the scale of the largest value
        scale = float(b.abs().max()) if b.is_floating_point() else 0.0
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12, torch.float16: 2e-3}.get(
            b.dtype, 0
        )
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_tensors_give_what_cpu_tensors_give(shape: Shape) -> None:
    _assert_same(shape.call(DEVICE), shape.call(torch.device("cpu")), DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_the_same_every_time(shape: Shape) -> None:
    first, second = shape.call(DEVICE), shape.call(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_current_stream_is_used(shape: Shape) -> None:
    expected = shape.call(DEVICE)
    gpu_backend.synchronize()
    with gpu_backend.busy_stream():
        got = shape.call(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_device_is_selected_and_left(shape: Shape) -> None:
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        got = shape.call(other)
        assert torch.cuda.current_device() == 0
    _assert_same(got, shape.call(torch.device("cpu")), other)
