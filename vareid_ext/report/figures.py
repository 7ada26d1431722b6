"""The pictures of a run, curves.png and ranking.png, and the one of several runs beside each other."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from vareid_ext._text import viewpoint_name
from vareid_ext.data import ImageList
from vareid_ext.files.atomic import atomic_file

_INK, _GREY, _GRID = "#22262b", "#7a828c", "#e4e7eb"
_RIGHT, _WRONG = "#2a9d55", "#d1393d"
_COLOURS = ("#2f6fb7", "#d98a1f", "#3b9c6d", "#8b5fbf", "#b5485d", "#4aa3a2", "#a0703a")
_DASHES = ((0, (6, 2)), (0, (2, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
TOP = 10
"""Images of a ranking that are shown."""


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
        steps: one mapping per logged step: "epoch" (a fraction), "lr" and "loss", a mapping of term to what it adds to
            the total.
        evaluations: one mapping per evaluation: "epoch", "mAP" and "rank1", fractions.
        references: mAP of what the run is compared with, by name; drawn as level lines.
        title: of the whole figure.
    """
    figure = Figure(figsize=(13, 4.6), dpi=110, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=10, color=_GREY)
    loss_axes, rate_axes, accuracy_axes = figure.subplots(1, 3)

    _style(loss_axes, "Loss, as its parts add up", "epoch")
    epochs = [step["epoch"] for step in steps]
    names = list(dict.fromkeys(name for step in steps for name in step["loss"] if name != "total"))
    colours = dict(zip(names, itertools.cycle(_COLOURS)))
    for name in ("total", *names):
        values = [step["loss"].get(name, math.nan) for step in steps]
        if any(math.isfinite(value) and value > 0 for value in values):
            width = 2.0 if name == "total" else 1.3
            loss_axes.plot(epochs, values, color=colours.get(name, _INK), linewidth=width, label=name)
    if loss_axes.lines:
        # A regularizer may start tens of times above the other terms and end far below them.
        loss_axes.set_yscale("log")
        loss_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        loss_axes.yaxis.set_minor_locator(NullLocator())
    _legend(loss_axes)

    rates = np.array([step["lr"] for step in steps])
    exponent = math.floor(math.log10(rates.max())) if len(rates) and rates.max() > 0 else 0
    _style(rate_axes, f"Learning rate, $10^{{{exponent}}}$", "epoch")
    rate_axes.plot(epochs, rates / 10.0**exponent, color=_INK, linewidth=1.6)
    rate_axes.set_ylim(bottom=0)

    _style(accuracy_axes, "Accuracy on query and gallery, %", "epoch")
    points = [e["epoch"] for e in evaluations]
    for key, text, colour in (("rank1", "rank-1", "#9db4cf"), ("mAP", "mAP", "#2f6fb7")):
        values = [100 * e[key] for e in evaluations]
        shown = f"{text} {values[-1]:.1f}" if values else text
        accuracy_axes.plot(points, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=shown)
    for (name, value), style in zip(references.items(), itertools.cycle(_DASHES)):
        shown = f"{name} {100 * value:.1f}"
        accuracy_axes.axhline(100 * value, color=_GREY, linewidth=1.1, linestyle=style, label=shown)
    accuracy_axes.set_ylim(0, 100)
    _legend(accuracy_axes)
    _save(figure, path)


