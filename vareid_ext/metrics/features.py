"""Ranking metrics from features, block by block of queries: no distance matrix need exist, re-ranked or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from vareid_ext import _arrays
from vareid_ext.metrics.ranking import (
    Labels,
    QueryRanking,
    RankingMetrics,
    check_junk_identity,
    check_max_rank,
    label_vector,
    rank_queries,
)
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops._checks import check_choice, check_count, check_values
from vareid_ext.ops._features import check_features, check_same_features, largest_magnitude, row_magnitudes
from vareid_ext.ops._filter import block_side, common_scale
from vareid_ext.ops._progress import listen
from vareid_ext.ops.nearest_neighbors import joint_neighbors
from vareid_ext.ops.pairwise_distance import RowDistances
from vareid_ext.ops.ranking import ranking_features
from vareid_ext.reference.pairwise_distance import METRICS
from vareid_ext.retrieval import check_parameters, k_reciprocal_rerank

_DENSE_ELEMENTS = 1 << 26  # re-ranked matrices up to this size are made whole, which saves a second product
_BLOCK_ELEMENTS = 1 << 23
_RERANK_DEFAULTS: Mapping[str, Any] = {"k1": 20, "k2": 6, "lambda_value": 0.3}


def rerank_options(rerank: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """k1, k2 and lambda_value of a ``rerank`` argument, checked; None if it asks for none."""
    if isinstance(rerank, bool):
        return dict(_RERANK_DEFAULTS) if rerank else None
    if not isinstance(rerank, Mapping):
        raise TypeError(f"rerank: {type(rerank).__name__} was given; allowed are True, False and a mapping")
    unknown = set(rerank) - set(_RERANK_DEFAULTS)
    if unknown:
        allowed = ", ".join(_RERANK_DEFAULTS)
        raise ValueError(f"rerank: {', '.join(sorted(map(repr, unknown)))} was given; allowed keys are {allowed}")
    options = {**_RERANK_DEFAULTS, **rerank}
    return dict(zip(_RERANK_DEFAULTS, check_parameters(**options), strict=True))


def _reranked_rows(
    query: Tensor, gallery: Tensor, *, k1: int, k2: int, lambda_value: float
) -> Callable[[int, int], Tensor]:
    """A function of (begin, end) that gives the final distances of these queries, [end - begin, G].

    The stages are those of :func:`vareid_ext.retrieval.k_reciprocal_rerank`; only the last, which blends with the
    original distances, waits for the rows to be asked for.
    """
    Q, G = query.shape[0], gallery.shape[0]
    scale = common_scale((query, gallery), largest_magnitude({"query": query, "gallery": gallery}))
    neighbor, near, row_max, _, _ = joint_neighbors(
        query, gallery, scale, min(Q + G, max(k1 + 1, k2)), 0, None, block_side(query.device)
    )
    indptr, index = stages.k_reciprocal_sets(neighbor, k1)
    value = stages.listed_distance(query, gallery, scale, neighbor, near, indptr, index)
    value = stages.k_reciprocal_encode(indptr, value, row_max)
    indptr, index, value = stages.k_reciprocal_expand(neighbor, k2, indptr, index, value)
    inverted = stages.k_reciprocal_invert(indptr, index, value, Q, Q + G)
    original = RowDistances(query, gallery, scale)

    def rows(begin: int, end: int) -> Tensor:
        block = original(begin, end)
        stages.k_reciprocal_blend(block, row_max[begin:end], indptr[begin:], index, value, *inverted, lambda_value)
        return block

    return rows


def rank_features(
    query: Any,
    gallery: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    metric: str = "sqeuclidean",
    rerank: bool | Mapping[str, Any] = False,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: bool = False,
) -> QueryRanking:
    """The ranking results of each query, from features; the arguments are those of :func:`evaluate_features`."""
    back = _arrays.returner(query)
    query, gallery = _arrays.to_tensor(query, "query"), _arrays.to_tensor(gallery, "gallery")
    check_values("query", query)
    check_features("query", query)
    check_same_features("gallery", gallery, "query", query)
    check_choice("metric", metric, METRICS)
    options = rerank_options(rerank)
    if options is not None and metric == "cosine":
        raise ValueError("metric: 'cosine' was given, but re-ranking is defined on squared Euclidean distances")
    Q, G = Labels(query_identity, gallery_identity, query_camera, gallery_camera).check()
    for name, features, rows in (("query", query, Q), ("gallery", gallery, G)):
        if features.shape[0] != rows:
            raise ValueError(f"{name}_identity: length {rows} was given, expected {features.shape[0]} (as {name})")
    if block_rows is not None:
        block_rows = check_count("block_rows", block_rows, 1)
    check_junk_identity(junk_identity)
    if options is not None and junk_identity is not None:  # junk must not be anybody's neighbour
        kept = label_vector(gallery_identity, "gallery_identity") != junk_identity
        if not bool(kept.all()):
            row_magnitudes("gallery", gallery)  # names rows by their numbers as given
            gallery = gallery[kept.to(gallery.device)]
            G = gallery.shape[0]
            if G == 0:
                raise ValueError(f"gallery_identity: every image has the junk identity {junk_identity}")
            gallery_identity = label_vector(gallery_identity, "gallery_identity")[kept]
            if gallery_camera is not None:
                gallery_camera = label_vector(gallery_camera, "gallery_camera")[kept]

    step = block_rows or max(1, _BLOCK_ELEMENTS // G)
    if options is None:
        labels = Labels(query_identity, gallery_identity, query_camera, gallery_camera).on(query.device)
        with _bar(progress, Q) as advance, listen(lambda pairs: advance(pairs // G)):
            found = ranking_features(query, gallery, metric, *labels, junk_identity, step)
        return QueryRanking(*map(back, found))
    distances: Any
    if block_rows is None and Q * G <= _DENSE_ELEMENTS:
        distances = k_reciprocal_rerank(query, gallery, progress=progress, **options)
    else:
        distances = _reranked_rows(query, gallery, **options)
    with _bar(progress, Q) as advance:
        results = rank_queries(
            distances,
            query_identity,
            gallery_identity,
            query_camera,
            gallery_camera,
            junk_identity=junk_identity,
            block_rows=step if callable(distances) else None,
            progress=advance,
        )
    return QueryRanking(*map(back, vars(results).values()))


@contextlib.contextmanager
def _bar(show: bool, queries: int) -> Iterator[Callable[[int], object]]:
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
    metric: str = "sqeuclidean",
    rerank: bool | Mapping[str, Any] = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: bool = False,
) -> RankingMetrics:
    """CMC, mAP and mINP from features, without holding the Q x G distances.

    Equivalent to :func:`evaluate_ranking` on float64 distances: the order is that of
    :func:`vareid_ext.nearest_neighbors`, whatever the block size, the number of threads and the junk. With re-ranking
    equivalent to ``evaluate_ranking(k_reciprocal_rerank(query, gallery, **rerank), ...)``.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; NumPy (memory-mapped, too), PyTorch or CuPy.
        gallery: features [G, D] of query's dtype and device.
        query_identity: ``[Q]`` whole numbers.
        gallery_identity: ``[G]`` whole numbers.
        query_camera: ``[Q]`` whole numbers, or None if cameras are not known; -1: this one is not known.
        gallery_camera: ``[G]`` whole numbers; given if and only if ``query_camera`` is.
        metric: "sqeuclidean", "euclidean" (the same order) or "cosine".
        rerank: True for k-reciprocal re-ranking, or a mapping with some of its ``k1`` (20), ``k2`` (6) and
            ``lambda_value`` (0.3). Junk is dropped before it, so that it is in nobody's neighbourhood.
        max_rank: length of the CMC curve, 1 to 2^20.
        junk_identity: the identity of gallery images to leave out; None for none.
        block_rows: queries handled at once (default: as many as make 2^23 distances; on a CPU at most 1,024). With
            re-ranking, matrices up to 2^26 elements are made whole unless this is given: that takes one product less.
        progress: show progress bars on standard error.

    Returns:
        :class:`RankingMetrics`, the curve in query's kind of array.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: as :func:`evaluate_ranking` and :func:`k_reciprocal_rerank`.
    """
    check_max_rank(max_rank)
    return rank_features(
        query,
        gallery,
        query_identity,
        gallery_identity,
        query_camera,
        gallery_camera,
        metric=metric,
        rerank=rerank,
        junk_identity=junk_identity,
        block_rows=block_rows,
        progress=progress,
    ).metrics(max_rank)
