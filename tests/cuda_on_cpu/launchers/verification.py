"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import InOut, dtype_code, spanned
from tests.cuda_on_cpu.launchers.ranking import with_codes


def verification_workspace_bytes(launch: Any, prefixes: int, Q: int, G: int, threads: int) -> int:
    return 0  # the CUDA kernels need none


def verification_histogram(
    launch: Any, distances: Any, labels: Any, counts: Any, nearest_distance: Any, nearest_index: Any, workspace: Any,
    place: Any,
) -> None:  # fmt: skip
    memory, row_stride = spanned(distances)
    launch(
        "verification_histogram_cuda", memory, row_stride, *with_codes(labels), InOut(counts),
        nearest_distance, nearest_index, None, dtype_code(distances), *distances.shape,
    )  # fmt: skip


def verification_refine(
    launch: Any, distances: Any, labels: Any, prefixes: Any, digits: int, counts: Any, workspace: Any, place: Any
) -> None:
    memory, row_stride = spanned(distances)
    padded = [*prefixes, *[0] * (8 - len(prefixes))]
    launch(
        "verification_refine_cuda", memory, row_stride, *with_codes(labels), *padded, len(prefixes), digits,
        InOut(counts), None, dtype_code(distances), *distances.shape,
    )  # fmt: skip


def verification_accepted(
    launch: Any, distances: Any, labels: Any, threshold: float, accepted: Any, place: Any
) -> None:
    memory, row_stride = spanned(distances)
    launch(
        "verification_accepted_cuda", memory, row_stride, *with_codes(labels), threshold, accepted,
        dtype_code(distances), *distances.shape,
    )  # fmt: skip
