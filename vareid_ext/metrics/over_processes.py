"""Ranking metrics of features that several processes hold a share each of.

The gallery goes round the ring twice: once for each query's distances to its matches, and once to count the images
before each of these. Products decide for most images; those of which their bounds leave it open are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

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
from vareid_ext.ops._filter import Filter, block_edges, block_side, strip_side
from vareid_ext.ops._matmul import full_float32
from vareid_ext.ops._shared_neighbors import Lists, edges_of, shared_scale
from vareid_ext.ops.nearest_neighbors import pair_distances
from vareid_ext.reference.pairwise_distance import METRICS, exact_distance
from vareid_ext.retrieval.distance import rows_in_block
from vareid_ext.retrieval.plan import rerank_plan
from vareid_ext.retrieval.rerank import Rerank, Reranker, reranker_options
from vareid_ext.retrieval.rerank.base import pair_bar
from vareid_ext.retrieval.rerank.k_reciprocal import K1, K2, LAMBDA_VALUE, check_parameters
from vareid_ext.retrieval.rerank.over_processes import FinalDistances, SharedKReciprocal
from vareid_ext.retrieval.shares import Shares, check_shares

DENSE_ELEMENTS = 1 << 26  # re-ranked matrices up to this size are made whole, which saves a second product


def rank_shares(
    query: Any, gallery: Any, identities: tuple[Any, Any], cameras: tuple[Any, Any], exclude: str | None,
    columns: Columns | None, metric: str, rerank: Rerank, max_rank: int, junk_identity: int | None,
    block_rows: int | None, progress: bool, group: ProcessGroup,
) -> QueryRanking:  # fmt: skip
    """The results of all processes' queries; the arguments are those of :func:`evaluate_features`."""
    back = _arrays.returner(query)
    options: dict[str, Any] = {}

    def check() -> dict[str, Any]:
        check_max_rank(max_rank)
        check_choice("metric", metric, METRICS)
        check_junk_identity(junk_identity)
        if rerank is not False:
            options.update(_reranking(rerank, metric))
        if block_rows is not None:
            check_count("block_rows", block_rows, 1)
        return {
            "exclude": exclude, "metric": metric, "junk_identity": junk_identity, "max_rank": max_rank,
            "rerank": options, "block_rows": block_rows,
        }  # fmt: skip

    shares = check_shares(group, {"query": query, "gallery": gallery}, check, nonzero=metric == "cosine")
    labels = _gathered_labels(shares.own, identities, cameras, exclude, columns, group).on(shares.own[0].device)
    if rerank is not False:
        shares, labels = _without_junk(shares, labels, junk_identity, group)
    (Q, G), processes, me = shares.totals, group.size(), group.rank()
    ranking: _Ranking
    if rerank is not False:
        final = _final_distances(shares, options, block_rows, group)
        queries, gallery, galleries = final.queries, final.gallery, final.galleries
        measure: _Products | _Values = _Values(final)
    else:
        held, queries = edges_of(shares.sizes[0]), edges_of([b - a for a, b in _shares(Q, processes)])
        own = moved(shares.own[0].contiguous(), held, queries, group)
        gallery, galleries = shares.own[1].contiguous(), edges_of(shares.sizes[1])
        scale = 1.0 if metric == "cosine" else shared_scale(shares.own, shares.largest, group)
        measure = _Products(own, "cosine" if metric == "cosine" else "sqeuclidean", scale, block_rows)
    some = labels.of_queries(slice(queries[me], queries[me + 1]))
    ranking = _Ranking(measure, gallery, galleries, some, junk_identity, group)
    with pair_bar(progress and me == 0, (queries[1] - queries[0]) * G):
        results = ranking.results()
    return QueryRanking(*(back(torch.cat(gather_rows(result, group))) for result in results))


def _shares(total: int, processes: int) -> list[tuple[int, int]]:
    return [share(total, process, processes) for process in range(processes)]


