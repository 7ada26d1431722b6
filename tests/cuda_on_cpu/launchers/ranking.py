"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import dtype_code, spanned


def ranking_workspace_bytes(launch: Any, max_group: int, threads: int) -> int:
    return 0  # the CUDA kernel needs none


def ranking_forward(
    launch: Any, distances: Any, gallery_order: Any, group_begin: Any, group_end: Any, junk: Any, query_camera: Any,
    gallery_camera: Any, average_precision: Any, inverse_negative_penalty: Any, first_match_rank: Any,
    num_matches: Any, workspace: Any, max_group: int, threads: int, stream: int,
) -> None:  # fmt: skip
    Q, G = distances.shape
    memory, row_stride = spanned(distances)
    launch(
        "ranking_forward_cuda", memory, row_stride, gallery_order, group_begin, group_end, junk,
        query_camera, gallery_camera, average_precision, inverse_negative_penalty, first_match_rank, num_matches,
        dtype_code(distances), Q, G,
    )  # fmt: skip
