"""The bytes that each kernel of the retrieval rows must move, from a call's own arguments and results.

The measure is a row (a warp's or a block's piece of work) that works alone: whatever it reads is read once, whatever it
writes is written once, and nothing is found in a cache because another row has read it. The harness counts the same way
(a byte once for each warp request), but nothing here comes from its counts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cuda_on_cpu.harness import InOut, Partial

_WARP = 32
_SORT_TILE = 8192


def _tensor(argument: Any) -> Any:
    return argument.tensor if isinstance(argument, InOut | Partial) else argument


def _size_of(count: Tensor) -> int:
    return int(count.sum())


def _running_sums(count: int) -> int:
    """Each count read, each sum written, and the 0 before them."""
    return 16 * count + 8


def _sets(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """A row's list, each neighbour's list as far as it must be looked through, 32 places at once, and the members."""
    neighbor, rows, width, k, _, size = after
    n = min(k + 1, width)
    near = neighbor[:, :n].long()
    found = near[near] == torch.arange(rows)[:, None, None]
    place = torch.where(found.any(-1), found.int().argmax(-1), n - 1)
    looked_at = ((place // _WARP + 1) * _WARP).clamp(max=n)
    return {"k_reciprocal_sets_kernel": 4 * (rows * n + _size_of(looked_at) + _size_of(size) + rows)}


def _robust_sets(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """A row's set, the half set of each member, and the size or the members."""
    sets, size, width, _, half_size, _, rows, indptr, index, _ = after
    members = sets[torch.arange(width)[None] < size[:, None]].long()
    read = 4 * (rows + 2 * members.numel() + _size_of(half_size[members]))
    if index is None:
        return {"k_reciprocal_robust_sets_kernel": read + 8 * rows, "k_reciprocal_prefix_kernel": _running_sums(rows)}
    return {"k_reciprocal_robust_sets_kernel": read + 8 * rows + 4 * int(indptr[-1])}


