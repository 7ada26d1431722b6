"""A report as one HTML file: the data of its sections, and the template that they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from vareid_ext.metrics import GroupMetrics
from vareid_ext.metrics.comparison import PairedDifference, difference_rows
from vareid_ext.metrics.exclusion import exclusion_text
from vareid_ext.report.history import History
from vareid_ext.report.measure import Measured
from vareid_ext.report.plots import Plot
from vareid_ext.report.tables import LABELS

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table: the first cell of a row names it. Cells of a heat map have a share of colour, in percent."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Tile:
    """An image of a ranked list."""

    kind: str
    """query, right, wrong, missed or junk"""
    label: str
    details: str
    alt: str
    uri: str
    activation: str


@dataclass(frozen=True)
class Ranked:
    """A query and what each of the compared found for it; `outcome` is that of the first of them."""

    number: int
    title: str
    view: str
    camera: str
    outcome: str
    query: Sequence[Tile]
    """the query's picture, one of each of the compared, as their activation maps differ"""
    lists: Sequence[tuple[str, str, Sequence[Tile]]]
    """name, a line on the list, its images"""


@dataclass
class Part:
    """What belongs to one of the compared."""

    name: str
    made: Sequence[Table] = ()
    commands: Sequence[str] = ()
    config: str = ""
    curves: Sequence[Plot] = ()
    histogram: Plot | None = None
    heat_maps: Sequence[Table] = ()
    maps: Sequence[Plot] = ()
    angles: Plot | None = None
    angle_table: Table | None = None
    gaps: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    made_by: str
    metrics: Table
    differences: Table | None
    parts: Sequence[Part]
    plots: Sequence[Plot]
    ranked: Sequence[Ranked]
    """empty: the section is left out"""
    ranked_note: str
    notes: Sequence[str]
    """what is to be known when reading the results, a line each"""
    has_pictures: bool
    has_activation: bool


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    views, cameras = (sorted({getattr(row, name) for row in page.ranked}) for name in ("view", "camera"))
    return environment.get_template("report.html").render(
        page=page, style=Markup(style), script=Markup(script), svg=Markup, views=views, cameras=cameras
    )


def metrics_table(measured: Mapping[str, Measured]) -> Table:
    """Every metric, one column for each of the compared."""
    columns: list[dict[str, str]] = []
    for result in measured.values():
        cells = result.metrics.cells()
        rows = {"queries counted": cells.pop("queries")} | {f"{name}, %": value for name, value in cells.items()}
        if result.verification is not None:
            thresholds = result.verification.threshold_cells()
            rates, points = result.verification.cells(), result.verification.points
            few = {
                name
                for name, point in zip(list(rates)[1:], points, strict=False)
                if point.target * result.verification.num_non_matches < 1
            }
            for name, value in rates.items():
                said = "; not measured: too few non-matches" if name in few else ""
                rows[f"{name}, % (threshold)"] = f"{value} ({thresholds[name]}{said})"
            best = result.verification.recommended
            if best is not None:
                rows[f"recommended threshold for FPR {best.point.target:g}"] = f"{best.point.threshold:.6g}"
                for name, rate, ends in (
                    ("FMR", best.point.fpr, best.fmr_interval), ("FNMR", best.point.fnmr, best.fnmr_interval)
                ):  # fmt: skip
                    low, high = (f"{100 * end:.3g}" for end in ends)
                    rows[f"its {name}, % (95 % interval)"] = f"{100 * rate:.3g} ({low} to {high})"
            rows["pairs: matches, non-matches"] = (
                f"{result.verification.num_matches:,}, {result.verification.num_non_matches:,}"
            )
        columns.append(rows)
    names = list(dict.fromkeys(name for rows in columns for name in rows))
    body = [[name, *(rows.get(name, "\u2013") for rows in columns)] for name in names]
    rules = dict.fromkeys(exclusion_text(result.how["exclude"]) for result in measured.values())
    caption = "; ".join(["Metrics, measured for this report", *(f"left out: {rule}" for rule in rules if rule)])
    return Table(caption, ["metric", *measured], body)


def difference_table(first: str, differences: Mapping[str, Mapping[str, PairedDifference]], resamples: int) -> Table:
    """Differences against the first, in percentage points."""
    caption = f"Differences to {first}, in percentage points; intervals of {resamples:,} bootstrap draws of the queries"
    header = ["", "metric", "points", "95 % interval", "won", "lost", "tied"]
    return Table(caption, header, difference_rows(differences))


def heat_map(name: str, label: str, cells: GroupMetrics) -> Table:
    """mAP and rank-1 from each group to each, coloured by mAP."""
    rows, shades = [], []
    low, high = np.nanmin(cells.mAP, initial=1), np.nanmax(cells.mAP, initial=0)
    for a, group in enumerate(cells.query_groups):
        row = [cells.called(group)]
        for b in range(len(cells.gallery_groups)):
            counted = int(cells.queries[a, b])
            values = f"{100 * cells.mAP[a, b]:.1f} / {100 * cells.rank1[a, b]:.1f} ({counted})"
            row.append(values if counted else "\u2013")
        rows.append(row)
        shares = 10 + 90 * (cells.mAP[a] - low) / max(high - low, 1e-9)
        shades.append(np.nan_to_num(shares).tolist())
    caption = (
        f"{name}: mAP / rank-1 in % (queries) from {label} to {label}; the stronger the colour, the higher the mAP"
    )
    left_out = [
        f"{count} {side}" for side, count in zip(("queries", "gallery images"), cells.left_out, strict=True) if count
    ]
    if left_out:
        caption += f"; left out, as of unknown {label}: {', '.join(left_out)}"
    return Table(caption, ["query \\ gallery", *map(cells.called, cells.gallery_groups)], rows, shades)


def history_tables(history: History) -> list[Table]:
    """The tables of a run folder: its results, by viewpoint too, and its environment."""
    tables = []
    names = ("mAP", "mINP", "rank1", "rank5", "rank10")
    results = [
        [LABELS.get(name, name), *(f"{100 * values[key]:.2f}" if key in values else "\u2013" for key in names)]
        for name, values in history.metrics.items()
        if isinstance(values, dict) and "mAP" in values
    ]
    if results:
        tables.append(Table("Results that the run wrote at its end, in %", ["", *names], results))
    by_view = history.metrics.get("by_query_viewpoint", {})
    views = [
        [f"{LABELS.get(name, name)}, {view}", str(values["queries"]), *(f"{100 * values[key]:.2f}" for key in names)]
        for name, of in by_view.items()
        for view, values in of.items()
    ]
    if views:
        tables.append(Table("The same by query viewpoint, in %", ["", "queries", *names], views))
    facts = {**history.environment}
    if isinstance(counted := history.metrics.get("queries"), dict):
        facts["queries counted, of all"] = f"{counted.get('counted')} of {counted.get('all')}"
    if "seconds" in history.metrics:
        facts["seconds, training and evaluation"] = history.metrics["seconds"]
    if facts:
        rows = [[name, _plain(value)] for name, value in facts.items()]
        tables.append(Table("Where it ran", ["", "value"], rows))
    return tables


def _plain(value: Any) -> str:
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
