"""Products of 8-bit numbers: AMX's kernel over tiles in software, and the machine's own, against whole numbers."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vareid_ext import _native
from vareid_ext.ops import _byte_filter

VNNI, AMX = 1, 2


@functools.cache
def library(folder: Path) -> ctypes.CDLL:
    here = Path(__file__).parent
    out = folder / "tiles.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    subprocess.run(
        ["g++", *flags, "-I", here.parent / "csrc", here / "software_tiles.cpp", "-o", out], check=True, timeout=300
    )
    return ctypes.CDLL(str(out))


@pytest.fixture
def multiply(tmp_path_factory):
    if not (_native.available("cpu") and _byte_filter.byte_products()):
        pytest.skip("this machine has no products of 8 bits")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    compiled = library(tmp_path_factory.getbasetemp())

    def run(x, x_scale, y, y_scale, how, ld):
        """out [rows, columns] and what lies beside it."""
        instructions, software = how
        if not software and instructions > compiled.usable():
            pytest.skip("this machine has no AMX")
        rows, columns = len(x), len(y)
        out = np.full((-(-rows // 8) * 8, ld), np.nan, dtype=np.float32)
        arrays = [np.ascontiguousarray(array, dtype=np.float32) for array in (x, x_scale, y, y_scale)]
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
        compiled.multiply.restype = ctypes.c_bool
        size = ctypes.c_int64
        assert compiled.multiply(
            instructions, software, pointers[0], pointers[1], size(rows), pointers[2], pointers[3], size(columns),
            size(x.shape[1]), out.ctypes.data_as(ctypes.c_void_p), size(ld),
        )  # fmt: skip
        return out[:rows, :columns], out[:, -(-columns // 32) * 32 :]

    return run


NUMBERS = {
    "random": lambda rng, shape: rng.integers(-127, 128, shape),
    "extreme": lambda rng, shape: rng.choice([-127, 127], shape),
    "all 127": lambda rng, shape: np.full(shape, 127),
    "all -127": lambda rng, shape: np.full(shape, -127),
    "alternating": lambda rng, shape: 127 * (-1) ** np.arange(np.prod(shape)).reshape(shape),
}


@pytest.mark.parametrize("how", [(VNNI, False), (AMX, True), (AMX, False)], ids=["VNNI", "software AMX", "AMX"])
@pytest.mark.parametrize("D", [1, 64, 65, 200])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 32), (17, 33), (64, 100)])
def test_products_are_those_of_whole_numbers(multiply, how, rows, columns, D):
    rng = np.random.default_rng(rows + columns + D)
    for numbers in NUMBERS.values():
        a, b = numbers(rng, (rows, D)), numbers(rng, (columns, D))
        scale, other = (2.0 ** rng.integers(-20, 20, size).astype(np.float32) for size in (rows, columns))
        got, beside = multiply(a * scale[:, None], scale, b * other[:, None], other, how, columns + 40)
        expected = (a @ b.T).astype(np.float32) * scale[:, None] * other
        np.testing.assert_array_equal(got, expected)
        assert np.isnan(beside).all()  # nothing is written there


@pytest.mark.parametrize("how", [(AMX, True), (AMX, False)], ids=["software AMX", "AMX"])
@pytest.mark.parametrize("D", [130, 2051])
def test_sums_and_their_rounding_are_those_of_vnni(multiply, how, D):
    """To the last bit, for scales that are no powers of two and sums beyond 2^24."""
    rng = np.random.default_rng(D)
    x, y = rng.standard_normal((40, D)) + 1, rng.standard_normal((70, D)) + 1
    x[3], y[5] = 0, 0
    scales = [(np.abs(rows).max(1) / 127).astype(np.float32) for rows in (x, y)]
    got, expected = (multiply(x, scales[0], y, scales[1], which, 128)[0] for which in (how, (VNNI, False)))
    assert (expected > 0).any()
    np.testing.assert_array_equal(got, expected)