def _listed_distance(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """A row's list, the known distances; for the others the row's features and those of each; the results."""
    x, x_factor, x_rows, _, _, _, y_rows, _, _, D, neighbor, _, width, indptr, index, _ = after
    rows, features = x_rows + y_rows, D * x.element_size() + (8 if x_factor is not None else 0)
    row = torch.repeat_interleave(torch.arange(rows), indptr.diff())
    known = (neighbor[row] == index[:, None]).any(1)
    unknown = int((~known).sum())
    measuring = row[~known].unique().numel()
    moved = rows * (16 + 4 * width) + 8 * index.numel() + 4 * int(known.sum()) + features * (unknown + measuring)
    return {"k_reciprocal_listed_distance_kernel": moved}


def _encode(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """Where a row lies, its maximum, its distances and its values."""
    _, distance, _, rows, _ = after
    return {"k_reciprocal_encode_kernel": 20 * rows + 8 * distance.numel()}


def _query_expansion(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """The sparse rows that are averaged (columns to count, columns and values to sum), and the size or the new row."""
    neighbor, rows, width, k2, indptr, _, _, new_indptr, new_index, *_ = after
    near = neighbor[:, : min(k2, width)].long()
    entries, lists = _size_of(indptr.diff()[near]), near.numel() * (4 + 16)
    if new_index is None:
        moved = lists + 4 * entries + 8 * rows
        return {"k_reciprocal_query_expansion_kernel": moved, "k_reciprocal_prefix_kernel": _running_sums(rows)}
    return {"k_reciprocal_query_expansion_kernel": lists + 8 * entries + 8 * rows + 8 * int(new_indptr[-1])}


def _invert(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """Sorting by column: in each pass every entry's digit is counted, every entry is read and written."""
    _, _, _, rows, first, columns, entries = after[:7]
    bits = max(columns - 1, 0).bit_length()
    passes = max(1, -(-bits // 8))
    digits, tiles = 2 ** -(-bits // passes), -(-entries // _SORT_TILE)
    table = 8 * digits * tiles  # where each tile's entries of each digit go
    return {
        "k_reciprocal_owner_kernel": 24 * (rows - first) + 4 * entries,
        "k_reciprocal_digits_kernel": passes * (4 * entries + table) + 8 * tiles,
        "k_reciprocal_prefix_kernel": passes * _running_sums(digits * tiles),
        "k_reciprocal_sort_kernel": passes * (2 * 12 * entries + table) + 8 * tiles,
        "k_reciprocal_start_kernel": 4 * (entries + entries // _WARP) + 8 * (columns + 1),
    }


def _postings(indptr: Tensor, index: Tensor, start: Tensor, queries: int) -> tuple[int, int]:
    """Entries of the queries' sparse rows, and of the lists of their columns."""
    column = index[int(indptr[0]) : int(indptr[queries])].long()
    return column.numel(), _size_of(start.diff()[column])


def _blend(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """A query's sparse row with where its columns' lists lie, these lists, and its distances read and written."""
    _, _, queries, gallery, _, indptr, index, _, start, *_ = after
    entries, postings = _postings(indptr, index, start, queries)
    return {"k_reciprocal_blend_kernel": 20 * queries + 24 * entries + 8 * postings + 8 * queries * gallery}


def _topk(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """The same without the distances: in their place what is listed, the features of those measured, and the best."""
    query, factor, queries, *_ = after
    D, nearest, _, listed, _, indptr, index, _, start, owner, *_ = after[9:]
    distance = after[22]
    entries, postings = _postings(indptr, index, start, queries)
    features, measured = D * query.element_size() + (8 if factor is not None else 0), 0
    for q, (begin, end) in enumerate(itertools.pairwise(indptr[: queries + 1].tolist())):
        sharing = {int(g) for c in index[begin:end].tolist() for g in owner[start[c] : start[c + 1]]}
        others = len(sharing - set(nearest[q].tolist()))
        measured += others + (others > 0)
    moved = 20 * queries + 24 * entries + 8 * postings + 8 * queries * listed + 12 * distance.numel()
    return {"k_reciprocal_topk_kernel": moved + features * measured}


def _matrix_neighbors(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """The rows of the three matrices, the lists and the maxima."""
    q_g, _, _, _, Q, G, k, *_ = after
    name, a_row = "k_reciprocal_matrix_neighbors_kernel", (Q + G) * q_g.element_size() + 4 * k + 8
    return {f"{name}<float, false>": Q * a_row, f"{name}<float, true>": G * a_row}


def _scan(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """The block (and its distances), the bounds of the other side for each thread block, each row's list: what is added
    to it, or all of it where it had to be cut."""
    _, _, rows, columns, row_begin, column_begin, *_ = after
    old_index, old_count, old_threshold = before[11], before[12], before[13]
    new_index, new_count, new_threshold = after[11], after[12], after[13]
    both, write = after[18:20]

    def lists(first: int, size: int) -> int:
        moved = 40 * size  # norm, window, count, threshold, cut, row_max; the last four are written too
        for r in range(first, first + size):
            b, a = int(old_count[r]), int(new_count[r])
            grown = a >= b and torch.equal(old_index[r, :b], new_index[r, :b])
            cut = not grown or float(old_threshold[r]) != float(new_threshold[r])
            moved += 12 * b + 8 * a if cut else 8 * (a - b)
        return moved

    block = 4 * rows * columns
    least = {
        "nearest_neighbors_scan_rows_kernel": block * (2 if write else 1)
        + 8 * columns * -(-rows // 8)
        + lists(row_begin, rows)
    }
    if both:
        side = 32 if after[16] <= 96 else 16
        least["nearest_neighbors_scan_columns_kernel"] = (
            block + 8 * rows * -(-columns // side) + lists(column_begin, columns)
        )
    return least


def _select(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """The candidates with their windows, the row's features and those of each candidate that can be among the nearest,
    and the results."""
    x, factor, D, k = after[0], after[1], after[17], after[31]
    left, right, lower, candidate, count, cut, distance = (after[i] for i in (21, 23, 24, 25, 26, 28, 33))
    features, moved = D * x.element_size() + (8 if factor is not None else 0), 0
    for i, n in enumerate(count.tolist()):
        upper = lower[i, :n] + 2 * (left[i] + right[candidate[i, :n].long()])
        limit = upper.kthvalue(k).values
        moved += 12 + 12 * n + 5
        if limit < cut[i]:
            moved += features * (1 + int((lower[i, :n] <= limit).sum())) + k * (4 + distance.element_size())
    return {"nearest_neighbors_select_kernel": moved}


def _rescan(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """A row's products and the others' bounds, the row's features and those of each that may be near, the results."""
    block, _, rows, count, x, factor = after[:6]
    D, left_norm, left_window, right_norm, right_window, kth_upper, k, _, distance = (
        after[21], *after[24:29], *after[30:33],
    )  # fmt: skip
    shrunk = (left_norm - left_window)[rows][:, None]
    near = -2 * block + (right_norm - right_window) + shrunk <= kth_upper[rows][:, None]
    features = D * x.element_size() + (8 if factor is not None else 0)
    moved = count * (20 + k * (4 + distance.element_size())) + 12 * block.numel()
    return {"nearest_neighbors_rescan_kernel": moved + features * (int(near.sum()) + count)}


def _prepare(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    x, factor, rows, _, _, D, center = after[:7]
    least = D * (x.element_size() + 4 + (0 if center is None else 8)) + 4 + (0 if factor is None else 8)
    return {"pairwise_distance_prepare_kernel": rows * least}


def _max_abs(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    x, _, rows, _, _, D, _ = after
    return {"pairwise_distance_max_abs_kernel": rows * (D * x.element_size() + 8)}


def _norm(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    x, factor, rows, _, _, D, _ = after
    return {"pairwise_distance_norm_kernel": rows * (D * x.element_size() + 8 + (8 if factor is not None else 0))}


def _pairwise_block(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """Every product and distance, the norms for each tile of 32 x 32, both rows where the product has lost digits."""
    block, x, rows, columns, D, x_norm, y_norm, mirror = (
        before[0], after[2], after[4], after[8], after[11], after[12], after[13], after[16],
    )  # fmt: skip
    total = x_norm[:, None] + y_norm
    again = int(((total - 2 * block).clamp(min=0) < total / 32).sum())
    norms = 4 * (rows * -(-columns // 32) + columns * -(-rows // 32))
    moved = rows * columns * (8 if mirror is None else 12) + norms + 2 * again * D * x.element_size()
    return {"pairwise_distance_block_kernel": moved}


def _pairwise_tiled(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """For each tile of 64 x 64 the rows and norms of both sides, every distance, both rows of a pair measured again."""
    p, q, block, x, rows, columns, D, x_norm, y_norm = *after[:3], after[4], after[6], after[10], *after[13:16]
    sides = rows * -(-columns // 64) + columns * -(-rows // 64)
    total = x_norm[:, None] + y_norm
    again = int(((total - 2 * p @ q.T).clamp(min=0) < total / 32).sum())
    moved = 4 * (D + 1) * sides + 4 * block.numel() + 2 * again * D * x.element_size()
    return {"pairwise_distance_tiled_kernel": moved}


_LEAST: dict[str, Callable[[Sequence[Any], Sequence[Any]], dict[str, int]]] = {
    "k_reciprocal_sets_cuda": _sets,
    "k_reciprocal_robust_sets_cuda": _robust_sets,
    "k_reciprocal_listed_distance_cuda": _listed_distance,
    "k_reciprocal_encode_cuda": _encode,
    "k_reciprocal_query_expansion_cuda": _query_expansion,
    "k_reciprocal_invert_cuda": _invert,
    "k_reciprocal_blend_cuda": _blend,
    "k_reciprocal_topk_cuda": _topk,
    "k_reciprocal_matrix_neighbors_cuda": _matrix_neighbors,
    "nearest_neighbors_scan_cuda": _scan,
    "nearest_neighbors_select_cuda": _select,
    "nearest_neighbors_rescan_cuda": _rescan,
    "pairwise_distance_max_abs_cuda": _max_abs,
    "pairwise_distance_norm_cuda": _norm,
    "pairwise_distance_prepare_cuda": _prepare,
    "pairwise_distance_block_cuda": _pairwise_block,
    "pairwise_distance_tiled_cuda": _pairwise_tiled,
}


class Counting:
    """A launcher that adds up the least bytes of the calls it passes on, by kernel."""

    def __init__(self, launch: Callable[..., Any]) -> None:
        self._launch = launch
        self.least: Counter[str] = Counter()

    def __call__(self, function: str, *arguments: Any) -> Any:
        values = [_tensor(argument) for argument in arguments]
        before = [value.clone() if isinstance(value, Tensor) else value for value in values]
        result = self._launch(function, *arguments)
        if function in _LEAST:
            self.least.update(_LEAST[function](before, values))
        return result

    def of(self, kernel: str) -> int | None:
        """The least bytes of a kernel, or None for one that no formula stands for."""
        return self.least.get(kernel, self.least.get(kernel.split("<")[0]))
