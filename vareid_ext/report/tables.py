"""Tables of a run's results, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vareid_ext._text import table
from vareid_ext.metrics.exclusion import exclusion_note

LABELS = {
    "raw_pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "untrained": "untrained",
    "trained": "trained",
    "reranked": "trained, re-ranked",
}
"""What the entries of metrics.json are called in tables and figures."""

_COLUMNS = {"mAP": "mAP", "mINP": "mINP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10"}


def read_json(path: Path) -> Any:
    """What a file of a run folder holds; ValueError, naming the file, if it is not JSON."""
    return parse_json(path.read_text(encoding="utf-8"), path)


def parse_json(text: str, path: Path) -> Any:
    """The value of JSON text; ValueError, naming the file it is from, if it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from error


def closing_tables(path: Path) -> str:
    """The results in a run folder's metrics.json as text, in percent, overall and per query viewpoint."""
    metrics = read_json(path / "metrics.json")
    rows = [
        (label, *(f"{100 * metrics[name][key]:.1f}" for key in _COLUMNS))
        for name, label in LABELS.items()
        if name in metrics
    ]
    parts = [table(("%", *_COLUMNS.values()), rows)]
    trained, reranked = metrics["by_query_viewpoint"]["trained"], metrics["by_query_viewpoint"]["reranked"]
    if trained:
        header = ("query viewpoint, %", "queries", "mAP", "rank-1", "re-ranked mAP", "rank-1")
        views = []
        for name, before in trained.items():
            values = [result[key] for result in (before, reranked[name]) for key in ("mAP", "rank1")]
            views.append((name, str(before["queries"]), *(f"{100 * value:.1f}" for value in values)))
        parts.append(table(header, views))
    counted = metrics["queries"]
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    if note := exclusion_note(config["evaluation"].get("exclude")):
        parts.append(note)
    parts.append(f"{counted['counted']} queries counted of {counted['all']}; {metrics['seconds']:.0f} s in all")
    return "\n\n".join(parts)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of :func:`vareid_ext.training.ablation.results` as text: mean and standard deviation in percent."""
    names = {"mAP": "mAP", "rank1": "rank-1"}
    with_published = any(row["published"] for row in rows)
    lines = []
    for row in rows:
        cells = [row["title"], str(len(row["runs"])), *(_mean_and_std(row, name) for name in names)]
        if with_published:
            cells += [f"{100 * row['published'][name]:.2f}" if row["published"] else "" for name in names]
        lines.append(cells)
    header = ["%", "runs", *names.values(), *(("paper's mAP", "rank-1") if with_published else ())]
    return table(header, lines)


def _mean_and_std(row: Mapping[str, Any], name: str) -> str:
    if name not in row["mean"]:
        return ""
    std = row["std"][name]
    return f"{100 * row['mean'][name]:.2f}" + ("" if std is None else f" \u00b1 {100 * std:.2f}")
