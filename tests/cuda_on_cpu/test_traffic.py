"""What the kernels move through global and shared memory, held to what each promises (representative.py)."""

from __future__ import annotations

import functools

import pytest

from tests import kernel_budget
from tests.cuda_on_cpu import build, measure, rows
from tests.cuda_on_cpu.measure import Measured
from tests.cuda_on_cpu.representative import REPRESENTATIVE, Shape

pytestmark = pytest.mark.skipif(bool(build.missing_reason()), reason=build.missing_reason() or "g++ is here")


@functools.cache
def traffic(row: str) -> dict[tuple[str, Shape], Measured]:
    return measure.traffic(row)


@pytest.mark.parametrize("row", rows.row_names())
def test_every_kernel_keeps_its_limits(row: str) -> None:
    assert row in REPRESENTATIVE, f"{row} has no representative call (tests/cuda_on_cpu/representative.py)"
    assert traffic(row), "the representative calls launch no kernel"
    for (kernel, shape), measured in traffic(row).items():
        limit, t = shape.limits[kernel.split("<")[0]], measured.traffic
        assert measured.ratio <= limit.moved, (kernel, shape.name, measured)
        assert measured.ratio >= 1, f"{kernel}, {shape.name}: less was moved than minima.py says must be: {measured}"
        assert t.coalescing >= limit.coalescing, (kernel, shape.name, t)
        assert t.wavefront_ratio <= limit.wavefronts, (kernel, shape.name, t)


@pytest.mark.parametrize("row", rows.row_names())
def test_every_launch_fits_on_a_multiprocessor(row: str) -> None:
    """Registers come to a warp in groups of 8 for each lane; no kernel asks for more than 48 KiB of shared memory."""
    _, budget = kernel_budget.read_budget()
    for (kernel, _), measured in traffic(row).items():
        t = measured.traffic
        for architecture, taken in budget[kernel].items():
            registers = -(-taken["registers"] // 8) * 8 * -(-t.threads // 32) * 32
            assert registers <= 65536, f"{kernel} with {t.threads} threads on {architecture}: {registers} registers"
            shared = taken["shared"] + t.dynamic_shared
            assert shared <= 48 * 1024, f"{kernel} on {architecture}: {shared} bytes of shared memory"


def test_angular_center_moves_the_bytes_of_its_arrays() -> None:
    """The minimum that the harness counts is the size of what must be read and written, counted by hand."""
    K, V, D = 64, 3, 1024
    small = 4 * (K * V + K + K * V)  # cosines and the two norms
    for (kernel, shape), measured in traffic("angular_center").items():
        t = measured.traffic
        centers = K * (1 + V) * D * (2 if "bfloat16" in shape.name else 4)
        if "forward" in kernel:
            assert (t.distinct_loaded, t.distinct_stored) == (centers, small)
        elif "backward" in kernel:
            assert (t.distinct_loaded, t.distinct_stored) == (centers + small + 4, centers)
        else:
            assert (t.distinct_loaded, t.distinct_stored) == (4 * K * V, 4)


def test_measures_are_deterministic() -> None:
    again = {(kernel, shape.name): t for (kernel, shape), t in measure.traffic("angular_center").items()}
    assert again == {(kernel, shape.name): t for (kernel, shape), t in traffic("angular_center").items()}
