"""Exact nearest neighbours."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import _shared_neighbors
from vareid_ext.ops import nearest_neighbors as _op
from vareid_ext.ops._checks import check_choice, check_count
from vareid_ext.reference.pairwise_distance import METRICS
from vareid_ext.retrieval.shares import check_shares


def nearest_neighbors(
    x: Any, y: Any = None, *, k: int, metric: str = "sqeuclidean", group: ProcessGroup | None = None
) -> tuple[Any, Any]:
    """The k nearest rows of y for each row of x, exactly.

    Neighbours are in the order of their float64 distances (sums of squared differences of the given features), ties by
    the lower index, whatever the block size and the number of threads; where squares would leave the range, of the
    features times a common power of two. No M x N matrix is held.

    Over processes: each gives its rows of x and y, M and N being those of all together, and gets the results of its
    rows of x, with indices into all rows of y, in order of the processes: those of one process, bit for bit. Shares may
    be of any size, and empty. With P processes, each sends about (P - 1) N / P rows of y; of x alone, whose pairs are
    compared once and as evenly as blocks allow, P/2 x M/P rows at most, 12 k + 8 bytes for each of as many rows, for
    lists that go back, and what uneven shares are evened out by.

    Args:
        x: features [M, D], float32, float16, bfloat16 or float64; D at most 16,384.
        y: features [N, D] of x's dtype and device; None for x itself (each row is then among its own neighbours).
        k: 1 to N.
        metric: "euclidean" (rooted), "sqeuclidean" (squared) or "cosine" (1 - cos).
        group: the processes that hold the rows, all of which call this; None for this one alone. Features on CPUs need
            gloo, on GPUs NCCL.

    Returns:
        distance [M, k], ascending, float32 (float64 for float64 features), and index int64 [M, k]; NumPy, PyTorch or
        CuPy as x was.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: shapes, devices, k or the metric do not fit; a row with NaN or Inf; a zero row under cosine;
            processes that disagree. All processes raise the same.
        LostProcessError: a RuntimeError; a process of the group ended, or did not answer within its time limit.
    """
    back = returner(x)
    if group is not None:
        distance, index = _of_all(x, y, k, metric, group)
        return back(distance), back(index)
    x = to_tensor(x, "x")
    distance, index = _op.nearest_neighbors(x, None if y is None else to_tensor(y, "y"), k, metric)
    return back(distance), back(index)


def _of_all(x: Any, y: Any, k: int, metric: str, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    def check() -> dict[str, Any]:
        check_choice("metric", metric, METRICS)
        return {"k": check_count("k", k, 1), "metric": metric}

    shares = check_shares(group, {"x": x, "y": y}, check, nonzero=metric == "cosine")
    name, rows = ("x" if y is None else "y"), shares.totals[-1]
    if k > rows:
        raise ValueError(f"k: {k} was given; allowed are 1 to {rows}, the number of rows of {name} of all processes")
    other = None if y is None else shares.own[1]
    return _shared_neighbors.nearest_neighbors(shares.own[0], other, k, metric, shares.sizes, shares.largest, group)
