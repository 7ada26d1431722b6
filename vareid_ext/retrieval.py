"""Distances, nearest neighbours and k-reciprocal re-ranking: pure functions of features or of distance matrices.

Every function takes NumPy arrays, PyTorch tensors, CuPy arrays or anything else that speaks DLPack, and returns the
kind it was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import k_reciprocal as _stages
from vareid_ext.ops import nearest_neighbors as _nearest
from vareid_ext.ops import pairwise_distance as _pairwise
from vareid_ext.ops._checks import check_same_device, dtype_name
from vareid_ext.ops._features import check_features, check_same_features, row_magnitudes
from vareid_ext.ops._filter import common_scale
from vareid_ext.ops._progress import listen
from vareid_ext.reference import k_reciprocal as reference


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


def _check_count(name: str, value: object, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: {type(value).__name__} was given; an int is needed")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least} is needed" if most is None else f"allowed are {least} to {most}"
        raise ValueError(f"{name}: {value} was given; {allowed}")


def _check_parameters(k1: int, k2: int, lambda_value: float) -> None:
    _check_count("k1", k1, 1, None)
    _check_count("k2", k2, 1, None)
    if not 0 <= lambda_value <= 1:  # NaN fails too
        raise ValueError(f"lambda_value: {lambda_value} was given; allowed are 0 to 1")


@dataclasses.dataclass(frozen=True)
class RerankPlan:
    """How a re-ranking will use memory beyond its input and result, in bytes. Made by :func:`rerank_plan`."""

    block_rows: int
    """Rows and columns of a block of products."""
    candidates: int
    """Candidates of every row, while the products go by, and the rows' norms and bounds."""
    block: int
    """A block of products, and blocks of features where they must be converted or centred."""
    lists: int
    """The neighbour lists and their distances."""
    sparse: int
    """The sparse encodings, estimated: how many entries they have depends on the features."""

    @property
    def peak(self) -> int:
        """The larger of the two phases: products, then encodings."""
        return self.lists + max(self.candidates + self.block, self.sparse)

    def __str__(self) -> str:
        parts = ("candidates", "block", "lists", "sparse", "peak")
        sizes = ", ".join(f"{name} {getattr(self, name) / 2**20:.1f} MiB" for name in parts)
        return f"re-ranking in blocks of {self.block_rows} rows: {sizes}"


def rerank_plan(
    Q: int, G: int, D: int, *, k1: int = 20, k2: int = 6, topk: int | None = None, block_rows: int | None = None,
    max_memory: int | None = None, direct: bool = True,
) -> RerankPlan:  # fmt: skip
    """The memory that :func:`k_reciprocal_rerank` will need on the CPU beyond its input and result.

    Args:
        Q: number of queries.
        G: number of gallery rows.
        D: elements of a feature.
        k1: as in :func:`k_reciprocal_rerank`.
        k2: as in :func:`k_reciprocal_rerank`.
        topk: as in :func:`k_reciprocal_rerank`.
        block_rows: rows of a block of products; None chooses.
        max_memory: bytes that may be used; None for no limit.
        direct: whether the features are float32 (others are converted block by block, which takes two more blocks).

    Raises:
        ValueError: ``max_memory`` does not suffice.
    """
    M = Q + G
    k = min(M, max(k1 + 1, k2))
    candidates = M * (8 * _nearest.capacity(k) + 40) + (Q * (8 * _nearest.capacity(topk) + 24) if topk else 0)
    lists = M * (8 * k + 16)
    encoded = 2 * min(M, k1 + 1)
    sparse = M * 8 * (encoded + 2 * encoded) + M * 16 * torch.get_num_threads()
    choices = [block_rows] if block_rows else [side for side in (1024, 768, 512, 256, 128, 64) if side <= max(64, M)]
    for side in choices:
        rows = min(side, M)
        block = 4 * rows * rows + (0 if direct else 2 * 4 * rows * D)
        plan = RerankPlan(side, candidates, block, lists, sparse)
        if max_memory is None or plan.peak <= max_memory:
            return plan
    raise ValueError(f"max_memory: {max_memory} bytes were given, but the least needed is {plan.peak}: {plan}")


@contextlib.contextmanager
def _progress_bar(show: bool, M: int) -> Iterator[None]:
    if not show:
        yield
        return
    from tqdm.auto import tqdm

    total = M * (M + 1) // 2
    with tqdm(total=total, desc="re-ranking", unit="pair", unit_scale=True, leave=False) as bar, listen(bar.update):
        yield


def _check_out(out: Any, shape: tuple[int, int], query: Tensor) -> Tensor:
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out: a read-only array was given; a writable one is needed")
    tensor = to_tensor(out, "out")
    if tensor.dtype != torch.float32:
        raise TypeError(f"out: dtype {dtype_name(tensor.dtype)} was given; float32 is needed")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"out: shape {list(tensor.shape)} was given; {list(shape)} is needed")
    check_same_device("out", tensor, "query", query)
    if shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError("out: rows must be contiguous")
    if isinstance(out, np.ndarray) and tensor.data_ptr() != out.ctypes.data:
        raise ValueError("out: an array in the machine's byte order and without negative strides is needed")
    return tensor


