"""k-reciprocal re-ranking of rows that several processes hold a share each of.

The neighbour lists are found by all together, each pair of rows being compared once, and are then everybody's, as the
sparse encodings made of them are; features go round the ring twice more, for the distances that these need and for the
nearest of each query. Every stage is that of one process, so the results are, too.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext import _native
from vareid_ext._arrays import returner
from vareid_ext._processes import gather_rows
from vareid_ext._ring import moved, visits
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops import nearest_neighbors as op
from vareid_ext.ops._checks import check_count
from vareid_ext.ops._filter import block_side
from vareid_ext.ops._shared_neighbors import (
    Division,
    Lists,
    edges_of,
    exact_lists,
    mutual_neighbors,
    numbers_of,
    shared_samples,
    shared_scale,
)  # fmt: skip
from vareid_ext.ops.pairwise_distance import RowDistances
from vareid_ext.reference.pairwise_distance import exact_distance, rows_per_block
from vareid_ext.retrieval.plan import rerank_plan
from vareid_ext.retrieval.rerank.base import pair_bar
from vareid_ext.retrieval.rerank.k_reciprocal import check_parameters, encode
from vareid_ext.retrieval.shares import Shares, check_shares

_FAR = 1e18  # from the origin: farther than scaled features are from each other, and its square is a float32


class SharedKReciprocal:
    """k-reciprocal re-ranking of a gallery for queries; each process holds some rows of both.

    Args:
        shares: query and gallery, checked.
        group: the processes.
        block_rows: rows and columns of a block of products.
        k1: as in :func:`k_reciprocal_rerank`.
        k2: as in :func:`k_reciprocal_rerank`.
        lambda_value: as in :func:`k_reciprocal_rerank`.
        limit: entries that the encodings may have; None for no limit.
    """

    def __init__(
        self, shares: Shares, group: ProcessGroup, block_rows: int, k1: int, k2: int, lambda_value: float,
        limit: int | None,
    ) -> None:  # fmt: skip
        self.group, self.k1, self.k2, self.lambda_value, self.limit = group, k1, k2, lambda_value, limit
        self.Q, self.G = shares.totals
        self.held = [edges_of(sizes) for sizes in shares.sizes]
        self.division = Division([self.Q, self.G], group.size(), block_rows)
        self.scale = shared_scale(shares.own, shares.largest, group)
        self.center_by = shared_samples(shares.own, self.held, group)
        parts = [
            moved(part.contiguous(), held, edges, group)
            for part, held, edges in zip(shares.own, self.held, self.division.edges, strict=True)
        ]
        self.queries = len(parts[0])  # of this process under the division
        self.own = torch.cat(parts)
        self.row_max, self.encodings = parts[0], (parts[0], parts[0], parts[0])  # until prepare

    def prepare(self, nearest: int = 0) -> bool:
        """Makes ``row_max`` and ``encodings`` of all rows; whether by the kernels, which list so many at most."""
        width = min(self.Q + self.G, max(self.k1 + 1, self.k2))
        device = self.own.device
        native = _native.available(device) and max(width, nearest) <= op.MAX_NEIGHBORS[device.type]
        best, row_max = self._neighbors(width, native)
        neighbor, self.row_max = self._everybodys(best.number), self._everybodys(row_max)
        del best
        self.encodings = encode(neighbor, self.row_max, self._distances, self.k1, self.k2, self.limit)
        return native

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Of each query that this process holds, the k best gallery rows: distance float32 and index int64 [q, k]."""
        native = self.prepare(k)
        result = self._nearest(k, native)
        queries = self.division.edges[0]
        distance, index = (moved(rows, queries, self.held[0], self.group) for rows in result)
        return distance, index

    def _everybodys(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of one: all queries' and then all of the gallery's."""
        parts = rows[: self.queries], rows[self.queries :]
        return torch.cat([part for rows in parts for part in gather_rows(rows, self.group)])

    def _neighbors(self, k: int, native: bool) -> tuple[Lists, Tensor]:
        if native:
            return mutual_neighbors(self.own, self.division, k, "sqeuclidean", self.scale, self.group, self.center_by)
        best, row_max = Lists(len(self.own), k, self.own.device), self.own.new_zeros(len(self.own)).float()
        for owner, visiting in visits(self.own, self.division.sizes, self.group, self.group.size() - 1):
            numbers = numbers_of(self.division.blocks[owner], self.own.device)
            if not len(visiting):
                continue
            step = rows_per_block(len(visiting))
            for begin in range(0, len(self.own), step):
                at = slice(begin, min(begin + step, len(self.own)))
                rows, others = (part.double() * self.scale for part in (self.own[at], visiting))
                block = exact_distance(rows, others, "sqeuclidean")
                row_max[at] = torch.maximum(row_max[at], block.amax(1).float())
                ordered, order = block.sort(dim=1, stable=True)
                best.merge(ordered[:, :k], numbers[order[:, :k]], begin)
        return best, row_max

    def _measured(self, visiting: Tensor, indptr: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Squared distances of the pairs of a pattern of ``rows`` and of visiting ones, float32."""
        pairs = torch.cat([indptr, indptr[-1:].expand(len(visiting))])  # the visitors' rows have no entries
        unknown = torch.full((len(pairs) - 1, 1), -1, dtype=torch.int32, device=rows.device)
        return stages.listed_distance(
            rows, visiting, self.scale, unknown, unknown.float(), pairs, (index + len(rows)).int()
        )

    def _distances(self, indptr: Tensor, index: Tensor) -> Tensor:
        """Distances of the pairs of a pattern over all rows: each process measures those of its own rows."""
        own = self._ranges(self.group.rank())
        counts = torch.cat([indptr[begin : end + 1].diff() for begin, end in own])
        entries = torch.cat([index[indptr[begin] : indptr[end]] for begin, end in own])
        rows = torch.arange(len(counts), device=index.device).repeat_interleave(counts)
        out = torch.empty(len(entries), device=index.device)
        for owner, visiting in visits(self.own, self.division.sizes, self.group, self.group.size() - 1):
            offset = 0
            for begin, end in self._ranges(owner):
                theirs = visiting[offset : offset + end - begin]
                offset += end - begin
                at = ((entries >= begin) & (entries < end)).nonzero()[:, 0]
                if len(at):
                    found = torch.bincount(rows[at], minlength=len(counts)).cumsum(0)
                    found = torch.cat([found.new_zeros(1), found])
                    out[at] = self._measured(theirs, found, entries[at] - begin, self.own)
        ends = int(counts[: self.queries].sum())
        return torch.cat([part for some in (out[:ends], out[ends:]) for part in gather_rows(some, self.group)])

    def _ranges(self, process: int) -> list[tuple[int, int]]:
        """Begin and end of a process's queries and of its gallery's rows, among all."""
        (q, g), p = self.division.edges, process
        return [(q[p], q[p + 1]), (self.Q + g[p], self.Q + g[p + 1])]

    def inverted(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The inverted index of the gallery's rows begin to end - 1."""
        indptr, entry, value = self.encodings
        begin, end = self.Q + begin, self.Q + end
        last = int(indptr[end])
        index: tuple[Tensor, Tensor, Tensor] = stages.k_reciprocal_invert(
            indptr[: end + 1], entry[:last], value[:last], begin, self.Q + self.G
        )
        return index

    def _nearest(self, k: int, native: bool) -> tuple[Tensor, Tensor]:
        """The k best for the queries of the division: the k best of each process's gallery rows, and of those."""
        indptr, entry, value = self.encodings
        queries = self._ranges(self.group.rank())[0][0]
        query, gallery = self.own[: self.queries], self.own[self.queries :]
        of_queries = self.row_max[queries:], indptr[queries:], entry, value
        candidates, originals = [], []
        edges = self.division.edges[1]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        for owner, visiting in visits(gallery, sizes, self.group, self.group.size() - 1):
            if not len(visiting) or not len(query):
                continue
            few = min(k, len(visiting))
            near = exact_lists(query, visiting, few, "sqeuclidean", self.scale, native)[1].int()
            inverted = self.inverted(edges[owner], edges[owner + 1])
            _, best = stages.k_reciprocal_topk(
                query, visiting, self.scale, near, self._original(query, visiting, near), *of_queries, *inverted,
                self.lambda_value,
            )  # fmt: skip
            candidates.append(best.int() + edges[owner])
            originals.append(self._original(query, visiting, best.int()))
        if not len(query):
            return query.new_empty((0, k), dtype=torch.float32), query.new_empty((0, k), dtype=torch.int64)
        inverted = self.inverted(0, self.G)
        # Rows that are not listed are measured from features: these are so far away that none of them comes first.
        far = torch.full((len(query), 1), _FAR, dtype=torch.float64, device=query.device)
        origin = far.new_zeros((self.G, 1))
        return stages.k_reciprocal_topk(
            far, origin, 1.0, torch.cat(candidates, 1), torch.cat(originals, 1), *of_queries, *inverted,
            self.lambda_value, k,
        )  # fmt: skip

    def _original(self, query: Tensor, visiting: Tensor, index: Tensor) -> Tensor:
        """Squared distances of listed rows, float32 as ``index`` [q, k]."""
        indptr = torch.arange(len(query) + 1, device=index.device) * index.shape[1]
        return self._measured(visiting, indptr, index.flatten(), query).view(index.shape)


class FinalDistances:
    """The final distances of some of the queries to the galleries of processes, one after the other.

    Args:
        fit: prepared.
        query_edges: where the blocks of all queries begin, and the end.
        gallery_edges: the same of the gallery.
        measured: as :class:`RowDistances` takes it; None to measure all distances in float64.

    Attributes:
        query: this process's whole blocks of queries.
        gallery: this process's whole blocks of the gallery.
        queries: where each process's queries begin among all, and the end.
        galleries: the same of the gallery.
        edges: where the blocks of this process's queries begin, and the end.
    """

    def __init__(
        self,
        fit: SharedKReciprocal,
        query_edges: Sequence[int],
        gallery_edges: Sequence[int],
        measured: bool | None,
    ) -> None:
        self._fit, self._gallery_edges, self._measured = fit, gallery_edges, measured
        processes, me = fit.group.size(), fit.group.rank()
        self.queries, self.galleries = (
            [edges[(len(edges) - 1) * process // processes] for process in range(processes + 1)]
            for edges in (query_edges, gallery_edges)
        )
        self.query = moved(fit.own[: fit.queries], fit.division.edges[0], self.queries, fit.group)
        self.gallery = moved(fit.own[fit.queries :], fit.division.edges[1], self.galleries, fit.group)
        self._first = self.queries[me]
        self.edges = _inside(query_edges, self._first, self.queries[me + 1])

    def visit(self, owner: int, visiting: Tensor) -> Callable[[int, int], Tensor]:
        """The function that gives float32 [end - begin, visitors] for this process's queries begin to end - 1."""
        fit, (begin, end) = self._fit, self.galleries[owner : owner + 2]
        edges = _inside(self._gallery_edges, begin, end)
        original: Callable[[int, int], Tensor]
        if self._measured is None:
            wide = visiting.double() * fit.scale

            def original(begin: int, end: int) -> Tensor:
                return exact_distance(self.query[begin:end].double() * fit.scale, wide, "sqeuclidean").float()

        else:
            original = RowDistances(self.query, visiting, fit.scale, fit.center_by, edges, self._measured)
        inverted = fit.inverted(begin, end)
        indptr, entry, value = fit.encodings

        def block(begin: int, end: int) -> Tensor:
            distance, first = original(begin, end), self._first + begin
            stages.k_reciprocal_blend(
                distance, fit.row_max[first:], indptr[first:], entry, value, *inverted, fit.lambda_value
            )
            return distance

        return block


def _inside(edges: Sequence[int], begin: int, end: int) -> list[int]:
    """Those of some ascending numbers from ``begin`` to ``end``, counted from ``begin``."""
    return [edge - begin for edge in edges if begin <= edge <= end]


def rerank_shares(
    query: Any, gallery: Any, k1: int, k2: int, lambda_value: float, topk: int | None, out: Any,
    block_rows: int | None, max_memory: int | None, show_plan: bool, progress: bool, group: ProcessGroup,
) -> tuple[Any, Any]:  # fmt: skip
    """:func:`k_reciprocal_rerank` with a group."""
    back = returner(query)

    def check() -> dict[str, Any]:
        if topk is None or out is not None:
            name = "out" if out is not None else "topk"
            raise ValueError(f"{name}: processes of a group make no [Q, G] result; topk is needed, and no out")
        check_parameters(k1, k2, lambda_value)
        counts = {"topk": check_count("topk", topk, 1), "block_rows": block_rows, "max_memory": max_memory}
        if block_rows is not None:
            counts["block_rows"] = check_count("block_rows", block_rows, 1)
        if max_memory is not None:
            counts["max_memory"] = check_count("max_memory", max_memory, 0, 2**63 - 1)
        return {"k1": k1, "k2": k2, "lambda_value": lambda_value, **counts}

    shares = check_shares(group, {"query": query, "gallery": gallery}, check)
    (Q, G), first = shares.totals, shares.own[0]
    for name, rows in (("query", Q), ("gallery", G)):
        if rows == 0:
            raise ValueError(f"{name}: no rows were given by any process; at least one is needed")
    topk = check_count("topk", topk, 1, G)
    if block_rows is None and max_memory is None and first.is_cuda:
        block_rows = block_side(first.device)
    plan = rerank_plan(
        Q, G, first.shape[1], k1=k1, k2=k2, topk=topk, block_rows=block_rows, max_memory=max_memory,
        processes=group.size(), element_size=first.element_size(), on_gpu=first.is_cuda,
    )  # fmt: skip
    if show_plan and group.rank() == 0:
        print(plan, file=sys.stderr)
    limit = None if max_memory is None else plan.entry_limit(max_memory)
    fit = SharedKReciprocal(shares, group, plan.block_rows, int(k1), int(k2), float(lambda_value), limit)
    with pair_bar(progress and group.rank() == 0, fit.division.pairs(0)):
        distance, index = fit.topk(topk)
    return back(distance), back(index)
