"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017).

M = Q + G rows, the queries first; d_ij = squared Euclidean distance divided by the largest of row i (a row whose
largest is 0 stays 0); rank(i) = the rows in ascending order of row i, ties by index, i itself not special::

    R(i, k)  = { j in rank(i)[:k+1] : i in rank(j)[:k+1] }                            (equation 3)
    R*(i)    = R(i, k1) with R(c, h) for each c in R(i, k1) that has
               3 |R(c, h) & R(i, k1)| > 2 |R(c, h)|,  h = int(np.around(k1 / 2))      (equation 5)
    V_i[j]   = exp(-d_ij) for j in R*(i), divided by their sum; R*(i) empty: V_i = 0  (equation 7)
    V_i      = mean of V_j over rank(i)[:k2], where k2 > 1                            (equation 11)
    m_ig     = sum_j min(V_i[j], V_g[j])
    final_ig = (1 - lambda) (1 - m_ig / (2 - m_ig)) + lambda d_ig                     (equations 10 and 12)

Each stage is a function of sparse rows in CSR form: ``indptr`` int64 [rows+1], ``index`` int32 [nnz] ascending within a
row, ``value`` float32 [nnz].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements of the largest temporary


def half_k(k1: int) -> int:
    """h = int(np.around(k1 / 2)): half to even, as the published code rounds."""
    return int(np.around(k1 / 2))


