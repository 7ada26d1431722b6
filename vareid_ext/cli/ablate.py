"""``vareid ablate``: the rows of the paper's Table 2 on a data set, or methods as in Table 1, over several seeds."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from vareid_ext.cli.common import EndedError, Result, add_common_options, command_parser, finish, silent
from vareid_ext.files.atomic import atomic_file
from vareid_ext.files.lock import locked
from vareid_ext.report import comparison_table, draw_comparison
from vareid_ext.training.ablation import SET_BY_THE_ROWS, finish_run, plan, results, rows_of_losses, rows_of_methods
from vareid_ext.training.command_line import parse, split_method_settings
from vareid_ext.training.console import tell
from vareid_ext.training.run import NonFiniteLossError
from vareid_ext.training.signals import RunInterruptedError

_DESCRIPTION = """\
Train the nine rows of the paper's Table 2 (seven networks, two of which are also re-ranked), or methods, each with
several seeds, and put mean and standard deviation beside the paper's numbers of the data set.

All options of `vareid train` but --output, --resume and --seed are taken and hold for every run, settings of a method
for the methods that have them; the rows of Table 2 set method.smoothing, use_viewpoint, use_regularizer and local. Only
the last epoch is evaluated, and no baselines, unless --evaluation.every and --evaluation.baselines say otherwise.

With --methods all runs use the images that --recipe or --data.kind names. What else a recipe holds, such as image size,
augmentation and schedule, is that of each method's recipe for this data set, where it has one.

The same command goes on where an earlier one has ended, however it ended, and may ask for more seeds. OUTPUT has a
run folder for each run, ablation.json and ablation.png.
"""
_EXAMPLES = """\
  vareid ablate --output runs/ablation
  vareid ablate --output runs/market --recipe market1501-va-reid --root /data/Market-1501 --viewpoint-file market.pkl
  vareid ablate --output runs/methods --methods va-reid,two-branch --seeds 1
"""
_DEFAULTS = ("--evaluation.every=0", "--evaluation.baselines=false")


def _run(options: argparse.Namespace) -> Result:
    output, seeds = Path(options.output), range(options.seeds)
    if not seeds:
        raise ValueError(f"--seeds: {options.seeds} was given; allowed are values from 1 on")
    _check_arguments(options.arguments, options.methods)
    arguments = [*_DEFAULTS, *options.arguments]
    general, settings = split_method_settings(arguments) if options.methods is not None else (arguments, {})
    request = parse(general)
    names = [name.strip() for name in options.methods.split(",")] if options.methods is not None else []
    rows = rows_of_methods(arguments, names) if names else rows_of_losses(request.config)
    runs = plan(rows, seeds, output)
    without = {field: [row.run for row in rows if not hasattr(row.config.method, field)] for field in settings}
    notes = [f"method.{field}: not a setting of {', '.join(others)}" for field, others in without.items() if others]
    title = f"{request.name}: runs (dots), their mean (bars), the paper (rings)"
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output), silent(options.quiet):
            for note in notes:
                tell(note)
            for number, (folder, config) in enumerate(runs.items(), 1):
                tell(f"\nrun {number} of {len(runs)}: {folder.name}")
                finish_run(config, folder, options.command)
                found = results(rows, seeds, output)
                with atomic_file(output / "ablation.json") as file:
                    file.write((json.dumps(found, indent=2) + "\n").encode())
                draw_comparison(output / "ablation.png", found, title=title)
    except NonFiniteLossError as error:
        raise EndedError(3, f"{folder}: stopped: {error}") from error
    except RunInterruptedError as error:
        raise EndedError(128 + error.number, f"{folder}: interrupted; the same command goes on") from error
    where = f"ablation.json, ablation.png and the runs are in {output}"
    text = "\n".join(["", comparison_table(found), "", *notes, where])
    return Result(text, {"output": str(output), "rows": found})


def _check_arguments(arguments: Sequence[str], methods: str | None) -> None:
    own = {"resume": "the same command, with the same --output, goes on"}
    own |= dict.fromkeys(("seed", "run.seed"), "the seeds are 0, 1 and so on, as many as --seeds")
    if methods:
        own |= dict.fromkeys(("method", "method.name"), "--methods has all of them")
    else:
        names = (*SET_BY_THE_ROWS, *(f"method.{name}" for name in SET_BY_THE_ROWS))
        own |= dict.fromkeys(names, "the rows differ in it")
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name in own:
            raise ValueError(f"{argument.partition('=')[0]}: not taken here; {own[name]}")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status: that of every command, and 3, a loss became NaN or infinite."""
    parser = command_parser("ablate", _DESCRIPTION, _EXAMPLES)
    parser.allow_abbrev = False  # --method is an option of the training
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the runs and of what they reached")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each row (default: %(default)s)")
    parser.add_argument(
        "--methods", metavar="A,B,C", help="methods instead of losses, by the data set's recipes where it has them"
    )
    add_common_options(parser)
    try:
        # Not the class's own: what is unknown here is an option of the training.
        options, others = argparse.ArgumentParser.parse_known_args(parser, list(arguments))
    except SystemExit as end:  # an error, or --help
        return int(end.code or 0)
    options.arguments, options.command = others, shlex.join(["vareid", "ablate", *arguments])
    return finish(parser.prog, _run, options)
