"""Exact nearest neighbours: the k smallest of a row's distances, ties by the lower index.

The order is that of the distances in float64, as :func:`vareid_ext.reference.pairwise_distance.exact_distance` sums
them; the distances that are returned are those, rounded to the result's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference.pairwise_distance import exact_distance, rows_per_block


def nearest_neighbors(x: Tensor, y: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k nearest rows of y for each row of x.

    Args:
        x: [M, D], floating point.
        y: [N, D] of x's dtype and device; None for x itself (every row is then among its own neighbours, at 0).
        k: 1 to N.
        metric: "sqeuclidean", "euclidean" or "cosine".

    Returns:
        distance [M, k], ascending, float64 for float64 features, else float32; index int64 [M, k].
    """
    other = x if y is None else y
    distance = x.new_empty((x.shape[0], k), dtype=accumulator_dtype(x.dtype))
    index = x.new_empty((x.shape[0], k), dtype=torch.int64)
    step = rows_per_block(other.shape[0])
    for begin in range(0, x.shape[0], step):
        block = exact_distance(x[begin : begin + step], other, metric)
        ordered, order = torch.sort(block, dim=1, stable=True)
        distance[begin : begin + step], index[begin : begin + step] = ordered[:, :k], order[:, :k]
    return distance, index


def joint_neighbors(
    query: Tensor, gallery: Tensor, scale: float, k: int, nearest: int, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Neighbour lists and row maxima of query and gallery together, as k-reciprocal re-ranking needs them.

    Rows 0 to Q-1 are the query's, Q to Q+G-1 the gallery's. Distances are squared Euclidean, of the features times
    ``scale`` (a power of two that keeps them within float32's range; re-ranking does not depend on it).

    Args:
        query: [Q, D], floating point.
        gallery: [G, D].
        scale: a power of two.
        k: 1 to Q + G.
        nearest: 0 to G, how many of the gallery's rows to list for each query; 0 with ``out``.
        out: float32 [Q, G] that is overwritten with the distances between queries and gallery; None for none.

    Returns:
        neighbor int32 [Q+G, k], the k nearest rows in order, ties by index; distance float32 [Q+G, k], theirs; row_max
        float32 [Q+G], each row's largest distance; gallery_index int32 [Q, nearest] and gallery_distance float32
        [Q, nearest], each query's nearest rows of the gallery, in order, ties by index.
    """
    query, gallery = query.to(torch.float64) * scale, gallery.to(torch.float64) * scale
    Q, M = query.shape[0], query.shape[0] + gallery.shape[0]
    neighbor = query.new_empty((M, k), dtype=torch.int32)
    distance = query.new_empty((M, k), dtype=torch.float32)
    row_max = query.new_empty((M,), dtype=torch.float32)
    gallery_index = query.new_empty((Q, nearest), dtype=torch.int32)
    gallery_distance = query.new_empty((Q, nearest), dtype=torch.float32)
    step = rows_per_block(M)
    for part, offset in ((query, 0), (gallery, Q)):
        for begin in range(0, part.shape[0], step):
            rows = part[begin : begin + step]
            block = torch.cat([exact_distance(rows, side, "sqeuclidean") for side in (query, gallery)], dim=1)
            at = slice(offset + begin, offset + begin + rows.shape[0])
            ordered, order = torch.sort(block, dim=1, stable=True)
            neighbor[at], distance[at], row_max[at] = order[:, :k].to(torch.int32), ordered[:, :k], block.amax(1)
            if offset == 0:
                if out is not None:
                    out[at] = block[:, Q:]
                ordered, order = torch.sort(block[:, Q:], dim=1, stable=True)
                gallery_index[at], gallery_distance[at] = order[:, :nearest].to(torch.int32), ordered[:, :nearest]
    return neighbor, distance, row_max, gallery_index, gallery_distance


def neighbors_of_rows(
    query: Tensor, gallery: Tensor, scale: float, k: int, metric: str, begin: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbour lists and row maxima of some rows of query and gallery together.

    Args:
        query: [Q, D], floating point.
        gallery: [G, D].
        scale: a power of two, as for :func:`joint_neighbors`; not used for the cosine.
        k: 1 to Q + G.
        metric: "sqeuclidean" or "cosine".
        begin: the first of the rows, numbered as for :func:`joint_neighbors`.
        end: the one behind the last.

    Returns:
        neighbor int32 [end - begin, k], distance float32 [end - begin, k], row_max float32 [end - begin]; for
        "sqeuclidean" rows ``begin`` to ``end - 1`` of what :func:`joint_neighbors` returns.
    """
    every = torch.cat([query, gallery]).to(torch.float64) * (scale if metric == "sqeuclidean" else 1)
    neighbor = query.new_empty((end - begin, k), dtype=torch.int32)
    distance = query.new_empty((end - begin, k), dtype=torch.float32)
    row_max = query.new_empty((end - begin,), dtype=torch.float32)
    for rows in torch.arange(begin, end, device=query.device).split(rows_per_block(every.shape[0])):
        block = exact_distance(every[rows], every, metric)
        ordered, order = torch.sort(block, dim=1, stable=True)
        at = slice(int(rows[0]) - begin, int(rows[-1]) + 1 - begin)
        neighbor[at], distance[at], row_max[at] = order[:, :k].to(torch.int32), ordered[:, :k], block.amax(1)
    return neighbor, distance, row_max


def extended_neighbors(
    old: Tensor, new: Tensor, scale: float, k: int, index: Tensor, distance: Tensor, row_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbour lists and row maxima of a gallery that has grown.

    Args:
        old: [N, D], floating point, the rows whose lists are known; N may be 0.
        new: [A, D], the rows that follow them.
        scale: a power of two, as for :func:`joint_neighbors`.
        k: 1 to N + A.
        index: int32 [N, at most k], the lists of ``old`` alone (a shortcut, as the next two; the result does not depend
            on them).
        distance: float64, theirs, at this scale.
        row_max: float32 [N].

    Returns:
        index int32 [N+A, k], the k nearest rows of each in order, ties by index, each among its own; distance float64
        [N+A, k]; row_max float32 [N+A], each row's largest distance.
    """
    every = torch.cat([old, new]).to(torch.float64) * scale
    M = every.shape[0]
    index, distance = index.new_empty((M, k)), distance.new_empty((M, k))
    row_max = row_max.new_empty((M,))
    step = rows_per_block(M)
    for begin in range(0, M, step):
        at = slice(begin, begin + step)
        block = exact_distance(every[at], every, "sqeuclidean")
        ordered, order = torch.sort(block, dim=1, stable=True)
        index[at], distance[at], row_max[at] = order[:, :k].to(torch.int32), ordered[:, :k], block.amax(1)
    return index, distance, row_max


def listed_distance(
    query: Tensor,
    gallery: Tensor,
    scale: float,
    neighbor: Tensor,
    neighbor_distance: Tensor,
    indptr: Tensor,
    index: Tensor,
) -> Tensor:
    """Squared Euclidean distances of the pairs (row, index) of a CSR pattern over query and gallery together.

    Args:
        query: [Q, D], floating point.
        gallery: [G, D].
        scale: what the features are multiplied by.
        neighbor: int32 [Q+G, k], lists whose distances are known (a shortcut; the result does not depend on them).
        neighbor_distance: float32 [Q+G, k].
        indptr: int64 [Q+G+1].
        index: int32 [nnz], in [0, Q+G).

    Returns:
        float32 [nnz], summed in float64.
    """
    Q, D = query.shape
    rows = torch.repeat_interleave(torch.arange(indptr.shape[0] - 1, device=index.device), indptr.diff())
    out = query.new_empty(index.shape, dtype=torch.float32)

    def gather(which: Tensor) -> Tensor:
        part = query.new_empty((which.shape[0], D))
        in_query = which < Q
        part[in_query] = query[which[in_query]]
        part[~in_query] = gallery[which[~in_query] - Q]
        return part.to(torch.float64) * scale

    step = rows_per_block(D)
    for begin in range(0, index.shape[0], step):
        at = slice(begin, begin + step)
        out[at] = (gather(rows[at]) - gather(index[at].long())).square().sum(1)
    return out
