"""k-reciprocal re-ranking as operators; the definitions are in :mod:`vareid_ext.reference.k_reciprocal`.

The stages after the neighbour lists, each an operator: the sets R*, the distances of their pairs, the encoding, its
query expansion, the inverted index of the gallery's encodings, and the blend of Jaccard and original distance, which
takes any of the queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._filter import contiguous_rows
from vareid_ext.ops._operator import contiguous, define
from vareid_ext.reference import k_reciprocal as reference
from vareid_ext.reference import nearest_neighbors as neighbor_reference
from vareid_ext.reference.pairwise_distance import exact_distance, rows_per_block

# Limits of the CUDA kernels and the sizes of their sort, as in csrc/k_reciprocal.h.
_CUDA_MAX_MEMBERS = 1024
_CUDA_MAX_LISTED = 159
_CUDA_MAX_TOPK = 128
_CUDA_SORT_TILE, _CUDA_SORT_DIGITS = 8192, 256


def _pattern_sizes(like: Tensor, rows: int) -> tuple[Tensor, Any]:
    return like.new_empty((rows + 1,), dtype=torch.int64), torch.library.get_ctx().new_dynamic_size()


def _workspace(like: Tensor, bytes_per_thread: int) -> Tensor:
    """Working memory of a CPU kernel; those of a GPU need none."""
    return like.new_empty(0 if like.is_cuda else bytes_per_thread * torch.get_num_threads(), dtype=torch.uint8)


def _check_entries(entries: int, limit: int | None) -> None:
    """ValueError if the encodings have more entries than memory was granted for."""
    if limit is not None and entries > limit:
        raise ValueError(
            f"max_memory: the encodings of these features have {entries} entries, but what was given suffices for "
            f"{max(limit, 0)}"
        )


def _reference_robust_sets(neighbor: Tensor, k1: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    indptr, index = reference.reciprocal_sets(neighbor, k1)
    _check_entries(index.numel(), limit)
    return indptr, index


def _native_robust_sets(neighbor: Tensor, k1: int, limit: int | None = None) -> Any:
    neighbor = neighbor.contiguous()
    M, width = neighbor.shape
    if neighbor.is_cuda and min(k1 + 1, width) > _CUDA_MAX_MEMBERS:
        return NotImplemented
    sets = []
    for k in (k1, reference.half_k(k1)):
        members = neighbor.new_empty((M, min(k + 1, width)))
        size = neighbor.new_empty((M,))
        _native.launch("k_reciprocal_sets", neighbor, k, members, size, on=neighbor)
        sets += [members, size]
    indptr = neighbor.new_empty((M + 1,), dtype=torch.int64)
    workspace = _workspace(neighbor, 8 * M)
    _native.launch("k_reciprocal_robust_sets", *sets, indptr, None, workspace, on=neighbor)
    entries = int(indptr[-1])
    _check_entries(entries, limit)
    index = neighbor.new_empty((entries,))
    _native.launch("k_reciprocal_robust_sets", *sets, indptr, index, workspace, on=neighbor)
    return indptr, index


def _fake_robust_sets(neighbor: Tensor, k1: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    indptr, entries = _pattern_sizes(neighbor, neighbor.shape[0])
    return indptr, neighbor.new_empty((entries,), dtype=torch.int32)


k_reciprocal_robust_sets = define(
    "k_reciprocal_robust_sets(Tensor neighbor, SymInt k1, SymInt? limit=None) -> (Tensor, Tensor)",
    fake=_fake_robust_sets,
    reference=_reference_robust_sets,
    native=_native_robust_sets,
)
"""R* of every row; see :func:`vareid_ext.reference.k_reciprocal.reciprocal_sets`.

ValueError if it has more than ``limit`` entries.
"""


def _scaled(query: Tensor, gallery: Tensor, scale: float) -> list[Tensor | None]:
    """Query, its factors, gallery, its factors, as the compiled module takes them."""
    arrays: list[Tensor | None] = []
    for part in (contiguous_rows(query), contiguous_rows(gallery)):
        factor = None if scale == 1 else part.new_full((part.shape[0],), scale, dtype=torch.float64)
        arrays += [part, factor]
    return arrays


def _native_listed_distance(query: Tensor, gallery: Tensor, scale: float, *arrays: Tensor) -> Tensor:
    out = query.new_empty(arrays[-1].shape, dtype=torch.float32)
    _native.launch(
        "k_reciprocal_listed_distance", *_scaled(query, gallery, scale), *map(contiguous, arrays), out, on=query
    )
    return out


listed_distance = define(
    "listed_distance(Tensor query, Tensor gallery, float scale, Tensor neighbor, Tensor neighbor_distance, "
    "Tensor indptr, Tensor index) -> Tensor",
    fake=lambda *arguments: arguments[-1].new_empty(arguments[-1].shape, dtype=torch.float32),
    reference=neighbor_reference.listed_distance,
    native=_native_listed_distance,
)
"""Distances of a pattern's pairs; see :func:`vareid_ext.reference.nearest_neighbors.listed_distance`."""