def draw_comparison(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw the mAP and rank-1 of rows beside each other, each run a dot and their mean a bar, and write them as PNG.

    Args:
        path: the file.
        rows: as :func:`vareid_ext.training.ablation.results` gives them; published scores are drawn as rings.
        title: of the whole figure.
    """
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(rows)), dpi=110, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=10, color=_GREY)
    for axes, (name, label) in zip(
        figure.subplots(1, 2, sharey=True), (("mAP", "mAP, %"), ("rank1", "rank-1, %")), strict=True
    ):
        _style(axes, label, "")
        for place, row in enumerate(rows):
            values = [100 * run[name] for run in row["runs"].values()]
            if values:
                axes.barh(place, 100 * row["mean"][name], height=0.55, color=_COLOURS[0], alpha=0.35)
                axes.plot(values, [place] * len(values), "o", color=_COLOURS[0], markersize=4)
            if row["published"]:
                score = 100 * row["published"][name]
                axes.plot(score, place, "o", color=_COLOURS[1], markerfacecolor="none", markersize=7)
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    _save(figure, path)


def _legend(axes: Axes) -> None:
    if axes.lines:
        axes.legend(
            fontsize=9, frameon=False, labelcolor=_INK, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14)
        )


def _viewpoint_text(images: ImageList, index: int) -> str:
    name = images.viewpoint_name[index]
    label = int(images.viewpoint[index])
    plain = name and ":" not in name  # not weights of viewpoints
    return name.replace("_", "-") if plain else viewpoint_name(label, images.viewpoints)


def _draw_image(axes: Axes, picture: Image.Image, colour: str, caption: str) -> None:
    axes.imshow(np.asarray(picture), aspect="auto", interpolation="lanczos")
    axes.add_patch(
        Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2.6, clip_on=False)
    )
    axes.set_xlabel(caption, fontsize=6.5, color=colour, labelpad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_ranking(
    path: Path,
    query: ImageList,
    gallery: ImageList,
    rows: Sequence[tuple[int, Sequence[tuple[str, Sequence[int], float]]]],
    *,
    title: str,
) -> None:
    """Draw queries with the first images of their rankings, right and wrong ones framed, and write them as PNG.

    Args:
        path: the file.
        query: the query images.
        gallery: the gallery images.
        rows: per query its index and its rankings, the same ones for every query: (name, gallery indices nearest first
            without those the protocol leaves out, average precision in [0, 1]). The first 10 are shown.
        title: of the whole figure.
    """
    first = query.load(rows[0][0]) if rows else Image.new("RGB", (1, 2))
    cell_width = 0.6
    cell_height = cell_width * min(max(first.height / first.width, 0.75), 3.0)
    names = [name for name, _, _ in rows[0][1]] if rows else []
    # Inches: margins, the query's column, and a block of ten columns for each ranking.
    step, block_gap, top, row_height = cell_width + 0.09, 0.34, 0.86, cell_height + 0.45
    block_lefts = [0.2 + cell_width + block_gap + i * (TOP * step - 0.09 + block_gap) for i in range(len(names))]
    width = max([left + TOP * step for left in block_lefts], default=6.0) + 0.12
    height = top + len(rows) * row_height + 0.05
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="center", **{"fontsize": 8.5, "color": _INK, **style})

    def place(x: float, y: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + cell_height) / height, cell_width / width, cell_height / height))

    write(0.2, 0.24, title, fontsize=11, fontweight="bold")
    write(width - 2.75, 0.24, "\u25a0 same identity", color=_RIGHT)
    write(width - 1.45, 0.24, "\u25a0 another identity", color=_WRONG)
    write(0.2, 0.6, "query", fontweight="bold")
    for left, name in zip(block_lefts, names, strict=True):
        write(left, 0.6, name, fontweight="bold")
    for line, (q, rankings) in enumerate(rows):
        y = top + line * row_height
        figure.add_artist(
            Line2D([0.2 / width, 1 - 0.2 / width], [1 - (y - 0.08) / height] * 2, color=_GRID, linewidth=1)
        )
        image_y = y + 0.18
        _draw_image(place(0.2, image_y), query.load(q), _INK, _viewpoint_text(query, q))
        for left, (_, order, precision) in zip(block_lefts, rankings, strict=True):
            write(left, y + 0.05, f"AP {100 * precision:.0f} %", fontsize=7.5, color=_GREY)
            for rank, index in enumerate(order[:TOP]):
                colour = _RIGHT if gallery.identity[index] == query.identity[q] else _WRONG
                axes = place(left + rank * step, image_y)
                _draw_image(axes, gallery.load(index), colour, _viewpoint_text(gallery, index))
    _save(figure, path)


_VERDICTS = {"yes": _RIGHT, "no": _WRONG, "unsure": _COLOURS[1], "": _INK}


def draw_results(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[Image.Image | None, Sequence[tuple[Image.Image | None, str, str]]]],
    *,
    title: str,
) -> None:
    """Draw queries and the images that a search has found for them, and write them as PNG.

    Args:
        path: the file.
        rows: of each query its image and, of each that was found, the image, a caption, and "yes", "no", "unsure" (the
            colour of its frame) or "". None is an image that cannot be read.
        title: of the whole figure.
    """
    first = next((image for query, found in rows for image in (query, *(f[0] for f in found)) if image), None)
    cell_width = 0.8
    cell_height = cell_width * (2 if first is None else min(max(first.height / first.width, 0.75), 3.0))
    step, top, row_height, left = cell_width + 0.1, 0.5, cell_height + 0.4, cell_width + 0.5
    width = max(4.0, left + step * max((len(found) for _, found in rows), default=0) + 0.1)
    height = top + len(rows) * row_height
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    figure.text(0.15 / width, 1 - 0.25 / height, title, va="center", fontsize=10, color=_INK, fontweight="bold")
    for line, (query, found) in enumerate(rows):
        cells = [(0.15, query, "query", ""), *((left + i * step, *cell) for i, cell in enumerate(found))]
        for x, image, caption, same in cells:
            y = 1 - (top + line * row_height + cell_height) / height
            axes = figure.add_axes((x / width, y, cell_width / width, cell_height / height))
            caption = f"{caption}  {same}" if same else caption
            _draw_image(axes, image or Image.new("RGB", (1, 2), _GRID), _VERDICTS[same], caption)
            if image is None:
                axes.text(0.5, 0.5, "missing", transform=axes.transAxes, ha="center", fontsize=7, color=_GREY)
    _save(figure, Path(path))
