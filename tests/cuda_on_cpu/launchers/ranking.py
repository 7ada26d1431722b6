"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import InOut, dtype_code, spanned


def with_codes(labels: Any) -> list[Any]:
    """The fields of RankingLabels: the six arrays, and the number of codes."""
    return [*labels, 0 if labels[4] is None else labels[4].shape[1]]


def ranking_workspace_bytes(launch: Any, max_group: int, threads: int) -> int:
    return 0  # the CUDA kernel needs none


def ranking_forward(
    launch: Any, distances: Any, labels: Any, results: Any, workspace: Any, max_group: int, place: Any
) -> None:
    Q, G = distances.shape
    memory, row_stride = spanned(distances)
    launch(
        "ranking_forward_cuda",
        memory,
        row_stride,
        *with_codes(labels),
        *results,
        None,
        dtype_code(distances),
        Q,
        G,
        max_group,
    )


def ranking_features_workspace_bytes(launch: Any, max_group: int, G: int, threads: int) -> int:
    return 0  # the CUDA kernel needs none


def ranking_features(
    launch: Any, products: Any, x: Any, y: Any, labels: Any, results: Any, workspace: Any, max_group: int, place: Any
) -> None:
    sets: list[Any] = []
    for rows, factor, _norm, _window in (x, y):
        memory, stride = spanned(rows)
        sets += [memory, factor, rows.shape[0], stride]
    launch(
        "ranking_features_cuda", InOut(products.contiguous()), products.shape[1], *sets, dtype_code(x[0]),
        x[0].shape[1], x[2], x[3], y[2], y[3], *with_codes(labels), *results, None, max_group,
    )  # fmt: skip