def _reranking(rerank: Rerank, metric: str) -> dict[str, Any]:
    """The parameters of the k-reciprocal re-ranking that is asked for."""
    if isinstance(rerank, Reranker):
        raise ValueError("rerank: a fitted re-ranker was given together with group; give its parameters")
    name, options = reranker_options(rerank)
    if name != "k_reciprocal":
        raise ValueError(f"rerank: {name!r} was given together with group; allowed is 'k_reciprocal'")
    if metric == "cosine":
        raise ValueError("metric: 'cosine' was given, but re-ranking is defined on squared Euclidean distances")
    options = {"k1": K1, "k2": K2, "lambda_value": LAMBDA_VALUE, "block_rows": None, "max_memory": None} | options
    options["k1"], options["k2"], options["lambda_value"] = check_parameters(
        options["k1"], options["k2"], options["lambda_value"]
    )
    for name, least in (("block_rows", 1), ("max_memory", 0)):
        if options[name] is not None:
            options[name] = check_count(name, options[name], least, 2**63 - 1)
    return options


def _without_junk(
    shares: Shares, labels: RankingLabels, junk_identity: int | None, group: ProcessGroup
) -> tuple[Shares, RankingLabels]:
    """Junk must not be in anybody's neighbourhood."""
    if junk_identity is None:
        return shares, labels
    kept = labels.gallery_identity != junk_identity
    parts = kept.split(shares.sizes[1])
    sizes = [int(part.sum()) for part in parts]
    if sum(sizes) == 0:
        raise ValueError(f"gallery_identity: every image has the junk identity {junk_identity}")
    query, gallery = shares.own[0], shares.own[1][parts[group.rank()]]
    largest = max(
        together(group, lambda: max([0.0, *(float(part.abs().max()) for part in (query, gallery) if len(part))]))
    )
    return Shares([query, gallery], [shares.sizes[0], sizes], largest), labels.of_gallery(kept)


def _final_distances(
    shares: Shares, options: dict[str, Any], block_rows: int | None, group: ProcessGroup
) -> FinalDistances:
    """Re-ranked, in the blocks in which one process makes them."""
    (Q, G), device, D = shares.totals, shares.own[0].device, shares.own[0].shape[1]
    k1, k2, max_memory = options["k1"], options["k2"], options["max_memory"]
    side = options["block_rows"]
    if side is None and max_memory is None and device.type == "cuda":
        side = block_side(device)
    plan = rerank_plan(
        Q, G, D, k1=k1, k2=k2, block_rows=side, max_memory=max_memory, processes=group.size(),
        element_size=shares.own[0].element_size(), on_gpu=device.type == "cuda",
    )  # fmt: skip
    limit = None if max_memory is None else plan.entry_limit(max_memory)
    fit = SharedKReciprocal(shares, group, plan.block_rows, k1, k2, options["lambda_value"], limit)
    native = fit.prepare()
    if block_rows is None and Q * G <= DENSE_ELEMENTS:  # one process takes the products of the neighbour lists
        return FinalDistances(
            fit, block_edges(Q, plan.block_rows), block_edges(G, plan.block_rows), False if native else None
        )
    step = block_rows or rows_in_block(G, device)
    edges = [*range(0, Q, step), Q]
    return FinalDistances(fit, edges, block_edges(G, strip_side(device, block_side(device))), True)


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


class _Products:
    """Distances of features: bounds from products, or all of them where there are no kernels."""

    def __init__(self, query: Tensor, metric: str, scale: float, block_rows: int | None) -> None:
        self.query, self.metric, self.scale = query, metric, scale
        self.block_rows = block_rows or block_side(query.device)
        self._visiting, self._filter = query, cast(Filter, None)

    def visit(self, _owner: int, visiting: Tensor) -> None:
        """Takes a gallery."""
        self._visiting = visiting
        if _native.available(visiting.device):
            scale = None if self.metric == "cosine" else self.scale
            self._filter = Filter([self.query, visiting], ["query", "gallery"], self.metric, scale)

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """float64 distances of queries and visiting images, which everything else is compared with."""
        if _native.available(rows.device):
            return pair_distances(self._filter, rows, columns)
        return _picked(self.blocks(), rows, columns)

    def blocks(self) -> Iterator[_Bounds]:
        """All pairs."""
        native, count = _native.available(self.query.device), len(self._visiting)
        for begin in range(0, len(self.query), self.block_rows):
            rows = slice(begin, min(begin + self.block_rows, len(self.query)))
            if not native:
                query, gallery = (part.double() * self.scale for part in (self.query[rows], self._visiting))
                exact = exact_distance(query, gallery, self.metric)
                yield _Bounds(rows, slice(0, count), exact, exact)
                continue
            for first in range(0, count, block_side(self.query.device)):
                columns = slice(first, min(first + block_side(self.query.device), count))
                yield _Bounds(rows, columns, *_bounds(self._filter, rows, columns))