def k_reciprocal_rerank(
    query: Any,
    gallery: Any,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    topk: int | None = None,
    out: Any = None,
    block_rows: int | None = None,
    max_memory: int | None = None,
    show_plan: bool = False,
    progress: bool = False,
) -> Any:
    """Re-rank with k-reciprocal encoding (Zhong et al., CVPR 2017), from features.

    The neighbour sets are those of the definition on float64 distances, ties and duplicates included; the values are
    right to 1e-5. Products run in full float32 whatever TF32, matmul precision or autocast say. Query and gallery are
    never concatenated, and nothing of size (Q+G) x (Q+G) is held.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; Q at least 1, D at most 16,384.
        gallery: features [G, D] of query's dtype and device; G at least 1.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.
        topk: return only each query's topk best gallery rows (1 to G), where Q x G does not fit.
        out: float32 [Q, G] that receives the result, a writable memory map for example; not with topk.
        block_rows: rows and columns of a block of products; None chooses. The result does not depend on it.
        max_memory: bytes that may be used beyond input and result, by :func:`rerank_plan`; None for no limit.
        show_plan: print the plan on standard error.
        progress: show a progress bar on standard error.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; with topk: distance float32 [Q, topk], ascending, ties by the
        lower index, and index int64 [Q, topk]. NumPy, PyTorch or CuPy as query was; ``out`` itself if it was given.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes, devices or parameters do not fit; a row with NaN or Inf;
            ``max_memory`` does not suffice.
    """
    back = returner(query)
    query, gallery = to_tensor(query, "query"), to_tensor(gallery, "gallery")
    check_features("query", query)
    check_same_features("gallery", gallery, "query", query)
    _check_parameters(k1, k2, lambda_value)
    Q, G = query.shape[0], gallery.shape[0]
    for name, rows in (("query", Q), ("gallery", G)):
        if rows == 0:
            raise ValueError(f"{name}: no rows were given; at least one is needed")
    if Q + G >= 1 << 31:
        raise ValueError(f"query, gallery: {Q} and {G} rows were given; together less than 2^31 are allowed")
    if topk is not None:
        _check_count("topk", topk, 1, G)
        if out is not None:
            raise ValueError("out: was given together with topk, whose result it cannot hold")
    if block_rows is not None:
        _check_count("block_rows", block_rows, 1, None)
    plan = rerank_plan(
        Q, G, query.shape[1], k1=k1, k2=k2, topk=topk, block_rows=block_rows, max_memory=max_memory,
        direct=query.dtype == torch.float32,
    )  # fmt: skip
    if show_plan:
        print(plan, file=sys.stderr)
    result = None if out is None else _check_out(out, (Q, G), query)
    if result is None and topk is None:
        result = query.new_empty((Q, G), dtype=torch.float32)
    scale = common_scale(max(float(row_magnitudes(n, p).max()) for n, p in (("query", query), ("gallery", gallery))))
    with _progress_bar(progress, Q + G):
        neighbor, near, row_max, gallery_index, gallery_distance = _nearest.joint_neighbors(
            query, gallery, scale, min(Q + G, max(k1 + 1, k2)), topk or 0, result, plan.block_rows
        )
    indptr, index = _stages.k_reciprocal_sets(neighbor, k1)
    value = _stages.listed_distance(query, gallery, scale, neighbor, near, indptr, index)
    value = _stages.k_reciprocal_encode(indptr, value, row_max)
    indptr, index, value = _stages.k_reciprocal_expand(neighbor, k2, indptr, index, value)
    if result is None:
        best = _stages.k_reciprocal_topk(
            query, gallery, scale, gallery_index, gallery_distance, row_max, indptr, index, value, lambda_value
        )
        return back(best[0]), back(best[1])
    _stages.k_reciprocal_blend(result, row_max, indptr, index, value, lambda_value)
    return back(result) if out is None else out


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
        raise ValueError(f"q_g_dist: shape {list(q_g.shape)} was given; [Q, G], both at least 1, is needed")
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
    scale = 1.0 if 1e-6 < largest < 1e6 or largest == 0 else 1 / largest  # squares within float32's range
    neighbor, row_max = _stages.matrix_neighbors(q_g, q_q, g_g, min(Q + G, max(k1 + 1, k2)))
    maximum = (row_max * scale).square().to(torch.float32)
    indptr, index = _stages.k_reciprocal_sets(neighbor, k1)
    value = reference.matrix_distance(q_g, q_q, g_g, scale, indptr, index)
    value = _stages.k_reciprocal_encode(indptr, value, maximum)
    encoding = _stages.k_reciprocal_expand(neighbor, k2, indptr, index, value)
    result = q_g.to(torch.float32 if scale == 1 else torch.float64, copy=True).mul_(scale).square_().to(torch.float32)
    _stages.k_reciprocal_blend(result, maximum, *encoding, lambda_value)
    return back(result)
