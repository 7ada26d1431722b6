"""Protocols on the query and gallery images taken together: a drawn gallery, and the paper's two of viewpoints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from vareid_ext import _arrays
from vareid_ext._labels import UNKNOWN, one_of_each
from vareid_ext._text import VIEWPOINTS, viewpoint_name
from vareid_ext.files.features import Features
from vareid_ext.metrics.exclusion import label_arguments, label_vector
from vareid_ext.metrics.features import evaluate_features
from vareid_ext.metrics.ranking import RankingMetrics, results_table
from vareid_ext.ops._checks import check_count
from vareid_ext.retrieval.rerank import Rerank

_MAX_REPEATS = 10_000


@dataclass(frozen=True)
class RepeatedMetrics:
    """The results of several random draws. ``print`` shows their mean and spread as a table, in percent.

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

    def cells(self) -> dict[str, str]:
        """The columns of a table by name: the number of draws, and mean ± standard deviation in percent."""
        std = self.std()
        return {
            "draws": str(len(self.runs)),
            **{name: f"{100 * value:.2f} ± {100 * std[name]:.2f}" for name, value in self.mean().items()},
        }

    def __str__(self) -> str:
        return results_table({"": self})


_Result = TypeVar("_Result")


class ByViewpoint(dict[int, _Result]):
    """Results by the numbers that the viewpoints were given as, in order; ``print`` shows a table, in percent.

    Attributes:
        names: what the viewpoints 0, 1, ... are called there.
    """

    def __init__(self, names: Sequence[str] = VIEWPOINTS) -> None:
        super().__init__()
        self.names = tuple(names)

    def __str__(self) -> str:
        return results_table({viewpoint_name(view, self.names): result for view, result in self.items()})


def _images(
    feature: Any,
    identity: Any,
    viewpoint: Any,
    camera: Any,
    columns: Mapping[str, Any] | None,
) -> Features:
    if identity is None:
        raise TypeError("identity: None was given; whole numbers are needed")
    tensor = _arrays.to_tensor(feature, "feature")
    if tensor.dim() != 2:
        raise ValueError(f"feature: shape {list(tensor.shape)} was given; [images, D] is needed")
    labels = {"identity": identity, "viewpoint": viewpoint, "camera": camera, **(columns or {})}
    vectors = {
        name: np.full(len(tensor), UNKNOWN) if value is None else label_vector(value, name).cpu().numpy()
        for name, value in labels.items()
    }
    for name, vector in vectors.items():
        if len(vector) != len(tensor):
            raise ValueError(f"{name}: length {len(vector)} was given, expected {len(tensor)} (as feature)")
    return Features(
        feature=tensor, identity=vectors["identity"], camera=vectors["camera"], viewpoint=vectors["viewpoint"],
        columns={name: vectors[name] for name in columns or ()},
    )  # fmt: skip


def _by_viewpoint(
    feature: Any,
    identity: Any,
    viewpoint: Any,
    camera: Any,
    columns: Mapping[str, Any] | None,
    junk_identity: int | None,
) -> Features:
    """The images, those that take no part with viewpoint -1."""
    if viewpoint is None:
        raise TypeError("viewpoint: None was given; whole numbers are needed")
    images = _images(feature, identity, viewpoint, camera, columns)
    taking_part = images.viewpoint >= 0
    if junk_identity is not None:
        taking_part &= images.identity != junk_identity
    if not taking_part.any():
        raise ValueError("viewpoint: no image has a known viewpoint (>= 0)")
    return replace(images, viewpoint=np.where(taking_part, images.viewpoint, UNKNOWN))


def _evaluate(
    images: Features, query: np.ndarray, gallery: np.ndarray, like: Any, exclude: str | None, **options: Any
) -> RankingMetrics:
    """Some images against others, the curve in the kind of array of `like`."""
    ours, theirs = images.select(query), images.select(gallery)
    labels = label_arguments(ours, theirs, exclude)
    metrics = evaluate_features(ours.feature, theirs.feature, **labels, **options)
    return replace(metrics, cmc=_arrays.returner(like)(metrics.cmc))


def evaluate_drawn_gallery(
    feature: Any,
    identity: Any,
    camera: Any = None,
    *,
    viewpoint: Any = None,
    exclude: str | None = None,
    columns: Mapping[str, Any] | None = None,
    repeats: int = 10,
    seed: int = 0,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
) -> RepeatedMetrics:
    """Retrieval in a gallery of one random image of each identity, for which all others ask; repeated.

    Args:
        feature: [N, D], the query and the gallery images together.
        identity: ``[N]`` whole numbers.
        camera: ``[N]`` whole numbers or None.
        viewpoint: ``[N]`` whole numbers or None; ``exclude`` can name it.
        exclude: which gallery images are left out, as in :func:`evaluate_ranking`.
        columns: what ``exclude`` can name beside identity, camera and viewpoint, by name: ``[N]`` whole numbers.
        repeats: random draws, 1 to 10,000.
        seed: of the first draw, 0 to 2^63 - 1; the next have the next ones.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        max_rank: as in :func:`evaluate_features`.
        junk_identity: images of this identity take no part; None for none.

    Returns:
        The :class:`RepeatedMetrics`, with curves in feature's kind of array.

    Raises:
        ValueError: as :func:`evaluate_features`; ``repeats`` or ``seed`` out of range; no identity has two images.

    Source: Liu et al., "Deep Relative Distance Learning: Tell the Difference Between Similar Vehicles", CVPR 2016.
    """
    repeats = check_count("repeats", repeats, 1, _MAX_REPEATS)
    seed = check_count("seed", seed, 0, 2**63 - 1)
    images = _images(feature, identity, viewpoint, camera, columns)
    if junk_identity is not None:
        images = images.select(images.identity != junk_identity)
    if len(np.unique(images.identity)) == len(images):
        raise ValueError("identity: no identity has two images, so that none is left to ask")
    runs = []
    for number in range(seed, seed + repeats):
        drawn = one_of_each(images.identity, np.random.default_rng(number))
        runs.append(
            _evaluate(images, ~drawn, drawn, feature, exclude=exclude, metric=metric, rerank=rerank, max_rank=max_rank)
        )
    return RepeatedMetrics(tuple(runs))


