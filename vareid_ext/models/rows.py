"""Horizontal rows of a feature map, pooled: the parts of PCB, HPM, Pyramid, MGN and VA-reID's local branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW_POOLINGS = ("avg", "max", "sum", "both")
"""Mean over a row, its maximum, the two added, or the two side by side."""


def equal_rows(height: int, *counts: int, overlap: bool = False) -> list[tuple[int, int]]:
    """The map cut into `counts[0]` equal rows, then into `counts[1]`, and so on.

    Args:
        height: of the feature map.
        counts: numbers of rows, each at least 1.
        overlap: where a count does not divide the height, let rows share a line of the map: row i of n begins at
            ``floor(i height / n)`` and ends before ``ceil((i + 1) height / n)``, as in torch's adaptive pooling.

    Returns:
        ``sum(counts)`` intervals (begin, end) of lines, the end not included.

    Raises:
        ValueError: a count below 1 or, without `overlap`, one that does not divide the height.
    """
    for n in counts:
        if n < 1 or (height % n and not overlap):
            raise ValueError(f"rows: {n} was given; allowed are numbers that divide the feature map's height, {height}")
    return [(i * height // n, -(-(i + 1) * height // n)) for n in counts for i in range(n)]


def row_runs(height: int, count: int) -> list[tuple[int, int]]:
    """All runs of adjacent rows out of `count` equal ones: the single rows from the top down, then the pairs, ...

    Args, Returns, Raises:
        As :func:`equal_rows`; there are ``count (count + 1) / 2`` intervals.
    """
    rows = equal_rows(height, count)
    return [(rows[i][0], rows[i + n - 1][1]) for n in range(1, count + 1) for i in range(count - n + 1)]


def pool_rows(x: Tensor, rows: Sequence[tuple[int, int]], pooling: str = "avg") -> Tensor:
    """One vector for each row of a feature map.

    Args:
        x: floating point [N, C, H, W].
        rows: P intervals (begin, end) of lines in [0, H], none of them empty.
        pooling: out of ``ROW_POOLINGS``.

    Returns:
        Float32 [N, P, C]; [N, P, 2 C], the mean first, for "both".

    Raises:
        ValueError: an unknown pooling, no rows, or one that is empty or leaves the map.
    """
    if pooling not in ROW_POOLINGS:
        raise ValueError(f"pooling: {pooling!r} was given; allowed are {', '.join(ROW_POOLINGS)}")
    if not rows or not all(0 <= begin < end <= x.shape[2] for begin, end in rows):
        raise ValueError(f"rows: {list(rows)} was given; allowed are intervals of lines in [0, {x.shape[2]}]")
    pooled = []
    if pooling != "max":
        lines = x.float().mean(3)
        pooled.append(torch.stack([lines[:, :, begin:end].mean(2) for begin, end in rows], dim=1))
    if pooling != "avg":
        lines = x.float().amax(3)
        pooled.append(torch.stack([lines[:, :, begin:end].amax(2) for begin, end in rows], dim=1))
    return pooled[0] + pooled[1] if pooling == "sum" else torch.cat(pooled, dim=2)
