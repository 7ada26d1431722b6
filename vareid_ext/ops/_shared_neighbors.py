"""Exact neighbours of rows that several processes hold a share each of.

Blocks of rows go round a ring of the processes. Each compares its own with those that come by and keeps the nearest;
what it finds for a visitor's rows goes back to their owner. Lists carry float64 distances, so merging them by distance
and, for ties, by number gives those of all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext import _native
from vareid_ext._processes import gather_rows, together
from vareid_ext._ring import begin_exchange, moved, visits
from vareid_ext.ops import _progress
from vareid_ext.ops import nearest_neighbors as op
from vareid_ext.ops._byte_filter import ByteFilter
from vareid_ext.ops._filter import Filter, block_edges, block_side, sample_step, scale_of, spread_from
from vareid_ext.ops._matmul import full_float32
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import nearest_neighbors as reference

NOBODY = (1 << 31) - 1  # the number at the end of a list that is not full
_CHUNK = 1 << 18  # elements of lists merged at once


def edges_of(sizes: Sequence[int]) -> list[int]:
    """Where each process's rows begin among all, and where the last one's end."""
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return edges


def shared_scale(parts: Sequence[Tensor], largest: float, group: ProcessGroup) -> float:
    """:func:`vareid_ext.ops._filter.common_scale` of the rows of all processes, given their largest element."""
    firsts = together(group, lambda: [part[:1].double().cpu().clone() for part in parts])  # no views, sent whole
    rows = [row for which in range(len(parts)) for each in firsts if len(row := each[which])]
    if not rows:
        return 1.0
    spreads = together(group, lambda: spread_from(rows[0].to(parts[0].device), parts, largest))
    return scale_of(largest, max(spreads))


def shared_samples(parts: Sequence[Tensor], edges: Sequence[Sequence[int]], group: ProcessGroup) -> list[Tensor]:
    """:func:`vareid_ext.ops._filter.samples` of the rows of all processes, of which each one's begin at these."""
    sampled = []
    for part, bounds in zip(parts, edges, strict=True):
        step = sample_step(bounds[-1], len(parts))
        sampled.append(torch.cat(gather_rows(part[-bounds[group.rank()] % step :: step], group)))
    return sampled


def _root(x: Tensor) -> Tensor:
    """Correctly rounded, as the kernels' is; PyTorch's is not on every CPU."""
    return x.sqrt() if x.is_cuda else torch.from_numpy(np.sqrt(x.numpy()))


class Lists:
    """The nearest rows found so far of some rows: number int32 [rows, k] and float64 distance, in order."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.distance = torch.full((rows, k), torch.inf, dtype=torch.float64, device=device)
        self.number = torch.full((rows, k), NOBODY, dtype=torch.int32, device=device)

    def merge(self, distance: Tensor, number: Tensor, begin: int = 0) -> None:
        """Takes the lists of the rows from ``begin`` on into account."""
        k = self.number.shape[1]
        step = max(1, _CHUNK // (k + number.shape[1]))
        for first in range(0, number.shape[0], step):
            some = slice(first, first + step)
            at = slice(begin + first, begin + min(first + step, number.shape[0]))
            numbers, order = torch.cat([self.number[at], number[some]], 1).sort(1)
            distances = torch.cat([self.distance[at], distance[some]], 1).gather(1, order)
            distances, order = distances.sort(dim=1, stable=True)
            self.distance[at], self.number[at] = distances[:, :k], numbers.gather(1, order[:, :k])

    def reach(self, metric: str) -> Tensor | None:
        """float32 [rows], what no squared distance of a list exceeds; None on a GPU, whose kernels want full lists."""
        if self.distance.is_cuda:
            return None
        farthest = self.distance[:, -1] * (2 if metric == "cosine" else 1)
        return torch.nextafter(farthest.float(), torch.tensor(torch.inf))


class _Block(NamedTuple):
    first: int
    """of the process's rows; the next is that of the last one and one more"""
    last: int
    number: int
    """the first row's among all"""


