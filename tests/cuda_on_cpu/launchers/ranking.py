"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import dtype_code, spanned


def ranking_workspace_bytes(launch: Any, max_group: int, threads: int) -> int:
    return 0  # the CUDA kernel needs none


def ranking_forward(
    launch: Any, distances: Any, labels: Any, results: Any, workspace: Any, max_group: int, place: Any
) -> None:
    Q, G = distances.shape
    memory, row_stride = spanned(distances)
    launch("ranking_forward_cuda", memory, row_stride, *labels, *results, None, dtype_code(distances), Q, G, max_group)
