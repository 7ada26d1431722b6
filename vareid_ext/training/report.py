"""What is told of a run and its results: tables on the terminal, entries of metrics.json, rows of the figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext._text import table
from vareid_ext.config import Config, OptimizerConfig
from vareid_ext.data import PKSampler, ReidData
from vareid_ext.training.command_line import Request, pairs
from vareid_ext.training.extraction import Features, Scores
from vareid_ext.training.figures import TOP, choose_queries, draw_curves, draw_ranking
from vareid_ext.training.run_folder import RunFolder
from vareid_ext.training.schedule import learning_rate, view_weight
from vareid_ext.training.state import Progress, TrainingState

METRIC_NAMES = ("mAP", "mINP", "rank1", "rank5", "rank10")
"""The entries of every set of metrics, all fractions in [0, 1]."""

LABELS = {
    "raw_pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "untrained": "untrained",
    "trained": "trained",
    "reranked": "trained, re-ranked",
}
"""What the entries of metrics.json are called in tables and figures."""


def metrics_of(scores: Scores) -> dict[str, float]:
    """The entry of metrics.json for a set of scores."""
    values = scores.overall.as_dict()
    return {name: values[name] for name in METRIC_NAMES}


def per_viewpoint(scores: Scores) -> dict[str, dict[str, float]]:
    """The entry of metrics.json for a set of scores, per query viewpoint."""
    return {
        name: {"queries": metrics.num_valid_queries, **{key: metrics.as_dict()[key] for key in METRIC_NAMES}}
        for name, metrics in scores.by_viewpoint.items()
    }


def one_line(name: str, values: Mapping[str, float]) -> str:
    """A set of metrics as a line of text."""
    return f"{name:<17} mAP {100 * values['mAP']:5.1f} %   rank-1 {100 * values['rank1']:5.1f} %"


def introduction(
    request: Request, folder: RunFolder, data: ReidData, state: TrainingState, device: torch.device, sampler: PKSampler
) -> str:
    """What a run is about to do, in lines of text."""
    config, loss = request.config, state.loss
    parts = [{"adaptive": "L_y", "uniform": "LSR", "none": "cross entropy"}[config.loss.smoothing]]
    parts += [f"{config.loss.view_weight:g} L_v"] * loss.use_viewpoint
    parts += [f"{config.loss.beta:g} L_R"] * loss.use_regularizer
    parts += ["stripes", f"{config.loss.triplet_weight:g} triplet"] if config.model.local else []
    size = sum(p.numel() for p in state.model.parameters()) / 1e6
    size_and_input = f"{size:.2f} M parameters, {config.data.height} x {config.data.width} images"
    epochs, batches = config.optimizer.epochs, sampler.batches_per_epoch
    images = f"{sampler.identities_per_batch} identities x {sampler.instances} images"
    losses = "native" if _native.available(device) else "PyTorch"
    lines = [
        data.summary(),
        "",
        f"recipe   {request.name}",
        f"network  {config.model.backbone}, {size_and_input}, feature length {state.model.feature_dim}",
        f"loss     {' + '.join(parts)}",
        f"training {epochs} epochs of {batches} steps, {epochs * batches} in all, of {images}",
        f"device   {device}, {torch.get_num_threads()} threads, losses: {losses}",
        f"output   {folder.path}",
    ]
    if state.model.left_out:
        left_out = textwrap.shorten(", ".join(state.model.left_out), 80)
        lines += [f"weights  {len(state.model.left_out)} entries of {config.model.weights} left out: {left_out}"]
    if state.restored is not None:
        lines += [f"resumed  at step {state.progress.step}", *_changes(state.restored, config, state.progress, batches)]
    return "\n".join([*lines, ""])


def _changes(before: Mapping[str, Any], config: Config, progress: Progress, batches: int) -> list[str]:
    """What a resumed run does otherwise than the configuration `before` said, in lines of text."""
    old, new = dict(pairs(before)), dict(pairs(config.plain()))
    names = [name for name in new if name in old and new[name] != old[name]]
    lines = [f"changed  {name}: {new[name]!r} now, {old[name]!r} before" for name in names]
    optimizers = (config.optimizer, OptimizerConfig(**before["optimizer"]))
    now, then = (learning_rate(optimizer, progress.step / batches) for optimizer in optimizers)
    if now != then:
        lines.append(f"schedule the learning rate goes on at {now:.3g}; it was to go on at {then:.3g}")
    return lines


def closing_tables(results: Mapping[str, Mapping[str, float]], trained: Scores, reranked: Scores) -> str:
    """The tables a run ends with, in percent: every entry of results, and the trained network per query viewpoint."""
    rows = [(LABELS[name], *(f"{100 * values[key]:.1f}" for key in METRIC_NAMES)) for name, values in results.items()]
    overall = table(("%", "mAP", "mINP", "rank-1", "rank-5", "rank-10"), rows)
    per_view = [
        (
            name,
            f"{before.num_valid_queries}",
            *(f"{100 * value:.1f}" for value in (before.mAP, before.rank1, after.mAP, after.rank1)),
        )
        for name, before in trained.by_viewpoint.items()
        for after in [reranked.by_viewpoint[name]]
    ]
    if not per_view:
        return overall
    header = ("query viewpoint, %", "queries", "mAP", "rank-1", "re-ranked mAP", "rank-1")
    return f"{overall}\n\n{table(header, per_view)}"


def draw_figures(
    config: Config,
    data: ReidData,
    progress: Progress,
    folder: RunFolder,
    name: str,
    features: tuple[Features, Features],
    rankings: Mapping[str, tuple[Tensor, Scores]],
) -> None:
    """Draw curves.png and ranking.png into the run folder.

    Args:
        config, data, progress, folder, name: of the run.
        features: of query and gallery.
        rankings: distances [Q, G] and their scores, the plain ranking first, the re-ranked one last.
    """
    references = {LABELS[key]: values["mAP"] for key, values in progress.baselines.items()}
    *_, (_, reranked) = rankings.values()
    draw_curves(
        folder.curves,
        [{**entry, "loss": contributions(config, entry)} for entry in folder.read_log() if "loss" in entry],
        [{"epoch": 0, **progress.baselines["untrained"]}, *progress.evaluations],
        {LABELS["reranked"]: reranked.overall.mAP, **references},
        title=f"recipe {name}, data {data.name}, {config.model.backbone}, {config.optimizer.epochs} epochs",
    )
    rows = ranking_rows(rankings, *features, config.evaluation.ranking_queries)
    title = f"{data.name}: queries and the first {TOP} images found for them"
    draw_ranking(folder.ranking, data.query, data.gallery, rows, title=title)


def ranking_rows(
    rankings: Mapping[str, tuple[Tensor, Scores]], query: Features, gallery: Features, count: int
) -> list[tuple[int, list[tuple[str, np.ndarray, float]]]]:
    """The rows of ranking.png: chosen queries, and for each ranking its order under the protocol and its AP."""
    first, *_ = (scores for _, scores in rankings.values())
    precision = {name: np.asarray(scores.queries.average_precision.cpu()) for name, (_, scores) in rankings.items()}
    chosen = choose_queries(
        query.viewpoint,
        np.asarray(first.queries.average_precision.cpu()),
        np.asarray(first.queries.num_matches.cpu()) > 0,
        count,
    )
    rows = []
    for q in chosen:
        left_out = (
            (gallery.identity == query.identity[q]) & (gallery.camera == query.camera[q]) & (query.camera[q] >= 0)
        )
        orders = []
        for name, (distances, _) in rankings.items():
            order = torch.argsort(distances[q], stable=True).cpu().numpy()
            orders.append((name, order[~left_out[order]], float(precision[name][q])))
        rows.append((q, orders))
    return rows


def contributions(config: Config, entry: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a logged loss times their weights at the time: what the total is the sum of."""
    # A step logged at the end of an epoch belongs to that epoch, whose number its own fraction has just passed.
    weights = {
        "viewpoint": view_weight(config.loss, math.ceil(entry["epoch"]) - 1),
        "regularizer": config.loss.beta,
        "stripes": config.loss.stripe_weight,
        "triplet": config.loss.triplet_weight,
    }
    return {name: weights.get(name, 1.0) * value for name, value in entry["loss"].items()}
