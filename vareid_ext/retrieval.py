"""Distances, nearest neighbours and k-reciprocal re-ranking: pure functions of features or of distance matrices.

Every function takes NumPy arrays, PyTorch tensors, CuPy arrays or anything else that speaks DLPack, and returns the
kind it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import nearest_neighbors as _nearest
from vareid_ext.ops import pairwise_distance as _pairwise
from vareid_ext.ops._features import check_features, check_rows, check_same_features
from vareid_ext.reference import k_reciprocal as reference
from vareid_ext.reference import nearest_neighbors as neighbor_reference


def _tensor(value: Any, name: str) -> Tensor:
    return value if isinstance(value, Tensor) else to_tensor(value, name)


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
    return back(_pairwise.pairwise_distance(_tensor(x, "x"), None if y is None else _tensor(y, "y"), metric))


def nearest_neighbors(x: Any, y: Any = None, *, k: int, metric: str = "sqeuclidean") -> tuple[Any, Any]:
    """The k nearest rows of y for each row of x, exactly.

    Neighbours are in the order of their float64 distances (sums of squared differences of the given features), ties by
    the lower index, whatever the block size and the number of threads. No M x N matrix is held.

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
    distance, index = _nearest.nearest_neighbors(x, None if y is None else to_tensor(y, "y"), k, metric)
    return back(distance), back(index)


def _check_parameters(k1: int, k2: int, lambda_value: float) -> None:
    for name, value in (("k1", k1), ("k2", k2)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: {type(value).__name__} was given; an int is needed")
        if value < 1:
            raise ValueError(f"{name}: {value} was given; at least 1 is needed")
    if not 0 <= lambda_value <= 1:  # NaN fails too
        raise ValueError(f"lambda_value: {lambda_value} was given; allowed are 0 to 1")


def k_reciprocal_rerank(query: Any, gallery: Any, *, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Any:
    """Re-rank with k-reciprocal encoding (Zhong et al., CVPR 2017), from features.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; Q at least 1.
        gallery: features [G, D] of query's dtype and device; G at least 1.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; NumPy, PyTorch or CuPy as query was.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes, devices or parameters do not fit; a row with NaN or Inf.
    """
    back = returner(query)
    query, gallery = to_tensor(query, "query"), to_tensor(gallery, "gallery")
    check_features("query", query)
    check_same_features("gallery", gallery, "query", query)
    _check_parameters(k1, k2, lambda_value)
    for name, part in (("query", query), ("gallery", gallery)):
        if part.shape[0] == 0:
            raise ValueError(f"{name}: no rows were given; at least one is needed")
        check_rows(name, part)
    Q, M = query.shape[0], query.shape[0] + gallery.shape[0]
    neighbor, row_max = neighbor_reference.joint_neighbors(query, gallery, min(M, max(k1 + 1, k2)))
    indptr, index = reference.reciprocal_sets(neighbor, k1)
    distance = neighbor_reference.pair_distance(query, gallery, indptr, index)
    encoding = reference.expand_query(neighbor, k2, indptr, index, reference.encode(indptr, distance, row_max))
    original = _pairwise.pairwise_distance(query, gallery, "sqeuclidean").float()
    return back(reference.blend(original, row_max[:Q], *encoding, lambda_value))


def _check_matrix(name: str, value: Tensor, shape: tuple[int, int]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape {list(value.shape)} was given; {list(shape)} is needed")
    finite = value.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name}: row {int((~finite).nonzero()[0])} holds NaN or Inf")


def re_ranking(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Any:
    """Re-rank with k-reciprocal encoding, from three matrices of rooted Euclidean distances (fast-reid's signature).

    Args:
        q_g_dist: [Q, G], distances between queries and gallery, floating point.
        q_q_dist: [Q, Q], between queries; symmetric.
        g_g_dist: [G, G], within the gallery; symmetric.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; NumPy, PyTorch or CuPy as q_g_dist was.

    Raises:
        TypeError: not arrays, or not floating.
        ValueError: an empty matrix; shapes or parameters do not fit; NaN, Inf or negative entries; asymmetry beyond
            1e-3 of the largest entry; similarities in place of distances.
    """
    back = returner(q_g_dist)
    names = ("q_g_dist", "q_q_dist", "g_g_dist")
    q_g, q_q, g_g = (to_tensor(value, name) for name, value in zip(names, (q_g_dist, q_q_dist, g_g_dist), strict=True))
    for name, value in zip(names, (q_g, q_q, g_g), strict=True):
        if not value.is_floating_point():
            raise TypeError(f"{name}: dtype {value.dtype} was given; a floating one is needed")
    _check_parameters(k1, k2, lambda_value)
    if q_g.dim() != 2 or 0 in q_g.shape:
        raise ValueError(f"q_g_dist: shape {list(q_g.shape)} was given; [Q, G] with at least one row and column is needed")
    Q, G = q_g.shape
    for name, value, shape in zip(names, (q_g, q_q, g_g), ((Q, G), (Q, Q), (G, G)), strict=True):
        _check_matrix(name, value, shape)
    largest = max(float(value.abs().max()) for value in (q_g, q_q, g_g))
    if bool(((q_q.diagonal() - 1).abs() <= 1e-2).all()) and largest <= 1.01:
        raise ValueError("q_q_dist: this looks like a similarity matrix (its diagonal is 1); distances are needed")
    for name, value in zip(names, (q_g, q_q, g_g), strict=True):
        if bool((value < 0).any()):
            raise ValueError(f"{name}: row {int((value < 0).any(1).nonzero()[0])} holds a negative distance")
    for name, value in (("q_q_dist", q_q), ("g_g_dist", g_g)):
        if float((value - value.T).abs().max()) > 1e-3 * largest:
            raise ValueError(f"{name}: is not symmetric (beyond 1e-3 of the largest distance)")
    distance = torch.cat([torch.cat([q_q, q_g], 1), torch.cat([q_g.T, g_g], 1)]).double().square()
    row_max = distance.amax(1)
    neighbor = torch.sort(distance, dim=1, stable=True).indices[:, : max(k1 + 1, k2)].to(torch.int32)
    indptr, index = reference.reciprocal_sets(neighbor, k1)
    rows = torch.repeat_interleave(torch.arange(Q + G, device=index.device), indptr.diff())
    value = reference.encode(indptr, distance[rows, index.long()], row_max)
    encoding = reference.expand_query(neighbor, k2, indptr, index, value)
    return back(reference.blend(distance[:Q, Q:].float(), row_max, *encoding, lambda_value))
