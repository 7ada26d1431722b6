"""Every row's own cases on a real GPU, and what only a GPU has: streams, devices, dispatch by the tensor's device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests import bfloat16
from tests.cuda_on_cpu import rows
from tests.cuda_on_cpu.representative import REPRESENTATIVE, Shape
from tests.gpu import gpu_backend
from tests.gpu.gpu_backend import DEVICE
from vareid_ext.ops import _bfloat16_filter

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


def _hostile(kind: str, rows: int, D: int) -> tuple[Tensor, Tensor]:
    """Elements of bfloat16 whose products are hard to add up, [rows, D] and [rows + 60, D]."""
    generator = torch.Generator().manual_seed(D)
    a, b = (torch.randn(size, D, generator=generator) for size in (rows, rows + 60))
    if kind == "cancelling":  # all but the last element
        half = D // 2
        a[:, half : 2 * half], b[:, half : 2 * half] = a[:, :half], -b[:, :half]
    elif kind == "of all magnitudes":
        a, b = (x * 2.0 ** torch.randint(-20, 20, x.shape, generator=generator) for x in (a, b))
    elif kind == "growing":
        a, b = (x * torch.logspace(-12, 12, D, base=2) for x in (a, b))
    elif kind == "subnormal":
        a, b = a * 2.0**-130, b * 2.0**19
    elif kind == "subnormal beside 2^21":
        a, b = (torch.where(torch.rand(x.shape, generator=generator) < 0.5, x * 2.0**-130, x * 2.0**19) for x in (a, b))
    elif kind == "cut off":  # all but the first product lie below its last bit
        a, b = torch.ones_like(a), torch.full_like(b, 1.99 * 2.0**-24)
        b[:, 0] = 1
    elif kind == "cut off in a partial sum":
        a, b = torch.ones_like(a), b.abs() * 2.0**-20
        b[:, D // 2], b[:, -1] = 1, -1
    return a.bfloat16(), b.bfloat16()


@pytest.mark.parametrize(
    "kind",
    ["random", "cancelling", "of all magnitudes", "growing", "subnormal", "subnormal beside 2^21", "cut off",
     "cut off in a partial sum"],
)  # fmt: skip
def test_products_of_bfloat16_err_by_no_more_than_is_assumed(kind: str) -> None:
    """The filter's proof rests on it: see vareid_ext/ops/_bfloat16_filter.py."""
    for M, D in ((1, 1), (5, 7), (300, 130), (300, 2048), (16, 16384)):
        a, b = _hostile(kind, M, D)
        out = torch.empty(len(a), len(b), device=DEVICE)
        bfloat16.multiply(a.to(DEVICE), b.to(DEVICE), out)
        wide_a, wide_b = a.double(), b.double()
        limit = _bfloat16_filter.product_error(D) * (wide_a.abs() @ wide_b.abs().T) + 2.0**-104 * D
        error = (out.cpu().double() - wide_a @ wide_b.T).abs()
        assert bool((error <= limit).all()), f"{M} rows, D={D}: {float((error / limit).max()):.2f} of the bound"
