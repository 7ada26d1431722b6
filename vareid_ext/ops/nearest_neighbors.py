"""Exact nearest neighbours as operators; the definitions are in :mod:`vareid_ext.reference.nearest_neighbors`."""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.ops._checks import check_choice
from vareid_ext.ops._features import check_features, check_rows, check_same_features
from vareid_ext.reference import nearest_neighbors as reference
from vareid_ext.reference.pairwise_distance import METRICS, result_dtype


@torch.library.custom_op("vareid::nearest_neighbors", mutates_args=())
def _nearest_neighbors(x: Tensor, y: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    check_rows("x", x, nonzero=metric == "cosine")
    if y is not None:
        check_rows("y", y, nonzero=metric == "cosine")
    return reference.nearest_neighbors(x, y, k, metric)


@_nearest_neighbors.register_fake
def _(x: Tensor, y: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=result_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)


def nearest_neighbors(x: Tensor, y: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest neighbours of tensors; :func:`vareid_ext.retrieval.nearest_neighbors` says what it takes."""
    check_features("x", x)
    if y is not None:
        check_same_features("y", y, "x", x)
    check_choice("metric", metric, METRICS)
    name, rows = ("x", x.shape[0]) if y is None else ("y", y.shape[0])
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: {type(k).__name__} was given; an int is needed")
    if not 1 <= k <= rows:
        raise ValueError(f"k: {k} was given; allowed are 1 to {rows}, the number of rows of {name}")
    return _nearest_neighbors(x, y, k, metric)
