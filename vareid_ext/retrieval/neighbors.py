"""Exact nearest neighbours."""

from __future__ import annotations

from typing import Any

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import nearest_neighbors as _op


def nearest_neighbors(x: Any, y: Any = None, *, k: int, metric: str = "sqeuclidean") -> tuple[Any, Any]:
    """The k nearest rows of y for each row of x, exactly.

    Neighbours are in the order of their float64 distances (sums of squared differences of the given features), ties by
    the lower index, whatever the block size and the number of threads; where squares would leave the range, of the
    features times a common power of two. No M x N matrix is held.

    Args:
        x: features [M, D], float32, float16, bfloat16 or float64; D at most 16,384.
        y: features [N, D] of x's dtype and device; None for x itself (each row is then among its own neighbours).
        k: 1 to N.
        metric: "euclidean" (rooted), "sqeuclidean" (squared) or "cosine" (1 - cos).

    Returns:
        distance [M, k], ascending, float32 (float64 for float64 features), and index int64 [M, k]; NumPy, PyTorch or
        CuPy as x was.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: shapes, devices, k or the metric do not fit; a row with NaN or Inf; a zero row under cosine.
    """
    back = returner(x)
    x = to_tensor(x, "x")
    distance, index = _op.nearest_neighbors(x, None if y is None else to_tensor(y, "y"), k, metric)
    return back(distance), back(index)
