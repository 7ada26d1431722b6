"""Ranking metrics of features that several processes hold a share each of.

The gallery goes round the ring twice: once for each query's distances to its matches, and once to count the images
before each of these. Products decide for most images; those of which their bounds leave it open are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext import _arrays, _native
from vareid_ext._processes import gather_rows, share, together
from vareid_ext._ring import moved, visits
from vareid_ext.metrics.exclusion import Columns, RankingLabels, check_labels, label_vector
from vareid_ext.metrics.ranking import QueryRanking, check_junk_identity, check_max_rank
from vareid_ext.ops import _progress
from vareid_ext.ops._checks import check_choice, check_count
from vareid_ext.ops._filter import Filter, block_side
from vareid_ext.ops._matmul import full_float32
from vareid_ext.ops._shared_neighbors import Lists, edges_of, shared_scale
from vareid_ext.ops.nearest_neighbors import pair_distances
from vareid_ext.reference.pairwise_distance import METRICS, exact_distance
from vareid_ext.retrieval.rerank import Rerank
from vareid_ext.retrieval.rerank.base import pair_bar
from vareid_ext.retrieval.shares import check_shares


def rank_shares(
    query: Any, gallery: Any, identities: tuple[Any, Any], cameras: tuple[Any, Any], exclude: str | None,
    columns: Columns | None, metric: str, rerank: Rerank, max_rank: int, junk_identity: int | None,
    block_rows: int | None, progress: bool, group: ProcessGroup,
) -> QueryRanking:  # fmt: skip
    """The results of all processes' queries; the arguments are those of :func:`evaluate_features`."""
    back = _arrays.returner(query)

    def check() -> dict[str, Any]:
        check_max_rank(max_rank)
        check_choice("metric", metric, METRICS)
        check_junk_identity(junk_identity)
        if rerank is not False:
            raise ValueError(
                "rerank: was given together with group, whose processes rank by the features' distances alone; "
                "k_reciprocal_rerank(topk=..., group=...) gives each query's best images"
            )
        if block_rows is not None:
            check_count("block_rows", block_rows, 1)
        return {"exclude": exclude, "metric": metric, "junk_identity": junk_identity, "max_rank": max_rank}

    shares = check_shares(group, {"query": query, "gallery": gallery}, check, nonzero=metric == "cosine")
    labels = _gathered_labels(shares.own, identities, cameras, exclude, columns, group).on(shares.own[0].device)
    (Q, G), processes, me = shares.totals, group.size(), group.rank()
    scale = 1.0 if metric == "cosine" else shared_scale(shares.own, shares.largest, group)
    held = edges_of(shares.sizes[0])
    even = [share(Q, process, processes)[0] for process in range(processes)] + [Q]
    ranking = _Ranking(
        moved(shares.own[0].contiguous(), held, even, group), shares.own[1].contiguous(), shares.sizes[1],
        labels.of_queries(slice(even[me], even[me + 1])), junk_identity,
        "sqeuclidean" if metric == "euclidean" else metric,  # the same order
        scale, block_rows or block_side(shares.own[0].device), group,
    )  # fmt: skip
    with pair_bar(progress and me == 0, (even[1] - even[0]) * G):
        results = ranking.results()
    return QueryRanking(*(back(torch.cat(gather_rows(result, group))) for result in results))


