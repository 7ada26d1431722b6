"""The plots of a page as SVG in the page's own colours, which are variables of its style sheet."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vareid_ext._text import viewpoint_name
from vareid_ext.metrics import VerificationMetrics
from vareid_ext.report.feature_map import FeatureMap
from vareid_ext.report.measure import distance_histogram

SERIES = 8
"""Colours of lines and identities in the style sheet: --s1 to --s8."""

# Matplotlib is given these, and the SVG has variables in their place.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_COLOURS = [f"#0a0a{i:02x}" for i in range(1, SERIES + 1)]
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(_COLOURS, 1)
}
_DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = {0: "o", 1: "s", 2: "^", 3: "D", 4: "v", 5: "P", 6: "<", 7: ">"}
_MARKER_NAMES = {
    "o": "disc", "s": "square", "^": "triangle", "D": "diamond", "v": "triangle down", "P": "plus",
    "<": "triangle left", ">": "triangle right", "X": "cross",
}  # fmt: skip
_MOST_POINTS = 400


class Plot(NamedTuple):
    """A plot for the template."""

    svg: str
    title: str
    description: str
    """what it shows, with its numbers, for who does not see it"""


def _axes(title_x: str, title_y: str, *, width: float = 4.4, height: float = 3.1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(title_x, color=_MUTED)
    axes.set_ylabel(title_y, color=_MUTED)
    axes.tick_params(colors=_MUTED, length=0)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)
    return figure, axes


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9, **options)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page; `name` keeps its ids apart from those of other plots."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r"font: (\S+) '[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % SERIES], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.8}


def _label(name: str) -> str:
    """A name for a legend: short, without formulas, and shown, which Matplotlib's are not that begin with "_"."""
    short = name if len(name) <= 26 else f"\u2026{name[-25:]}"
    return f"\u200b{short}".replace("$", r"\$")


def _thinned(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(int))


def loss_plot(steps: Sequence[Mapping[str, Any]], name: str) -> Plot:
    """The terms of the loss, as they add up, over the epochs."""
    figure, axes = _axes("epoch", "loss")
    steps = [steps[i] for i in _thinned(len(steps))]
    epochs = [step["epoch"] for step in steps]
    terms = list(dict.fromkeys(term for step in steps for term in step["loss"]))
    said = []
    for number, term in enumerate(terms):
        values = [step["loss"].get(term, math.nan) for step in steps]
        if any(math.isfinite(value) and value > 0 for value in values):
            axes.plot(epochs, values, label=term, **_style(number))
        said.append(f"{term} from {values[0]:.3g} to {values[-1]:.3g}")
    axes.set_yscale("log")
    _legend(axes)
    return Plot(_svg(figure, f"loss {name}"), "Loss", f"Loss over {epochs[-1]:g} epochs: {', '.join(said)}.")


def rate_plot(steps: Sequence[Mapping[str, Any]], name: str) -> Plot:
    """The learning rate over the epochs."""
    figure, axes = _axes("epoch", "learning rate")
    steps = [steps[i] for i in _thinned(len(steps))]
    rates = [step["lr"] for step in steps]
    axes.plot([step["epoch"] for step in steps], rates, **_style(0))
    axes.set_ylim(bottom=0)
    said = f"Learning rate from {rates[0]:.3g}, at most {max(rates):.3g}, to {rates[-1]:.3g}."
    return Plot(_svg(figure, f"rate {name}"), "Learning rate", said)


def accuracy_plot(evaluations: Sequence[Mapping[str, Any]], name: str) -> Plot:
    """mAP and rank-1 over the epochs."""
    figure, axes = _axes("epoch", "%")
    epochs, said = [entry["epoch"] for entry in evaluations], []
    for number, (key, label) in enumerate((("mAP", "mAP"), ("rank1", "rank-1"))):
        values = [100 * entry[key] for entry in evaluations]
        axes.plot(epochs, values, label=label, marker="os"[number], markersize=4, **_style(number))
        said.append(f"{label} from {values[0]:.1f} to {values[-1]:.1f} %")
    axes.set_ylim(bottom=0)
    _legend(axes)
    title = "Accuracy on query and gallery"
    return Plot(_svg(figure, f"accuracy {name}"), title, f"Over {epochs[-1]:g} epochs {', '.join(said)}.")


def cmc_plot(curves: Mapping[str, np.ndarray]) -> Plot:
    """The CMC curves, by name."""
    figure, axes = _axes("rank", "queries with a match so far, %")
    said = []
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(np.arange(1, len(curve) + 1), 100 * curve, label=_label(name), **_style(number))
        ranks = [f"{100 * curve[r - 1]:.1f} % at rank {r}" for r in (1, 5, 10, 20) if r <= len(curve)]
        said.append(f"{name}: {', '.join(ranks)}.")
    if len(curves) > 1:
        _legend(axes, loc="lower right")
    return Plot(_svg(figure, "cmc"), "CMC", " ".join(said))


