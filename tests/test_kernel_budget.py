"""The compiled kernels spill nothing, keep nothing in local memory, and take no more than tests/kernel_budget.json."""

from __future__ import annotations

import pytest

from tests import kernel_budget
from tests.kernel_budget import Usage

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6vareid12_GLOBAL__N_110sum_kernelIfEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN6vareid12_GLOBAL__N_110sum_kernelIfEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6vareid12_GLOBAL__N_110sum_kernelIfEEvPKT_' for 'sm_90'
ptxas info    : Function properties for _ZN6vareid12_GLOBAL__N_110sum_kernelIfEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""

needs_nvcc = pytest.mark.skipif(
    bool(kernel_budget.missing_reason()), reason=kernel_budget.missing_reason() or "nvcc is here"
)


def test_the_report_of_the_compiler_is_understood() -> None:
    assert kernel_budget.parse(LOG) == {
        "sum_kernel<float>": {"sm_80": Usage(40, 1024, 8, 16), "sm_90": Usage(32, 0, 0, 0)}
    }


def test_what_exceeds_the_budget_is_named() -> None:
    found = kernel_budget.parse(LOG)
    fitting = {
        "sum_kernel<float>": {"sm_80": {"registers": 40, "shared": 1024}, "sm_90": {"registers": 64, "shared": 0}}
    }
    assert kernel_budget.differences(found, fitting) == []
    tight = {"sum_kernel<float>": {"sm_80": {"registers": 39, "shared": 1023}, "sm_90": {"registers": 32, "shared": 0}}}
    assert kernel_budget.differences(found, tight) == [
        "sum_kernel<float> on sm_80: registers 40, allowed are 39",
        "sum_kernel<float> on sm_80: shared 1024, allowed are 1023",
    ]
    assert kernel_budget.differences(found, {"old_kernel": {}}) == [
        "sum_kernel<float>: is not in the budget",
        "old_kernel: is in the budget, but no longer in csrc/cuda",
    ]


@needs_nvcc
def test_every_kernel_is_compiled_for_every_architecture() -> None:
    expected = {f"sm_{a}" for a in kernel_budget.ARCHITECTURES}
    for kernel, found in kernel_budget.usage().items():
        assert set(found) == expected, kernel


@needs_nvcc
def test_no_spills_and_no_local_memory() -> None:
    for kernel, found in kernel_budget.usage().items():
        for architecture, u in found.items():
            assert (u.stack, u.spills) == (0, 0), f"{kernel} on {architecture}: {u}"


@needs_nvcc
def test_the_compile_is_free_of_warnings() -> None:
    for source in sorted(kernel_budget.KERNELS.glob("*.cu")):
        assert "warning" not in kernel_budget.compile_log(source), source.name


@needs_nvcc
def test_the_budget_is_kept() -> None:
    version, budget = kernel_budget.read_budget()
    if version != kernel_budget.compiler_version():
        pytest.skip(f"the budget was written with nvcc {version}, this is {kernel_budget.compiler_version()}")
    found = kernel_budget.differences(kernel_budget.usage(), budget)
    assert not found, "\n".join([*found, "(wanted? python -m tests.kernel_budget --update)"])
