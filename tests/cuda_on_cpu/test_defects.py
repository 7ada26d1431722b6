"""The harness proves itself: every kind of defect, planted, is reported; correct kernels are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.harness import (
    ORDERS,
    Everywhere,
    InOut,
    KernelDefect,
    Launcher,
    LauncherError,
    Workspace,
    planted,
)

pytestmark = pytest.mark.skipif(bool(build.missing_reason()), reason=build.missing_reason() or "g++ is here")
N = 64
SOURCE = Path(__file__).parent / "planted" / "defects.cu"

# what must be reported, for each kernel of planted/defects.cu
DEFECTS = {
    "missing_syncthreads": r"data race on shared variable 'tile' \+ \d+ bytes .*no __syncthreads between",
    "missing_second_syncthreads": r"data race on shared variable 'first'.*no __sync",
    "missing_syncwarp": r"data race on shared variable 'tile'.*no __syncwarp or __syncthreads",
    "inter_block_race": r"data race on argument 2 of inter_block_race_cuda .*nothing orders the blocks",
    "global_read_past_end": r"out-of-bounds read of 4 bytes at argument 1 of .* \+ 256 bytes \(of 256\)",
    "global_read_before_start": r"out-of-bounds read of 4 bytes at argument 1 of .* - 4 bytes",
    "global_write_past_end": r"out-of-bounds write of 4 bytes at argument 2 of .* \+ 252 bytes \(of 252\)",
    "static_shared_overflow": r"out-of-bounds write of 4 bytes at shared variable 'tile' \+ 252 bytes \(of 252\)",
    "dynamic_shared_overflow": r"out-of-bounds write of 4 bytes at dynamic shared memory \+ 252 bytes \(of 252\)",
    "divergent_barrier": r"barrier divergence in block \(0,0,0\): thread \(0,0,0\) waits at .*thread \(32,0,0\) at",
    "barrier_after_exit": r"barrier divergence in block \(0,0,0\): .*thread \(63,0,0\) has ended",
    "divergent_warp": r"barrier divergence .* of the same warp and mask",
    "shuffle_from_exited_lane": r"shuffle from an absent lane: thread \(62,0,0\) .* reads lane 31 .* has ended",
    "shuffle_outside_mask": r"shuffle from an absent lane: .* is not in the mask",
    "uninitialised_shared_read": r"uninitialised read of 4 bytes at shared variable 'tile' \+ 20 bytes",
    "shared_kept_between_blocks": r"uninitialised read of 4 bytes at shared variable 'kept'",
    "uninitialised_global_read": r"uninitialised read of 4 bytes at argument 2 of",
    "unwritten_output": r"unwritten output: element 63 of argument 2",
    "misaligned_access": r"misaligned read of 8 bytes at argument 1",
    "other_threads_stack": r"out-of-bounds read of 4 bytes at .*no device memory lies there",
    "loop_carried_race": r"data race on shared variable 'tile' .*no __syncthreads between",
    "byte_race": r"data race on shared variable 'flag' \+ 0 bytes .*no __syncwarp",
    "unordered_initialisation": r"data race on shared variable 'count' .*no __sync",
    "plain_read_beside_atomics": r"data race on argument 2 of .* \+ 0 bytes .*nothing orders the blocks",
    "write_after_other_blocks_read": r"data race on argument 2 of .* \+ 0 bytes .*nothing orders the blocks",
    "partly_written_vector": r"uninitialised read of 16 bytes at shared variable 'tile' \+ 0 bytes",
    "constant_input_write": r"constant input: write of 4 bytes at argument 1 of .* \+ 28 bytes",
    "device_variable": r"unchecked write of 4 bytes .*__device__ variables are not supported",
    "divergent_function": r"barrier divergence: threads came to \S+defects\.cu:\d+ by calls at \S+:\d+ and \S+:\d+",
    "divergent_shuffle": r"barrier divergence: threads came to \S+defects\.cu:\d+ by calls at \S+:\d+ and \S+:\d+",
    "different_masks": r"barrier divergence .* of the same warp and mask",
    "mask_without_itself": r"thread \(31,0,0\) .* with a mask \(0x7fffffff\) that leaves itself out",
    "strided_stores": r"unwritten output: element 37 of argument 2",
    "host_pointer": r"out-of-bounds read of 4 bytes at address 0x\w+ .*no device memory lies there",
    "host_read": r"the host reads argument 1 of host_read_cuda .* \+ 252 bytes .*: that is device memory",
    "wrong_device": r"a DeviceGuard is missing",
    "wrong_stream": r"launch on another stream",
    "too_much_shared": r"50000 bytes of dynamic shared memory",
    "empty_grid": r"launch with grid \(0,1,1\)",
    "memset_past_end": r"cudaMemsetAsync of 260 bytes runs past argument 2",
}
# found by the sanitizers only
SANITIZED = {
    "signed_overflow": r"[Ss]igned integer overflow",
    "row_overflow": r"[Ii]ndex 32 out of bounds",
    "local_array_overflow": r"(stack-buffer-overflow|[Ii]ndex 8 out of bounds)",
}
HOST_SIDE = {
    "wrong_device", "wrong_stream", "too_much_shared", "empty_grid", "memset_past_end", "unwritten_output",
    "strided_stores", "host_pointer", "host_read",
}  # fmt: skip
READS_ITS_OUTPUT = {"plain_read_beside_atomics", "write_after_other_blocks_read"}


def run_defect(name: str, flavour: str, order: str) -> None:
    outputs = N - 1 if name == "global_write_past_end" else N
    x, y = torch.ones(N), torch.empty(outputs)
    with Launcher(planted(flavour), order) as launch:
        launch(f"{name}_cuda", x, InOut(y) if name in READS_ITS_OUTPUT else y, outputs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_reported_in_every_order(name: str, order: str) -> None:
    with pytest.raises(KernelDefect) as caught:
        run_defect(name, "checker", order)
    text = str(caught.value)
    expected = DEFECTS[name]
    if order != "forward":  # other threads are the first to be noticed
        expected = re.sub(
            r"\\\(\d+,0,0\\\)|lane \d+|\\\+ \d+ bytes", lambda m: re.sub(r"\d+,0,0|\d+", r"[\\d,]+", m[0]), expected
        )
    if not (order != "forward" and name in ("uninitialised_shared_read",)):
        assert re.search(expected, text), text
    if name not in HOST_SIDE:
        lines = {int(n) for n in re.findall(r"planted/defects\.cu:(\d+)", text)}
        assert lines & body_lines(name), text


def body_lines(name: str) -> set[int]:
    """The lines of a planted kernel, and of the function `<name>_part` that it calls."""
    lines = SOURCE.read_text().splitlines()
    firsts = [i for i, line in enumerate(lines) if re.match(rf"__(?:global|device)__ .*\b{name}(?:_part)?\(", line)]
    return {i + 1 for first in firsts for i in range(first, lines.index("}", first) + 1)}


def test_missing_fence_between_blocks() -> None:
    x, y = torch.ones(3), torch.empty(3)
    with Launcher(planted("checker")) as launch, pytest.raises(KernelDefect, match="nothing orders the blocks"):
        launch("missing_fence_cuda", x, y, Workspace(4), 3)


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_report(name: str) -> None:
    with pytest.raises(KernelDefect, match=SANITIZED[name]):
        run_defect(name, "asan", "forward")


@pytest.mark.parametrize("name", ["global_read_past_end", "static_shared_overflow", "dynamic_shared_overflow"])
def test_sanitizers_see_device_and_shared_memory(name: str) -> None:
    with pytest.raises(KernelDefect, match=r"(buffer-overflow|use-after-poison|out of bounds)"):
        run_defect(name, "asan", "forward")


def test_every_planted_defect_is_tested() -> None:
    exported = set(re.findall(r"^EXPORT\((\w+)_cuda\)", SOURCE.read_text(), re.MULTILINE))
    assert exported == {*DEFECTS, *SANITIZED, "missing_fence"}


@pytest.mark.parametrize("columns", [1, 31, 128, 203])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_correct_softmax(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, columns, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    with Everywhere(planted) as launch:
        launch("softmax_cuda" if dtype == torch.float32 else "softmax_double_cuda", x, y, 5, columns)
    torch.testing.assert_close(y, x.softmax(1))


@pytest.mark.parametrize("n", [1, 32, 70])
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_correct_transpose(n: int, variant: int) -> None:
    x = torch.randn(n, n)
    y = torch.empty_like(x)
    with Everywhere(planted) as launch:
        launch("transpose_cuda", x, y, n, variant)
    assert torch.equal(y, x.T)


def test_fence_and_atomic_order_blocks() -> None:
    x, y = torch.ones(1000), torch.empty(1)
    with Everywhere(planted) as launch:
        launch("grid_sum_cuda", x, Workspace(16 * 4), Workspace(4), y, 1000)
    assert y.item() == 1000


def test_warps_exchange_through_shared_memory_and_vote() -> None:
    x = torch.arange(64, dtype=torch.int32)
    y, odd = torch.empty_like(x), torch.empty(2, dtype=torch.int32)
    with Everywhere(planted) as launch:
        launch("warp_reverse_cuda", x, y, odd)
    assert y.tolist() == [*range(31, -1, -1), *range(63, 31, -1)]
    assert odd.tolist() == [16, 16]


def test_lanes_of_half_a_warp_are_matched() -> None:
    x = torch.arange(64, dtype=torch.int32) % 5
    y = torch.empty_like(x)
    with Everywhere(planted) as launch:
        launch("equal_lanes_cuda", x, y)
    halves = [range(t // 16 * 16, t // 16 * 16 + 16) for t in range(64)]
    expected = [sum(1 << peer % 32 for peer in half if x[peer] == x[t]) for t, half in enumerate(halves)]
    assert [int(value) % 2**32 for value in y] == expected


@pytest.mark.parametrize("barrier", ["__syncthreads();", "__syncwarp();"])
def test_a_disabled_barrier_is_noticed(barrier: str) -> None:
    source = "tests/cuda_on_cpu/planted/correct.cu"
    text = (build.ROOT / source).read_text().splitlines()
    line = next(i for i, t in enumerate(text) if t.strip() == barrier) + 1
    if barrier == "__syncthreads();":
        call: tuple[Any, ...] = ("softmax_cuda", torch.ones(1, 128), torch.empty(1, 128), 1, 128)
    else:
        x = torch.ones(64, dtype=torch.int32)
        call = ("warp_reverse_cuda", x, torch.empty_like(x), torch.empty(2, dtype=torch.int32))
    library = planted("checker")
    library.disable_barrier((source, line))
    try:
        with Launcher(library) as launch, pytest.raises(KernelDefect, match="data race"):
            launch(*call)
    finally:
        library.disable_barrier(None)
    with Launcher(library) as launch:
        launch(*call)


def test_traffic_of_known_kernels() -> None:
    x, n = torch.randn(64, 64), 64
    library = planted("checker")
    with Launcher(library) as launch, library.measuring() as traffic:
        for variant in range(3):
            launch("transpose_cuda", x, torch.empty_like(x), n, variant)
        launch("copy4_cuda", x, torch.empty_like(x), n * n)
    for name, t in traffic.items():
        assert (t.bytes_loaded, t.bytes_stored) == (4 * n * n, 4 * n * n), name
        assert t.moved_ratio == 1
        assert t.launches == 1
    naive, padded, plain = (
        traffic["naive_transpose_kernel"],
        traffic["transpose_kernel<1>"],
        traffic["transpose_kernel<0>"],
    )
    # 128 loads of 4 sectors and 128 stores of 32
    assert (naive.requests, naive.sectors, naive.ideal_sectors) == (256, 128 * 4 + 128 * 32, 256 * 4)
    assert padded.coalescing == 1
    assert padded.wavefront_ratio == 1
    # 128 stores of one wavefront and 128 column loads of 32
    assert (plain.wavefronts, plain.ideal_wavefronts) == (128 + 128 * 32, 256)
    assert traffic["copy4_kernel"].requests == 2 * n * n // 4 // 32
    assert traffic["copy4_kernel"].coalescing == 1


def test_bad_calls_are_refused() -> None:
    x = torch.ones(4, 4)
    with Launcher(planted("checker")) as launch:
        with pytest.raises(ValueError, match="no launcher 'absent_cuda' is exported"):
            launch("absent_cuda", x)
        with pytest.raises(ValueError, match="2 arguments were given"):
            launch("softmax_cuda", x, x)
        with pytest.raises(TypeError, match=r"argument 1 of softmax_cuda \(const float32\*\): a torch.float64 tensor"):
            launch("softmax_cuda", x.double(), x, 4, 4)
        with pytest.raises(ValueError, match="contiguous"):
            launch("softmax_cuda", x.T[:2], torch.empty(2, 4), 2, 4)
        with pytest.raises(TypeError, match="argument 3"):
            launch("softmax_cuda", x, torch.empty_like(x), 4.0, 4)


UNSUPPORTED = {
    "#include <cooperative_groups.h>": "cooperative groups",
    "#include <cub/cub.cuh>": "CUB",
    "#include <mma.h>": "mma.h",
    "#include <cuda_pipeline.h>": "cuda_pipeline.h",
    '__global__ void k() { asm volatile("bar.sync 0;"); }': "inline PTX",
    "__global__ void k(unsigned* y) { *y = __activemask(); }": "__activemask",
    "__global__ void k(int* y) { *y = __reduce_add_sync(0xffffffffu, *y); }": "__reduce_add_sync",
    "__global__ void k(int* y) { *y = __vabs4(*y); }": "tests/cuda_on_cpu/include does not have",
    "__global__ void k() {} void f() { k<<<1, 1>>>(); }": "<<<",
    "__global__ void k() { extern __shared__ float tile[]; tile[0] = 0; }": "extern __shared__",
}


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_unsupported_feature_is_a_compile_error(code: str, tmp_path: Path) -> None:
    source = tmp_path / "unsupported.cu"
    source.write_text(f"#include <cuda_runtime.h>\n{code}\n")
    with pytest.raises(build.BuildError) as caught:
        build.build("unsupported", [source], [], "fast")
    assert "not supported" in str(caught.value)
    assert UNSUPPORTED[code] in str(caught.value)


def test_launcher_exceptions_pass_through() -> None:
    with Launcher(planted("fast")) as launch, pytest.raises(LauncherError, match="cudaMemsetAsync: invalid argument"):
        launch("complaint_cuda")