def _gathered_labels(
    features: list[Tensor], identities: tuple[Any, Any], cameras: tuple[Any, Any], exclude: str | None,
    columns: Columns | None, group: ProcessGroup,
) -> RankingLabels:  # fmt: skip
    """The labels of all processes' rows, checked; every process's own fit its rows."""

    def own_labels() -> dict[str, Tensor]:
        if columns is not None and not isinstance(columns, Mapping):
            raise TypeError(f"columns: {type(columns).__name__} was given; a mapping of names to pairs is needed")
        pairs = [("{}_identity", identities), ("{}_camera", cameras)]
        pairs += [(f"columns: {name} of {{}}", pair) for name, pair in (columns or {}).items()]
        own = {}
        for name, pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"{name.format('both')}: {type(pair).__name__} was given; a pair is needed")
            for side, rows, values in zip(("query", "gallery"), features, pair, strict=True):
                if values is None and name == "{}_camera":
                    continue
                called = f"{name.format(side)} (process {group.rank()})"
                if values is None:
                    raise TypeError(f"{called}: None was given; whole numbers are needed")
                vector = label_vector(values, called).cpu()
                if len(vector) != len(rows):
                    raise ValueError(f"{called}: length {len(vector)} was given, expected {len(rows)} (as {side})")
                own[name.format(side)] = vector
        return own

    theirs = together(group, own_labels)
    for process, labels in enumerate(theirs):
        odd = sorted(labels.keys() ^ theirs[0].keys())
        if odd:
            raise ValueError(f"{odd[0]}: was given by process {process} or by process 0, but not by both")
    whole = {name: torch.cat([labels[name] for labels in theirs]) for name in theirs[0]}
    pairs = None
    if columns is not None:
        pairs = {name: (whole[f"columns: {name} of query"], whole[f"columns: {name} of gallery"]) for name in columns}
    return check_labels(
        whole["query_identity"], whole["gallery_identity"], whole.get("query_camera"), whole.get("gallery_camera"),
        exclude, pairs,
    )  # fmt: skip


class _Ranking(NamedTuple):
    """Some queries and the galleries of all processes."""

    query: Tensor
    gallery: Tensor
    """this process's rows"""
    sizes: list[int]
    """of the gallery, by process"""
    labels: RankingLabels
    """of these queries and of the whole gallery"""
    junk_identity: int | None
    metric: str
    scale: float
    block_rows: int
    group: ProcessGroup

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of :class:`QueryRanking`."""
        rows, columns = self._matches()
        found = torch.bincount(rows, minlength=len(self.query))
        matches = Lists(len(self.query), int(found.max()) if len(found) else 0, self.query.device)
        edges = edges_of(self.sizes)
        for owner, visiting in self._visits():
            inside = (columns >= edges[owner]) & (columns < edges[owner + 1])
            self._measure_matches(matches, visiting, rows[inside], columns[inside], edges[owner])
        before = torch.zeros_like(matches.number, dtype=torch.int64)
        for owner, visiting in self._visits():
            self._count(before, matches, visiting, edges[owner])
        return _metrics(found, before)

    def _visits(self) -> Iterator[tuple[int, Tensor]]:
        """(owner, its rows) of those that have some."""
        visitors = visits(self.gallery, self.sizes, self.group, self.group.size() - 1)
        return ((owner, rows) for owner, rows in visitors if len(rows))

    def _matches(self) -> tuple[Tensor, Tensor]:
        """Each pair of a query and a match of it that is not left out, in order: query and gallery row."""
        identity, order = torch.sort(self.labels.gallery_identity, stable=True)
        begin = torch.searchsorted(identity, self.labels.query_identity)
        count = torch.searchsorted(identity, self.labels.query_identity, right=True) - begin
        if self.junk_identity is not None:
            count = count.masked_fill(self.labels.query_identity == self.junk_identity, 0)
        rows = torch.arange(len(count), device=count.device).repeat_interleave(count)
        place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
        columns = order[begin[rows] + place]
        kept = ~self.labels.left_out(rows, columns)
        return rows[kept], columns[kept]

    def _measure_matches(self, matches: Lists, visiting: Tensor, rows: Tensor, columns: Tensor, first: int) -> None:
        if not len(rows):
            return
        count = torch.bincount(rows, minlength=len(self.query))
        place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
        some = Lists(len(self.query), int(count.max()), self.query.device)
        some.number[rows, place] = columns.to(torch.int32)
        some.distance[rows, place] = self._exact(visiting, rows, columns - first)
        matches.merge(some.distance, some.number)

    def _exact(self, visiting: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """float64 distances of pairs, which everything else is compared with."""
        if _native.available(visiting.device):
            return pair_distances(self._filter(visiting), rows, columns)
        out = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        for begin in range(0, len(self.query), self.block_rows):
            inside = ((rows >= begin) & (rows < begin + self.block_rows)).nonzero()[:, 0]
            out[inside] = self._exact_block(visiting, begin)[rows[inside] - begin, columns[inside]]
        return out

    def _exact_block(self, visiting: Tensor, begin: int) -> Tensor:
        rows, others = self.query[begin : begin + self.block_rows], visiting
        return exact_distance(rows.double() * self.scale, others.double() * self.scale, self.metric)

    def _filter(self, visiting: Tensor) -> Filter:
        scale = None if self.metric == "cosine" else self.scale
        return Filter([self.query, visiting], ["query", "gallery"], self.metric, scale)

    def _count(self, before: Tensor, matches: Lists, visiting: Tensor, first: int) -> None:
        """Adds to each match the images among the visiting that come before it."""
        if not matches.number.shape[1]:
            return
        native = _native.available(visiting.device)
        filtered = self._filter(visiting) if native else None
        side = block_side(visiting.device) if native else len(visiting)
        for begin in range(0, len(self.query), self.block_rows):
            end = min(begin + self.block_rows, len(self.query))
            if filtered is None:
                lower = upper = self._exact_block(visiting, begin)
            for column in range(0, len(visiting), side):
                stop = min(column + side, len(visiting))
                if filtered is not None:
                    lower, upper = _bounds(filtered, slice(begin, end), slice(column, stop))
                distance, number = matches.distance[begin:end], matches.number[begin:end]
                place = torch.searchsorted(distance, lower.double())
                open_rows, open_columns = (place < torch.searchsorted(distance, upper.double(), right=True)).nonzero(
                    as_tuple=True
                )
                if len(open_rows):
                    exact = (
                        lower[open_rows, open_columns]
                        if filtered is None
                        else pair_distances(filtered, open_rows + begin, open_columns + column)
                    )
                    names = open_columns + (first + column)
                    place[open_rows, open_columns] = _places(distance, number, open_rows, exact, names)
                images = torch.arange(first + column, first + stop, device=before.device)
                counted = ~self.labels.left_out(torch.arange(begin, end, device=before.device)[:, None], images)
                if self.junk_identity is not None:
                    counted &= self.labels.gallery_identity[images] != self.junk_identity
                width = distance.shape[1] + 1
                found = torch.zeros((end - begin, width), dtype=torch.int64, device=before.device)
                found.scatter_add_(1, place, counted.long())
                before[begin:end] += found.cumsum(1)[:, :-1]
                _progress.advance((end - begin) * (stop - column))


def _bounds(filtered: Filter, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the distances of some rows of the first part to some of the second, float32."""
    with full_float32(filtered.norm.device.type):
        left = filtered.block(0, rows.start, rows.stop, 0)
        product = torch.mm(left, filtered.block(1, columns.start, columns.stop, 1).T).mul_(-2)
    norms, windows = filtered.norms, filtered.windows
    shrunk, grown = norms[0][rows] - windows[0][rows], norms[0][rows] + windows[0][rows]
    other_shrunk, other_grown = norms[1][columns] - windows[1][columns], norms[1][columns] + windows[1][columns]
    lower = (product + other_shrunk + shrunk[:, None]).clamp_(min=0)
    return lower, (product.add_(other_grown).add_(grown[:, None])).clamp_(min=0)


