"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import InOut, dtype_code


def pairwise_distance_max_abs(launch: Any, x: Any, out: Any, threads: int, stream: int) -> None:
    rows, D = x.shape
    launch("pairwise_distance_max_abs_cuda", x.contiguous(), dtype_code(x), rows, D, D, out)


def pairwise_distance_norm(launch: Any, x: Any, factor: Any, out: Any, threads: int, stream: int) -> None:
    rows, D = x.shape
    launch("pairwise_distance_norm_cuda", x.contiguous(), factor, dtype_code(x), rows, D, D, out)


def pairwise_distance_prepare(
    launch: Any, x: Any, factor: Any, center: Any, out: Any, norm: Any, threads: int, stream: int
) -> None:
    rows, D = x.shape
    launch("pairwise_distance_prepare_cuda", x.contiguous(), factor, dtype_code(x), rows, D, D, center, out, norm)


def pairwise_distance_block(
    launch: Any, block: Any, x: Any, x_factor: Any, y: Any, y_factor: Any, x_norm: Any, y_norm: Any, metric: int,
    unscale: float, mirror: Any, threads: int, stream: int,
) -> None:  # fmt: skip
    (rows, columns), D = block.shape, x.shape[1]
    dense = block.contiguous()
    dense_mirror = None if mirror is None else mirror.contiguous()
    launch(
        "pairwise_distance_block_cuda", InOut(dense), columns, x.contiguous(), x_factor, rows, D, y.contiguous(),
        y_factor, columns, D, dtype_code(x), D, x_norm, y_norm, metric, unscale, dense_mirror, rows,
    )  # fmt: skip
    block.copy_(dense)
    if mirror is not None:
        mirror.copy_(dense_mirror)


def pairwise_distance_tiled(
    launch: Any, x_prepared: Any, y_prepared: Any, block: Any, x: Any, x_factor: Any, y: Any, y_factor: Any,
    x_norm: Any, y_norm: Any, metric: int, unscale: float, stream: int,
) -> None:  # fmt: skip
    (rows, columns), D = block.shape, x.shape[1]
    launch(
        "pairwise_distance_tiled_cuda", x_prepared.contiguous(), y_prepared.contiguous(), block, columns,
        x.contiguous(), x_factor, rows, D, y.contiguous(), y_factor, columns, D, dtype_code(x), D, x_norm, y_norm,
        metric, unscale,
    )  # fmt: skip
