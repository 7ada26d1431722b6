"""Exact nearest neighbours as operators; the definitions are in :mod:`vareid_ext.reference.nearest_neighbors`.

The native kernels take blocks of float32 products from the vendor's library and scan each once, while it is in cache,
for the entries that can still be among a row's nearest: those whose lower bound does not exceed the k-th smallest upper
bound (:mod:`vareid_ext.ops._filter` has the bounds and their proof). What remains is measured in float64 and ordered. A
set against itself is symmetric: only blocks on and above the diagonal are computed, and each serves its rows and its
columns. Rows that had more near ties than places are done again, whole. Where a CPU has products of 8 bits, or a GPU of
bfloat16, these filter in place of float32 ones (:mod:`vareid_ext.ops._byte_filter`,
:mod:`vareid_ext.ops._bfloat16_filter`), unless too many rows would be done again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops import _progress
from vareid_ext.ops._bfloat16_filter import BFloat16Filter
from vareid_ext.ops._byte_filter import ByteFilter
from vareid_ext.ops._checks import check_choice, check_count
from vareid_ext.ops._features import check_features, check_same_features, row_magnitudes
from vareid_ext.ops._filter import Filter, block_edges, block_side, row_blocks, samples, strip_side
from vareid_ext.ops._matmul import full_float32
from vareid_ext.ops._operator import define
from vareid_ext.ops._rounded_filter import RoundedFilter
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import nearest_neighbors as reference
from vareid_ext.reference.pairwise_distance import METRICS

MAX_NEIGHBORS = {"cpu": 2048, "cuda": 128}  # the largest k of the native kernels
MIN_ROWS = 64  # done again at once, where memory allows it
_PAIR_ELEMENTS = 1 << 20  # of the rows of pairs that are measured at once
_MAX_CAPACITY = 4096  # as kMaxCapacity in csrc/cpu/nearest_neighbors_candidates.h
_PANELS = 512  # columns that are held in panels at once, a multiple of csrc/cpu/float_products.h's kFloatPanel
_FARTHEST = 8  # as kFarthest in csrc/nearest_neighbors.h
_FAR_PLACES = 32  # for pairs that come before a row's largest distance is about known
_FAR_BYTES = 28 * _FAR_PLACES  # of a row, with the copies that are sorted
_FAR_SHARE = 64  # one of so many columns may be measured for a row's largest distance
_CUDA_CAPACITIES = (96, 192)  # candidates for which csrc/cuda/nearest_neighbors.cu has lists
_EQUAL_CHUNK = 1 << 16  # elements compared at once
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def capacity(k: int, rounded: bool = False) -> int:
    """Candidates kept for each row: k and room for near ties and for those that come before the threshold is known.

    The window of rounded rows leaves 2 k to 2.5 k of a row's neighbours.
    """
    room = max(9 * k // 4, 56) if rounded else max(k // 2, 40)
    return min((k + room + 15) // 16 * 16, _MAX_CAPACITY)


def _places_for_bfloat16(k: int) -> int:
    """:func:`capacity` with these products."""
    return capacity(k) if capacity(k) <= _CUDA_CAPACITIES[0] else _CUDA_CAPACITIES[1]


def _capacity(k: int, rounded: RoundedFilter | None) -> int:
    if isinstance(rounded, BFloat16Filter):
        return _places_for_bfloat16(k)
    return capacity(k, rounded is not None)


def candidate_bytes(k: int, on_gpu: bool = False) -> int:
    """What the candidates of a row take at most, and the pairs that its largest distance may be that of."""
    if on_gpu:
        return 8 * _places_for_bfloat16(k) + _FAR_BYTES
    return 8 * capacity(k, rounded=True) + 8 * _FARTHEST + 4


def rescan_bytes(columns: int, threads: int) -> int:
    """What it takes, beside the products, to do rows again that have more near ties than places (on a CPU)."""
    return columns * (24 * threads + 80) + 64 * _EQUAL_CHUNK


class _Candidates(NamedTuple):
    """What is kept of each row while blocks go by, as csrc/nearest_neighbors.h explains it and in its order."""

    lower: Tensor
    """[rows, places]"""
    column: Tensor
    """int32 [rows, places]"""
    kept: Tensor
    """int32"""
    threshold: Tensor
    cut: Tensor
    row_max: Tensor
    crowded: Tensor
    """bool; on a GPU it is not used"""

    @classmethod
    def none(cls, row_max: Tensor, places: int) -> _Candidates:
        """Of rows whose largest distances go to ``row_max`` [rows]."""
        rows, new = row_max.shape[0], row_max.new_empty
        return cls(
            new((rows, places)), new((rows, places), dtype=torch.int32), new(rows, dtype=torch.int32).zero_(),
            new(rows).fill_(torch.inf), new(rows).fill_(torch.inf), row_max, new(rows, dtype=torch.bool).zero_(),
        )  # fmt: skip


class _Scan:
    """Candidates of the rows of some parts of a filter, gathered block by block; or of those among them from number
    ``begin`` on and before ``end``.

    With ``reach`` [rows], squared distances beyond it are not wanted, and rows may have fewer than k candidates.
    """

    def __init__(
        self, filtered: Filter, left: Sequence[int], right: Sequence[int], k: int, metric: str, block_rows: int,
        begin: int = 0, end: int | None = None, rounded: RoundedFilter | None = None, pairs: bool = False,
        reach: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.filtered, self.rounded, self.k, self.metric = filtered, rounded, k, METRICS.index(metric)
        self.block_rows = max(MIN_ROWS, block_rows)
        self.left, self.right = _between(filtered.sets(*left), begin, end), filtered.sets(*right)
        self.left_parts, self.right_parts = list(left), list(right)
        bounds = filtered.bounds if rounded is None else rounded.bounds
        norm, window = bounds(left)
        self.left_bounds, self.right_bounds = (norm[begin:end], window[begin:end]), bounds(right)
        self.begin, self.rows = begin, sum(part.shape[0] for part, _ in self.left)
        self.columns = sum(filtered.parts[w].shape[0] for w in right)
        new = filtered.norm.new_empty
        self.row_max = new(self.rows).zero_()
        self._panels: Tensor | None = None
        self._products: Tensor | None = None
        self.candidates = _Candidates.none(self.row_max, _capacity(k, rounded))
        if reach is not None:
            self.candidates.threshold.copy_(reach)
        self.opposite: _Scan | None = None
        self.farthest: Any = None
        if pairs and isinstance(rounded, BFloat16Filter):
            self.opposite = self._of_opposite_rows()
            of_products = torch.empty_like(self.row_max)
            self.candidates = self.candidates._replace(row_max=of_products)
        elif pairs and not filtered.norm.is_cuda:
            shape = self.rows, _FARTHEST
            found = new(shape), new(shape, dtype=torch.int32), new(self.rows, dtype=torch.int32).zero_()
            self.farthest = found

    def _of_opposite_rows(self) -> _Scan:
        """A scan that finds what is farthest: ``-n_i - n_j - 2 (-p_i . p_j)`` is least where the distance is largest,
        and errs by no more than the window, too.
        """
        one = copy.copy(self)
        one.k, one.candidates = 1, _Candidates.none(torch.empty_like(self.row_max), _FAR_PLACES)
        one.left_bounds, one.right_bounds = (
            (norm.neg(), window) for norm, window in (self.left_bounds, self.right_bounds)
        )
        return one

    def start_from(self, index: Tensor, distance: Tensor, row_max: Tensor) -> None:
        """Makes known lists the candidates of the first rows; ``distance`` is float64."""
        rows, width = index.shape
        lower, candidate, count, threshold, *_ = self.candidates
        lower[:rows, :width] = torch.nextafter(distance.float(), distance.new_tensor(-torch.inf, dtype=torch.float32))
        candidate[:rows, :width] = index
        count[:rows], self.row_max[:rows] = width, row_max
        if width == self.k and rows:
            window = self.left_bounds[1]
            reach = torch.stack([window[index[:, place].long()] for place in range(width)]).amax(0)
            threshold[:rows] = lower[:rows, width - 1] + 2 * (window[:rows] + reach)

    def side(self, begin: int, end: int, left: int, right: int, k: int) -> _Scan:
        """The candidates of rows begin to end - 1, which are one part, among those of another part, to be selected."""
        one = copy.copy(self)
        one.left_parts, one.right_parts, one.k = [left], [right], k
        one.left, one.right = self.filtered.sets(left), self.filtered.sets(right)
        bounds = self.filtered.bounds if self.rounded is None else self.rounded.bounds
        one.left_bounds, one.right_bounds = bounds([left]), bounds([right])
        one.rows, one.columns = end - begin, self.filtered.parts[right].shape[0]
        one.candidates = _Candidates(*(state[begin:end] for state in self.candidates))
        if right:  # they are numbered from the first part on
            offset, measured = self.filtered.parts[0].shape[0], one.candidates.column < 0
            one.candidates.column.sub_(offset).add_(measured, alpha=2 * offset)  # of those, it is ~j
        one.row_max = self.row_max[begin:end]
        return one

    def scan(self, block: Tensor, row: int, column: int, *, both: bool, write: bool) -> None:
        """Takes the candidates of a block of products; ``both``: for its columns too."""
        if self.opposite is not None:
            self.opposite.scan(block.neg_(), row, column, both=both, write=False)
            block.neg_()
        given = block, row, column, self.left_bounds, self.right_bounds, self.candidates, self.k, both
        if self.farthest is None:
            _native.launch("nearest_neighbors_scan", *given, write, on=block)
        else:
            _native.launch("nearest_neighbors_scan_farthest", *given, self._sets, self.farthest, on=block)

    def multiply(self, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        """Writes the products of blocks of the filter's rows, by which candidates are found, to ``out``."""
        if isinstance(self.rounded, BFloat16Filter):
            self.rounded.multiply(rows, columns, out)
        else:
            torch.mm(rows, columns.T, out=out)

    def scan_written(self, rows: Tensor, columns: Tensor, row: int, column: int, out: Tensor) -> None:
        """Makes a block's products, takes its candidates for both sides, and writes its distances to ``out``.

        It is for scans that look for the pairs of the largest distances.
        """
        if self._panels is None:
            self._panels = rows.new_empty(_PANELS * rows.shape[1])
        for begin in range(0, columns.shape[0], _PANELS):
            some = slice(begin, begin + _PANELS)
            _native.launch(
                "nearest_neighbors_scan_written", rows, columns[some], row, column + begin, self.left_bounds,
                self.right_bounds, self.candidates, self.k, self._sets, self.farthest, out[:, some], self._panels,
                self._workspace(), on=rows,
            )  # fmt: skip

    @property
    def _sets(self) -> Any:
        """The features by which pairs are measured."""
        return self.left, self.right

    def _workspace(self) -> Tensor:
        """What the threads' products are written to."""
        if self._products is None:
            size = torch.get_num_threads() * _native.module().packed_scan_bytes
            self._products = self.filtered.norm.new_empty(size, dtype=torch.uint8)
        return self._products

    def scan_packed(
        self, left: tuple[Tensor, ...], right: tuple[Tensor, ...], sizes: tuple[int, int], row: int, column: int, *,
        both: bool,
    ) -> None:  # fmt: skip
        """As :meth:`scan`, of blocks of packed rows."""
        workspace = self._workspace()
        _native.launch(
            "nearest_neighbors_scan_packed", left, sizes[0], right, sizes[1], self.filtered.parts[0].shape[1], row,
            column, self.left_bounds, self.right_bounds, self.candidates, self.k, both, self._sets, self.farthest,
            workspace, on=workspace,
        )  # fmt: skip

    def finish(self) -> Tensor:
        """Each row's largest distance, after the last block."""
        if self.farthest is not None:
            _native.launch("nearest_neighbors_farthest", self._sets, self.farthest, self.row_max, on=self.row_max)
            self.farthest = None
        if self.opposite is not None:
            torch.maximum(self.row_max, self.opposite.largest_distances(), out=self.row_max)
            self.opposite = None
        self._panels = self._products = None
        if self.rounded is not None:
            self.rounded.drop_buffers()
        self.filtered.drop_buffers()
        return self.row_max

    def select(self, distance_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """index int32 [rows, k] and distance [rows, k], exact."""
        filtered = self.filtered
        index = filtered.norm.new_empty((self.rows, self.k), dtype=torch.int32)
        distance = filtered.norm.new_empty((self.rows, self.k), dtype=distance_dtype)
        unsure = filtered.norm.new_empty(self.rows, dtype=torch.bool)
        kth_upper = filtered.norm.new_empty(self.rows)
        _native.launch(
            "nearest_neighbors_select", self.left, self.right, self.metric, filtered.unscale, self.left_bounds,
            self.right_bounds, self.candidates, self.k, index, distance, unsure, kth_upper, on=index,
        )  # fmt: skip
        rows = unsure.nonzero()[:, 0]
        products = "float32" if self.rounded is None else self.rounded.name
        _progress.count(f"rows filtered by products of {products}", lambda: self.rows)
        if not index.is_cuda:
            _progress.count("with candidates measured early", lambda: int(self.candidates.crowded.sum()))
        _progress.count("done again", rows.numel)
        if rows.numel():
            del self.candidates
            self._rescan(rows, kth_upper, index, distance)
        return index, distance

    def _rescan(self, unsure: Tensor, kth_upper: Tensor, index: Tensor, distance: Tensor) -> None:
        """Computes some rows' products whole and takes every entry that may be among the nearest."""
        filtered = self.filtered
        same, places = None, 0  # a GPU needs neither
        if not index.is_cuda:
            same = self._equal_rows()
            places = torch.get_num_threads() * (self.columns + (self.columns + 1) // 2) * 16
        workspace = filtered.norm.new_empty(places, dtype=torch.uint8)
        left_bounds, right_bounds = self._float32_bounds()
        for rows, products in self._whole_rows(unsure):
            _native.launch(
                "nearest_neighbors_rescan", products, rows, self.left, self.right, self.metric, filtered.unscale,
                left_bounds, right_bounds, kth_upper, same, self.k, index, distance, workspace, on=index,
            )  # fmt: skip

    def _float32_bounds(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        norm, window = self.filtered.bounds(self.left_parts)
        return (norm[self.begin :], window[self.begin :]), self.filtered.bounds(self.right_parts)

    def _whole_rows(self, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some of these rows at a time, and their float32 products with all columns."""
        filtered = self.filtered
        # As many rows at once as fit in the memory of a block of products and its features.
        part = filtered.parts[0]
        D = part.shape[1]
        taken = self.block_rows * 4 * (self.block_rows + D)
        fitting = taken // (4 * self.columns + (4 + part.element_size()) * D)
        step = max(1, min(self.block_rows, fitting, numbers.numel()))
        block, prepared = filtered.norm.new_empty((step, self.columns)), filtered.norm.new_empty((step, D))
        for rows in numbers.split(step):
            products = block[: rows.numel()]
            with full_float32(block.device.type):
                chosen = self._gather(rows, prepared)
                for which, first, last, offset in row_blocks(filtered, self.right_parts, self.block_rows):
                    columns = filtered.block(which, first, last, 1)
                    torch.mm(chosen, columns.T, out=products[:, offset : offset + last - first])
            yield rows, products

    def largest_distances(self) -> Tensor:
        """float32 [rows], of a scan of opposite rows: measured where few pairs may be a row's farthest, else by way of
        float32 products.
        """
        lower, index, count, _, cut, *_ = self.candidates
        empty = torch.arange(lower.shape[1], device=lower.device) >= count[:, None]
        lower, at = lower.masked_fill(empty, torch.inf).topk(_FARTHEST + 1, largest=False)
        index = index.masked_fill(empty, 0).gather(1, at)
        window = self.left_bounds[1][:, None] + self.right_bounds[1][index.long()]
        limit = (lower + 2 * window).amin(1)
        near = lower <= limit[:, None]
        index = torch.where(near, index, index[:, :1])
        largest = self.row_max.new_zeros(self.rows, dtype=torch.float64)
        for place in range(min(_FARTHEST, int(near.sum(1).amax())) if self.rows else 0):
            measured = _measure(self.filtered, self.left, self.right, index[:, place], self.right_bounds)
            torch.maximum(largest, measured, out=largest)
        unsure = (near[:, -1] | (cut <= limit)).nonzero()[:, 0]
        _progress.count("largest distances done again", unsure.numel)
        (norm, _), (right_norm, _) = self._float32_bounds()
        for rows, products in self._whole_rows(unsure) if unsure.numel() else ():
            squared = products.mul_(-2).add_(norm[rows, None]).add_(right_norm)
            largest[rows] = squared.amax(1).clamp_(min=0).double()
        return largest.float()

    def _gather(self, rows: Tensor, out: Tensor) -> Tensor:
        """The prepared float32 rows of these ascending numbers, in the first rows of ``out``."""
        filtered, offset, done, rows = self.filtered, 0, 0, rows + self.begin
        for which in self.left_parts:
            of_part = rows[(rows >= offset) & (rows < offset + filtered.parts[which].shape[0])] - offset
            filtered.gather(which, of_part, out[done : done + of_part.numel()])
            offset += filtered.parts[which].shape[0]
            done += of_part.numel()
        return out[:done]

    def _equal_rows(self) -> Tensor:
        """int32 [columns]: the first row of the right set that each one is equal to, bit for bit."""
        parts = [self.filtered.parts[w] for w in self.right_parts]
        bits = [part.view(_BITS[part.dtype]) for part in parts]
        D, device = parts[0].shape[1], parts[0].device
        odd = torch.randint(-(2**62), 2**62, (D,), generator=torch.Generator().manual_seed(0)).to(device) * 2 + 1
        step = max(1, _EQUAL_CHUNK // D)
        code = torch.empty(self.columns, dtype=torch.int64, device=device)
        mixed, offset = code.new_empty((step, D)), 0
        for rows in (rows for part in bits for rows in part.split(step)):
            end = offset + rows.shape[0]
            torch.sum(torch.mul(rows, odd, out=mixed[: rows.shape[0]]), 1, out=code[offset:end])
            offset = end
        _, group = torch.unique(code, return_inverse=True)
        number = torch.arange(self.columns, device=device)
        first = torch.full_like(number, self.columns).scatter_reduce_(0, group, number, "amin")[group]

        def rows_of(numbers: Tensor) -> Tensor:
            out, offset = bits[0].new_empty((numbers.numel(), D)), 0
            for part in bits:
                inside = (numbers >= offset) & (numbers < offset + part.shape[0])
                out[inside] = part[numbers[inside] - offset]
                offset += part.shape[0]
            return out

        same = number.clone()
        candidates = (first != number).nonzero()[:, 0]
        for some in candidates.split(step):  # equal codes are not yet equal rows
            equal = (rows_of(some) == rows_of(first[some])).all(1)
            same[some[equal]] = first[some[equal]]
        return same.to(torch.int32)


def _measure(
    filtered: Filter, left: Sequence[tuple[Tensor, Any]], right: Sequence[tuple[Tensor, Any]], columns: Tensor,
    right_bounds: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """float64 ``|z_i - z_j|^2`` of each row of the left set and one of the right, summed as the nearest's."""
    new, size = filtered.norm.new_zeros, columns.numel()
    candidates = _Candidates.none(new(size), 2)
    candidates.kept.fill_(1)
    candidates.lower[:, 0], candidates.column[:, 0] = 0, columns
    out = new((size, 1), dtype=torch.float64)
    _native.launch(
        "nearest_neighbors_select", left, right, METRICS.index("sqeuclidean"), 1.0, (new(size), new(size)),
        right_bounds, candidates, 1, new((size, 1), dtype=torch.int32), out, new(size, dtype=torch.bool), new(size),
        on=out,
    )  # fmt: skip
    return out[:, 0]


def pair_distances(filtered: Filter, rows: Tensor, columns: Tensor) -> Tensor:
    """float64 ``|z_i - z_j|^2`` of pairs of rows of the first and of the second part, summed as the nearest's."""
    out = filtered.norm.new_empty(rows.shape[0], dtype=torch.float64)
    (x, factor), right = filtered.sets(0)[0], filtered.sets(1)
    for begin in range(0, rows.shape[0], max(1, _PAIR_ELEMENTS // x.shape[1])):
        at = slice(begin, begin + max(1, _PAIR_ELEMENTS // x.shape[1]))
        left = [(x.index_select(0, rows[at]), None if factor is None else factor[rows[at]])]
        out[at] = _measure(filtered, left, right, columns[at], filtered.bounds([1]))
    return out


def _ways(
    filtered: Filter, left: Sequence[int], right: Sequence[int], k: int, block_rows: int, rows: int | None = None
) -> RoundedFilter | None:
    """The rounded rows whose products filter, or None for float32; ``rows`` of the left set are multiplied, None for
    all.
    """
    if rows is None:
        rows = sum(filtered.parts[w].shape[0] for w in left)
    columns = sum(filtered.parts[w].shape[0] for w in right)
    rounded: RoundedFilter
    if ByteFilter.pays(filtered.parts[0], rows):
        rounded = ByteFilter(filtered, block_rows)
    elif BFloat16Filter.pays(filtered.parts[0], rows * columns):
        rounded = BFloat16Filter(filtered, block_rows)
    else:
        return None
    # As the kernels keep them, on a CPU and on a GPU, with places left for those that come.
    places = _capacity(k, rounded)
    kept = places - (places - k) // (4 if isinstance(rounded, ByteFilter) else 2)
    return rounded if rounded.suits(left, right, k, kept) else None


def pairs_pay(sampled: Sequence[Tensor], metric: str, scale: float | None, total: int) -> bool:
    """Whether largest distances of ``total`` rows are those of few pairs, which are then measured, in place of what
    products give.

    It depends on nothing but that and :func:`vareid_ext.ops._filter.samples` of the rows: where they are divided, too.
    """
    rows = sum(map(len, sampled))
    kind: type[ByteFilter] | type[BFloat16Filter]
    if ByteFilter.pays(sampled[0], rows):
        kind = ByteFilter
    elif BFloat16Filter.pays(sampled[0], total * total, pairs=True):
        kind = BFloat16Filter
    else:
        return False
    return kind(Filter(sampled, ["samples"] * len(sampled), metric, scale), rows).far_pairs() * _FAR_SHARE <= 1


def _symmetric_scan(
    filtered: Filter, scans: Sequence[_Scan], block_rows: int, out: Tensor | None = None, known: int = 0
) -> None:
    """Every block on and above the diagonal of all parts against themselves, but for those among ``known`` first parts.

    The first of ``scans`` looks at all of them, a second one at those of the first part against the second. Without a
    second one, these may go into ``out``.
    """
    blocks = row_blocks(filtered, range(len(filtered.parts)), block_rows)
    side = max((last - first for _, first, last, _ in blocks), default=0)
    together = strip_side(filtered.norm.device, 1)
    rounded = scans[0].rounded if isinstance(scans[0].rounded, ByteFilter) else None
    buffer = filtered.norm.new_empty(0 if rounded else side * side * min(together, len(blocks)))
    count = len(blocks)
    spans = [(at, at, count) for at in range(count)]
    if rounded:  # images of one person often lie side by side: what is near is known early
        spans = [(at, at, at + 1) for at in range(count)] + [(at, at + 1, count) for at in range(count)]
    with full_float32(buffer.device.type):
        for at, start, stop in spans:
            which, first, last, offset = blocks[at]
            right = [block for block in blocks[start:stop] if which >= known or block[0] >= known]
            if not right:
                continue
            rows, size = filtered.block(which, first, last, 0), last - first
            packed = rounded and rounded.block(which, first, last, left=True)
            for strip in _strips(right, together):
                other, begin, end = strip[0][0], strip[0][1], strip[-1][2]
                alone, crossed = end - begin == size and strip[0][3] == offset, which != other
                wanted = crossed and out is not None
                if crossed and out is not None:
                    target = out[first:last, begin:end]
                    if scans[0].farthest is not None:
                        scans[0].scan_written(rows, filtered.block(other, begin, end, 1), offset, strip[0][3], target)
                        _progress.advance(size * (end - begin))
                        continue
                elif rounded and packed:
                    columns, to, sizes = rounded.block(other, begin, end, left=False), strip[0][3], (size, end - begin)
                    for scan in scans[1:] if crossed else ():
                        scan.scan_packed(packed, columns, sizes, first, begin, both=False)
                    scans[0].scan_packed(packed, columns, sizes, offset, to, both=True)
                    _progress.advance(size * (size + 1) // 2 if alone else size * (end - begin))
                    continue
                else:
                    target = buffer[: size * (end - begin)].view(size, end - begin)
                columns_of = rows if alone else filtered.block(other, begin, end, 1)
                if wanted:  # of float32, whatever filters: they are within its window
                    torch.mm(rows, columns_of.T, out=target)
                else:
                    scans[0].multiply(rows, columns_of, target)
                for _, other_first, other_last, other_offset in strip:
                    block, same = target[:, other_first - begin : other_last - begin], other_offset == offset
                    if crossed:
                        for scan in scans[1:]:
                            scan.scan(block, first, other_first, both=False, write=False)
                    scans[0].scan(block, offset, other_offset, both=not same, write=wanted)
                    _progress.advance(size * (size + 1) // 2 if same else size * (other_last - other_first))


def _scan_of_rows(filtered: Filter, scan: _Scan, block_rows: int) -> None:
    """The blocks of :func:`_symmetric_scan` that hold rows of the scan, which are whole blocks: the same products, and
    so on a CPU, where they are made one by one, the same bits.
    """
    blocks = row_blocks(filtered, range(len(filtered.parts)), block_rows)
    if isinstance(scan.rounded, ByteFilter):
        own_blocks = [block for block in blocks if scan.begin <= block[3] < scan.begin + scan.rows]
        _packed_scan(scan.rounded, scan, own_blocks, blocks)
        return
    side = max((last - first for _, first, last, _ in blocks), default=0)
    buffer, turned = (filtered.norm.new_empty(side * side) for _ in range(2))
    with full_float32(buffer.device.type):
        for at, (which, first, last, offset) in enumerate(blocks):
            rows, size = filtered.block(which, first, last, 0), last - first
            own = scan.begin <= offset < scan.begin + scan.rows
            for other, begin, end, other_offset in blocks[at:]:
                same, other_own = other_offset == offset, scan.begin <= other_offset < scan.begin + scan.rows
                if not own and not other_own:
                    continue
                columns = rows if same else filtered.block(other, begin, end, 1)
                target = buffer[: size * (end - begin)].view(size, end - begin)
                scan.multiply(rows, columns, target)
                if own:
                    scan.scan(target, offset - scan.begin, other_offset, both=False, write=False)
                if other_own and not same:
                    crossed = turned[: target.numel()].view(end - begin, size).copy_(target.T)
                    scan.scan(crossed, other_offset - scan.begin, offset, both=False, write=False)
                _progress.advance(target.numel() * (own + (other_own and not same)))


def _between(sets: list[tuple[Tensor, Tensor | None]], begin: int, end: int | None) -> list[tuple[Tensor, Any]]:
    """Rows and factors of the rows from number ``begin`` on and before ``end`` of some sets; of sets that have any, as
    the kernels look for factors at the first one.
    """
    found, offset = [], 0
    for part, factor in sets:
        rows = slice(max(0, begin - offset), None if end is None else max(0, end - offset))
        found.append((part[rows], None if factor is None else factor[rows]))
        offset += part.shape[0]
    return [of_set for of_set in found if of_set[0].shape[0]] or found[:1]


def _strips(blocks: list[tuple[int, int, int, int]], together: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """The blocks in runs of at most ``together`` that lie side by side in one part."""
    for _, of_part in itertools.groupby(blocks, key=lambda block: block[0]):
        run = list(of_part)
        yield from (run[begin : begin + together] for begin in range(0, len(run), together))


def _one_sided_scan(filtered: Filter, scan: _Scan, block_rows: int) -> None:
    if isinstance(scan.rounded, ByteFilter):
        _packed_scan(scan.rounded, scan, *(row_blocks(filtered, [part], block_rows) for part in (0, 1)))
        return
    rows_of = row_blocks(filtered, [0], block_rows)
    columns_of = row_blocks(filtered, [1], strip_side(filtered.norm.device, block_rows))
    sides = [max((last - first for _, first, last, _ in blocks), default=0) for blocks in (rows_of, columns_of)]
    buffer = filtered.norm.new_empty(sides[0] * sides[1])
    with full_float32(buffer.device.type):
        for _, first, last, _ in rows_of:
            rows = filtered.block(0, first, last, 0)
            for _, other_first, other_last, _ in columns_of:
                columns = filtered.block(1, other_first, other_last, 1)
                target = buffer[: rows.shape[0] * columns.shape[0]].view(rows.shape[0], columns.shape[0])
                scan.multiply(rows, columns, target)
                scan.scan(target, first, other_first, both=False, write=False)


def _packed_scan(
    rounded: ByteFilter, scan: _Scan, rows_of: list[tuple[int, int, int, int]],
    columns_of: list[tuple[int, int, int, int]], *, both: bool = False,
) -> None:  # fmt: skip
    """Every block of rows against every block of columns, by products of 8 bits; ``both``: for the columns, too."""
    for which, first, last, offset in rows_of:
        left = rounded.block(which, first, last, left=True)
        for other, other_first, other_last, other_offset in columns_of:
            sizes = last - first, other_last - other_first
            right = rounded.block(other, other_first, other_last, left=False)
            scan.scan_packed(left, right, sizes, offset - scan.begin, other_offset, both=both)
            _progress.advance(sizes[0] * sizes[1])


def one_sided_scan(filtered: Filter, k: int, metric: str, block_rows: int, reach: Tensor | None = None) -> _Scan:
    """The first part against the second, with whichever products pay."""
    rounded = _ways(filtered, [0], [1], k, block_rows)
    scan = _Scan(filtered, [0], [1], k, metric, block_rows, rounded=rounded, reach=reach)
    _one_sided_scan(filtered, scan, block_rows)
    return scan


def crossed_scan(filtered: Filter, scan: _Scan, block_rows: int) -> None:
    """The first part against the second, which are numbered together, for both, with the scan's rounded rows."""
    assert isinstance(scan.rounded, ByteFilter)
    blocks = row_blocks(filtered, [0, 1], block_rows)
    rows_of, columns_of = ([block for block in blocks if block[0] == part] for part in (0, 1))
    _packed_scan(scan.rounded, scan, rows_of, columns_of, both=True)


def _reference_nearest_neighbors(
    x: Tensor, y: Tensor | None, k: int, metric: str, block_rows: int
) -> tuple[Tensor, Tensor]:
    row_magnitudes("x", x, nonzero=metric == "cosine")
    if y is not None:
        row_magnitudes("y", y, nonzero=metric == "cosine")
    return reference.nearest_neighbors(x, y, k, metric)


def _native_nearest_neighbors(
    x: Tensor, y: Tensor | None, k: int, metric: str, block_rows: int
) -> tuple[Tensor, Tensor]:
    if k > MAX_NEIGHBORS[x.device.type]:
        return NotImplemented
    block_rows = block_rows or block_side(x.device)
    if y is None:
        filtered = Filter([x], ["x"], metric)
        scan = _Scan(filtered, [0], [0], k, metric, block_rows, rounded=_ways(filtered, [0], [0], k, block_rows))
        _symmetric_scan(filtered, [scan], block_rows)
    else:
        scan = one_sided_scan(Filter([x, y], ["x", "y"], metric), k, metric, block_rows)
    scan.finish()
    index, distance = scan.select(accumulator_dtype(x.dtype))
    return distance, index.to(torch.int64)


def _fake_nearest_neighbors(x: Tensor, y: Tensor | None, k: int, *_arguments: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=accumulator_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)


_nearest_neighbors = define(
    "nearest_neighbors(Tensor x, Tensor? y, SymInt k, str metric, SymInt block_rows) -> (Tensor, Tensor)",
    fake=_fake_nearest_neighbors,
    reference=_reference_nearest_neighbors,
    native=_native_nearest_neighbors,
)


def _native_joint_neighbors(
    query: Tensor, gallery: Tensor, scale: float, k: int, nearest: int, out: Tensor | None, block_rows: int
) -> Any:
    if max(k, nearest) > MAX_NEIGHBORS[query.device.type]:
        return NotImplemented
    filtered = Filter([query, gallery], ["query", "gallery"], "sqeuclidean", scale=scale)
    pairs = pairs_pay(samples(filtered.parts), "sqeuclidean", scale, len(filtered.norm))
    rounded = _ways(filtered, [0, 1], [0, 1], k, block_rows) if pairs else None
    scans = [_Scan(filtered, [0, 1], [0, 1], k, "sqeuclidean", block_rows, rounded=rounded, pairs=pairs)]
    if nearest:
        scans.append(_Scan(filtered, [0], [1], nearest, "sqeuclidean", block_rows, rounded=rounded))
    _symmetric_scan(filtered, scans, block_rows, out)
    row_max = scans[0].finish()
    index, distance = scans[0].select(torch.float32)
    if not nearest:
        empty = query.new_empty((query.shape[0], 0), dtype=torch.float32)
        return index, distance, row_max, empty.to(torch.int32), empty
    del scans[0]
    return index, distance, row_max, *scans[0].select(torch.float32)


def _fake_joint_neighbors(
    query: Tensor, gallery: Tensor, scale: float, k: int, nearest: int, *_arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (Q, G), new = (query.shape[0], gallery.shape[0]), query.new_empty
    return (
        new((Q + G, k), dtype=torch.int32), new((Q + G, k), dtype=torch.float32), new((Q + G,), dtype=torch.float32),
        new((Q, nearest), dtype=torch.int32), new((Q, nearest), dtype=torch.float32),
    )  # fmt: skip


joint_neighbors = define(
    "joint_neighbors(Tensor query, Tensor gallery, float scale, SymInt k, SymInt nearest, Tensor(a!)? out, "
    "SymInt block_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_joint_neighbors,
    reference=lambda *arguments: reference.joint_neighbors(*arguments[:-1]),
    native=_native_joint_neighbors,
)
"""Neighbour lists of both; see :func:`vareid_ext.reference.nearest_neighbors.joint_neighbors`.

``scale`` must be what :func:`vareid_ext.ops._filter.common_scale` gives for the two.
"""


def _native_neighbors_of_rows(
    query: Tensor, gallery: Tensor, scale: float, k: int, metric: str, begin: int, end: int, block_rows: int
) -> Any:
    if k > MAX_NEIGHBORS[query.device.type]:
        return NotImplemented
    of_squares = metric == "sqeuclidean"
    filtered = Filter([query, gallery], ["query", "gallery"], metric, scale=scale if of_squares else None)
    pairs = pairs_pay(samples(filtered.parts), metric, scale if of_squares else None, len(filtered.norm))
    rounded = _ways(filtered, [0, 1], [0, 1], k, block_rows) if pairs else None
    scan = _Scan(filtered, [0, 1], [0, 1], k, metric, block_rows, begin, end, rounded, pairs)
    _scan_of_rows(filtered, scan, block_rows)
    row_max = scan.finish() if of_squares else scan.finish() / 2
    return *scan.select(torch.float32), row_max


def _fake_neighbors_of_rows(
    query: Tensor, gallery: Tensor, scale: float, k: int, metric: str, begin: int, end: int, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    new, rows = query.new_empty, end - begin
    return new((rows, k), dtype=torch.int32), new((rows, k), dtype=torch.float32), new((rows,), dtype=torch.float32)


neighbors_of_rows = define(
    "neighbors_of_rows(Tensor query, Tensor gallery, float scale, SymInt k, str metric, SymInt begin, SymInt end, "
    "SymInt block_rows) -> (Tensor, Tensor, Tensor)",
    fake=_fake_neighbors_of_rows,
    reference=lambda *arguments: reference.neighbors_of_rows(*arguments[:-1]),
    native=_native_neighbors_of_rows,
)
"""Neighbour lists of some rows; see :func:`vareid_ext.reference.nearest_neighbors.neighbors_of_rows`.

``scale`` is as for :func:`joint_neighbors`, whose bits these are on a CPU where ``begin`` and ``end`` are edges of its
blocks, as they must be: :func:`edges` has them.
"""


def edges(query: int, gallery: int, block_rows: int) -> list[int]:
    """Where the blocks of :func:`joint_neighbors` begin, and where the last one ends."""
    return [*block_edges(query, block_rows), *(query + edge for edge in block_edges(gallery, block_rows)[1:])]


def _native_extended_neighbors(
    old: Tensor, new: Tensor, scale: float, k: int, index: Tensor, distance: Tensor, row_max: Tensor
) -> Any:
    if k > MAX_NEIGHBORS[old.device.type]:
        return NotImplemented
    names, parts = ["old", "new"], [old, new]
    if not old.shape[0]:  # the kernels look for the factors at the first part
        names, parts = names[1:], parts[1:]
    filtered, side, every = Filter(parts, names, "sqeuclidean", scale=scale), block_side(old.device), range(len(parts))
    pairs = pairs_pay(samples(filtered.parts), "sqeuclidean", scale, len(filtered.norm))
    rounded = _ways(filtered, every, every, k, side, new.shape[0]) if pairs else None
    scan = _Scan(filtered, every, every, k, "sqeuclidean", side, rounded=rounded, pairs=pairs)
    scan.start_from(index, distance, row_max)
    _symmetric_scan(filtered, [scan], side, known=len(parts) - 1)
    scan.finish()
    return *scan.select(torch.float64), scan.row_max


def _fake_extended_neighbors(
    old: Tensor, new: Tensor, scale: float, k: int, index: Tensor, distance: Tensor, row_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    M = old.shape[0] + new.shape[0]
    return index.new_empty((M, k)), distance.new_empty((M, k)), row_max.new_empty((M,))


extended_neighbors = define(
    "extended_neighbors(Tensor old, Tensor new, float scale, SymInt k, Tensor index, Tensor distance, Tensor row_max) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_extended_neighbors,
    reference=reference.extended_neighbors,
    native=_native_extended_neighbors,
)
"""Neighbour lists of a gallery that has grown; see :func:`vareid_ext.reference.nearest_neighbors.extended_neighbors`.

Only products of new rows are made. ``scale`` must be what :func:`vareid_ext.ops._filter.common_scale` gives for both.
"""


def nearest_neighbors(x: Tensor, y: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest neighbours of tensors; :func:`vareid_ext.retrieval.nearest_neighbors` says what it takes."""
    check_features("x", x)
    if y is not None:
        check_same_features("y", y, "x", x)
    check_choice("metric", metric, METRICS)
    name, rows = ("x", x.shape[0]) if y is None else ("y", y.shape[0])
    k = check_count("k", k, 1)
    if k > rows:
        raise ValueError(f"k: {k} was given; allowed are 1 to {rows}, the number of rows of {name}")
    distance, index = _nearest_neighbors(x, y, k, metric, 0)
    return distance, index