def _mutual(neighbor: Tensor, k: int) -> Tensor:
    """bool [M, min(k+1, K)]: whether neighbor[i, a] is in R(i, k)."""
    near = neighbor[:, : k + 1].long()
    M, width = near.shape
    member = torch.empty_like(near, dtype=torch.bool)
    step = max(1, _CHUNK // (width * width))
    for begin in range(0, M, step):
        rows = torch.arange(begin, min(begin + step, M), device=near.device)
        member[rows] = (near[near[rows]] == rows[:, None, None]).any(-1)
    return member


def _to_csr(key: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """CSR pattern of ascending keys row * columns + column."""
    indptr = torch.zeros(rows + 1, dtype=torch.int64, device=key.device)
    indptr[1:] = torch.bincount(key // columns, minlength=rows).cumsum(0)
    return indptr, (key % columns).to(torch.int32)


def _row_of_entry(indptr: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(indptr.shape[0] - 1, device=indptr.device), indptr.diff())


def reciprocal_sets(neighbor: Tensor, k1: int) -> tuple[Tensor, Tensor]:
    """R*(i) of every row.

    Args:
        neighbor: int32 [M, K], rank(i)[:K], K at least min(M, k1 + 1).
        k1: at least 1.

    Returns:
        CSR pattern: indptr [M+1], index [nnz].
    """
    M, h = neighbor.shape[0], half_k(k1)
    near, member = neighbor[:, : k1 + 1].long(), _mutual(neighbor, k1)
    half_near, half_member = neighbor[:, : h + 1].long(), _mutual(neighbor, h)
    rows, at = member.nonzero(as_tuple=True)
    center = near[rows, at]
    keys = [rows * M + center]
    step = max(1, _CHUNK // (near.shape[1] * half_near.shape[1]))
    for begin in range(0, rows.shape[0], step):
        i, c = rows[begin : begin + step], center[begin : begin + step]
        candidate, valid = half_near[c], half_member[c]
        inside = ((candidate[:, :, None] == near[i][:, None, :]) & member[i][:, None, :]).any(-1)
        taken = 3 * (inside & valid).sum(1) > 2 * valid.sum(1)
        keys.append((i[:, None] * M + candidate)[valid & taken[:, None]])
    return _to_csr(torch.unique(torch.cat(keys)), M, M)


def encode(indptr: Tensor, distance: Tensor, row_max: Tensor) -> Tensor:
    """V before query expansion.

    Args:
        indptr: [M+1], the rows of R*.
        distance: float32 [nnz], squared distances of the pattern's pairs.
        row_max: float32 [M], each row's largest squared distance.

    Returns:
        value float32 [nnz]; each row that is not empty sums to 1.
    """
    rows = _row_of_entry(indptr)
    scale = torch.where(row_max > 0, 1 / row_max.double(), 0)
    weight = torch.exp(-distance.double() * scale[rows])
    total = torch.zeros(row_max.shape, dtype=torch.float64, device=weight.device).index_add_(0, rows, weight)
    return (weight / total[rows]).to(torch.float32)


def expand_query(
    neighbor: Tensor, k2: int, indptr: Tensor, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query expansion: the mean of the encodings of the k2 first of each row's list.

    Args:
        neighbor: int32 [M, K], K at least min(M, k2).
        k2: at least 1; with 1 the encoding comes back as it is.
        indptr: [M+1].
        index: [nnz].
        value: [nnz].

    Returns:
        indptr [M+1], index, value of the expanded rows.
    """
    if k2 == 1:
        return indptr.clone(), index.clone(), value.clone()
    M = neighbor.shape[0]
    near = neighbor[:, :k2].long()
    source, length = near.flatten(), indptr.diff()
    count = length[source]
    target = torch.arange(M, device=near.device).repeat_interleave(near.shape[1])
    end = count.cumsum(0)
    total = int(end[-1]) if end.numel() else 0
    entry = torch.arange(total, device=near.device) + torch.repeat_interleave(indptr[source] - end + count, count)
    key, inverse = torch.unique(torch.repeat_interleave(target, count) * M + index[entry].long(), return_inverse=True)
    summed = torch.zeros(key.shape, dtype=torch.float64, device=value.device)
    summed.index_add_(0, inverse, value[entry].double())
    new_indptr, new_index = _to_csr(key, M, M)
    return new_indptr, new_index, (summed / near.shape[1]).to(torch.float32)


def invert(indptr: Tensor, index: Tensor, value: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverted index of the rows from ``first`` on of a CSR matrix with so many columns.

    Returns:
        start int64 [columns+1], owner int32 (row - first, ascending within a column), weight float32.
    """
    rows = _row_of_entry(indptr)
    inside = rows >= first
    order = torch.sort(index[inside], stable=True).indices
    start = torch.zeros(columns + 1, dtype=torch.int64, device=index.device)
    start[1:] = torch.bincount(index[inside], minlength=columns).cumsum(0)
    return start, (rows[inside] - first)[order].to(torch.int32), value[inside][order]


def blend(
    distance: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    index: Tensor,
    value: Tensor,
    inverted: tuple[Tensor, Tensor, Tensor],
    lambda_value: float,
) -> Tensor:
    """The final distances of some queries: Jaccard blended with the original.

    Args:
        distance: float32 [rows, G], squared distances.
        row_max: float32 [rows or more], each row's largest squared distance.
        indptr: [rows+1 or more], where the rows' encodings lie in index and value.
        index: [nnz].
        value: [nnz], encodings after query expansion.
        inverted: the gallery's, of :func:`invert`.
        lambda_value: in [0, 1].

    Returns:
        float32 [rows, G].
    """
    start, owner, weight = inverted
    G, out = distance.shape[1], torch.empty_like(distance)
    for begin in range(0, distance.shape[0], 64):
        end = min(begin + 64, distance.shape[0])
        at = slice(int(indptr[begin]), int(indptr[end]))
        column = index[at].long()
        count = start.diff()[column]
        ends = count.cumsum(0)
        entry = torch.arange(int(count.sum()), device=index.device)
        entry += torch.repeat_interleave(start[column] - ends + count, count)
        least = torch.minimum(torch.repeat_interleave(value[at].double(), count), weight[entry].double())
        cell = torch.repeat_interleave(_row_of_entry(indptr[begin : end + 1]), count) * G + owner[entry]
        shared = torch.zeros((end - begin) * G, dtype=torch.float64, device=index.device)
        shared = shared.index_add_(0, cell, least).view(end - begin, G)
        scale = torch.where(row_max[begin:end] > 0, 1 / row_max[begin:end].double(), 0)[:, None]
        jaccard = 1 - shared / (2 - shared)
        out[begin:end] = (1 - lambda_value) * jaccard + lambda_value * scale * distance[begin:end].double()
    return out


def matrix_neighbors(q_g: Tensor, q_q: Tensor, g_g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbour lists and row maxima of the symmetric matrix [[q_q, q_g], [q_g^T, g_g]].

    Args:
        q_g: [Q, G], floating point, not negative.
        q_q: [Q, Q].
        g_g: [G, G].
        k: 1 to Q + G.

    Returns:
        neighbor int32 [Q+G, k], ties by the lower index; row_max float64 [Q+G].
    """
    Q, G = q_g.shape
    neighbor = q_g.new_empty((Q + G, k), dtype=torch.int32)
    row_max = q_g.new_empty((Q + G,), dtype=torch.float64)
    step = max(1, _CHUNK // (Q + G))
    for first, second, offset in ((q_q, q_g, 0), (q_g.T, g_g, Q)):
        for begin in range(0, first.shape[0], step):
            block = torch.cat([first[begin : begin + step], second[begin : begin + step]], dim=1)
            at = slice(offset + begin, offset + begin + block.shape[0])
            neighbor[at] = torch.sort(block, dim=1, stable=True).indices[:, :k].to(torch.int32)
            row_max[at] = block.amax(1)
    return neighbor, row_max


def matrix_distance(q_g: Tensor, q_q: Tensor, g_g: Tensor, row_max: Tensor, indptr: Tensor, index: Tensor) -> Tensor:
    """(d / the row's maximum)^2 of the pairs of a CSR pattern over the matrix of :func:`matrix_neighbors`.

    Returns:
        float32 [nnz].
    """
    Q = q_g.shape[0]
    rows, columns = _row_of_entry(indptr), index.long()
    out = index.new_empty(index.shape, dtype=torch.float64)
    for matrix, row_in_query, column_in_query in ((q_q, True, True), (q_g, True, False), (g_g, False, False)):
        at = ((rows < Q) == row_in_query) & ((columns < Q) == column_in_query)
        r, c = rows[at] - (0 if row_in_query else Q), columns[at] - (0 if column_in_query else Q)
        out[at] = matrix[r, c].to(torch.float64)
    crossed = (rows >= Q) & (columns < Q)
    out[crossed] = q_g[columns[crossed], rows[crossed] - Q].to(torch.float64)
    return (out / row_max[rows]).square().to(torch.float32)
