"""What a report measures of a query and a gallery: metrics, verification, groups, and lists of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext.files.features import Features
from vareid_ext.metrics import (
    GroupMetrics,
    QueryRanking,
    RankingMetrics,
    VerificationMetrics,
    evaluate_by_group,
    rank_features,
    verify_features,
)
from vareid_ext.metrics.exclusion import check_labels, label_arguments
from vareid_ext.metrics.features import check_retrieval
from vareid_ext.ops.nearest_neighbors import nearest_neighbors
from vareid_ext.retrieval.rerank import Rerank, fit_reranker

MOST_JUNK, MOST_MISSED = 3, 3
"""Junk images and missed matches that a list shows, at most."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a query and a gallery; `gaps` says what could not be, a line each."""

    query: Features
    gallery: Features
    how: Mapping[str, Any]
    """the metric or the fitted re-ranker, the junk identity, labels and rule of exclusion, as the functions of
    `vareid_ext.metrics` take them"""
    ranking: QueryRanking
    metrics: RankingMetrics
    verification: VerificationMetrics | None
    groups: Mapping[str, GroupMetrics]
    """by label"""
    gaps: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """An image of a list.

    Attributes:
        index: in the gallery.
        distance: to the query.
        kind: "right", "wrong", "missed" (a match that comes behind the list), or "junk" (left out of the ranking).
        rank: from 1; 0 for junk.
    """

    index: int
    distance: float
    kind: str
    rank: int


@dataclass(frozen=True)
class FoundList:
    """What was found for a query: the first of its ranking with the junk among them, then missed matches."""

    images: Sequence[Found]
    missed: int
    """matches behind the first, of which a few are in `images`"""
    more_junk: int
    """junk before the last that is not in `images`"""

    @property
    def more_missed(self) -> int:
        """Missed matches that are not in `images`."""
        return self.missed - sum(image.kind == "missed" for image in self.images)


def measure(
    query: Features,
    gallery: Features,
    *,
    exclude: str | None = None,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    junk_identity: int | None = -1,
    recommend_fpr: float = 1e-3,
    block_rows: int | None = None,
    progress: bool = False,
) -> Measured:
    """Ranking, verification and group metrics; the arguments are those of :func:`vareid_ext.verify_features`.

    Raises:
        ValueError: as :func:`vareid_ext.evaluate_features`, also where no query has a match.
    """
    how: dict[str, Any] = {**label_arguments(query, gallery, exclude), "metric": metric}
    if rerank is not False:
        junk = gallery.identity == junk_identity if junk_identity is not None else np.zeros(len(gallery), dtype=bool)
        del how["metric"]
        how["rerank"] = fit_reranker(rerank, query.feature, gallery.feature[torch.from_numpy(~junk)])
    how["junk_identity"] = junk_identity
    streamed: dict[str, Any] = {"block_rows": block_rows, "progress": progress}
    ranking = rank_features(query.feature, gallery.feature, **how, **streamed)
    metrics = ranking.metrics(50)
    gaps = []
    people = [np.unique(side.identity[side.identity != junk_identity]) for side in (query, gallery)]
    recommend, verification = recommend_fpr if len(people[0]) > 1 else None, None
    if recommend is None:
        gaps.append("recommended threshold: the queries show one identity; its intervals need two or more")
    if len(np.union1d(*people)) > 1:
        verification = verify_features(query.feature, gallery.feature, **how, recommend_fpr=recommend, **streamed)
    else:
        gaps.append("verification (ROC, histogram, thresholds): all images show one identity; there are no non-matches")
    groups = {}
    for label in ("viewpoint", "camera"):
        of: Any = {"query_group": getattr(query, label), "gallery_group": getattr(gallery, label)}
        if all((group >= 0).any() for group in of.values()):
            names = query.viewpoints if label == "viewpoint" else query.names.get(label, ())
            groups[label] = evaluate_by_group(query.feature, gallery.feature, **how, **of, names=names)
        else:
            gaps.append(f"metrics by {label}: the {label} of no image is known on one side")
    return Measured(query, gallery, how, ranking, metrics, verification, groups, gaps)