def roc_plot(results: Mapping[str, VerificationMetrics]) -> Plot:
    """The ROC curves with the recommended points, by name."""
    figure, axes = _axes("false positive rate", "true positive rate, %")
    said = []
    left = min(1 / result.num_non_matches for result in results.values()) / 2
    for number, (name, result) in enumerate(results.items()):
        _, fpr, tpr = result.roc
        at = _thinned(len(fpr))
        axes.step(fpr[at], 100 * tpr[at], where="post", label=_label(name), **_style(number))
        points = [f"{100 * point.tpr:.1f} % at {point.target:.0e}" for point in result.points]
        text = f"{name}: true positive rate {', '.join(points)}; equal error rate {100 * result.eer:.2f} %"
        if result.recommended is not None:
            best = result.recommended.point
            axes.plot(
                [best.fpr or left], [100 * best.tpr], "D", color=_COLOURS[number % SERIES], markersize=8, clip_on=False,
                markeredgecolor=_INK, label="recommended" if number == len(results) - 1 else None,
            )  # fmt: skip
            text += f"; recommended distance {best.threshold:.4g}: {100 * best.tpr:.1f} % at {best.fpr:.2g}"
            text += "" if best.fpr else " (at the left edge)"
        said.append(f"{text}.")
    axes.set_xscale("log")
    axes.set_xlim(left, 1.2)
    _legend(axes, loc="best")
    return Plot(_svg(figure, "roc"), "ROC", " ".join(said))


def histogram_plot(result: VerificationMetrics, name: str) -> Plot:
    """Distances of the matches and of the non-matches."""
    figure, axes = _axes("distance", "density of the pairs")
    edges, match, non_match = distance_histogram(result)
    for number, (label, share, hatch) in enumerate((("matches", match, "////"), ("non-matches", non_match, ""))):
        axes.stairs(
            share / np.diff(edges), edges, fill=True, facecolor="none" if hatch else _COLOURS[number], hatch=hatch,
            edgecolor=_COLOURS[number], alpha=1 if hatch else 0.45, label=label, linewidth=1.2,
        )  # fmt: skip
    middle = (edges[1:] + edges[:-1]) / 2
    said = [
        f"half of the {count:,} {label} lie below {middle[int((np.cumsum(share) < 0.5).argmin())]:.3g}"
        for label, share, count in (
            ("matches", match, result.num_matches), ("non-matches", non_match, result.num_non_matches)
        )
    ]  # fmt: skip
    if result.recommended is not None:
        threshold = result.recommended.point.threshold
        axes.axvline(threshold, color=_INK, linestyle=_DASHES[1], linewidth=1.4, label="recommended")
        said.append(f"the recommended threshold is {threshold:.4g}")
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    description = f"{name}: {'; '.join(said)}."
    return Plot(_svg(figure, f"histogram {name}"), f"Distances: {name}", description)


def map_plot(found: FeatureMap, name: str, title: str) -> Plot:
    """Images and centres in a plane, coloured by identity, shaped by viewpoint."""
    figure, axes = _axes("", "", width=5.2, height=5.4)
    axes.set_xticklabels([])
    axes.set_yticklabels([])
    identities = np.unique(found.identity)
    shapes = {view: _MARKERS.get(view, "X") for view in sorted(set(found.viewpoint[found.kind != "identity centre"]))}
    for colour, identity in zip(itertools.cycle(_COLOURS), identities):
        for view, marker in shapes.items():
            of = (found.identity == identity) & (found.viewpoint == view)
            for kind, size, edge in (("image", 22, "none"), ("viewpoint centre", 90, _INK)):
                x, y = found.points[of & (found.kind == kind)].T
                axes.scatter(x, y, s=size, c=colour, marker=marker, edgecolors=edge, linewidths=1.2, alpha=0.9)
        x, y = found.points[(found.identity == identity) & (found.kind == "identity centre")].T
        axes.scatter(x, y, s=190, c=colour, marker="*", edgecolors=_INK, linewidths=1.2)
        axes.scatter([], [], s=30, c=colour, marker="o", label=f"identity {viewpoint_name(int(identity), found.names)}")
    for view, marker in shapes.items():
        label = viewpoint_name(int(view), found.viewpoints) if view >= 0 else "view unknown"
        axes.scatter([], [], s=30, facecolors="none", edgecolors=_INK, marker=marker, label=label)
    axes.scatter([], [], s=110, facecolors="none", edgecolors=_INK, marker="*", label="identity centre")
    axes.scatter([], [], s=80, c=_GRID, marker="o", edgecolors=_INK, linewidths=1.2, label="large: view centre")
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
    images = int((found.kind == "image").sum())
    spoken = [f"{viewpoint_name(int(v), found.viewpoints)} {_MARKER_NAMES[m]}" for v, m in shapes.items()]
    said = f"{found.note} {images} images of {len(identities)} identities; shapes: {', '.join(spoken)}."
    return Plot(_svg(figure, f"map {name} {title}"), title, said)


def angle_plot(before: Sequence[np.ndarray] | None, after: Sequence[np.ndarray], name: str) -> Plot:
    """Angles between identity and viewpoint centres, by viewpoint, before and after training."""
    figure, axes = _axes("angle, degrees", "centres, %")
    edges, said = np.linspace(0, 180, 61), []
    for moment, angles, hatch in (("before", before, "////"), ("after", after, "")):
        if angles is None:
            continue
        values = np.concatenate(angles)
        number = int(moment == "after")
        counts = 100 * np.histogram(values, edges)[0] / len(values)
        axes.stairs(
            counts, edges, fill=True, facecolor="none" if hatch else _COLOURS[number], hatch=hatch,
            edgecolor=_COLOURS[number], alpha=1 if hatch else 0.55, label=f"{moment} training",
        )  # fmt: skip
        said.append(
            f"{moment} training {values.min():.1f} to {values.max():.1f} degrees, median {np.median(values):.1f}"
        )
    axes.set_xlim(0, 180)
    axes.set_xticks(range(0, 181, 30))
    _legend(axes)
    return Plot(_svg(figure, f"angles {name}"), "Angles of the centres", f"{name}: {'; '.join(said)}.")