def _places(distance: Tensor, number: Tensor, rows: Tensor, exact: Tensor, names: Tensor) -> Tensor:
    """How many of a row's matches, in order of distance and number, come before an image or are it."""
    out = torch.empty_like(rows)
    for some in torch.arange(len(rows), device=rows.device).split(max(1, (1 << 20) // distance.shape[1])):
        near, tied = distance[rows[some]], number[rows[some]] <= names[some, None]
        out[some] = ((near < exact[some, None]) | ((near == exact[some, None]) & tied)).sum(1)
    return out


def _metrics(found: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`QueryRanking` from each query's number of matches and the images before each."""
    precision = torch.zeros(len(found), dtype=torch.float64, device=found.device)
    for match in range(before.shape[1]):  # summed in the kernels' order
        share_of_hits = torch.full_like(precision, match + 1) / (before[:, match] + 1)
        precision += torch.where(found > match, share_of_hits, 0.0)
    count, any_match = found.clamp(min=1), found > 0
    if before.shape[1] == 0:
        return precision, precision.clone(), torch.zeros_like(found), found
    last = before.gather(1, (count - 1)[:, None])[:, 0] + 1
    average = torch.where(any_match, precision / count, 0.0)
    return (
        average, torch.where(any_match, found.double() / last, 0.0), torch.where(any_match, before[:, 0] + 1, 0), found
    )  # fmt: skip
