"""Tables of a run's results, from its folder."""

from __future__ import annotations

import json
from pathlib import Path

from vareid_ext._text import table

LABELS = {
    "raw_pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "untrained": "untrained",
    "trained": "trained",
    "reranked": "trained, re-ranked",
}
"""What the entries of metrics.json are called in tables and figures."""

_COLUMNS = {"mAP": "mAP", "mINP": "mINP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10"}


def closing_tables(path: Path) -> str:
    """The results in a run folder's metrics.json as text, in percent, overall and per query viewpoint."""
    metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
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
    parts.append(f"{counted['counted']} queries counted of {counted['all']}; {metrics['seconds']:.0f} s in all")
    return "\n\n".join(parts)