def _native_encode(indptr: Tensor, distance: Tensor, row_max: Tensor) -> Tensor:
    distance = distance.contiguous()
    value = torch.empty_like(distance)
    _native.launch("k_reciprocal_encode", indptr, distance, row_max.contiguous(), value, on=distance)
    return value


k_reciprocal_encode = define(
    "k_reciprocal_encode(Tensor indptr, Tensor distance, Tensor row_max) -> Tensor",
    fake=lambda _indptr, distance, _row_max: distance.new_empty(distance.shape, dtype=torch.float32),
    reference=reference.encode,
    native=_native_encode,
)
"""V before query expansion; see :func:`vareid_ext.reference.k_reciprocal.encode`."""


def _reference_query_expansion(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    expanded = reference.expand_query(neighbor, k2, indptr, index, value)
    _check_entries(expanded[1].numel(), limit)
    return expanded


def _native_query_expansion(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if k2 == 1:
        return indptr.clone(), index.clone(), value.clone()
    neighbor, index, value = neighbor.contiguous(), index.contiguous(), value.contiguous()
    new_indptr = torch.empty_like(indptr)
    workspace = _workspace(neighbor, 16 * neighbor.shape[0])
    given = neighbor, k2, indptr, index, value, new_indptr
    _native.launch("k_reciprocal_query_expansion", *given, None, None, workspace, on=neighbor)
    entries = int(new_indptr[-1])
    _check_entries(entries, limit)
    new_index, new_value = index.new_empty((entries,)), value.new_empty((entries,))
    _native.launch("k_reciprocal_query_expansion", *given, new_index, new_value, workspace, on=neighbor)
    return new_indptr, new_index, new_value


def _fake_query_expansion(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    new_indptr, entries = _pattern_sizes(neighbor, neighbor.shape[0])
    return new_indptr, index.new_empty((entries,)), value.new_empty((entries,))


k_reciprocal_query_expansion = define(
    "k_reciprocal_query_expansion(Tensor neighbor, SymInt k2, Tensor indptr, Tensor index, Tensor value, "
    "SymInt? limit=None) -> (Tensor, Tensor, Tensor)",
    fake=_fake_query_expansion,
    reference=_reference_query_expansion,
    native=_native_query_expansion,
)
"""Query expansion; see :func:`vareid_ext.reference.k_reciprocal.expand_query`.

ValueError if the result has more than ``limit`` entries.
"""


def invert_workspace(device_type: str, columns: int, entries: int) -> int:
    """Bytes of scratch that building the inverted index takes."""
    if device_type == "cuda":
        return 8 * (_CUDA_SORT_DIGITS * -(-entries // _CUDA_SORT_TILE) + 4) + 16 * (-(-entries // 8) * 8)
    return 8 * columns


def _native_invert(
    indptr: Tensor, index: Tensor, value: Tensor, first: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    index, value = index.contiguous(), value.contiguous()
    entries = index.shape[0] - int(indptr[first])
    inverted = indptr.new_empty((columns + 1,)), index.new_empty((entries,)), value.new_empty((entries,))
    workspace = index.new_empty(invert_workspace(index.device.type, columns, entries), dtype=torch.uint8)
    _native.launch("k_reciprocal_invert", indptr, index, value, first, columns, *inverted, workspace, on=index)
    return inverted


def _fake_invert(
    indptr: Tensor, index: Tensor, value: Tensor, first: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    start, entries = _pattern_sizes(indptr, columns)
    return start, index.new_empty((entries,)), value.new_empty((entries,))


k_reciprocal_invert = define(
    "k_reciprocal_invert(Tensor indptr, Tensor index, Tensor value, SymInt first, SymInt columns) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_invert,
    reference=reference.invert,
    native=_native_invert,
)
"""The inverted index of the rows from ``first`` on; see :func:`vareid_ext.reference.k_reciprocal.invert`."""

_ENCODINGS = (
    "Tensor row_max, Tensor indptr, Tensor index, Tensor value, Tensor start, Tensor owner, Tensor weight, "
    "float lambda_value"
)


def _reference_blend(distance: Tensor, row_max: Tensor, *arguments: Any) -> None:
    indptr, index, value, start, owner, weight, lambda_value = arguments
    distance.copy_(reference.blend(distance, row_max, indptr, index, value, (start, owner, weight), lambda_value))


def _native_blend(distance: Tensor, *arguments: Any) -> Any:
    *encodings, lambda_value = arguments
    G = distance.shape[1]
    if distance.stride(1) != 1 and G > 1:
        return NotImplemented
    workspace = _workspace(distance, 4 * G)
    _native.launch("k_reciprocal_blend", distance, *map(contiguous, encodings), lambda_value, workspace, on=distance)


k_reciprocal_blend = define(
    f"k_reciprocal_blend(Tensor(a!) distance, {_ENCODINGS}) -> ()",
    fake=lambda *_arguments: None,
    reference=_reference_blend,
    native=_native_blend,
)
"""Overwrites the original distances of some queries with the final; see
:func:`vareid_ext.reference.k_reciprocal.blend`.
"""


def _native_matrix_neighbors(q_g: Tensor, q_q: Tensor, g_g: Tensor, k: int) -> Any:
    if q_g.is_cuda and k > _CUDA_MAX_LISTED:
        return NotImplemented
    lists = _empty_lists(q_g, q_q, g_g, k)
    workspace = _workspace(q_g, 128 * q_g.shape[0] + 32 * k + 1024)
    matrices = map(contiguous, (q_g, q_q, g_g))
    _native.launch("k_reciprocal_matrix_neighbors", *matrices, k, *lists, workspace, on=q_g)
    return lists


def _empty_lists(q_g: Tensor, q_q: Tensor, g_g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    M = q_g.shape[0] + q_g.shape[1]
    return q_g.new_empty((M, k), dtype=torch.int32), q_g.new_empty((M,), dtype=torch.float64)


matrix_neighbors = define(
    "matrix_neighbors(Tensor q_g, Tensor q_q, Tensor g_g, SymInt k) -> (Tensor, Tensor)",
    fake=_empty_lists,
    reference=reference.matrix_neighbors,
    native=_native_matrix_neighbors,
)
"""Neighbour lists from three matrices; see :func:`vareid_ext.reference.k_reciprocal.matrix_neighbors`."""


def _empty_topk(nearest: Tensor, original: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    shape = nearest.shape[0], nearest.shape[1] if k is None else k
    return original.new_empty(shape), nearest.new_empty(shape, dtype=torch.int64)


def _reference_topk(
    query: Tensor, gallery: Tensor, scale: float, nearest: Tensor, original: Tensor, row_max: Tensor, indptr: Tensor,
    index: Tensor, value: Tensor, start: Tensor, owner: Tensor, weight: Tensor, lambda_value: float,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    distance, order = _empty_topk(nearest, original, k)
    gallery = gallery.double() * scale
    step = rows_per_block(gallery.shape[0])
    for begin in range(0, query.shape[0], step):
        at = slice(begin, min(begin + step, query.shape[0]))
        every = exact_distance(query[at].double() * scale, gallery, "sqeuclidean").to(torch.float32)
        every.scatter_(1, nearest[at].long(), original[at])
        encodings = row_max[at], indptr[begin:], index, value, (start, owner, weight)
        final = reference.blend(every, *encodings, lambda_value)
        if lambda_value > 0:  # who shares nothing takes part if listed, or if the original distance weighs nothing
            listed = torch.zeros_like(every, dtype=torch.bool).scatter_(1, nearest[at].long(), True)
            alone = (reference.blend(torch.zeros_like(every), *encodings, 0.0) == 1) & ~listed
            final.masked_fill_(alone & (row_max[at, None] > 0), torch.inf)
        ordered, ranked = torch.sort(final, dim=1, stable=True)
        distance[at], order[at] = ordered[:, : distance.shape[1]], ranked[:, : distance.shape[1]]
    return distance, order


def _native_topk(
    query: Tensor, gallery: Tensor, scale: float, nearest: Tensor, original: Tensor, row_max: Tensor, indptr: Tensor,
    index: Tensor, value: Tensor, start: Tensor, owner: Tensor, weight: Tensor, lambda_value: float,
    k: int | None = None,
) -> Any:  # fmt: skip
    outputs = _empty_topk(nearest, original, k)
    if query.is_cuda and outputs[0].shape[1] > _CUDA_MAX_TOPK:
        return NotImplemented
    arrays = nearest, original, row_max, indptr, index, value, start, owner, weight
    _native.launch(
        "k_reciprocal_topk", *_scaled(query, gallery, scale), *map(contiguous, arrays), lambda_value, *outputs,
        _workspace(query, 24 * gallery.shape[0]), on=query,
    )  # fmt: skip
    return outputs


def _fake_topk(
    query: Tensor, gallery: Tensor, scale: float, nearest: Tensor, original: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    return _empty_topk(nearest, original, arguments[8] if len(arguments) > 8 else None)


k_reciprocal_topk = define(
    f"k_reciprocal_topk(Tensor query, Tensor gallery, float scale, Tensor nearest, Tensor original, {_ENCODINGS}, "
    "SymInt? k=None) -> (Tensor, Tensor)",
    fake=_fake_topk,
    reference=_reference_topk,
    native=_native_topk,
)
"""The smallest final distances of each query, without whole rows.

Args:
    query: [Q, D].
    gallery: [G, D].
    scale: what the features are multiplied by.
    nearest: int32 [Q, listed], distinct gallery rows for each query, which take part whatever they share: its nearest.
    original: float32 [Q, listed], their squared distances; the others' are measured from the features.
    row_max: float32 [Q or more].
    indptr: [Q+1 or more], with index and value the queries' encodings after query expansion.
    index: [nnz].
    value: [nnz].
    start: [columns+1], with owner and weight the gallery's, inverted by :func:`k_reciprocal_invert`.
    owner: [entries].
    weight: [entries].
    lambda_value: in [0, 1].
    k: 1 to listed; None for listed.

Returns:
    distance float32 [Q, k], ascending, ties by the lower index; index int64 [Q, k]. What shares nothing with a
    query has Jaccard distance 1, so it is among the k smallest only if its original distance is.
"""
