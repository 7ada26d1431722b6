"""k-reciprocal re-ranking of one query for a gallery whose own neighbour lists are known.

The definition (:mod:`vareid_ext.reference.k_reciprocal`) is about query and gallery together. A query enters few of the
gallery's lists, which changes few of the sets R*, and few rows share anything with it. So its result takes its
distances to all rows, the sets that change, and a small problem: the rows that share something, and what their
encodings are made of, under numbers of their own, by the operators that solve the whole one. Rows are numbered as
there: 0 is the query, row g of the gallery g + 1. Every step keeps the order of the numbers, and with it ties and the
order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops._features import row_magnitudes
from vareid_ext.ops._filter import common_scale, contiguous_rows
from vareid_ext.ops.nearest_neighbors import extended_neighbors, nearest_neighbors
from vareid_ext.reference.k_reciprocal import half_k

_CHUNK = 1 << 21  # elements of the largest temporary


def list_width(rows: int, k1: int, k2: int) -> int:
    """How many neighbours of each of so many rows re-ranking looks at."""
    return min(rows, max(k1 + 1, k2))


def rows_of(indptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of a CSR pattern: how many entries each has, and where they stand."""
    count = indptr[rows + 1] - indptr[rows]
    first = torch.repeat_interleave(indptr[rows] - count.cumsum(0) + count, count)
    return count, first.add_(torch.arange(len(first)))


@dataclass(frozen=True, eq=False)
class KnownGallery:
    """The features of a gallery and its own neighbour lists and sets, on the CPU.

    Attributes:
        feature: [G, D], rows contiguous.
        index: int32 [G, list_width(G, k1, k2)], the nearest rows of each, in order, ties by index.
        distance: float64, their squared distances at ``scale``.
        row_max: float32 [G], the largest squared distance of each row.
        set_indptr: int64 [G+1], with set_index and set_distance the sets R* of the rows.
        set_index: int32 [nnz].
        set_distance: float32 [nnz], squared distances.
        scale: a power of two, what features are multiplied by.
        largest: the largest absolute value of the features.
        k1: size of the k-reciprocal neighbour sets.
        k2: neighbours averaged in query expansion.
    """

    feature: Tensor
    index: Tensor
    distance: Tensor
    row_max: Tensor
    set_indptr: Tensor
    set_index: Tensor
    set_distance: Tensor
    scale: float
    largest: float
    k1: int
    k2: int

    @classmethod
    def empty(cls, D: int, dtype: torch.dtype, k1: int, k2: int) -> KnownGallery:
        """A gallery of no rows, for :meth:`extended`."""
        index, distance, row_max = (torch.empty(0, dtype=t) for t in (torch.int32, torch.float64, torch.float32))
        lists = index.view(0, 0), distance.view(0, 0), row_max
        indptr = torch.zeros(1, dtype=torch.int64)
        return cls(torch.empty(0, D, dtype=dtype), *lists, indptr, index, row_max, 1.0, 0.0, k1, k2)

    def extended(self, feature: Tensor) -> KnownGallery:
        """The gallery with further rows [A, D], finite, of its dtype."""
        every = torch.cat([self.feature, feature])
        largest = max(self.largest, float(row_magnitudes("feature", feature).max()))
        scale = common_scale((every,), largest)
        ratio = (scale / self.scale) ** 2
        k = list_width(len(every), self.k1, self.k2)
        index, distance, row_max = extended_neighbors(
            self.feature, feature, scale, k, self.index, self.distance * ratio, self.row_max * ratio
        )
        indptr, members = stages.k_reciprocal_robust_sets(index, self.k1)
        lists = index, distance.float()
        between = stages.listed_distance(every[:1], every[1:], scale, *lists, indptr, members)
        return KnownGallery(
            every, index, distance, row_max, indptr, members, between, scale, largest, self.k1, self.k2
        )  # fmt: skip

    @cached_property
    def reach(self) -> Tensor:
        """float64 [G]: a query that is as near enters the row's list."""
        return self._last_of(list_width(len(self.feature) + 1, self.k1, self.k2))

    @cached_property
    def expansion_reach(self) -> Tensor:
        """float64 [G]: a query that is as near is among those whose encodings the row's is the mean of."""
        return self._last_of(self.k2)

    def _last_of(self, count: int) -> Tensor:
        if count > self.index.shape[1]:
            return self.distance.new_full((len(self.feature),), torch.inf)
        return self.distance[:, count - 1].contiguous()

    @cached_property
    def listing(self) -> tuple[Tensor, Tensor]:
        """Which rows have a row among their first k2: CSR int64 [G+1], int32."""
        near = self.index[:, : self.k2]
        return self._inverted(torch.arange(0, near.numel() + 1, near.shape[1]), near.flatten())

    @cached_property
    def holding(self) -> tuple[Tensor, Tensor]:
        """Which rows have a row in R*: CSR int64 [G+1], int32."""
        return self._inverted(self.set_indptr, self.set_index)

    def _inverted(self, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        self.check(index)
        weight = torch.zeros(index.shape)
        return stages.k_reciprocal_invert(indptr, index, weight, 0, len(self.feature))[:2]

    def check(self, index: Tensor) -> None:
        """ValueError for rows out of a damaged file, which no kernel may follow out of the gallery."""
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self.feature):
            raise ValueError(f"index: names rows beyond the {len(self.feature)} that it has: it is damaged")

    @cached_property
    def _every_row(self) -> tuple[Tensor, ...]:
        """What :func:`listed_distance` takes to measure one pair of each row, the gallery before the query."""
        G = len(self.feature)
        unknown = torch.full((G + 1, 1), -1, dtype=torch.int32)
        return unknown, unknown.float(), torch.arange(G + 2).clamp_(max=G), torch.full((G,), G, dtype=torch.int32)

    def original(self, query: Tensor, scale: float) -> Tensor:
        """Squared distances of a query [1, D] to all rows: float32 [G], of float64 sums."""
        return stages.listed_distance(self.feature, query, scale, *self._every_row)


