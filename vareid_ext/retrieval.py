"""Distances, nearest neighbours and k-reciprocal re-ranking: pure functions of features or of distance matrices.

Every function takes NumPy arrays, PyTorch tensors, CuPy arrays or anything else that speaks DLPack, also of several
kinds on one device, and returns the kind of its first argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
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
from vareid_ext.ops._checks import (
    check_count,
    check_dtype,
    check_floating,
    check_number,
    check_same_device,
    check_values,
    dtype_name,
)
from vareid_ext.ops._features import check_features, check_same_features, largest_magnitude
from vareid_ext.ops._filter import block_side, common_scale, contiguous_rows, has_contiguous_rows
from vareid_ext.ops._progress import listen
from vareid_ext.reference import k_reciprocal as reference
from vareid_ext.reference.pairwise_distance import rows_per_block


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
    return back(_pairwise.pairwise_distance(_tensor(x, "x"), None if y is None else _tensor(y, "y"), metric))


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
    distance, index = _nearest.nearest_neighbors(x, None if y is None else to_tensor(y, "y"), k, metric)
    return back(distance), back(index)


def check_parameters(k1: int, k2: int, lambda_value: float) -> tuple[int, int, float]:
    """The parameters of a re-ranking as Python's numbers; TypeError or ValueError unless they can be that."""
    k1, k2 = check_count("k1", k1, 1), check_count("k2", k2, 1)
    check_number("lambda_value", lambda_value)
    if not 0 <= lambda_value <= 1:  # NaN fails too
        raise ValueError(f"lambda_value: {lambda_value} was given; allowed are 0 to 1")
    return k1, k2, float(lambda_value)


@dataclasses.dataclass(frozen=True)
class RerankPlan:
    """How a re-ranking will use memory beyond its input and result, in bytes. Made by :func:`rerank_plan`."""

    block_rows: int
    """Rows and columns of a block of products."""
    copies: int
    """Copies of features whose rows are not contiguous."""
    candidates: int
    """Candidates of every row, while the products go by, and the rows' norms and bounds."""
    block: int
    """A block of products, the product's own buffers, two blocks of features for where they must be converted or
    centred, and the list of the blocks."""
    lists: int
    """The neighbour lists and their distances."""
    again: int
    """What the rows that have more near ties than candidates take beyond a block when they are done again."""
    entries: int
    """Entries of the sparse encodings, estimated: how many they have depends on the features."""
    sparse: int
    """The sparse encodings with so many entries."""

    def most_entries(self, max_memory: int) -> int:
        """Entries of the encodings for which ``max_memory`` bytes suffice."""
        return self.entries + (max_memory - self.copies - self.lists - self.sparse) // _ENTRY

    @property
    def peak(self) -> int:
        """The largest of the phases: products, rows done again, encodings."""
        return self.copies + self.lists + max(max(self.candidates, self.again) + self.block, self.sparse)

    def __str__(self) -> str:
        parts = ("copies", "candidates", "block", "lists", "again", "sparse", "peak")
        sizes = ", ".join(f"{name} {getattr(self, name) / 2**20:.1f} MiB" for name in parts)
        return f"re-ranking in blocks of {self.block_rows} rows: {sizes}"


_PRODUCT_BUFFERS = 4 << 20  # what the vendor's product packs its operands into
_ENTRY = 16  # bytes of an entry of the expanded encodings and of their inverted index
_ROUNDING = 1e-3  # share of the largest distance up to which asymmetry and negative distances are rounding errors
_PLACE = 256  # bytes of a block's place in the list of blocks
_SIDES = (1024, 768, 512, 256, 128, 64)


