"""Distances between all rows of two sets of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import pairwise_distance as _op
from vareid_ext.ops._filter import block_side


def _tensor(value: Any, name: str) -> Tensor:
    """As :func:`to_tensor`, with the gradient's history."""
    tensor = to_tensor(value, name)
    return value if isinstance(value, Tensor) else tensor


def pairwise_distance(x: Any, y: Any = None, *, metric: str = "euclidean") -> Any:
    """Distances between all rows of x and all rows of y.

    Differentiable for PyTorch tensors. Products run in full float32 whatever TF32, matmul precision or autocast say.

    Args:
        x: features [M, D], float32, float16, bfloat16 or float64; D at most 16,384.
        y: features [N, D] of x's dtype and device; None for x itself, whose self-distances are then exactly 0.
        metric: "euclidean" (rooted), "sqeuclidean" (squared) or "cosine" (1 - cos).

    Returns:
        [M, N], float32 (float64 for float64 features), never negative; NumPy, PyTorch or CuPy as x was.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: shapes, devices or the metric do not fit; a row with NaN or Inf; a zero row under cosine.
    """
    back = returner(x)
    return back(_op.pairwise_distance(_tensor(x, "x"), None if y is None else _tensor(y, "y"), metric))


def rows_in_block(columns: int, device: torch.device) -> int:
    """How many rows of so many distances are held at once: 2^23 distances, or two blocks of products on a large GPU."""
    return max(1, max(1 << 23, 2 * block_side(device) ** 2) // columns)
