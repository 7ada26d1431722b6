"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import InOut, Partial, dtype_code, spanned


def _sets(parts: Any) -> list[Any]:
    """x, factor, rows, stride of the first set and of the second (an empty one where there is none)."""
    first, factor = parts[0]
    second, second_factor = parts[1] if len(parts) == 2 else (first[:0], None)
    flat: list[Any] = []
    for x, f in ((first, factor), (second, second_factor)):
        memory, stride = spanned(x)
        flat += [memory if x.numel() else None, f, x.shape[0], stride]
    return flat


def nearest_neighbors_scan(
    launch: Any, block: Any, row: int, column: int, left_bounds: Any, right_bounds: Any, candidates: Any, k: int,
    both: bool, write: bool, place: Any,
) -> None:  # fmt: skip
    rows, columns = block.shape
    dense = block.contiguous()
    launch(
        "nearest_neighbors_scan_cuda", InOut(dense), columns, rows, columns, row, column, *left_bounds, *right_bounds,
        *map(InOut, candidates[:6]), candidates[0].shape[1], k, both, write,
    )  # fmt: skip
    block.copy_(dense)


def nearest_neighbors_select(
    launch: Any, x: Any, y: Any, metric: int, unscale: float, left_bounds: Any, right_bounds: Any, candidates: Any,
    k: int, index: Any, distance: Any, unsure: Any, kth_upper: Any, place: Any,
) -> None:  # fmt: skip
    launch(
        "nearest_neighbors_select_cuda", *_sets(x), *_sets(y), dtype_code(x[0][0]), x[0][0].shape[1], metric, unscale,
        *left_bounds, *right_bounds, *map(InOut, candidates[:6]), candidates[0].shape[1], k, Partial(index),
        Partial(distance), dtype_code(distance), unsure, kth_upper,
    )  # fmt: skip


def nearest_neighbors_rescan(
    launch: Any, block: Any, rows: Any, x: Any, y: Any, metric: int, unscale: float, left_bounds: Any,
    right_bounds: Any, kth_upper: Any, same: Any, k: int, index: Any, distance: Any, workspace: Any, place: Any,
) -> None:  # fmt: skip
    count, columns = block.shape
    launch(
        "nearest_neighbors_rescan_cuda", block.contiguous(), columns, rows.contiguous(), count, *_sets(x), *_sets(y),
        dtype_code(x[0][0]), x[0][0].shape[1], metric, unscale, *left_bounds, *right_bounds, kth_upper, None, k,
        InOut(index), InOut(distance), dtype_code(distance), None,
    )  # fmt: skip
