"""Ranking metrics from features, block by block of queries: no distance matrix need exist, re-ranked or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext import _arrays
from vareid_ext.metrics.exclusion import Columns, RankingLabels, check_labels
from vareid_ext.metrics.over_processes import DENSE_ELEMENTS, rank_shares
from vareid_ext.metrics.ranking import (
    QueryRanking,
    RankingMetrics,
    check_junk_identity,
    check_max_rank,
    check_subset,
    rank_labelled,
)
from vareid_ext.ops._checks import check_choice, check_count, check_values
from vareid_ext.ops._features import check_features, check_same_features, row_magnitudes
from vareid_ext.ops._progress import listen
from vareid_ext.ops.nearest_neighbors import nearest_neighbors
from vareid_ext.ops.ranking import ranking_features
from vareid_ext.reference.pairwise_distance import METRICS
from vareid_ext.retrieval.distance import rows_in_block
from vareid_ext.retrieval.rerank import Rerank, Reranker, fit_reranker
from vareid_ext.retrieval.rerank.base import progress_bar


class Retrieval(NamedTuple):
    """A retrieval, checked; ``kept`` holds where the gallery's images were before its junk was dropped."""

    query: Tensor
    gallery: Tensor
    labels: RankingLabels
    fit: Reranker | None
    kept: Tensor


def check_retrieval(
    query: Any, gallery: Any, labels: RankingLabels, metric: str, rerank: Rerank, junk_identity: int | None,
    drop_junk: bool,
) -> Retrieval:  # fmt: skip
    """The arguments of :func:`evaluate_features`, checked, and the re-ranker that they ask for."""
    query, gallery = _arrays.to_tensor(query, "query"), _arrays.to_tensor(gallery, "gallery")
    check_values("query", query)
    check_values("gallery", gallery)
    check_features("query", query)
    check_same_features("gallery", gallery, "query", query)
    check_choice("metric", metric, METRICS)
    if rerank is not False and metric == "cosine":
        raise ValueError("metric: 'cosine' was given, but re-ranking is defined on squared Euclidean distances")
    check_junk_identity(junk_identity)
    labels = labels.on(query.device)
    sides = (("query", query, labels.query_identity), ("gallery", gallery, labels.gallery_identity))
    for name, features, identity in sides:
        if len(features) != len(identity):
            raise ValueError(f"{name}_identity: length {len(identity)} was given, expected {len(features)} (as {name})")
    kept = torch.arange(len(gallery), device=query.device)
    if drop_junk and junk_identity is not None:
        kept = (labels.gallery_identity != junk_identity).nonzero()[:, 0]
    if len(kept) < len(gallery):
        row_magnitudes("gallery", gallery)  # names rows by their numbers as given
        if len(kept) == 0:
            raise ValueError(f"gallery_identity: every image has the junk identity {junk_identity}")
        gallery, labels = gallery[kept], labels.of_gallery(kept)
    return Retrieval(query, gallery, labels, fit_reranker(rerank, query, gallery), kept)


def rank_features(
    query: Any,
    gallery: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: bool = False,
) -> QueryRanking:
    """The ranking results of each query, from features; the arguments are those of :func:`evaluate_features`."""
    back = _arrays.returner(query)
    if block_rows is not None:
        block_rows = check_count("block_rows", block_rows, 1)
    labels = check_labels(query_identity, gallery_identity, query_camera, gallery_camera, exclude, columns)
    # Junk must not be in anybody's neighbourhood; the original ranking leaves it out at the end.
    query, gallery, labels, fit, _ = check_retrieval(
        query, gallery, labels, metric, rerank, junk_identity, drop_junk=rerank is not False
    )
    if fit is None:
        with query_bar(progress, len(query)) as advance:
            found = rank_by_features(query, gallery, labels, metric, junk_identity, block_rows, advance)
        return QueryRanking(*map(back, found))
    Q, G = len(query), len(gallery)
    distances: Any = fit.rows
    with progress_bar(progress, fit):
        if block_rows is None and Q * G <= DENSE_ELEMENTS:
            distances = fit.matrix()
        else:
            fit.prepare()
    with query_bar(progress, Q) as advance:
        results = rank_labelled(distances, labels, junk_identity, block_rows, advance)
    return QueryRanking(*map(back, vars(results).values()))