def rerank_plan(
    Q: int, G: int, D: int, *, k1: int = 20, k2: int = 6, topk: int | None = None, block_rows: int | None = None,
    max_memory: int | None = None, copies: int = 0,
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
        copies: bytes of features whose rows are not contiguous.

    Raises:
        ValueError: ``max_memory`` does not suffice.
    """
    M, threads = Q + G, torch.get_num_threads()
    k = min(M, max(k1 + 1, k2))
    lists = M * (8 * k + 16)
    native = max(k, topk or 0) <= _nearest.MOST_NEIGHBORS["cpu"]
    candidates = M * (8 * _nearest.capacity(k) + 40) + (Q * (8 * _nearest.capacity(topk) + 24) if topk else 0)
    again = _nearest.again_bytes(M, threads)
    if not native:  # whole rows in float64, of features in float64
        candidates, again = 16 * M * D + 56 * M * min(M, rows_per_block(M)), 0
    entries = M * min(M, math.ceil(2 * (k1 + 1) * math.sqrt(k2)))
    sparse = _ENTRY * entries + M * (40 + 24 * threads)
    for side in [block_rows] if block_rows else [side for side in _SIDES if side <= max(64, M)]:
        rows = min(max(_nearest.LEAST_ROWS, side), M)
        block = 4 * rows * (rows + 2 * D) + _PRODUCT_BUFFERS + _PLACE * -(-M // side)
        plan = RerankPlan(side, copies, candidates, block, lists, again, entries, sparse)
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


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of one matrix overlaps that of the other."""
    begin = [t.data_ptr() for t in (a, b)]
    size = [t.element_size() * (1 + (t.shape[0] - 1) * t.stride(0) + (t.shape[1] - 1) * t.stride(1)) for t in (a, b)]
    return begin[0] < begin[1] + size[1] and begin[1] < begin[0] + size[0]


def _check_out(out: Any, shape: tuple[int, int], query: Tensor, gallery: Tensor) -> Tensor:
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
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError("out: rows that overlap were given; each needs memory of its own")
    for name, features in (("query", query), ("gallery", gallery)):
        if _share_memory(tensor, features):
            raise ValueError(
                f"out: lies in the memory between {name}'s first and last element, which is read while out is written"
            )
    if isinstance(out, np.ndarray) and tensor.data_ptr() != out.ctypes.data:
        raise ValueError("out: an aligned array in the machine's byte order and without negative strides is needed")
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
        topk: return only each query's topk best gallery rows (1 to G), where Q x G does not fit. Their order is that of
            the distances before they are rounded to float32, ties by the lower index.
        out: float32 [Q, G] that receives the result, a writable memory map for example; not with topk.
        block_rows: rows and columns of a block of products; None chooses. The sets do not depend on it, and values
            only in their last bits.
        max_memory: bytes that may be used beyond input and result, by :func:`rerank_plan`; None for no limit. How large
            the sparse encodings get depends on the features: if they are found to be larger than what is left for
            them, that is an error too, and ``out`` then holds unfinished values. What the system's allocator keeps of
            freed memory comes on top: with glibc's up to about 10 MiB, or none with ``MALLOC_TRIM_THRESHOLD_=65536``
            in the environment.
        show_plan: print the plan on standard error.
        progress: show a progress bar on standard error.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; with topk: distance float32 [Q, topk], ascending, and index
        int64 [Q, topk]. NumPy, PyTorch or CuPy as query was; ``out`` itself if it was given.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes, devices or parameters do not fit; a row with NaN or Inf;
            ``max_memory`` does not suffice.
    """
    back = returner(query)
    query, gallery = to_tensor(query, "query"), to_tensor(gallery, "gallery")
    check_values("query", query)
    check_features("query", query)
    check_same_features("gallery", gallery, "query", query)
    k1, k2, lambda_value = check_parameters(k1, k2, lambda_value)
    Q, G = query.shape[0], gallery.shape[0]
    for name, rows in (("query", Q), ("gallery", G)):
        if rows == 0:
            raise ValueError(f"{name}: no rows were given; at least one is needed")
    if Q + G >= 1 << 31:
        raise ValueError(f"query, gallery: {Q} and {G} rows were given; together less than 2^31 are allowed")
    if topk is not None:
        topk = check_count("topk", topk, 1, G)
        if out is not None:
            raise ValueError("out: was given together with topk, whose result it cannot hold")
    if block_rows is not None:
        block_rows = check_count("block_rows", block_rows, 1)
    if max_memory is not None:
        max_memory = check_count("max_memory", max_memory, 0, 2**63 - 1)
    if block_rows is None and max_memory is None and query.is_cuda:
        block_rows = block_side(query.device)
    plan = rerank_plan(
        Q, G, query.shape[1], k1=k1, k2=k2, topk=topk, block_rows=block_rows, max_memory=max_memory,
        copies=sum(part.numel() * part.element_size() for part in (query, gallery) if not has_contiguous_rows(part)),
    )  # fmt: skip
    most = None if max_memory is None else plan.most_entries(max_memory)
    if show_plan:
        print(plan, file=sys.stderr)
    result = None if out is None else _check_out(out, (Q, G), query, gallery)
    if result is None and topk is None:
        result = query.new_empty((Q, G), dtype=torch.float32)
    query, gallery = contiguous_rows(query), contiguous_rows(gallery)
    scale = common_scale((query, gallery), largest_magnitude({"query": query, "gallery": gallery}))
    with _progress_bar(progress, Q + G):
        neighbor, near, row_max, gallery_index, gallery_distance = _nearest.joint_neighbors(
            query, gallery, scale, min(Q + G, max(k1 + 1, k2)), topk or 0, result, plan.block_rows
        )
    indptr, index = _stages.k_reciprocal_sets(neighbor, k1, most)
    value = _stages.listed_distance(query, gallery, scale, neighbor, near, indptr, index)
    value = _stages.k_reciprocal_encode(indptr, value, row_max)
    indptr, index, value = _stages.k_reciprocal_expand(neighbor, k2, indptr, index, value, most)
    encodings = indptr, index, value, *_stages.k_reciprocal_invert(indptr, index, value, Q, Q + G)
    if result is None:
        best = _stages.k_reciprocal_topk(
            query, gallery, scale, gallery_index, gallery_distance, row_max, *encodings, lambda_value
        )
        return back(best[0]), back(best[1])
    _stages.k_reciprocal_blend(result, row_max, *encodings, lambda_value)
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
        q_g_dist: [Q, G], distances between queries and gallery, float32, float16, bfloat16 or float64. In all three,
            negative entries of up to 1e-3 of the largest are rounding errors and taken as 0.
        q_q_dist: [Q, Q], between queries; symmetric; of q_g_dist's dtype and device.
        g_g_dist: [G, G], within the gallery; likewise.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; NumPy, PyTorch or CuPy as q_g_dist was.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty matrix; shapes or parameters do not fit; NaN or Inf; negative entries or asymmetry beyond
            1e-3 of the largest entry; similarities in place of distances (the diagonals of q_q_dist and g_g_dist are
            then larger than the other entries).
    """
    back = returner(q_g_dist)
    names = ("q_g_dist", "q_q_dist", "g_g_dist")
    q_g, q_q, g_g = (to_tensor(value, name) for name, value in zip(names, (q_g_dist, q_q_dist, g_g_dist), strict=True))
    check_values("q_g_dist", q_g)
    check_floating("q_g_dist", q_g)
    for name, value in (("q_q_dist", q_q), ("g_g_dist", g_g)):
        check_dtype(name, value, q_g.dtype)
        check_same_device(name, value, "q_g_dist", q_g)
    k1, k2, lambda_value = check_parameters(k1, k2, lambda_value)
    if q_g.dim() != 2 or 0 in q_g.shape:
        raise ValueError(f"q_g_dist: shape {list(q_g.shape)} was given; [Q, G], both at least 1, is needed")
    Q, G = q_g.shape
    for name, value, shape in zip(names, (q_g, q_q, g_g), ((Q, G), (Q, Q), (G, G)), strict=True):
        _check_matrix(name, value, shape)
    # A sum over pairs of s_ii + s_jj - 2 s_ij is a sum of |x_i - x_j|^2 where s are products of features, above 0;
    # where s are distances, it is below 0.
    trace = sum(float(value.diagonal().sum(dtype=torch.float64)) for value in (q_q, g_g))
    total = sum(times * float(value.sum(dtype=torch.float64)) for value, times in ((q_g, 2), (q_q, 1), (g_g, 1)))
    if (Q + G) * trace > total:
        raise ValueError(
            "q_q_dist: this looks like a similarity matrix (the diagonals of q_q_dist and g_g_dist are larger than the "
            "other entries); distances are needed"
        )
    allowed = _ROUNDING * max(float(value.max()) for value in (q_g, q_q, g_g))
    for name, value in zip(names, (q_g, q_q, g_g), strict=True):
        negative = (value < -allowed).any(1)
        if bool(negative.any()):
            raise ValueError(
                f"{name}: row {int(negative.nonzero()[0])} holds a negative distance (beyond 1e-3 of the largest)"
            )
    for name, value in (("q_q_dist", q_q), ("g_g_dist", g_g)):
        if float((value - value.T).abs().max()) > allowed:
            raise ValueError(f"{name}: is not symmetric (beyond 1e-3 of the largest distance)")
    q_g, q_q, g_g = (value.clamp(min=0) if bool((value < 0).any()) else value for value in (q_g, q_q, g_g))
    neighbor, row_max = _stages.matrix_neighbors(q_g, q_q, g_g, min(Q + G, max(k1 + 1, k2)))
    row_max.masked_fill_(row_max == 0, 1)  # such rows stay 0
    maximum = torch.ones_like(row_max, dtype=torch.float32)  # divided before squares can leave float32's range
    indptr, index = _stages.k_reciprocal_sets(neighbor, k1)
    value = reference.matrix_distance(q_g, q_q, g_g, row_max, indptr, index)
    value = _stages.k_reciprocal_encode(indptr, value, maximum)
    encodings = _stages.k_reciprocal_expand(neighbor, k2, indptr, index, value)
    inverted = _stages.k_reciprocal_invert(*encodings, Q, Q + G)
    wide = torch.promote_types(q_g.dtype, torch.float32)
    result = q_g.to(wide, copy=True).div_(row_max[:Q, None].to(wide)).square_().to(torch.float32)
    _stages.k_reciprocal_blend(result, maximum, *encodings, *inverted, lambda_value)
    return back(result)
