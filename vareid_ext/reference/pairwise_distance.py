"""Distances between the rows of two sets of features.

With rows ``x_i`` and ``y_j`` of D elements::

    sqeuclidean  d_ij = sum_k (x_ik - y_jk)^2
    euclidean    d_ij = sqrt(sqeuclidean)
    cosine       d_ij = 1 - cos(x_i, y_j) = |x_i / |x_i| - y_j / |y_j||^2 / 2

Gradients, with g the upstream gradient::

    sqeuclidean  d/dx_i = 2 sum_j g_ij (x_i - y_j)
    euclidean    the same with g_ij / (2 d_ij) in place of g_ij, and 0 where d_ij = 0
    cosine       d/dx_i = sum_j g_ij ((1 - d_ij) x_i / |x_i| - y_j / |y_j|) / |x_i|

The cosine is written as half a squared distance because that form is exactly 0 for equal rows, so that duplicates tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.reference import accumulator_dtype

METRICS = ("euclidean", "sqeuclidean", "cosine")
_BLOCK_ELEMENTS = 1 << 23  # float64 distances held at once by the functions that go over blocks of rows


def rows_per_block(columns: int) -> int:
    """How many rows of so many float64 distances are held at once."""
    return max(1, _BLOCK_ELEMENTS // max(1, columns))


def unit_rows(x: Tensor) -> Tensor:
    """The rows divided by their lengths, in x's dtype; a zero row is divided by zero, which callers refuse before."""
    return x / x.norm(dim=1, keepdim=True)


def exact_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Distances as float64 sums of squared differences, one pair at a time: equal rows have equal distances.

    Args:
        x: [M, D], floating point.
        y: [N, D], on x's device.
        metric: "sqeuclidean", "euclidean" or "cosine".

    Returns:
        float64 [M, N]. Each entry depends on its two rows only, and is the same with the rows exchanged.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    if metric == "cosine":
        x, y = unit_rows(x), unit_rows(y)
    rooted = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "euclidean":
        return rooted
    return rooted.square() if metric == "sqeuclidean" else rooted.square() / 2


def pairwise_distance_forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """All distances.

    Args:
        x: [M, D], floating point.
        y: [N, D] of x's dtype and device; None for x itself.
        metric: "sqeuclidean", "euclidean" or "cosine".

    Returns:
        [M, N], float64 for float64 features, else float32.
    """
    other = x if y is None else y
    out = x.new_empty((x.shape[0], other.shape[0]), dtype=accumulator_dtype(x.dtype))
    step = rows_per_block(other.shape[0])
    for begin in range(0, x.shape[0], step):
        out[begin : begin + step] = exact_distance(x[begin : begin + step], other, metric)
    return out


def pairwise_distance_backward(
    upstream: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to x and y (closed form), in the features' dtype.

    Args:
        upstream: [M, N], in the distances' dtype.
        x: [M, D].
        y: [N, D] or None (x itself: its gradient is then the sum of both results).
        distance: [M, N], what the forward pass returned.
        metric: "sqeuclidean", "euclidean" or "cosine".
    """
    other = x if y is None else y
    wide_x, wide_y = x.to(distance.dtype), other.to(distance.dtype)
    if metric == "cosine":
        x_norm, y_norm = wide_x.norm(dim=1, keepdim=True), wide_y.norm(dim=1, keepdim=True)
        unit_x, unit_y = wide_x / x_norm, wide_y / y_norm
        along = upstream * (1 - distance)
        grad_x = (along.sum(1, keepdim=True) * unit_x - upstream @ unit_y) / x_norm
        grad_y = (along.sum(0)[:, None] * unit_y - upstream.T @ unit_x) / y_norm
        return grad_x.to(x.dtype), grad_y.to(x.dtype)
    weight = 2 * upstream
    if metric == "euclidean":
        weight = torch.where(distance > 0, upstream / distance, 0)
    grad_x = weight.sum(1, keepdim=True) * wide_x - weight @ wide_y
    grad_y = weight.sum(0)[:, None] * wide_y - weight.T @ wide_x
    return grad_x.to(x.dtype), grad_y.to(x.dtype)
