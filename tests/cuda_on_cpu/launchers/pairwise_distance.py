"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import InOut, dtype_code, spanned


def pairwise_distance_max_abs(launch: Any, x: Any, out: Any, place: Any) -> None:
    (rows, D), (memory, stride) = x.shape, spanned(x)
    launch("pairwise_distance_max_abs_cuda", memory, None, rows, stride, dtype_code(x), D, out)


def pairwise_distance_norm(launch: Any, x: Any, factor: Any, out: Any, place: Any) -> None:
    (rows, D), (memory, stride) = x.shape, spanned(x)
    launch("pairwise_distance_norm_cuda", memory, factor, rows, stride, dtype_code(x), D, out)


def pairwise_distance_prepare(launch: Any, x: Any, factor: Any, center: Any, out: Any, norm: Any, place: Any) -> None:
    (rows, D), (memory, stride) = x.shape, spanned(x)
    launch("pairwise_distance_prepare_cuda", memory, factor, rows, stride, dtype_code(x), D, center, out, norm)


def pairwise_distance_block(
    launch: Any, block: Any, x: Any, x_factor: Any, y: Any, y_factor: Any, x_norm: Any, y_norm: Any, metric: int,
    unscale: float, mirror: Any, place: Any,
) -> None:  # fmt: skip
    (rows, columns), D = block.shape, x.shape[1]
    (x_memory, x_stride), (y_memory, y_stride) = spanned(x), spanned(y)
    dense = block.contiguous()
    dense_mirror = None if mirror is None else mirror.contiguous()
    launch(
        "pairwise_distance_block_cuda", InOut(dense), columns, x_memory, x_factor, rows, x_stride, y_memory, y_factor,
        columns, y_stride, dtype_code(x), D, x_norm, y_norm, metric, unscale, dense_mirror, rows,
    )  # fmt: skip
    block.copy_(dense)
    if mirror is not None:
        mirror.copy_(dense_mirror)


def pairwise_distance_tiled(
    launch: Any, x_prepared: Any, y_prepared: Any, block: Any, x: Any, x_factor: Any, y: Any, y_factor: Any,
    x_norm: Any, y_norm: Any, metric: int, unscale: float, place: Any,
) -> None:  # fmt: skip
    (rows, columns), D = block.shape, x.shape[1]
    (x_memory, x_stride), (y_memory, y_stride) = spanned(x), spanned(y)
    launch(
        "pairwise_distance_tiled_cuda", x_prepared.contiguous(), y_prepared.contiguous(), block, columns,
        x_memory, x_factor, rows, x_stride, y_memory, y_factor, columns, y_stride, dtype_code(x), D, x_norm, y_norm,
        metric, unscale,
    )  # fmt: skip
