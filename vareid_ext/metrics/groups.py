"""Ranking metrics from one group of images to another: from which side to which, from which camera to which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext._labels import UNKNOWN
from vareid_ext._text import table, viewpoint_name
from vareid_ext.metrics.exclusion import Columns, RankingLabels, check_labels, label_vector
from vareid_ext.metrics.features import check_retrieval, rank_by_features
from vareid_ext.metrics.ranking import QueryRanking, rank_labelled
from vareid_ext.retrieval.distance import rows_in_block
from vareid_ext.retrieval.rerank import Rerank, Reranker


@dataclass(frozen=True, eq=False)
class GroupMetrics:
    """A cell for A groups of queries and B groups of gallery images. ``print`` shows mAP and rank-1 in percent.

    Attributes:
        query_groups: the A numbers of the queries' groups, in order.
        gallery_groups: the B numbers of the gallery's groups, in order.
        mAP: float64 [A, B] in [0, 1], NaN where no query of the group has a match in the gallery's group.
        rank1: float64 [A, B], as mAP.
        queries: int64 [A, B], the queries that have a match there, over which the means are taken.
        images: int64 [B], the gallery images of each group, without junk.
        left_out: the queries, and the gallery images without junk, whose group is unknown (-1).
        names: what the groups 0, 1, ... are called; beyond them by their numbers.
    """

    query_groups: tuple[int, ...]
    gallery_groups: tuple[int, ...]
    mAP: np.ndarray
    rank1: np.ndarray
    queries: np.ndarray
    images: np.ndarray
    left_out: tuple[int, int]
    names: tuple[str, ...] = ()

    def called(self, group: int) -> str:
        """The name of a group."""
        return viewpoint_name(group, self.names)

    def as_dict(self) -> dict[str, Any]:
        """The groups, the cells and the counts as lists, None for NaN."""
        cells = {
            name: [[None if math.isnan(v) else v for v in row] for row in getattr(self, name).tolist()]
            for name in ("mAP", "rank1")
        }
        counts = {"queries": self.queries.tolist(), "images": self.images.tolist()}
        return {
            "query_groups": list(self.query_groups), "gallery_groups": list(self.gallery_groups),
            "query_names": [*map(self.called, self.query_groups)],
            "gallery_names": [*map(self.called, self.gallery_groups)], **cells, **counts,
        }  # fmt: skip

    def __str__(self) -> str:

        def cell(a: int, b: int) -> str:
            if not self.queries[a, b]:
                return "\u2013"
            return f"{100 * self.mAP[a, b]:.1f} / {100 * self.rank1[a, b]:.1f} ({self.queries[a, b]})"

        columns = range(len(self.gallery_groups))
        rows = [(self.called(group), *(cell(a, b) for b in columns)) for a, group in enumerate(self.query_groups)]
        return table(("query \\ gallery", *map(self.called, self.gallery_groups)), rows)


def evaluate_by_group(
    query: Any,
    gallery: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    query_group: Any,
    gallery_group: Any,
    names: Sequence[str] = (),
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    junk_identity: int | None = -1,
) -> GroupMetrics:
    """mAP and rank-1 of the queries of each group among the gallery images of each, such as a viewpoint or camera.

    A cell is what :func:`evaluate_features` gives for these queries if the gallery held the images of its group alone.
    Re-ranked distances are those within the whole gallery, of which a cell takes its columns.

    Args:
        query: as in :func:`evaluate_features`, like all that are not named here.
        gallery: features [G, D].
        query_identity: ``[Q]``.
        gallery_identity: ``[G]``.
        query_camera: ``[Q]`` or None.
        gallery_camera: ``[G]`` or None.
        exclude: as in :func:`evaluate_features`.
        columns: as in :func:`evaluate_features`.
        query_group: ``[Q]`` whole numbers; -1: unknown, the query is left out.
        gallery_group: ``[G]`` whole numbers; -1: unknown, the image is left out.
        names: what the groups 0, 1, ... are called in tables, such as viewpoints.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        junk_identity: as in :func:`evaluate_features`.

    Returns:
        :class:`GroupMetrics`.

    Raises:
        TypeError: as :func:`evaluate_features`; groups that are not whole numbers.
        ValueError: as :func:`evaluate_features`; groups of another length; no query, or no gallery image, of a known
            group.
    """
    given = check_labels(query_identity, gallery_identity, query_camera, gallery_camera, exclude, columns)
    of_query = label_vector(query_group, "query_group").cpu()
    of_gallery = label_vector(gallery_group, "gallery_group").cpu()
    checked = check_retrieval(query, gallery, given, metric, rerank, junk_identity, drop_junk=True)
    for side, group, images in (("query", of_query, query), ("gallery", of_gallery, gallery)):
        if len(group) != len(images):
            raise ValueError(
                f"{side}_group: length {len(group)} was given, expected {len(images)} (as {side}_identity)"
            )
    query, gallery, labels, fit, kept = checked
    of_gallery = of_gallery[kept.cpu()]
    known_query, known_gallery = of_query != UNKNOWN, of_gallery != UNKNOWN
    for name, known in (("query_group", known_query), ("gallery_group", known_gallery)):
        if not known.any():
            raise ValueError(f"{name}: no image has a known group (other than -1)")
    of_rows, of_columns = of_query[known_query].unique().tolist(), of_gallery[known_gallery].unique().tolist()
    members = [(of_gallery == group).nonzero()[:, 0].to(query.device) for group in of_columns]
    if fit is None:
        rankings = [
            QueryRanking(*rank_by_features(query, gallery[some], labels.of_gallery(some), metric, junk_identity=None))
            for some in members
        ]
    else:
        rankings = _reranked(fit, labels, members)
    cells = [[_cell(ranking, of_query == group) for ranking in rankings] for group in of_rows]
    mAP, rank1, counted = (np.array([[cell[i] for cell in row] for row in cells]) for i in range(3))
    return GroupMetrics(
        query_groups=tuple(of_rows),
        gallery_groups=tuple(of_columns),
        mAP=mAP,
        rank1=rank1,
        queries=counted,
        images=np.array([len(some) for some in members]),
        left_out=(int((~known_query).sum()), int((~known_gallery).sum())),
        names=tuple(names),
    )


def _reranked(fit: Reranker, labels: RankingLabels, members: Sequence[Tensor]) -> list[QueryRanking]:
    """The rankings of all queries among some columns each of the re-ranked distances, which are made once."""
    found: list[list[QueryRanking]] = [[] for _ in members]
    Q, G = fit.shape
    step = rows_in_block(G, fit.query.device)
    for begin in range(0, Q, step):
        block = fit.distances(begin, min(begin + step, Q))
        of_block = labels.of_queries(slice(begin, begin + step))
        for ranking, some in zip(found, members, strict=True):
            ranking.append(rank_labelled(block[:, some], of_block.of_gallery(some), junk_identity=None))
    names = QueryRanking.__dataclass_fields__
    return [QueryRanking(*(torch.cat([getattr(part, name) for part in parts]) for name in names)) for parts in found]


def _cell(ranking: QueryRanking, chosen: Tensor) -> tuple[float, float, int]:
    """mAP, rank-1 and the number of queries that are counted."""
    counted = int((ranking.num_matches.cpu()[chosen] > 0).sum())
    if not counted:
        return math.nan, math.nan, 0
    metrics = ranking.metrics(1, subset=chosen)
    return metrics.mAP, metrics.rank1, counted
