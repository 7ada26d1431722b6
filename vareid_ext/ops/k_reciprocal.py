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
from vareid_ext.ops._features import stream_of
from vareid_ext.ops._filter import contiguous_rows
from vareid_ext.reference import k_reciprocal as reference
from vareid_ext.reference import nearest_neighbors as neighbor_reference
from vareid_ext.reference.pairwise_distance import exact_distance, rows_per_block

# Limits of the CUDA kernels and the sizes of their sort, as in csrc/k_reciprocal.h.
_CUDA_MOST_MEMBERS = 1024
_CUDA_MOST_LISTED = 159
_CUDA_MOST_TOPK = 128
_CUDA_SORT_TILE, _CUDA_SORT_DIGITS = 8192, 256


def _pattern_sizes(like: Tensor, rows: int) -> tuple[Tensor, Any]:
    return like.new_empty((rows + 1,), dtype=torch.int64), torch.library.get_ctx().new_dynamic_size()


def _check_entries(entries: int, most: int | None) -> None:
    """ValueError if the encodings have more entries than memory was granted for."""
    if most is not None and entries > most:
        raise ValueError(
            f"max_memory: the encodings of these features have {entries} entries, but what was given suffices for "
            f"{max(most, 0)}"
        )


@torch.library.custom_op("vareid::k_reciprocal_sets", mutates_args=())
def k_reciprocal_sets(neighbor: Tensor, k1: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """R* of every row; see :func:`vareid_ext.reference.k_reciprocal.reciprocal_sets`.

    ValueError if it has more than ``most`` entries.
    """
    indptr, index = reference.reciprocal_sets(neighbor, k1)
    _check_entries(index.numel(), most)
    return indptr, index


@k_reciprocal_sets.register_fake
def _(neighbor: Tensor, k1: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    indptr, entries = _pattern_sizes(neighbor, neighbor.shape[0])
    return indptr, neighbor.new_empty((entries,), dtype=torch.int32)


@torch.library.custom_op("vareid::listed_distance", mutates_args=())
def listed_distance(
    query: Tensor,
    gallery: Tensor,
    scale: float,
    neighbor: Tensor,
    neighbor_distance: Tensor,
    indptr: Tensor,
    index: Tensor,
) -> Tensor:
    """Distances of a pattern's pairs; see :func:`vareid_ext.reference.nearest_neighbors.listed_distance`."""
    return neighbor_reference.listed_distance(query, gallery, scale, neighbor, neighbor_distance, indptr, index)


@listed_distance.register_fake
def _(*arguments: Any) -> Tensor:
    index: Tensor = arguments[-1]
    return index.new_empty(index.shape, dtype=torch.float32)


@torch.library.custom_op("vareid::k_reciprocal_encode", mutates_args=())
def k_reciprocal_encode(indptr: Tensor, distance: Tensor, row_max: Tensor) -> Tensor:
    """V before query expansion; see :func:`vareid_ext.reference.k_reciprocal.encode`."""
    return reference.encode(indptr, distance, row_max)


@k_reciprocal_encode.register_fake
def _(indptr: Tensor, distance: Tensor, row_max: Tensor) -> Tensor:
    return distance.new_empty(distance.shape, dtype=torch.float32)


@torch.library.custom_op("vareid::k_reciprocal_expand", mutates_args=())
def k_reciprocal_expand(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query expansion; see :func:`vareid_ext.reference.k_reciprocal.expand_query`.

    ValueError if the result has more than ``most`` entries.
    """
    expanded = reference.expand_query(neighbor, k2, indptr, index, value)
    _check_entries(expanded[1].numel(), most)
    return expanded


@k_reciprocal_expand.register_fake
def _(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    new_indptr, entries = _pattern_sizes(neighbor, neighbor.shape[0])
    return new_indptr, index.new_empty((entries,)), value.new_empty((entries,))


@torch.library.custom_op("vareid::k_reciprocal_invert", mutates_args=())
def k_reciprocal_invert(
    indptr: Tensor, index: Tensor, value: Tensor, first: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverted index of the rows from ``first`` on; see :func:`vareid_ext.reference.k_reciprocal.invert`."""
    return reference.invert(indptr, index, value, first, columns)


@k_reciprocal_invert.register_fake
def _(indptr: Tensor, index: Tensor, value: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    start, entries = _pattern_sizes(indptr, columns)
    return start, index.new_empty((entries,)), value.new_empty((entries,))


@torch.library.custom_op("vareid::k_reciprocal_blend", mutates_args=("distance",))
def k_reciprocal_blend(
    distance: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor,
    owner: Tensor,
    weight: Tensor,
    lambda_value: float,
) -> None:
    """Overwrites the original distances of some queries with the final; see
    :func:`vareid_ext.reference.k_reciprocal.blend`.
    """
    distance.copy_(reference.blend(distance, row_max, indptr, index, value, (start, owner, weight), lambda_value))


@k_reciprocal_blend.register_fake
def _(*_arguments: Any) -> None:
    return None


@torch.library.custom_op("vareid::matrix_neighbors", mutates_args=())
def matrix_neighbors(q_g: Tensor, q_q: Tensor, g_g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbour lists from three matrices; see :func:`vareid_ext.reference.k_reciprocal.matrix_neighbors`."""
    return reference.matrix_neighbors(q_g, q_q, g_g, k)


@matrix_neighbors.register_fake
def _(q_g: Tensor, q_q: Tensor, g_g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    M = q_g.shape[0] + q_g.shape[1]
    return q_g.new_empty((M, k), dtype=torch.int32), q_g.new_empty((M,), dtype=torch.float64)


@torch.library.custom_op("vareid::k_reciprocal_topk", mutates_args=())
def k_reciprocal_topk(
    query: Tensor,
    gallery: Tensor,
    scale: float,
    nearest: Tensor,
    original: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor,
    owner: Tensor,
    weight: Tensor,
    lambda_value: float,
) -> tuple[Tensor, Tensor]:
    """The smallest final distances of each query, without whole rows.

    Args:
        query: [Q, D].
        gallery: [G, D].
        scale: what the features are multiplied by.
        nearest: int32 [Q, k], each query's nearest gallery rows by original distance, in order.
        original: float32 [Q, k], their squared distances.
        row_max: float32 [Q or more].
        indptr: [Q+1 or more], with index and value the queries' encodings after query expansion.
        index: [nnz].
        value: [nnz].
        start: [columns+1], with owner and weight the gallery's, inverted by :func:`k_reciprocal_invert`.
        owner: [entries].
        weight: [entries].
        lambda_value: in [0, 1].

    Returns:
        distance float32 [Q, k], ascending, ties by the lower index; index int64 [Q, k]. What shares nothing with a
        query has Jaccard distance 1, so it is among the k smallest only if its original distance is.
    """
    k, inverted = nearest.shape[1], (start, owner, weight)
    distance, order = torch.empty_like(original), torch.empty_like(nearest, dtype=torch.int64)
    gallery = gallery.double() * scale
    step = rows_per_block(gallery.shape[0])
    for begin in range(0, query.shape[0], step):
        at = slice(begin, min(begin + step, query.shape[0]))
        every = exact_distance(query[at].double() * scale, gallery, "sqeuclidean").to(torch.float32)
        final = reference.blend(every, row_max[at], indptr[begin:], index, value, inverted, lambda_value)
        ordered, ranked = torch.sort(final, dim=1, stable=True)
        distance[at], order[at] = ordered[:, :k], ranked[:, :k]
    return distance, order


@k_reciprocal_topk.register_fake
def _(
    query: Tensor, gallery: Tensor, scale: float, nearest: Tensor, original: Tensor, *_arguments: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(original), torch.empty_like(nearest, dtype=torch.int64)


def _scratch(like: Tensor, size: int) -> Tensor:
    """Working memory of a kernel, in bytes."""
    return like.new_empty((size,), dtype=torch.uint8)


def _native_sets(neighbor: Tensor, k1: int, most: int | None = None) -> Any:
    native, view, threads, stream = _native.module(), _native.view, torch.get_num_threads(), stream_of(neighbor)
    neighbor = neighbor.contiguous()
    M, width = neighbor.shape
    if neighbor.is_cuda and min(k1 + 1, width) > _CUDA_MOST_MEMBERS:
        return NotImplemented
    sets = []
    for k in (k1, reference.half_k(k1)):
        members = neighbor.new_empty((M, min(k + 1, width)))
        size = neighbor.new_empty((M,))
        native.k_reciprocal_sets(view(neighbor), k, view(members), view(size), threads, stream)
        sets += [members, size]
    indptr = neighbor.new_empty((M + 1,), dtype=torch.int64)
    workspace = _scratch(neighbor, 0 if neighbor.is_cuda else 8 * M * threads)
    arrays = [view(array) for array in (*sets, indptr)]
    native.k_reciprocal_expanded(*arrays, None, view(workspace), threads, stream)
    entries = int(indptr[-1])
    _check_entries(entries, most)
    index = neighbor.new_empty((entries,))
    native.k_reciprocal_expanded(*arrays, view(index), view(workspace), threads, stream)
    return indptr, index


def _scaled(query: Tensor, gallery: Tensor, scale: float) -> list[Any]:
    """Query, its factors, gallery, its factors, as the compiled module takes them."""
    views = []
    for part in (contiguous_rows(query), contiguous_rows(gallery)):
        factor = None if scale == 1 else part.new_full((part.shape[0],), scale, dtype=torch.float64)
        views += [_native.view(part), _native.view(factor)]
    return views


def _native_listed_distance(
    query: Tensor,
    gallery: Tensor,
    scale: float,
    neighbor: Tensor,
    neighbor_distance: Tensor,
    indptr: Tensor,
    index: Tensor,
) -> Tensor:
    view = _native.view
    out = query.new_empty(index.shape, dtype=torch.float32)
    _native.module().k_reciprocal_listed_distance(
        *_scaled(query, gallery, scale), view(neighbor.contiguous()), view(neighbor_distance.contiguous()),
        view(indptr), view(index), view(out), torch.get_num_threads(), stream_of(query),
    )  # fmt: skip
    return out


def _native_encode(indptr: Tensor, distance: Tensor, row_max: Tensor) -> Tensor:
    view, distance = _native.view, distance.contiguous()
    value = torch.empty_like(distance)
    _native.module().k_reciprocal_encode(
        view(indptr), view(distance), view(row_max.contiguous()), view(value), torch.get_num_threads(),
        stream_of(distance),
    )  # fmt: skip
    return value


def _native_expand(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if k2 == 1:
        return indptr.clone(), index.clone(), value.clone()
    native, view, threads, stream = _native.module(), _native.view, torch.get_num_threads(), stream_of(neighbor)
    neighbor, index, value = neighbor.contiguous(), index.contiguous(), value.contiguous()
    M = neighbor.shape[0]
    new_indptr = torch.empty_like(indptr)
    workspace = _scratch(neighbor, 0 if neighbor.is_cuda else 16 * M * threads)
    arrays = [view(array) for array in (indptr, index, value, new_indptr)]
    native.k_reciprocal_expand(view(neighbor), k2, *arrays, None, None, view(workspace), threads, stream)
    entries = int(new_indptr[-1])
    _check_entries(entries, most)
    new_index, new_value = index.new_empty((entries,)), value.new_empty((entries,))
    native.k_reciprocal_expand(
        view(neighbor), k2, *arrays, view(new_index), view(new_value), view(workspace), threads, stream
    )
    return new_indptr, new_index, new_value


def invert_workspace(device_type: str, columns: int, entries: int) -> int:
    """Bytes of scratch that building the inverted index takes."""
    if device_type == "cuda":
        return 8 * (_CUDA_SORT_DIGITS * -(-entries // _CUDA_SORT_TILE) + 4) + 16 * (-(-entries // 8) * 8)
    return 8 * columns


def _native_invert(
    indptr: Tensor, index: Tensor, value: Tensor, first: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    view, threads = _native.view, torch.get_num_threads()
    index, value = index.contiguous(), value.contiguous()
    entries = index.shape[0] - int(indptr[first])
    start = indptr.new_empty((columns + 1,))
    owner, weight = index.new_empty((entries,)), value.new_empty((entries,))
    workspace = _scratch(index, invert_workspace(index.device.type, columns, entries))
    _native.module().k_reciprocal_invert(
        view(indptr), view(index), view(value), first, columns, view(start), view(owner), view(weight),
        view(workspace), threads, stream_of(index),
    )  # fmt: skip
    return start, owner, weight


def _native_blend(
    distance: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor,
    owner: Tensor,
    weight: Tensor,
    lambda_value: float,
) -> Any:
    view, threads = _native.view, torch.get_num_threads()
    G = distance.shape[1]
    if distance.stride(1) != 1 and G > 1:
        return NotImplemented
    workspace = _scratch(distance, 0 if distance.is_cuda else 4 * G * threads)
    _native.module().k_reciprocal_blend(
        view(distance), view(row_max.contiguous()), view(indptr), view(index.contiguous()), view(value.contiguous()),
        view(start), view(owner), view(weight), lambda_value, view(workspace), threads, stream_of(distance),
    )  # fmt: skip


def _native_topk(
    query: Tensor,
    gallery: Tensor,
    scale: float,
    nearest: Tensor,
    original: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor,
    owner: Tensor,
    weight: Tensor,
    lambda_value: float,
) -> Any:
    if query.is_cuda and nearest.shape[1] > _CUDA_MOST_TOPK:
        return NotImplemented
    view, threads = _native.view, torch.get_num_threads()
    G = gallery.shape[0]
    distance = torch.empty_like(original, memory_format=torch.contiguous_format)
    gallery_index = torch.empty_like(distance, dtype=torch.int64)
    workspace = _scratch(query, 0 if query.is_cuda else 24 * G * threads)
    _native.module().k_reciprocal_topk(
        *_scaled(query, gallery, scale), view(nearest.contiguous()), view(original.contiguous()),
        view(row_max.contiguous()), view(indptr), view(index.contiguous()), view(value.contiguous()), view(start),
        view(owner), view(weight), lambda_value, view(distance), view(gallery_index), view(workspace), threads,
        stream_of(query),
    )  # fmt: skip
    return distance, gallery_index


def _native_matrix_neighbors(q_g: Tensor, q_q: Tensor, g_g: Tensor, k: int) -> Any:
    if q_g.is_cuda and k > _CUDA_MOST_LISTED:
        return NotImplemented
    view, threads = _native.view, torch.get_num_threads()
    Q, G = q_g.shape
    neighbor = q_g.new_empty((Q + G, k), dtype=torch.int32)
    row_max = q_g.new_empty((Q + G,), dtype=torch.float64)
    workspace = _scratch(q_g, 0 if q_g.is_cuda else (128 * Q + 32 * k + 1024) * threads)
    _native.module().k_reciprocal_matrix_neighbors(
        view(q_g.contiguous()), view(q_q.contiguous()), view(g_g.contiguous()), k, view(neighbor), view(row_max),
        view(workspace), threads, stream_of(q_g),
    )  # fmt: skip
    return neighbor, row_max


for _device_type in ("cpu", "cuda"):
    _native.register(k_reciprocal_sets, _device_type)(_native_sets)
    _native.register(listed_distance, _device_type)(_native_listed_distance)
    _native.register(k_reciprocal_encode, _device_type)(_native_encode)
    _native.register(k_reciprocal_expand, _device_type)(_native_expand)
    _native.register(k_reciprocal_invert, _device_type)(_native_invert)
    _native.register(k_reciprocal_blend, _device_type)(_native_blend)
    _native.register(k_reciprocal_topk, _device_type)(_native_topk)
    _native.register(matrix_neighbors, _device_type)(_native_matrix_neighbors)
