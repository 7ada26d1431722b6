"""``vareid methods``: every method, whose it is, what it claims and needs, and the published and measured scores."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vareid_ext._text import table
from vareid_ext.cli.common import Result, command_parser, run_command
from vareid_ext.files.atomic import atomic_file
from vareid_ext.methods import METHODS

_DESCRIPTION = """\
Every method, once for each network that has recipes of its own: paper, claim, what it needs beside images and
identities, the published mAP / rank-1 in percent, and what its recipes have reached here.

With --page FILE the table replaces the one between the marks of a Markdown page.
"""
_EXAMPLES = """\
  vareid methods
  vareid methods --json
  vareid methods --page docs/methods.md
"""
_DATASETS = {"market1501": "Market-1501", "dukemtmc": "DukeMTMC-reID"}
_HEADER = ("name", "title and paper", *_DATASETS.values(), "here", "claim", "needs")
_BEGIN, _END = "<!-- methods: begin (vareid methods --page docs/methods.md) -->", "<!-- methods: end -->"


def described() -> list[dict[str, Any]]:
    """A dictionary for each method and network: name, method, title, paper, file, claim, needs, and by data set the
    `published` and `measured` (mAP, rank-1), percent."""
    found = []
    for method, kind in METHODS.items():
        about = kind.about
        names = dict.fromkeys(_name(recipe) or method for recipe in (*about.published, *about.measured))
        for name in names or [method]:
            scores = [
                {r.partition("-")[0]: values for r, values in by_recipe.items() if (_name(r) or method) == name}
                for by_recipe in (about.published, about.measured)
            ]
            found.append(
                {
                    "name": name, "method": method, "title": about.title, "paper": about.paper,
                    "file": f"{kind.__module__.replace('.', '/')}.py", "claim": about.claim, "needs": about.needs,
                    "published": scores[0], "measured": scores[1],
                }
            )  # fmt: skip
    return found


def _name(recipe: str) -> str:
    """What stands behind the data set in the name of a recipe."""
    return recipe.partition("-")[2]


def _cells(line: Mapping[str, Any]) -> list[str]:
    published = [_score(line["published"].get(dataset)) for dataset in _DATASETS]
    here = "; ".join(f"{dataset} {_score(values)}" for dataset, values in line["measured"].items())
    return [line["name"], f"{line['title']}: {line['paper']}", *published, here, line["claim"], line["needs"]]


def _score(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]} / {values[1]}"


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table of a page in docs/."""
    rows = [_HEADER, ["---"] * len(_HEADER)]
    rows += [[f"[`{line['name']}`](../{line['file']})", *_cells(line)[1:]] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _run(options: argparse.Namespace) -> Result:
    lines = described()
    if options.page is not None:
        page = Path(options.page)
        before, begin, rest = page.read_text(encoding="utf-8").partition(f"{_BEGIN}\n")
        _, end, after = rest.partition(_END)
        if not begin or not end:
            raise ValueError(f"--page: {options.page!r} has no lines {_BEGIN} and {_END}")
        with atomic_file(page) as file:
            file.write(f"{before}{begin}{markdown(lines)}{end}{after}".encode())
    return Result(table(_HEADER, map(_cells, lines)), {"methods": lines})


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = command_parser("methods", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--page", metavar="FILE", help="Markdown page whose table is written again")
    return run_command(parser, _run, arguments)