class OneQuery:
    """One query's place in a gallery.

    Args:
        gallery: as it is without the query.
        query: [1, D], of the gallery's dtype, finite.
    """

    def __init__(self, gallery: KnownGallery, query: Tensor) -> None:
        self.gallery, self.query = gallery, contiguous_rows(query)
        largest = max(gallery.largest, float(row_magnitudes("query", self.query).max()))
        self.scale = common_scale((self.query, gallery.feature), largest)
        self.ratio = (self.scale / gallery.scale) ** 2  # of the lists' distances
        self.original = gallery.original(self.query, self.scale)

    # ---- distances

    def _measured(self, rows: Tensor) -> Tensor:
        """Squared distances to some rows of the gallery, before they are rounded: float64."""
        query = self.query.double() * self.scale
        step = max(1, _CHUNK // query.shape[1])
        parts = [
            nearest_neighbors(self.gallery.feature[some].double() * self.scale, query, 1, "sqeuclidean")[0][:, 0]
            for some in rows.split(step)
            if len(some)
        ]
        return torch.cat([query.new_empty(0), *parts])

    def nearest(self, k: int, allowed: Tensor | None = None) -> Tensor:
        """The k nearest rows of the gallery in order, ties by index; fewer, if fewer are ``allowed``, bool [G]."""
        original = self.original if allowed is None else self.original.where(allowed, torch.inf)
        k = min(k, len(original) if allowed is None else int(allowed.sum()))
        if k == 0:
            return torch.empty(0, dtype=torch.int64)
        last = original.topk(k, largest=False, sorted=False).values.max()
        rows = (original <= last).nonzero()[:, 0]
        rows = rows[original[rows].argsort(stable=True)]
        distance = original[rows]
        same = distance.diff() == 0
        tied = torch.zeros(len(rows), dtype=torch.bool)
        tied[1:] |= same
        tied[:-1] |= same
        if bool(tied.any()):  # equal as float32, perhaps not before
            exact = distance.double()
            exact[tied] = self._measured(rows[tied])
            within = exact.argsort(stable=True)  # rows stand by index where they are equal
            rows = rows[within[distance[within].argsort(stable=True)]]
        return rows[:k]

    # ---- lists

    @cached_property
    def entered(self) -> Tensor:
        """The rows of the gallery whose lists the query enters, ascending."""
        reach = self.gallery.reach * self.ratio
        rounded = reach.float()
        rows = (self.original <= rounded).nonzero()[:, 0]
        open_ = self.original[rows] == rounded[rows]
        inside = ~open_
        inside[open_] = self._measured(rows[open_]) <= reach[rows[open_]]
        return rows[inside]

    @cached_property
    def places(self) -> Tensor:
        """int64 [G]: where the query stands in each row's list, beyond its end if it does not enter."""
        rows, width = self.entered, len(self.own)
        exact, own = self.gallery.distance[rows] * self.ratio, self.original[rows][:, None]
        rounded = exact.float()
        place = (rounded < own).sum(1)
        tied = (rounded == own).any(1)  # as float32, perhaps not before
        place[tied] = (exact[tied] < self._measured(rows[tied])[:, None]).sum(1)
        every = torch.full((len(self.original),), width)
        every[rows] = place
        return every

    @cached_property
    def own(self) -> Tensor:
        """The query's list, int64."""
        width = list_width(len(self.original) + 1, self.gallery.k1, self.gallery.k2)
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.nearest(width - 1) + 1])

    def lists(self, rows: Tensor, width: int) -> Tensor:
        """The first entries of the lists of some rows, which ascend: int64 [n, width or all there are]."""
        width = min(width, len(self.own))
        at = rows[rows > 0] - 1
        stored = self.gallery.index[:, :width][at]
        self.gallery.check(stored)
        lists = torch.empty(len(at), width, dtype=torch.int64)
        lists[:, : stored.shape[1]] = stored
        lists += 1
        place = self.places[at]
        enters = (place < width).nonzero()[:, 0]  # all, where the lists are shorter without the query
        column, place = torch.arange(width), place[enters, None]
        lists[enters] = lists[enters].gather(1, column - (column > place).long()).masked_fill_(column == place, 0)
        return lists if len(at) == len(rows) else torch.cat([self.own[None, :width], lists])

    def _numbering(self, rows: Tensor, otherwise: int) -> Tensor:
        """int32 [G+1]: the place of each row among some."""
        table = torch.full((len(self.original) + 1,), otherwise, dtype=torch.int32)
        table[rows] = torch.arange(len(rows), dtype=torch.int32)
        return table

    # ---- sets

    def _reciprocal(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The lists [n, k + 1] of some rows, and of which entries the row is a neighbour too: R(row, k)."""
        around = self.lists(rows, k + 1)
        every = torch.unique(around)
        near = self.lists(every, k + 1).int()
        at = self._numbering(every, -1)[around].long()
        chunks = torch.arange(len(rows)).split(max(1, _CHUNK // near.shape[1] ** 2))
        mutual = [(near[at[some]] == rows[some, None, None]).any(-1) for some in chunks]
        return around, torch.cat(mutual) if mutual else around.bool()

    @cached_property
    def changed(self) -> Tensor:
        """The rows whose sets R* are others than without the query, and perhaps more; the query is the first."""
        k1, width = self.gallery.k1, self.gallery.index.shape[1]

        def members_changed(k: int) -> Tensor:
            """Where R(row, k) may have changed: whom the query has displaced, and where."""
            rows = self.entered[self.places[self.entered] <= k]
            displaced = self.gallery.index[rows, k] if k < width else rows[:0]
            self.gallery.check(displaced)
            return torch.cat([rows, displaced.long()]) + 1

        half = torch.unique(members_changed(half_k(k1)))
        around, mutual = self._reciprocal(half, k1)  # mutual: who has one of these in R
        return torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), members_changed(k1), around[mutual]]))

    @cached_property
    def new_sets(self) -> tuple[Tensor, Tensor]:
        """R* of the changed rows: how many members each has, and the members, ascending in each row."""
        rows, k1, M = self.changed, self.gallery.k1, len(self.original) + 1
        around, mutual = self._reciprocal(rows, k1)
        center = around[mutual]
        number = torch.repeat_interleave(torch.arange(len(rows)), mutual.sum(1))
        halves, of = torch.unique(center, return_inverse=True)
        theirs, valid = self._reciprocal(halves, half_k(k1))
        original = (number * M + center).sort().values
        candidate, allowed = theirs[of], valid[of]
        key = number[:, None] * M + candidate
        place = torch.searchsorted(original, key).clamp_(max=len(original) - 1)
        inside = (original[place] == key) & allowed
        taken = 3 * inside.sum(1) > 2 * allowed.sum(1)
        key = torch.unique(torch.cat([original, key[allowed & taken[:, None]]]))
        return torch.bincount(key // M, minlength=len(rows)), key % M

    def _sets(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """R* of some rows, which ascend: how many members each has, the members, and their squared distances."""
        number = self._numbering(self.changed, -1)[rows].long()
        old = (number < 0).nonzero()[:, 0]
        new = (number >= 0).nonzero()[:, 0]
        old_count, old_at = rows_of(self.gallery.set_indptr, rows[old] - 1)
        count = torch.zeros_like(rows)
        count[old], count[new] = old_count, self.new_sets[0][number[new]]
        indptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
        member, distance = count.new_empty(int(indptr[-1])), self.original.new_empty(int(indptr[-1]))
        at = rows_of(indptr, old)[1]
        stored = self.gallery.set_index[old_at]
        self.gallery.check(stored)
        member[at], distance[at] = stored.long() + 1, self.gallery.set_distance[old_at] * self.ratio
        at, (new_count, new_at) = rows_of(indptr, new)[1], rows_of(self._new_indptr, number[new])
        member[at] = self.new_sets[1][new_at]
        distance[at] = self._distances(torch.repeat_interleave(rows[new], new_count), member[at])
        return count, member, distance

    @cached_property
    def _new_indptr(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.new_sets[0].cumsum(0)])

    def _distances(self, left: Tensor, right: Tensor) -> Tensor:
        """Squared distances of pairs, float32."""
        out = self.original.new_empty(len(left))
        crossed = (left == 0) | (right == 0)
        other = left.maximum(right)[crossed]
        out[crossed] = torch.where(other > 0, self.original[(other - 1).clamp_(min=0)], 0)
        left, right = left[~crossed], right[~crossed]
        used, number = torch.unique(torch.cat([left, right]), return_inverse=True)
        if len(used):
            feature = self.gallery.feature[used - 1]
            first, order = number[: len(left)].sort(stable=True)
            indptr = torch.cat([first.new_zeros(1), torch.bincount(first, minlength=len(used)).cumsum(0)])
            unknown = torch.full((len(used), 1), -1, dtype=torch.int32)
            measured = stages.listed_distance(
                feature[:1], feature[1:], self.scale, unknown, unknown.float(), indptr,
                number[len(left) :][order].int(),
            )  # fmt: skip
            out[(~crossed).nonzero()[:, 0][order]] = measured
        return out

    def _sharing(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the query's encoding after expansion has entries, who has some of these in R*, and whose encodings are
        means of theirs; of both perhaps more, and the query is the first."""
        k2, zero = self.gallery.k2, torch.zeros(1, dtype=torch.int64)
        columns = torch.unique(self._sets(torch.unique(self.own[:k2]))[1])
        start, owner = self.gallery.holding
        holding = owner[rows_of(start, columns[columns > 0] - 1)[1]].long() + 1
        count, members = self.new_sets
        changed = torch.repeat_interleave(self.changed, count)[self._numbering(columns, -1)[members] >= 0]
        sources = torch.unique(torch.cat([zero, holding, changed]))
        if k2 == 1:
            return columns, sources, sources
        start, owner = self.gallery.listing
        listing = owner[rows_of(start, sources[1:] - 1)[1]].long() + 1
        near = (self.original <= (self.gallery.expansion_reach * self.ratio).float()).nonzero()[:, 0] + 1
        return columns, sources, torch.unique(torch.cat([zero, listing, near]))

    # ---- results

    def reranked(self, topk: int, lambda_value: float, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows of smallest final distance, as ``k_reciprocal_rerank(query, gallery, topk=topk)`` has them.

        Args:
            topk: at least 1.
            lambda_value: weight of the original distance, 0 to 1.
            allowed: bool [G], rows that may be in the result; all are in the neighbourhoods.

        Returns:
            distance float32 [n], index int64 [n]: n is topk, or how many are allowed.
        """
        k2, zero = self.gallery.k2, torch.zeros(1, dtype=torch.int64)
        columns, sources, expanded = self._sharing()
        top = self.original.max()[None]
        if lambda_value * float(top) > 0:  # who shares nothing is among the best only if the original distance is
            first = self.nearest(topk, allowed)
        else:
            first = torch.arange(len(self.original)) if allowed is None else allowed.nonzero()[:, 0]
        local = torch.unique(torch.cat([columns, sources, expanded, first[:topk] + 1]))
        beyond = len(local)  # a row without an encoding
        number = self._numbering(local, beyond)
        original = torch.cat([self.original[local[1:] - 1], top])
        row_max = torch.cat([top, self.gallery.row_max[local[1:] - 1] * self.ratio, top])
        row_max[1:] = row_max[1:].maximum(original)

        count, members, distance = self._sets(sources)
        ends = torch.cat([zero, count.cumsum(0)])
        value = stages.k_reciprocal_encode(ends, distance, row_max[number[sources].long()])
        # Of the encodings, only what the query has too can be shared.
        shared = self._numbering(columns, -1)[members] >= 0
        within = torch.cat([zero, shared.cumsum(0)])
        entries = torch.zeros(beyond + 1, dtype=torch.int64)
        entries[number[sources].long()] = within[ends].diff()
        encodings = torch.cat([zero, entries.cumsum(0)]), number[members[shared]], value[shared]
        if k2 > 1:
            averaged = self.lists(expanded, k2)
            neighbor = torch.full((beyond + 1, averaged.shape[1]), beyond, dtype=torch.int32)
            neighbor[number[expanded].long()] = number[averaged]
            encodings = stages.k_reciprocal_query_expansion(neighbor, k2, *encodings)
        inverted = stages.k_reciprocal_invert(*encodings, 1, beyond + 1)
        # All distances are given; points on a line have them too.
        line = original.double().sqrt()[:, None]
        final, order = stages.k_reciprocal_topk(
            line.new_zeros(1, 1), line, 1.0, torch.arange(beyond, dtype=torch.int32)[None], original[None], row_max,
            *encodings, *inverted, lambda_value,
        )  # fmt: skip
        rows, final = local[order[0, :-1] + 1] - 1, final[0, :-1]  # the last is the one without an encoding
        if allowed is not None:
            final, rows = final[allowed[rows]], rows[allowed[rows]]
        return final[:topk], rows[:topk]
