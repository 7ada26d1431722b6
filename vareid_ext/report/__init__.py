"""What a run folder shows: tables and figures, made from its files alone and the images of its data set."""

from __future__ import annotations

from pathlib import Path

import yaml

from vareid_ext.data import ReidData
from vareid_ext.report.figures import TOP, draw_comparison, draw_curves, draw_ranking
from vareid_ext.report.tables import LABELS, closing_tables, comparison_table, parse_json, read_json

__all__ = ["LABELS", "closing_tables", "comparison_table", "draw_comparison", "draw_figures", "read_json"]


def draw_figures(path: Path, data: ReidData) -> None:
    """Draw curves.png and ranking.png of a finished run into its folder.

    Args:
        path: the folder, with config.yaml, log.jsonl, metrics.json and rankings.json.
        data: the run's data set.
    """
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    metrics, rankings = (read_json(path / f"{name}.json") for name in ("metrics", "rankings"))
    log_file = path / "log.jsonl"
    log = [parse_json(line, log_file) for line in log_file.read_text(encoding="utf-8").splitlines()]
    references = {LABELS[name]: metrics[name]["mAP"] for name in LABELS if name in metrics and name != "trained"}
    steps = [entry for entry in log if "loss" in entry]
    evaluations = [entry for entry in log if "mAP" in entry]
    epochs = max((entry["epoch"] for entry in evaluations), default=0)
    draw_curves(
        path / "curves.png",
        steps,
        [{"epoch": 0, **metrics["untrained"]}, *evaluations],
        references,
        title=f"{path.resolve().name}: {config['method']['name']}, {config['model']['backbone']}, data {data.name}, "
        f"{epochs} epochs",
    )
    names = {"trained": "trained", "reranked": "re-ranked"}
    rows = [
        (row["query"], [(names[key], row[key]["gallery"], row[key]["average_precision"]) for key in names])
        for row in rankings
    ]
    title = f"{data.name}: queries and the first {TOP} images found for them"
    draw_ranking(path / "ranking.png", data.query, data.gallery, rows, title=title)
