"""The two pictures of a run folder: curves.png and ranking.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vareid_ext.checkpoint import atomic_file
from vareid_ext.data import VIEWPOINTS, ImageList

_INK, _GREY, _GRID = "#22262b", "#7a828c", "#e4e7eb"
_RIGHT, _WRONG, _QUERY = "#2a9d55", "#d1393d", "#22262b"
_COLOURS = {"total": "#22262b", "identity": "#2f6fb7", "viewpoint": "#d98a1f", "regularizer": "#3b9c6d"}
_COLOURS.update(triplet="#8b5fbf", stripes="#b5485d")
_NAMES = {
    "total": "total",
    "identity": "identity $L_y$",
    "viewpoint": "viewpoint $L_v$",
    "regularizer": "centres $L_R$",
    "triplet": "triplet",
    "stripes": "stripes",
}
_TOP = 10


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _style(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold", pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=_GREY)
    axes.tick_params(labelsize=9, colors=_GREY, length=0)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)


def draw_curves(
    path: Path,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
    *,
    title: str,
) -> None:
    """Draw the losses, the learning rate and the accuracy of a run over its epochs, and write them as PNG.

    Args:
        path: the file.
        steps: one mapping per logged step: "epoch" (a fraction), "lr" and "loss", a mapping of part to value.
        evaluations: one mapping per evaluation: "epoch", "mAP" and "rank1", fractions.
        references: mAP of what the run is compared with, by name; drawn as horizontal lines.
        title: of the whole figure.
    """
    figure = Figure(figsize=(13, 4.2), dpi=110, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=10, color=_GREY)
    loss_axes, rate_axes, accuracy_axes = figure.subplots(1, 3)

    _style(loss_axes, "Loss", "epoch")
    epochs = np.array([step["epoch"] for step in steps])
    for name, colour in _COLOURS.items():
        values = np.array([step["loss"].get(name, math.nan) for step in steps], dtype=float)
        if len(values) and np.isfinite(values).any() and np.nanmax(np.abs(values)) > 0:
            width = 2.0 if name == "total" else 1.3
            loss_axes.plot(epochs, values, color=colour, linewidth=width, label=_NAMES[name])
    if loss_axes.lines:
        loss_axes.set_ylim(bottom=0)
        loss_axes.legend(fontsize=9, frameon=False, labelcolor=_INK)

    _style(rate_axes, "Learning rate", "epoch")
    rate_axes.plot(epochs, [step["lr"] for step in steps], color=_INK, linewidth=1.6)
    if len(steps):
        rate_axes.set_ylim(bottom=0)
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        rate_axes.yaxis.get_offset_text().set(size=9, color=_GREY)

    _style(accuracy_axes, "Accuracy on query and gallery, %", "epoch")
    points = [e["epoch"] for e in evaluations]
    for key, label, colour in (("rank1", "rank-1", "#9db4cf"), ("mAP", "mAP", "#2f6fb7")):
        values = np.array([100 * e[key] for e in evaluations])
        accuracy_axes.plot(points, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
        if len(values):
            accuracy_axes.annotate(
                f"{values[-1]:.1f}", (points[-1], values[-1]), textcoords="offset points", xytext=(6, -3), fontsize=9, color=_INK
            )
    styles = ((0, (6, 2)), (0, (2, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
    for (name, value), style in zip(references.items(), styles, strict=False):
        accuracy_axes.axhline(100 * value, color=_GREY, linewidth=1.1, linestyle=style, label=f"{name}, mAP {100 * value:.1f}")
    accuracy_axes.set_ylim(0, 100)
    accuracy_axes.legend(fontsize=9, frameon=False, labelcolor=_INK)
    _save(figure, path)


def choose_queries(viewpoint: np.ndarray, average_precision: np.ndarray, countable: np.ndarray, count: int) -> list[int]:
    """Queries to show: the viewpoints in turn, and within each a good, a middling and a poor one.

    Args:
        viewpoint: [Q], -1 unknown.
        average_precision: [Q].
        countable: bool [Q], queries that have a match.
        count: how many at most.

    Returns:
        Query indices, ordered by viewpoint, the better first.
    """
    groups = [np.flatnonzero(countable & (viewpoint == label)) for label in np.unique(viewpoint[countable])]
    groups = [group[np.lexsort((group, -average_precision[group]))] for group in groups if len(group)]
    chosen: set[int] = set()
    quantiles = (0.25, 0.85, 0.5, 0.97, 0.05, 0.7, 0.35)
    for round_number in range(count):
        for group in groups:
            if len(chosen) < count:
                at = quantiles[round_number % len(quantiles)] * (len(group) - 1)
                rest = [int(i) for i in group if int(i) not in chosen]
                if rest:
                    wanted = int(group[round(at)])
                    chosen.add(wanted if wanted not in chosen else rest[0])
    position = {int(q): (g, i) for g, group in enumerate(groups) for i, q in enumerate(group)}
    return sorted(chosen, key=lambda q: position[q])


def _viewpoint_text(images: ImageList, index: int) -> str:
    name = images.viewpoint_name[index]
    label = int(images.viewpoint[index])
    return name.replace("_", "-") if name else VIEWPOINTS[label] if label >= 0 else "unknown"


def _draw_image(axes: Axes, picture: Image.Image, colour: str, caption: str) -> None:
    axes.imshow(np.asarray(picture), aspect="auto", interpolation="lanczos")
    axes.add_patch(
        Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=3.2, clip_on=False)
    )
    axes.set_xlabel(caption, fontsize=7.5, color=colour, labelpad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_ranking(
    path: Path,
    query: ImageList,
    gallery: ImageList,
    rows: Sequence[tuple[int, Sequence[tuple[str, np.ndarray, float]]]],
    *,
    title: str,
) -> None:
    """Draw queries with the first images of their rankings, right and wrong ones framed, and write them as PNG.

    Args:
        path: the file.
        query: the query images.
        gallery: the gallery images.
        rows: per query its index and its rankings: (name, gallery indices nearest first without those the protocol
            leaves out, average precision in [0, 1]). The first 10 are shown.
        title: of the whole figure.
    """
    first = query.load(rows[0][0]) if rows else Image.new("RGB", (1, 2))
    aspect = min(max(first.height / first.width, 0.75), 3.0)
    lines = [(q, name, order, ap, i == 0) for q, rankings in rows for i, (name, order, ap) in enumerate(rankings)]
    width, cell = 13.2, 0.93
    height = cell * aspect + 0.27
    figure = Figure(figsize=(width, max(len(lines), 1) * height + 0.75), dpi=100, facecolor="white")
    total = figure.get_figheight()
    figure.text(0.012, 1 - 0.28 / total, title, fontsize=11, color=_INK, fontweight="bold", va="center")
    legend = ((_RIGHT, "same identity"), (_WRONG, "another identity"))
    for i, (colour, text) in enumerate(legend):
        figure.text(0.74 + 0.12 * i, 1 - 0.28 / total, f"\u25a0 {text}", fontsize=9, color=colour, va="center")
    step = (width - 2.75) / _TOP
    for line, (q, name, order, ap, is_first) in enumerate(lines):
        top = 0.55 + line * height
        bottom = (total - top - cell * aspect) / total

        def place(left: float, bottom: float = bottom) -> Axes:
            return figure.add_axes((left / width, bottom, cell / width, cell * aspect / total))

        if is_first:
            _draw_image(place(0.15), query.load(q), _QUERY, f"query, {_viewpoint_text(query, q)}")
            if line:
                y = 1 - (top - 0.03) / total
                figure.add_artist(_rule(y))
        figure.text(1.25 / width, bottom + cell * aspect / total / 2, f"{name}\nAP {100 * ap:.0f} %", fontsize=9, va="center",
                    color=_INK, linespacing=1.5)  # fmt: skip
        for rank, index in enumerate(order[:_TOP]):
            right = gallery.identity[index] == query.identity[q]
            colour = _RIGHT if right else _WRONG
            left = 2.5 + rank * step
            _draw_image(place(left), gallery.load(int(index)), colour, f"{rank + 1} \u00b7 {_viewpoint_text(gallery, int(index))}")
    _save(figure, path)


def _rule(y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([0.012, 0.988], [y, y], color=_GRID, linewidth=1)