def rank_by_features(
    query: Tensor, gallery: Tensor, labels: RankingLabels, metric: str, junk_identity: int | None,
    block_rows: int | None = None, progress: Callable[[int], object] = lambda _queries: None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of :class:`QueryRanking`, of what is checked and not re-ranked."""
    step = block_rows or rows_in_block(len(gallery), query.device)
    if labels.query_marks is not None:
        row_magnitudes("query", query, nonzero=metric == "cosine")  # names rows by their numbers as given
    with listen(lambda pairs: progress(pairs // len(gallery))):
        return labels.results(
            junk_identity, lambda rows, operands: ranking_features(query[rows], gallery, metric, *operands, step)
        )


def ranked_lists(
    query: Any,
    gallery: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    queries: Any,
    top: int = 10,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    junk_identity: int | None = -1,
) -> list[Any]:
    """The nearest gallery images of some queries, in order, without those that the evaluation leaves out.

    These are the images that :func:`rank_features` ranks: neither junk nor those that the rule leaves out. Ties by the
    lower index. No Q x G distances are held.

    Args:
        query: as in :func:`evaluate_features`, like all that are not named here.
        gallery: features [G, D].
        query_identity: ``[Q]``.
        gallery_identity: ``[G]``.
        query_camera: ``[Q]`` or None.
        gallery_camera: ``[G]`` or None.
        exclude: as in :func:`evaluate_features`.
        columns: as in :func:`evaluate_features`.
        queries: indices of queries, or a boolean ``[Q]`` array.
        top: length of the lists, at least 1; a list is shorter where the gallery has fewer images left.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        junk_identity: as in :func:`evaluate_features`.

    Returns:
        For each of ``queries`` the int64 indices of its images in the gallery, in query's kind of array.

    Raises:
        TypeError: as :func:`evaluate_features`.
        ValueError: as :func:`evaluate_features`; an index that no query has.
    """
    back = _arrays.returner(query)
    top = check_count("top", top, 1)
    labels = check_labels(query_identity, gallery_identity, query_camera, gallery_camera, exclude, columns)
    query, gallery, labels, fit, kept = check_retrieval(
        query, gallery, labels, metric, rerank, junk_identity, drop_junk=True
    )
    chosen = check_subset(queries, len(query), "queries").to(query.device)
    chosen = torch.arange(len(query), device=query.device)[chosen]
    lists: list[Any] = []
    step = rows_in_block(len(gallery), torch.device("cpu"))  # whose rows are sorted whole
    for begin in range(0, len(chosen), step):
        some = chosen[begin : begin + step]
        left_out = labels.left_out(some[:, None], slice(None))
        if fit is None:
            k = min(len(gallery), top + int(left_out.sum(1).amax()))
            order = nearest_neighbors(query[some], gallery, k, metric)[1]
        else:
            order = torch.cat([fit.distances(q, q + 1) for q in some.tolist()]).sort(dim=1, stable=True).indices
        lists += [back(kept[row[~out[row]][:top]]) for row, out in zip(order, left_out, strict=True)]
    return lists


@contextlib.contextmanager
def query_bar(show: bool, queries: int) -> Iterator[Callable[[int], object]]:
    """A bar on standard error over so many queries: a function that is told of further ones."""
    if not show:
        yield lambda _queries: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=queries, desc="ranking", unit="query", leave=False) as bar:
        yield bar.update


def evaluate_features(
    query: Any,
    gallery: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: bool = False,
    group: ProcessGroup | None = None,
) -> RankingMetrics:
    """CMC, mAP and mINP from features, without holding the Q x G distances.

    Equivalent to :func:`evaluate_ranking` on float64 distances: the order is that of
    :func:`vareid_ext.nearest_neighbors`, whatever the block size, the number of threads and the junk. With re-ranking
    equivalent to ``evaluate_ranking(k_reciprocal_rerank(query, gallery, **rerank), ...)``.

    Over processes: each gives its rows of query and gallery with their labels, Q and G being those of all together, and
    all get the same metrics: those of one process, with the CPU's kernels bit for bit (re-ranked with as many threads
    and the same blocks). Shares may be of any size, and empty. Labels are sent to all; of the gallery's features each
    process sends 2 (P - 1) G / P rows, P being the number of processes, of the queries' those that even the shares out.
    Re-ranking sends what :func:`k_reciprocal_rerank` sends beside.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; NumPy (memory-mapped, too), PyTorch or CuPy.
        gallery: features [G, D] of query's dtype and device.
        query_identity: ``[Q]`` whole numbers.
        gallery_identity: ``[G]`` whole numbers.
        query_camera: ``[Q]`` whole numbers, or None if cameras are not known; -1: this one is not known.
        gallery_camera: ``[G]`` whole numbers; given if and only if ``query_camera`` is.
        exclude: which images are left out, as in :func:`evaluate_ranking`: None, "none", "identity&camera |
            identity&clothes", ...
        columns: what ``exclude`` can name beside identity and camera, as in :func:`evaluate_ranking`.
        metric: "sqeuclidean", "euclidean" (the same order) or "cosine".
        rerank: True for k-reciprocal re-ranking; a mapping with some of its ``k1`` (20), ``k2`` (6) and
            ``lambda_value`` (0.3), say; the name of another re-ranker (:data:`vareid_ext.retrieval.RERANKERS`), in a
            mapping as its ``method``; or one that is fitted to these features, without junk. Junk is dropped before, so
            that it is in nobody's neighbourhood.
        max_rank: length of the CMC curve, 1 to 2^20.
        junk_identity: the identity of gallery images to leave out; None for none.
        block_rows: queries handled at once (default: as many as make 2^23 distances; on a CPU at most 1,024). With
            re-ranking, matrices up to 2^26 elements are made whole unless this is given: that takes one product less.
        progress: show progress bars on standard error; over processes the first one does.
        group: the processes that hold the rows, all of which call this; None for this one alone. Features on CPUs need
            gloo, on GPUs NCCL.

    Returns:
        :class:`RankingMetrics`, the curve in query's kind of array.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: as :func:`evaluate_ranking` and :func:`k_reciprocal_rerank`; over processes a re-ranker that is
            fitted or another than k-reciprocal, and processes that disagree. All processes raise the same.
        LostProcessError: a RuntimeError; a process of the group ended, or did not answer within its time limit.
    """
    if group is not None:
        ranking = rank_shares(
            query, gallery, (query_identity, gallery_identity), (query_camera, gallery_camera), exclude, columns,
            metric, rerank, max_rank, junk_identity, block_rows, progress, group,
        )  # fmt: skip
        return ranking.metrics(max_rank)
    check_max_rank(max_rank)
    return rank_features(
        query,
        gallery,
        query_identity,
        gallery_identity,
        query_camera,
        gallery_camera,
        exclude=exclude,
        columns=columns,
        metric=metric,
        rerank=rerank,
        junk_identity=junk_identity,
        block_rows=block_rows,
        progress=progress,
    ).metrics(max_rank)