def evaluate_single_viewpoint(
    feature: Any,
    identity: Any,
    viewpoint: Any,
    camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Mapping[str, Any] | None = None,
    repeats: int = 10,
    seed: int = 0,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
    names: Sequence[str] = VIEWPOINTS,
) -> ByViewpoint[RepeatedMetrics]:
    """Retrieval among the images of one viewpoint.

    For every viewpoint v, on the images D_v that have it: one random image of each identity is a query, the rest is
    the gallery; this is repeated, and the mean and the spread are reported.

    Args:
        feature: [N, D], the query and the gallery images together.
        identity: ``[N]`` whole numbers.
        viewpoint: ``[N]`` whole numbers >= 0; images of unknown viewpoint (-1) take no part.
        camera: ``[N]`` whole numbers or None.
        exclude: which gallery images are left out, as in :func:`evaluate_ranking`.
        columns: what ``exclude`` can name beside identity, camera and viewpoint, by name: ``[N]`` whole numbers.
        repeats: random draws, 1 to 10,000.
        seed: of the draws, 0 to 2^63 - 1; the same seed draws the same queries everywhere.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        max_rank: as in :func:`evaluate_features`.
        junk_identity: images of this identity take no part; None for none.
        names: what the viewpoints 0, 1, ... are called when the result is printed.

    Returns:
        For each viewpoint that occurs, by its number and in order, its :class:`RepeatedMetrics`, with curves in
        feature's kind of array.

    Raises:
        ValueError: as :func:`evaluate_features`; ``repeats`` or ``seed`` out of range; a viewpoint in which no
            query has a match.

    Source: the supplement of Zhu et al., "Viewpoint-Aware Loss with Angular Regularization for Person
    Re-Identification", AAAI 2020.
    """
    repeats = check_count("repeats", repeats, 1, _MAX_REPEATS)
    seed = check_count("seed", seed, 0, 2**63 - 1)
    images = _by_viewpoint(feature, identity, viewpoint, camera, columns, junk_identity)
    generator = np.random.default_rng(seed)
    results: ByViewpoint[RepeatedMetrics] = ByViewpoint(names)
    for view in np.unique(images.viewpoint[images.viewpoint >= 0]).tolist():
        members = np.flatnonzero(images.viewpoint == view)
        runs = []
        for _ in range(repeats):
            is_query = one_of_each(images.identity[members], generator)
            query, gallery = members[is_query], members[~is_query]
            if len(gallery) == 0:
                raise ValueError(f"viewpoint: {view} has one image of each identity, so that no gallery is left")
            runs.append(
                _evaluate(
                    images, query, gallery, feature, exclude=exclude, metric=metric, rerank=rerank, max_rank=max_rank
                )
            )
        results[view] = RepeatedMetrics(tuple(runs))
    return results


def evaluate_cross_viewpoint(
    feature: Any,
    identity: Any,
    viewpoint: Any,
    camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Mapping[str, Any] | None = None,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    max_rank: int = 50,
    junk_identity: int | None = -1,
    names: Sequence[str] = VIEWPOINTS,
) -> ByViewpoint[RankingMetrics]:
    """Retrieval from one viewpoint in the others: for every viewpoint, its images are queries, the rest is the gallery.

    Args:
        feature: [N, D], the query and the gallery images together.
        identity: ``[N]`` whole numbers.
        viewpoint: ``[N]`` whole numbers >= 0; images of unknown viewpoint (-1) take no part.
        camera: ``[N]`` whole numbers or None.
        exclude: which gallery images are left out, as in :func:`evaluate_ranking`.
        columns: what ``exclude`` can name beside identity, camera and viewpoint, by name: ``[N]`` whole numbers.
        metric: as in :func:`evaluate_features`.
        rerank: as in :func:`evaluate_features`.
        max_rank: as in :func:`evaluate_features`.
        junk_identity: images of this identity take no part; None for none.
        names: what the viewpoints 0, 1, ... are called when the result is printed.

    Returns:
        For each viewpoint that occurs, by its number and in order, its :class:`RankingMetrics`, with a curve in
        feature's kind of array.

    Raises:
        ValueError: as :func:`evaluate_features`; only one viewpoint occurs.

    Source: the supplement of Zhu et al., "Viewpoint-Aware Loss with Angular Regularization for Person
    Re-Identification", AAAI 2020.
    """
    images = _by_viewpoint(feature, identity, viewpoint, camera, columns, junk_identity)
    views = np.unique(images.viewpoint[images.viewpoint >= 0]).tolist()
    if len(views) < 2:
        raise ValueError(f"viewpoint: only {views[0]} occurs; two are needed")
    results: ByViewpoint[RankingMetrics] = ByViewpoint(names)
    for view in views:
        query = images.viewpoint == view
        gallery = (images.viewpoint >= 0) & ~query
        results[view] = _evaluate(
            images, query, gallery, feature, exclude=exclude, metric=metric, rerank=rerank, max_rank=max_rank
        )
    return results