def chosen_queries(precision: np.ndarray, matched: np.ndarray, count: int) -> np.ndarray:
    """Queries to show, the hardest first: half of them the hardest, the others spread evenly over the rest.

    Args:
        precision: [Q], by which they are ordered.
        matched: bool [Q], queries that have a match; others are not shown.
        count: how many, at most.
    """
    order = np.flatnonzero(matched)
    order = order[np.argsort(precision[order], kind="stable")]
    if len(order) <= count:
        return order
    hardest = (count + 1) // 2
    rest = np.linspace(hardest, len(order) - 1, count - hardest).round().astype(int)
    return np.concatenate([order[:hardest], order[rest]])


def found_lists(measured: Measured, queries: Sequence[int], top: int) -> list[FoundList]:
    """What was found for some queries, with its distances, in the order of the ranking metrics."""
    how = dict(measured.how)
    junk_identity, metric, rerank = how.pop("junk_identity"), how.pop("metric", "sqeuclidean"), how.pop("rerank", False)
    query, gallery, labels, fit, kept = check_retrieval(
        measured.query.feature, measured.gallery.feature, check_labels(**how), metric, rerank, junk_identity,
        drop_junk=rerank is not False,
    )  # fmt: skip
    lists = []
    for q in queries:
        row = torch.tensor([q], device=query.device)
        distance: Tensor
        if fit is None:
            distance, index = nearest_neighbors(query[row], gallery, len(gallery), metric)
        else:
            distance, index = fit.distances(q, q + 1).sort(dim=1, stable=True)
        out = labels.left_out(row, slice(None))
        if junk_identity is not None:
            out = out | (labels.gallery_identity == junk_identity)
        match = (labels.gallery_identity == labels.query_identity[q]) & ~out
        order = index[0]
        columns = [np.asarray(c.cpu()) for c in (kept[order], distance[0], out[order], match[order])]
        lists.append(_list(columns, top))
    return lists


def _list(columns: Sequence[np.ndarray], top: int) -> FoundList:
    """A list out of the gallery in order of distance: its indices, distances, what is junk, what is a match."""
    index, distance, out, match = columns
    rank = np.cumsum(~out)
    end = int(np.searchsorted(rank, min(top, rank[-1]))) + 1 if len(rank) and rank[-1] else 0
    junk = np.flatnonzero(out[:end])
    missed = end + np.flatnonzero(match[end:])
    shown = np.setdiff1d(np.arange(end), junk[MOST_JUNK:])
    images = [
        Found(
            int(index[i]), float(distance[i]), "junk" if out[i] else "right" if match[i] else "wrong",
            0 if out[i] else int(rank[i]),
        )
        for i in shown
    ]  # fmt: skip
    images += [Found(int(index[i]), float(distance[i]), "missed", int(rank[i])) for i in missed[:MOST_MISSED]]
    return FoundList(images, len(missed), max(0, len(junk) - MOST_JUNK))


def distance_histogram(verification: VerificationMetrics, bins: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of the matches and of the non-matches by distance, from the ROC: no further reading of the pairs.

    Returns:
        Ascending edges [n + 1], n up to `bins`, and the two shares [n], exact: of the pairs above an edge and up to the
        next. The edges are thresholds of the ROC, nearly even.
    """
    threshold, fpr, tpr = verification.roc
    even = np.linspace(threshold[0], threshold[-1], bins + 1)[1:]
    at = np.unique(np.searchsorted(threshold, even, side="right") - 1)
    # The ROC's first threshold is at most 1 / 128 above the least distance.
    first = threshold[0] - max(abs(threshold[0]) / 64, (threshold[-1] - threshold[0]) / 1000)
    match, non_match = (np.diff(rate[at], prepend=0.0) for rate in (tpr, fpr))
    return np.concatenate([[first], threshold[at]]), match, non_match
