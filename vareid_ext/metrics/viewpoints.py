"""The viewpoint protocols of the VA-reID paper's supplement, on the query and gallery images taken together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext import _arrays
from vareid_ext.metrics.features import evaluate_features
from vareid_ext.metrics.ranking import RankingMetrics, label_vector


@dataclass(frozen=True)
class RepeatedMetrics:
    """The results of several random draws.

    Attributes:
        runs: one :class:`RankingMetrics` for each draw.
    """

    runs: tuple[RankingMetrics, ...]

    def _over_runs(self, of: Any) -> dict[str, float]:
        dicts = [run.as_dict() for run in self.runs]
        return {name: float(of([values[name] for values in dicts])) for name in dicts[0]}

    def mean(self) -> dict[str, float]:
        """The mean of each of ``mAP``, ``mINP``, ``rank1``, ``rank5`` and ``rank10``."""
        return self._over_runs(statistics.fmean)

    def std(self) -> dict[str, float]:
        """The standard deviation of each (of the draws made: divided by their number)."""
        return self._over_runs(statistics.pstdev)


@dataclass(frozen=True)
class _Images:
    feature: Tensor
    identity: Tensor
    viewpoint: Tensor
    camera: Tensor | None

    def evaluate(self, query: Tensor, gallery: Tensor, **options: Any) -> RankingMetrics:
        cameras = (None, None) if self.camera is None else (self.camera[query], self.camera[gallery])
        device = self.feature.device
        features = self.feature[query.to(device)], self.feature[gallery.to(device)]
        return evaluate_features(*features, self.identity[query], self.identity[gallery], *cameras, **options)


def _images(feature: Any, identity: Any, viewpoint: Any, camera: Any, junk_identity: int | None) -> _Images:
    tensor = _arrays.to_tensor(feature, "feature")
    if tensor.dim() != 2:
        raise ValueError(f"feature: shape {list(tensor.shape)} was given; [images, D] is needed")
    labels = {"identity": identity, "viewpoint": viewpoint, "camera": camera}
    vectors = {name: None if value is None else label_vector(value, name).cpu() for name, value in labels.items()}
    for name, vector in vectors.items():
        if vector is not None and len(vector) != len(tensor):
            raise ValueError(f"{name}: length {len(vector)} was given, expected {len(tensor)} (as feature)")
    if vectors["identity"] is None or vectors["viewpoint"] is None:
        raise TypeError("identity, viewpoint: None was given; both are needed")
    taking_part = vectors["viewpoint"] >= 0
    if junk_identity is not None:
        taking_part &= vectors["identity"] != junk_identity
    if not bool(taking_part.any()):
        raise ValueError("viewpoint: no image has a known viewpoint (>= 0)")
    identities = vectors["identity"]
    return _Images(tensor, identities, torch.where(taking_part, vectors["viewpoint"], -1), vectors["camera"])


def evaluate_single_viewpoint(
    feature: Any,
    identity: Any,
    viewpoint: Any,
    camera: Any = None,
    *,
    repeats: int = 10,
    seed: int = 0,
    metric: str = "sqeuclidean",
    rerank: bool | Mapping[str, Any] = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
) -> dict[int, RepeatedMetrics]:
    """Retrieval among the images of one viewpoint.

    For every viewpoint v, on the images D_v that have it: one random image of each identity is a query, the rest is
    the gallery; this is repeated, and the mean and the spread are reported.

    Args:
        feature: [N, D], the query and the gallery images together.
        identity: ``[N]`` whole numbers.
        viewpoint: ``[N]`` whole numbers >= 0; images of unknown viewpoint (-1) take no part.
        camera: ``[N]`` whole numbers or None; gallery images by the query's camera are left out, as always.
        repeats: random draws, >= 1.
        seed: of the draws; the same seed draws the same queries everywhere.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        max_rank: as in :func:`evaluate_features`.
        junk_identity: images of this identity take no part; None for none.

    Returns:
        For each viewpoint that occurs, in order, its :class:`RepeatedMetrics`.

    Raises:
        ValueError: as :func:`evaluate_features`; ``repeats`` below 1; a viewpoint in which no query has a match.

    Source: the supplement of Zhu et al., "Viewpoint-Aware Loss with Angular Regularization for Person
    Re-Identification", AAAI 2020.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int | np.integer) or repeats < 1:
        raise ValueError(f"repeats: {repeats!r} was given; allowed are whole numbers >= 1")
    images = _images(feature, identity, viewpoint, camera, junk_identity)
    generator = np.random.default_rng(seed)
    results = {}
    for view in images.viewpoint[images.viewpoint >= 0].unique().tolist():
        members = torch.nonzero(images.viewpoint == view)[:, 0].numpy()
        runs = []
        for _ in range(repeats):
            shuffled = members[generator.permutation(len(members))]
            _, first = np.unique(images.identity.numpy()[shuffled], return_index=True)
            is_query = np.zeros(len(members), dtype=bool)
            is_query[first] = True
            query, gallery = (torch.from_numpy(np.sort(shuffled[chosen])) for chosen in (is_query, ~is_query))
            if len(gallery) == 0:
                raise ValueError(f"viewpoint: {view} has one image of each identity, so that no gallery is left")
            runs.append(images.evaluate(query, gallery, metric=metric, rerank=rerank, max_rank=max_rank))
        results[view] = RepeatedMetrics(tuple(runs))
    return results


def evaluate_cross_viewpoint(
    feature: Any,
    identity: Any,
    viewpoint: Any,
    camera: Any = None,
    *,
    metric: str = "sqeuclidean",
    rerank: bool | Mapping[str, Any] = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
) -> dict[int, RankingMetrics]:
    """Retrieval from one viewpoint in the others: for every viewpoint, its images are queries, the rest is the gallery.

    Args:
        feature: [N, D], the query and the gallery images together.
        identity: ``[N]`` whole numbers.
        viewpoint: ``[N]`` whole numbers >= 0; images of unknown viewpoint (-1) take no part.
        camera: ``[N]`` whole numbers or None; gallery images by the query's camera are left out, as always.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        max_rank: as in :func:`evaluate_features`.
        junk_identity: images of this identity take no part; None for none.

    Returns:
        For each viewpoint that occurs, in order, its :class:`RankingMetrics`.

    Raises:
        ValueError: as :func:`evaluate_features`; only one viewpoint occurs.

    Source: the supplement of Zhu et al., "Viewpoint-Aware Loss with Angular Regularization for Person
    Re-Identification", AAAI 2020.
    """
    images = _images(feature, identity, viewpoint, camera, junk_identity)
    views = images.viewpoint[images.viewpoint >= 0].unique().tolist()
    if len(views) < 2:
        raise ValueError(f"viewpoint: only {views[0]} occurs; two are needed")
    results = {}
    for view in views:
        query = torch.nonzero(images.viewpoint == view)[:, 0]
        gallery = torch.nonzero((images.viewpoint >= 0) & (images.viewpoint != view))[:, 0]
        results[view] = images.evaluate(query, gallery, metric=metric, rerank=rerank, max_rank=max_rank)
    return results
