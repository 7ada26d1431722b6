"""``vareid train``: train a model, evaluate it, and show what was reached."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
from collections.abc import Sequence

from vareid_ext._processes import LostProcessError
from vareid_ext.cli.common import EndedError, Result, finish, silent
from vareid_ext.report import draw_figures
from vareid_ext.report.tables import closing_tables
from vareid_ext.training import program
from vareid_ext.training.command_line import parse
from vareid_ext.training.plan import training_plan
from vareid_ext.training.processes import Processes, joined
from vareid_ext.training.run import NonFiniteLossError
from vareid_ext.training.signals import RunInterruptedError, Signals


def _run(processes: Processes, options: argparse.Namespace) -> Result:
    request = parse(options.arguments)
    try:
        with silent(options.quiet or not processes.first):
            folder, data = program.run(request, processes)
            path = folder.path
            with Signals() as signals, signals.immediate(f"everything was saved; draw again with --resume {path}"):
                processes.first_does(lambda: draw_figures(path, data))
    except NonFiniteLossError as error:
        raise EndedError(3, f"stopped: {error}") from error
    except RunInterruptedError as error:
        raise EndedError(128 + error.number, f"interrupted: {error}") from error
    except LostProcessError as error:
        message = f"stopped: of {processes.size} processes one has ended; what was saved last stands"
        raise EndedError(1, message) from error
    text = f"\n{closing_tables(path)}\n\nmetrics.json, curves.png, ranking.png and checkpoints are in {path}"
    return Result(text, {"run": str(path), **json.loads(folder.metrics.read_text())})


_PLANNED = ("processes", "identities", "viewpoints")


def _planned(arguments: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """What stands behind --plan, and the other arguments."""
    at = arguments.index("--plan")
    end = next((i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    numbers = {}
    for argument in arguments[at + 1 : end]:
        name, _, value = argument.partition("=")
        if name not in _PLANNED or name in numbers or not re.fullmatch("[1-9][0-9]*", value):
            raise ValueError(
                f"--plan: {argument!r} was given; allowed are {', '.join(f'{known}=NUMBER' for known in _PLANNED)}, "
                "once each and from 1 on"
            )
        numbers[name] = int(value)
    return numbers, [*arguments[:at], *arguments[end:]]


def _plan(processes: Processes, options: argparse.Namespace) -> Result:
    numbers, arguments = _planned(options.arguments)
    config = parse(arguments).config
    if not {"identities", "viewpoints"} <= numbers.keys():
        data = program.load_run_data(config, train=True)
        numbers = {"identities": data.num_identities, "viewpoints": data.num_viewpoints, **numbers}
    plan = training_plan(
        config,
        processes=numbers.get("processes", processes.size),
        identities=numbers["identities"],
        viewpoints=numbers["viewpoints"],
    )
    return Result(str(plan), plan.as_dict())


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status: that of every command, and 3, the loss became NaN or infinite."""
    flags = ("--json", "--quiet", "--debug")
    options = argparse.Namespace(**{flag[2:]: flag in arguments for flag in flags})
    options.arguments = [argument for argument in arguments if argument not in flags]
    try:
        with joined() as processes, contextlib.ExitStack() as stack:
            if not processes.first:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                options.quiet = True
            run = _plan if "--plan" in options.arguments else _run
            return finish("vareid train", functools.partial(run, processes), options, say=processes.say)
    except SystemExit as end:  # --help
        return int(end.code or 0)
