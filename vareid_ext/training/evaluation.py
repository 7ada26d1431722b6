"""From images to scores: features of a network or of a baseline, distances, ranking metrics, per query viewpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from vareid_ext.data import Batch, ImageList, ReidDataset, collate
from vareid_ext.files.features import Features
from vareid_ext.methods import Method
from vareid_ext.metrics import QueryRanking, RankingMetrics, rank_features, ranked_lists
from vareid_ext.metrics.exclusion import label_arguments
from vareid_ext.retrieval.rerank import Reranker
from vareid_ext.training.signals import ignore_in_worker, postponed

_BASELINE_SIZE = (64, 32)
_HISTOGRAM_BINS = 8
_HISTOGRAM_STRIPES = 3


@dataclass(frozen=True, eq=False)
class Scores:
    """What a ranking is worth.

    Attributes:
        overall: over all queries.
        by_viewpoint: over the queries of each viewpoint that has a countable one, by the viewpoint's name.
        queries: per query.
    """

    overall: RankingMetrics
    by_viewpoint: dict[str, RankingMetrics]
    queries: QueryRanking


def inference_batches(
    method: Method,
    images: ImageList,
    transform: Callable[[Any], Tensor],
    *,
    rows: range | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    workers: int = 0,
    autocast: torch.dtype | None = None,
    compute: Callable[[Batch], Tensor],
) -> Iterator[Tensor]:
    """What a method computes of images, one batch after the other.

    Args:
        method: on `device`; at the end it is in the mode (training or evaluation) it was in.
        images: N of them.
        transform: PIL image -> float32 [3, H, W], without augmentation.
        batch_size: images per batch.
        rows: which of the images; None for all.
        device: where the network is, and where the results stay.
        workers: processes that load images.
        autocast: dtype of mixed precision, None for none.
        compute: of a batch.
    """
    # A generator of its own: a loader without one draws from the global generator, and training would depend on it.
    loader = DataLoader(
        ReidDataset(images, transform),
        batch_size=batch_size,
        sampler=range(len(images)) if rows is None else rows,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=_start_worker,
    )
    with postponed():  # processes that are half started, or half ended below, complain
        batches = iter(loader)
    was_training = method.training
    method.eval()
    try:
        for batch in batches:
            batch = _channels_like(method, batch.to(device, non_blocking=True))
            # Not around the yield: it would hold for whoever takes the results.
            with (
                torch.inference_mode(),
                torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None),
            ):
                result = compute(batch)
            yield result
    finally:
        method.train(was_training)
        with postponed():
            del batches


def extract_features(
    method: Method,
    images: ImageList,
    transform: Callable[[Any], Tensor],
    *,
    flip: bool = False,
    normalize: str = "whole",
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The test features of a method, [n, D] of each batch.

    Args:
        method, images, transform, options: as for :func:`inference_batches`.
        flip, normalize: as in :meth:`vareid_ext.methods.Method.embed`.
        progress: called with the number of further images done after each batch.
    """
    parts = []
    embed = functools.partial(method.embed, flip=flip, normalize=normalize)
    for feature in inference_batches(method, images, transform, compute=embed, **options):
        parts.append(feature)
        if progress is not None:
            progress(len(feature))
    return parts


def _start_worker(worker: int) -> None:
    ignore_in_worker()


def _channels_like(method: Method, batch: Batch) -> Batch:
    weight = next((p for p in method.parameters() if p.ndim == 4), None)
    last = weight is not None and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return replace(
        batch, image=batch.image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    )


def _baseline(images: ImageList, describe: Callable[[Tensor], Tensor]) -> Features:
    def rows() -> Iterator[Tensor]:
        for i in range(len(images)):
            yield describe(TF.pil_to_tensor(images.load(i)))

    return Features.of(F.normalize(torch.stack(list(rows())), dim=1), images, images.paths)


def raw_pixel_features(images: ImageList) -> Features:
    """A baseline: the pixels themselves, at 64 x 32."""

    def describe(image: Tensor) -> Tensor:
        return TF.resize(image, list(_BASELINE_SIZE), antialias=True).float().flatten()

    return _baseline(images, describe)


def colour_histogram_features(images: ImageList) -> Features:
    """A baseline: joint RGB histograms (8 x 8 x 8) of three horizontal stripes, compared by the Hellinger distance."""

    def describe(image: Tensor) -> Tensor:
        bins = (image.long() * _HISTOGRAM_BINS) // 256
        joint = (bins[0] * _HISTOGRAM_BINS + bins[1]) * _HISTOGRAM_BINS + bins[2]
        counts = [
            torch.bincount(part.flatten(), minlength=_HISTOGRAM_BINS**3) for part in joint.chunk(_HISTOGRAM_STRIPES)
        ]
        return torch.cat(counts).float().sqrt()

    return _baseline(images, describe)


def score(query: Features, gallery: Features, rerank: Reranker | None = None, exclude: str | None = None) -> Scores:
    """Ranking metrics of features; no [Q, G] matrix is held.

    Args:
        query, gallery: the two sides.
        rerank: fitted to the two; None for none.
        exclude: which images are left out, as in :func:`vareid_ext.evaluate_ranking`.
    """
    labels = label_arguments(query, gallery, exclude)
    queries = rank_features(query.feature, gallery.feature, **labels, rerank=rerank or False)
    matched = np.asarray(queries.num_matches.cpu()) > 0
    by_viewpoint = {}
    for label, name in enumerate(query.viewpoints):
        subset = query.viewpoint == label
        if (subset & matched).any():
            by_viewpoint[name] = queries.metrics(subset=torch.from_numpy(subset))
    return Scores(queries.metrics(), by_viewpoint, queries)


def metrics_of(scores: Scores) -> dict[str, float]:
    """The entry of metrics.json for a set of scores: mAP, mINP, rank1, rank5 and rank10."""
    return scores.overall.as_dict()


def per_viewpoint(scores: Scores) -> dict[str, dict[str, float]]:
    """The entry of metrics.json for a set of scores, per query viewpoint."""
    return {
        name: {"queries": metrics.num_valid_queries, **metrics.as_dict()}
        for name, metrics in scores.by_viewpoint.items()
    }


def first_found(
    query: Features, gallery: Features, chosen: Sequence[int], count: int, rerank: Reranker | None = None,
    exclude: str | None = None,
) -> list[list[int]]:  # fmt: skip
    """The gallery images that are found first for some queries, as the metrics count: without those left out.

    Args:
        query, gallery: the two sides.
        chosen: numbers of queries.
        count: how many images of each, at most.
        rerank: as in :func:`score`.
        exclude: as in :func:`score`.
    """
    labels = label_arguments(query, gallery, exclude)
    found = ranked_lists(
        query.feature, gallery.feature, **labels, queries=list(chosen), top=count, rerank=rerank or False
    )
    return [images.tolist() for images in found]