class _Values:
    """Re-ranked distances."""

    def __init__(self, final: FinalDistances) -> None:
        self.query, self._final = final.query, final

    def visit(self, owner: int, visiting: Tensor) -> None:
        """Takes a gallery."""
        self._block, self._count = self._final.visit(owner, visiting), len(visiting)

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """float64 distances of queries and visiting images."""
        return _picked(self.blocks(), rows, columns)

    def blocks(self) -> Iterator[_Bounds]:
        """All pairs."""
        for begin, end in itertools.pairwise(self._final.edges):
            exact = self._block(begin, end)
            yield _Bounds(slice(begin, end), slice(0, self._count), exact, exact)


class _Bounds(NamedTuple):
    """Distances of some queries and visiting images lie between these; they are these where both are the same."""

    rows: slice
    columns: slice
    lower: Tensor
    upper: Tensor


def _picked(blocks: Iterator[_Bounds], rows: Tensor, columns: Tensor) -> Tensor:
    """Of blocks that hold all visiting images, the distances of some pairs, float64."""
    out = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for at, _, exact, _ in blocks:
        inside = ((rows >= at.start) & (rows < at.stop)).nonzero()[:, 0]
        out[inside] = exact[rows[inside] - at.start, columns[inside]].double()
    return out


class _Ranking(NamedTuple):
    """Some queries and the galleries of all processes."""

    measure: _Products | _Values
    gallery: Tensor
    """this process's rows"""
    edges: list[int]
    """where each process's begin among all, and the end"""
    labels: RankingLabels
    """of these queries and of the whole gallery"""
    junk_identity: int | None
    group: ProcessGroup

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of :class:`QueryRanking`."""
        queries, device = len(self.labels.query_identity), self.gallery.device
        rows, columns = self._matches()
        found = torch.bincount(rows, minlength=queries)
        matches = Lists(queries, int(found.max()) if len(found) else 0, device)
        for owner in self._visits():
            first, end = self.edges[owner : owner + 2]
            inside = (columns >= first) & (columns < end)
            self._measure_matches(matches, rows[inside], columns[inside], first)
        before = torch.zeros_like(matches.number, dtype=torch.int64)
        for owner in self._visits():
            if matches.number.shape[1]:
                self._count(before, matches, self.edges[owner])
        return _metrics(found, before)

    def _visits(self) -> Iterator[int]:
        """Each owner of images, when these are here."""
        sizes = [end - begin for begin, end in itertools.pairwise(self.edges)]
        for owner, visiting in visits(self.gallery, sizes, self.group, self.group.size() - 1):
            if len(visiting):
                self.measure.visit(owner, visiting)
                yield owner

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

    def _measure_matches(self, matches: Lists, rows: Tensor, columns: Tensor, first: int) -> None:
        if not len(rows):
            return
        count = torch.bincount(rows, minlength=len(matches.number))
        place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
        some = Lists(len(count), int(count.max()), rows.device)
        some.number[rows, place] = columns.to(torch.int32)
        some.distance[rows, place] = self.measure.pairs(rows, columns - first)
        matches.merge(some.distance, some.number)

    def _count(self, before: Tensor, matches: Lists, first: int) -> None:
        """Adds to each match the visiting images that come before it; the first of them has this number."""
        junk = self.junk_identity
        for rows, columns, lower, upper in self.measure.blocks():
            distance, number = matches.distance[rows], matches.number[rows]
            place = torch.searchsorted(distance, lower.double())
            beyond = torch.searchsorted(distance, upper.double(), right=True)
            row, column = (place < beyond).nonzero(as_tuple=True)
            if len(row):
                exact = lower[row, column].double()
                if lower is not upper:
                    exact = self.measure.pairs(row + rows.start, column + columns.start)
                place[row, column] = _places(distance, number, row, exact, column + (first + columns.start))
            images = torch.arange(first + columns.start, first + columns.stop, device=before.device)
            queries = torch.arange(rows.start, rows.stop, device=before.device)[:, None]
            counted = ~self.labels.left_out(queries, images)
            if junk is not None:
                counted &= self.labels.gallery_identity[images] != junk
            found = before.new_zeros((len(distance), distance.shape[1] + 1))
            found.scatter_add_(1, place, counted.long())
            before[rows] += found.cumsum(1)[:, :-1]
            _progress.advance(len(distance) * len(images))


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
