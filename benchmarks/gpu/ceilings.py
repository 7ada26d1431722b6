"""Step: what the device can do at most, by plain PyTorch: a copy, matrix products, a launch, a look from the host."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.records import Records
from benchmarks.gpu.step import DEVICE, DRY_RUN, Clock
from vareid_ext.ops._matmul import full_float32


def _copy(clock: Clock) -> dict[str, Any]:
    source = torch.empty((1 if DRY_RUN else 2048) << 20, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    seconds = clock.medians([lambda: target.copy_(source)], 1)[0]
    return {"value": 2 * source.nbytes / seconds / 1e9, "unit": "GB/s, read and written"}


def _product(clock: Clock, dtype: torch.dtype, size: int) -> dict[str, Any]:
    size = 128 if DRY_RUN else size
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with full_float32(DEVICE.type):
        seconds = clock.medians([lambda: torch.mm(a, b, out=out)], 1)[0]
    return {"value": 2 * size**3 / seconds / 1e12, "unit": f"TFLOP/s, {size} x {size} x {size}, random values"}


def _launch(clock: Clock) -> dict[str, Any]:
    x, count = torch.zeros(1, device=DEVICE), 1000

    def run() -> None:
        for _ in range(count):
            x.add_(1)

    return {"value": clock.medians([run], 1)[0] / count * 1e6, "unit": "microseconds"}


def _look(clock: Clock) -> dict[str, Any]:
    x, count = torch.zeros(1, device=DEVICE), 100

    def run() -> None:
        for _ in range(count):
            x.item()

    return {"value": clock.medians([run], 1)[0] / count * 1e6, "unit": "microseconds"}


def main() -> None:
    records, clock = Records(), Clock()
    records.check("copy", lambda: _copy(clock))
    records.check("float32 product", lambda: _product(clock, torch.float32, 8192))
    records.check("bfloat16 product", lambda: _product(clock, torch.bfloat16, 8192))
    records.check("float64 product", lambda: _product(clock, torch.float64, 4096))
    records.check("launch of a small kernel", lambda: _launch(clock))
    records.check("look at a value from the host", lambda: _look(clock))


if __name__ == "__main__":
    main()
