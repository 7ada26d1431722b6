"""``vareid figures``: the pictures and tables of a finished run, made again from its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vareid_ext.cli.common import Result, command_parser, run_command
from vareid_ext.report import closing_tables, draw_figures, read_json
from vareid_ext.training.command_line import parse
from vareid_ext.training.program import load_run_data

_EXAMPLES = "  vareid figures runs/mine"


def _run(options: argparse.Namespace) -> Result:
    path = Path(options.run)
    for name in ("config.yaml", "log.jsonl", "metrics.json", "rankings.json"):
        if not (path / name).is_file():
            raise ValueError(f"RUN: {options.run!r} is not the folder of a finished run (there is no {name})")
    draw_figures(path, load_run_data(parse(["--resume", options.run]).config, progress=not options.quiet))
    return Result(closing_tables(path), {"run": str(path), **read_json(path / "metrics.json")})


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = command_parser("figures", "Draw curves.png and ranking.png of a finished run again.", _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="the run's folder; its data set must be where it was")
    return run_command(parser, _run, arguments)
