"""The report as JSON and as a page; both are written again after every check."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write gpu_report.json and gpu_report.md, each at once or not at all."""
    for name, text in (("gpu_report.json", json.dumps(report, indent=1)), ("gpu_report.md", page(report))):
        part = folder / f".{name}.part"
        part.write_text(text + "\n")
        os.replace(part, folder / name)


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    title = "# GPU report" + (" (dry run: tiny sizes on the CPU)" if report["dry run"] else "")
    lines = [
        title,
        "",
        f"{report['seconds']:.0f} s in all.",
        "",
        "| step | result | checks | s |",
        "| --- | --- | --- | ---: |",
    ]
    for step in report["steps"]:
        why = f": {step['why']}" if step["why"] else ""
        lines.append(
            f"| {step['title']} | {step['status']}{why} | {_counts(step['records'])} | {step['seconds']:.0f} |"
        )
    for step in report["steps"]:
        lines += ["", f"## {step['title']}", "", *_section(step)]
    return "\n".join(lines)


def _counts(records: Sequence[Mapping[str, Any]]) -> str:
    statuses = [record["status"] for record in records]
    return ", ".join(f"{statuses.count(s)} {s}" for s in ("passed", "failed", "skipped", "begun") if s in statuses)


def _section(step: Mapping[str, Any]) -> list[str]:
    """What did not pass; then tables of what was measured, one for each set of columns that follow one another."""
    lines = [f"- {record['status']}: {record['name']}: {record.get('why', '')}" for record in step["records"]
             if record["status"] in ("failed", "begun")]  # fmt: skip
    skipped = Counter(record.get("why", "") for record in step["records"] if record["status"] == "skipped")
    lines += [f"- {count} skipped: {why}" for why, count in skipped.items()]
    measured = [record for record in step["records"] if record["status"] == "passed" and _columns(record)]
    for columns, group in itertools.groupby(measured, _columns):
        rows = list(group)
        if len(rows) == 1:
            lines += ["", f"{rows[0]['name']}:", *(f"- {column}: {_cell(rows[0][column])}" for column in columns)]
            continue
        lines += ["", "| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        lines += [f"| {row['name']} | " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return lines


def _columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(key for key in record if key not in ("name", "status", "seconds", "why"))


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
