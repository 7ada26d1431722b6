"""What a run folder tells of how its model was made: command, configuration, versions, log, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vareid_ext.report.tables import parse_json, read_json


@dataclass(frozen=True)
class History:
    """The files of a run folder; those that are not there are empty here and named in `gaps`.

    Attributes:
        commands: the lines that the run was started and resumed with.
        config: config.yaml without them.
        environment: environment.json, versions and device.
        metrics: metrics.json.
        steps: the logged steps: "epoch", "lr" and "loss", a mapping of term to what it adds to the total.
        evaluations: the logged evaluations: "epoch", "mAP", "rank1", ...
        gaps: what is not there, a line each.
    """

    commands: Sequence[str] = ()
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    gaps: Sequence[str] = ()


def read_history(folder: Path) -> History:
    """What the folder of a run holds, of whatever version.

    Raises:
        ValueError: a file is damaged.
    """
    files = {name: folder / name for name in ("config.yaml", "environment.json", "metrics.json", "log.jsonl")}
    gaps = [f"{folder}: there is no {name}" for name, path in files.items() if not path.is_file()]
    found = {name: path for name, path in files.items() if path.is_file()}
    environment, metrics = (read_json(found[n]) if n in found else {} for n in ("environment.json", "metrics.json"))
    config = found["config.yaml"].read_text(encoding="utf-8") if "config.yaml" in found else ""
    log = _log(found["log.jsonl"]) if "log.jsonl" in found else []
    steps = [entry for entry in log if isinstance(entry.get("loss"), dict) and "epoch" in entry]
    evaluations = [entry for entry in log if "mAP" in entry and "epoch" in entry]
    if log and not steps:
        gaps.append(f"{files['log.jsonl']}: holds no losses in this version's form")
    lines = config.splitlines()
    commands = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    config = "\n".join(line for line in lines if not line.startswith("#"))
    return History(commands, config, environment, metrics, steps, evaluations, gaps)


def _log(path: Path) -> list[dict[str, Any]]:
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # a last line without its end was not finished
    entries = [parse_json(line, path) for line in lines if line]
    return [entry for entry in entries if isinstance(entry, dict)]