class Division:
    """How the blocks of sets of features, one set after the other, are divided among processes: evenly, in order.

    Args:
        totals: rows of each set.
        processes: how many there are.
        block_rows: rows and columns of a block of products; the blocks are those of one process.
    """

    def __init__(self, totals: Sequence[int], processes: int, block_rows: int) -> None:
        self.totals, self.processes = list(totals), processes
        self.blocks: list[list[_Block]] = [[] for _ in range(processes)]
        self.edges: list[list[int]] = []
        """of each set, where each process's rows begin, and the end"""
        offset = 0
        for total in totals:
            rows = block_edges(total, block_rows)
            count = len(rows) - 1
            places = [count * process // processes for process in range(processes + 1)]
            self.edges.append([rows[place] for place in places])
            for process, blocks in enumerate(self.blocks):
                begin = blocks[-1].last if blocks else 0
                for block in range(places[process], places[process + 1]):
                    size = rows[block + 1] - rows[block]
                    blocks.append(_Block(begin, begin + size, offset + rows[block]))
                    begin += size
            offset += total
        self.sizes = [blocks[-1].last if blocks else 0 for blocks in self.blocks]

    def _middle(self, process: int) -> int:
        return len(self.blocks[process]) // 2

    def compared(self, process: int, owner: int) -> tuple[list[_Block], list[_Block]]:
        """Which of its own blocks a process compares with which of an owner's that come by.

        Two that are opposite in the ring meet twice: the lower one takes the first half of its own.
        """
        own, other = self.blocks[process], self.blocks[owner]
        if process != owner and (owner - process) % self.processes * 2 == self.processes:
            if process < owner:
                own = own[: self._middle(process)]
            else:
                other = other[self._middle(owner) :]
        return own, other

    def pairs(self, process: int) -> int:
        """How many pairs of rows a process compares, each pair once."""
        total = self.sizes[process] * (self.sizes[process] + 1) // 2
        for step in range(1, self.processes // 2 + 1):
            own, other = self.compared(process, (process + step) % self.processes)
            total += _length(own) * _length(other)
        return total

    def first_row(self, process: int, owner: int) -> int:
        """The first row of the owner's that a process needs."""
        blocks = self.compared(process, owner)[1]
        return blocks[0].first if blocks else self.sizes[owner]


def _span(blocks: Sequence[_Block]) -> slice:
    return slice(blocks[0].first, blocks[-1].last) if blocks else slice(0, 0)


def _length(blocks: Sequence[_Block]) -> int:
    return _span(blocks).stop - _span(blocks).start


def numbers_of(blocks: Sequence[_Block], device: torch.device) -> Tensor:
    """int32 [rows], the numbers among all of the rows of some blocks."""
    ranges = [torch.arange(b.number, b.number + b.last - b.first, dtype=torch.int32) for b in blocks]
    return torch.cat([torch.empty(0, dtype=torch.int32), *ranges]).to(device)


def _scan_blocks(filtered: Filter, scan: op._Scan, mine: Sequence[_Block], theirs: Sequence[_Block] | None) -> None:
    """Compares blocks of the first part with those of the second, or with each other.

    A product's factors are in the order of one process, whose bits its result then has.
    """
    part, other = (0, mine) if theirs is None else (1, theirs)
    offset = _length(mine) * part  # the second part is numbered after the first
    side = max(block.last - block.first for block in (*mine, *other))
    buffer = filtered.norm.new_empty(side * side)
    with full_float32(buffer.device.type):
        for at, one in enumerate(mine):
            row, height = one.first - _span(mine).start, one.last - one.first
            rows = filtered.block(0, row, row + height, 0)
            for two in other[at:] if theirs is None else other:
                column, width = two.first - _span(other).start, two.last - two.first
                columns = rows if two is one else filtered.block(part, column, column + width, 1)
                block = buffer[: height * width]
                if one.number <= two.number:
                    scan.multiply(rows, columns, block.view(height, width))
                    scan.scan(block.view(height, width), row, offset + column, both=two is not one, write=False)
                else:
                    scan.multiply(columns, rows, block.view(width, height))
                    scan.scan(block.view(width, height), offset + column, row, both=True, write=False)
                _progress.advance(height * (height + 1) // 2 if two is one else height * width)


def mutual_neighbors(
    own: Tensor, division: Division, k: int, metric: str, scale: float | None, group: ProcessGroup,
    center_by: Sequence[Tensor] | None = None,
) -> tuple[Lists, Tensor]:  # fmt: skip
    """The k nearest of all rows for each of this process's, each pair of rows being compared once.

    Args:
        own: this process's rows under ``division``, contiguous, of dtypes and values that were checked.
        division: of all rows.
        k: as the native kernels allow.
        metric: "sqeuclidean" or "cosine".
        scale: the common factor; None for the cosine.
        group: the processes.
        center_by: as :class:`Filter` takes it; the largest distances are then those of one process. None: they are not
            wanted.

    Returns:
        The lists; and float32 [n], each row's largest distance as the products give it.
    """
    processes, me = group.size(), group.rank()
    pairs = None if center_by is None else op.pairs_pay(center_by, metric, scale, sum(division.totals))
    best, row_max = Lists(own.shape[0], k, own.device), torch.zeros(own.shape[0], device=own.device)

    def take(found: _Found, at: slice) -> None:
        best.merge(found.distance, found.number, at.start)
        row_max[at] = torch.maximum(row_max[at], found.row_max)

    for owner, visiting in visits(own, division.sizes, group, processes // 2, division.first_row):
        mine, theirs = division.compared(me, owner)
        to_owner = _empty(own, theirs, mine, k)
        helper = (2 * me - owner) % processes  # whose visitor this process is
        reach = best.reach(metric) if owner != me else None
        if reach is not None:
            others, visitors = division.compared(helper, me)
            coming = reach.new_empty(_length(theirs) if mine else 0)
            begin_exchange([(helper, reach[_span(visitors if others else [])])], [(owner, coming)], group)()
            reach = torch.cat([reach[_span(mine)], coming])
        if mine and theirs:
            parts = [own] if owner == me else [own[_span(mine)], visiting[-_length(theirs) :]]
            filtered = Filter(parts, [""] * len(parts), metric, scale, center_by)
            found, to_owner = _compared(filtered, mine, theirs, k, metric, pairs, reach)
            take(found, _span(mine))
        if owner != me:
            theirs, mine = division.compared(helper, me)
            found = _empty(own, mine, theirs, k)
            begin_exchange([(owner, part) for part in to_owner], [(helper, part) for part in found], group)()
            if mine and theirs:
                take(found, _span(mine))
    return best, row_max


class _Found(NamedTuple):
    """Lists of some rows: float64 and int32 [rows, width]; and float32 [rows], their largest distances."""

    distance: Tensor
    number: Tensor
    row_max: Tensor


def _empty(like: Tensor, of: Sequence[_Block], among: Sequence[_Block], k: int) -> _Found:
    """Memory for the lists of rows among others; of none where there are no others."""
    rows, width = _length(of) if among else 0, min(k, _length(among))
    new = like.new_empty
    return _Found(
        new((rows, width), dtype=torch.float64),
        new((rows, width), dtype=torch.int32),
        new(rows, dtype=torch.float32),
    )


def _compared(
    filtered: Filter, mine: Sequence[_Block], theirs: Sequence[_Block], k: int, metric: str, pairs: bool | None,
    reach: Tensor | None = None,
) -> tuple[_Found, _Found]:  # fmt: skip
    """The lists of the rows of some blocks among those of others, and the other way round.

    ``pairs``: whether the largest distances are those of pairs; if not, they are those of one process's products, and
    None if they are not wanted. ``reach``: as far as lists of the rows reach that are known.
    """
    device, alone = filtered.norm.device, len(filtered.parts) == 1
    rows, columns = _length(mine), 0 if alone else _length(theirs)
    every, width, side = range(len(filtered.parts)), min(k, rows) if alone else k, block_side(device)
    rounded = None if pairs is False else op._ways(filtered, [0], [len(every) - 1], width, side)
    scan = op._Scan(filtered, every, every, width, metric, side, rounded=rounded, pairs=bool(pairs), reach=reach)
    if not isinstance(rounded, ByteFilter):
        _scan_blocks(filtered, scan, mine, None if alone else theirs)
    elif alone:
        op._symmetric_scan(filtered, [scan], side)
    else:
        op.crossed_scan(filtered, scan, side)
    scan.finish()

    def found(found_by: op._Scan, among: Sequence[_Block]) -> _Found:
        row_max = found_by.row_max
        index, distance = found_by.select(torch.float64)
        number = torch.cat([numbers_of(among, device), index.new_tensor([NOBODY])])  # the last one is that of -1
        return _Found(distance, number[index.long()], row_max)

    if alone:
        lists = found(scan, mine)
        return lists, lists
    sides = scan.side(0, rows, 0, 1, min(k, columns)), scan.side(rows, rows + columns, 1, 0, min(k, rows))
    return found(sides[0], theirs), found(sides[1], mine)


def exact_lists(
    x: Tensor, y: Tensor, k: int, metric: str, scale: float | None, native: bool, reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """float64 distance [M, k] and index [M, k] of each row's nearest, of the rows times the scale if there is one.

    Those beyond ``reach`` may be missing, at the end: index -1, distance Inf.
    """
    if not native:
        x, y = (part.double() if scale is None else part.double() * scale for part in (x, y))
        return reference.nearest_neighbors(x, y, k, metric)
    filtered = Filter([x, y], ["x", "y"], metric, scale)
    scan = op.one_sided_scan(filtered, k, metric, block_side(x.device), reach)
    index, distance = scan.select(torch.float64)
    return distance, index


def visited_neighbors(
    x: Tensor, y: Tensor, sizes: Sequence[int], k: int, metric: str, scale: float | None, group: ProcessGroup,
    native: bool,
) -> Lists:  # fmt: skip
    """The k nearest of all processes' rows of y for each of this one's rows of x; y's sizes are those by process."""
    best, edges = Lists(x.shape[0], k, x.device), edges_of(sizes)
    for owner, visiting in visits(y.contiguous(), sizes, group, group.size() - 1):
        if len(x) and len(visiting):
            count, reach = min(k, len(visiting)), best.reach(metric)
            distance, index = exact_lists(x, visiting, count, metric, scale, native, reach)
            best.merge(distance, (index + edges[owner]).masked_fill_(index < 0, NOBODY).to(torch.int32))
    return best


def nearest_neighbors(
    x: Tensor, y: Tensor | None, k: int, metric: str, sizes: Sequence[Sequence[int]], largest: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`vareid_ext.ops.nearest_neighbors.nearest_neighbors` of the rows of all processes, for this one's.

    Args:
        x: this process's rows [m, D].
        y: this process's rows of the others [n, D], or None.
        k: 1 to the number of all rows.
        metric: one of METRICS.
        sizes: rows by process of x, and of y unless it is None.
        largest: the largest absolute value of all rows.
        group: the processes.
    """
    native = _native.available(x.device) and k <= op.MAX_NEIGHBORS[x.device.type]
    parts = [x] if y is None else [x, y]
    scale, unscale, measured = None, 1.0, metric
    if native and metric != "cosine":
        scale, measured = shared_scale(parts, largest, group), "sqeuclidean"
        unscale = 1 / scale
    if native and y is None:
        held, rows = edges_of(sizes[0]), sum(sizes[0])
        block_rows = min(block_side(x.device), max(1, -(-rows // (2 * group.size()))))
        division = Division([rows], group.size(), block_rows)
        own = moved(x.contiguous(), held, division.edges[0], group)
        best, _ = mutual_neighbors(own, division, k, measured, scale, group)
        distance, number = (moved(found, division.edges[0], held, group) for found in (best.distance, best.number))
    else:
        best = visited_neighbors(x, x if y is None else y, sizes[-1], k, measured, scale, group, native)
        distance, number = best.distance, best.number
    if native and metric == "euclidean":
        distance = _root(distance) * unscale
    elif native and metric == "sqeuclidean":
        distance = distance * unscale * unscale
    return distance.to(accumulator_dtype(x.dtype)), number.to(torch.int64)
