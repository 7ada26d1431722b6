"""``vareid compare RUN RUN ...``: which of several models is better, and whether that is more than chance."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.sources import ABOUT_FILES, Source, add_source_arguments, check_sources, one_rule, open_sources
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.features import Features
from vareid_ext.metrics import QueryRanking, rank_features
from vareid_ext.metrics.comparison import (
    COMPARED,
    check_same_queries,
    compare_rankings,
    comparison_text,
    gallery_notes,
)
from vareid_ext.metrics.exclusion import exclusion_note, exclusion_text, label_arguments
from vareid_ext.metrics.ranking import results_table
from vareid_ext.ops._checks import check_count

BELOW = 4
"""Exit status: a difference is below what --fail-below allows."""

_DESCRIPTION = f"""\
Compare trained models, or features in files, on the same queries: the metrics, and against the first the differences of
mAP and rank-1 with 95 % intervals of a paired bootstrap over the queries, and how many queries are won and lost.

RUN is a run folder or a checkpoint, measured on its own test images or, with --data and --root, on those of another
data set. The queries must be the same for all; galleries may differ, which is said.

{ABOUT_FILES}
"""
_EXAMPLES = f"""\
  vareid compare runs/mine runs/yours
  vareid compare runs/mine runs/yours --data market1501 --root Market-1501 --json
  vareid compare --features query-a.npz gallery-a.npz --features query-b.npz gallery-b.npz
  vareid compare runs/before runs/after --fail-below mAP=-0.5     (exit status {BELOW} if after is that much worse)
"""


def _parser() -> Parser:
    parser = command_parser("compare", _DESCRIPTION, _EXAMPLES)
    add_source_arguments(parser, "compare k-reciprocal re-ranked rankings")
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--fail-below", type=_limit, action="append", default=[], metavar="METRIC=POINTS",
        help=f"exit status {BELOW} if the difference of mAP or rank1 of any but the first is below so many percentage "
        "points; may be given for both",
    )  # fmt: skip
    add_bootstrap_arguments(group)
    parser.add_argument("--output", metavar="FILE", help="write the results to this .json file")
    return parser


def add_bootstrap_arguments(group: argparse._ArgumentGroup) -> None:
    """How the intervals are made."""
    group.add_argument("--resamples", type=int, default=10_000, metavar="N", help="draws (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of these draws (default: %(default)s)")


def check_bootstrap(options: argparse.Namespace) -> None:
    """ValueError where what :func:`add_bootstrap_arguments` takes is out of range."""
    check_count("--resamples", options.resamples, 1)
    check_count("--seed", options.seed, 0)


def _limit(text: str) -> tuple[str, float]:
    """The metric and the percentage points in ``mAP=-0.5``."""
    name, _, points = text.partition("=")
    try:
        if name in COMPARED and math.isfinite(float(points)):
            return name, float(points)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} was given; mAP=POINTS or rank1=POINTS is needed: mAP=-0.5")


def _measure(options: argparse.Namespace, source: Source) -> tuple[Features, QueryRanking, list[str], Features]:
    """The queries of a source, what each reached, what is to be said, and the gallery."""
    sides = source.read()
    how: dict[str, Any] = {"rerank": source.rerank} if options.rerank else {"metric": options.metric}
    ranking = rank_features(
        sides.query.feature, sides.gallery.feature, **label_arguments(sides.query, sides.gallery, source.exclude),
        **how, junk_identity=sides.junk, block_rows=options.block_rows, progress=not options.quiet,
    )  # fmt: skip
    return sides.query, ranking, sides.notes, sides.gallery


def _run(options: argparse.Namespace) -> Result:
    check_sources(options, _parser())
    check_bootstrap(options)
    output = None if options.output is None else check_writable(options.output, (".json",))
    sources = open_sources(options, ["identity"], paths=True)
    if len(sources) < 2:
        raise ValueError(f"{'RUN' if options.runs else '--features'}: one was given; two or more are needed")
    rule = exclusion_text(one_rule(sources))
    found = {source.name: _measure(options, source) for source in sources}
    check_same_queries({name: query for name, (query, *_) in found.items()})
    first, *others = found
    differences = {
        name: compare_rankings(
            found[first][1], found[name][1], resamples=options.resamples, seed=options.seed, names=(first, name)
        )
        for name in others
    }
    metrics = {name: ranking.metrics() for name, (_, ranking, *_) in found.items()}
    below = [
        f"{name}: {metric} {100 * by_metric[metric].difference:+.2f} points, below {points:+g}"
        for name, by_metric in differences.items()
        for metric, points in options.fail_below
        if 100 * by_metric[metric].difference < points
    ]
    values = {
        "first": first,
        "metrics": {name: result.as_dict() for name, result in metrics.items()},
        "differences": {name: {m: d.as_dict() for m, d in by.items()} for name, by in differences.items()},
        "queries": metrics[first].num_valid_queries, "resamples": options.resamples, "seed": options.seed,
        "below": below, **({"exclude": rule} if rule else {}),
    }  # fmt: skip
    notes = [note for _, _, notes, _ in found.values() for note in notes]
    notes += [exclusion_note(rule)] if rule else []
    notes += gallery_notes({name: gallery for name, (*_, gallery) in found.items()})
    if output is not None:
        with atomic_file(output) as file:
            file.write((json.dumps(values, indent=2) + "\n").encode())
    text = [results_table(metrics), "", comparison_text(first, differences, options.resamples), *notes, *below]
    return Result("\n".join(text), values, BELOW if below else 0)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status: that of every command, and ``BELOW``."""
    return run_command(_parser(), _run, arguments)
