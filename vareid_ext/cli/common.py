"""What the commands share: options, errors, signals, results as text or JSON; and the exit status of each end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from tqdm import tqdm

from _vareid_cli import nearest

PRECISIONS = ("fp32", "bf16", "fp16")

# A signal may end a bar that holds tqdm's lock; tqdm's thread would wait for it, and the process for the thread.
tqdm.monitor_interval = 0


class Result(NamedTuple):
    """What a command has found."""

    text: str
    """for people"""
    values: Mapping[str, Any]
    """the same for ``--json``: numbers, strings, lists and dictionaries"""
    status: int = 0
    """the exit status"""


class EndedError(Exception):
    """The command has ended otherwise than was asked for; `status` is its exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TerminatedError(BaseException):
    """SIGTERM came. No Exception, so that nobody who handles whatever a damaged file raises takes it for that."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the option that may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser; an unknown option is an error, and comes before arguments that are missing."""
        known = [name for action in self._actions for name in action.option_strings]
        for argument in args:
            option = argument.partition("=")[0]
            if option == "--":
                break
            if option.startswith("--") and not any(name.startswith(option) for name in known):
                self.error(f"there is no option {option}{nearest(option, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def command_parser(name: str, description: str, examples: str) -> Parser:
    """The parser of a command, for its own arguments.

    Args:
        name: of the command.
        description: what it does; its line breaks are kept.
        examples: command lines.
    """
    return Parser(
        prog=f"vareid {name}", description=description, epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true",
        help="results as one JSON document on standard output, everything else on standard error",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="results and errors only, no progress")
    group.add_argument("--debug", action="store_true", help="errors with a traceback")


def add_inference_arguments(parser: argparse.ArgumentParser, *, flip: bool = True) -> None:
    """How a trained model is run; `flip` is for what gives features."""
    group = parser.add_argument_group("inference")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the network (default: %(default)s)")
    if flip:
        group.add_argument(
            "--flip", action=argparse.BooleanOptionalAction,
            help="add the mirrored image's feature (default: as the run)",
        )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at once (default: %(default)s)")
    group.add_argument("--workers", type=int, metavar="N", help="processes that load images (default: chosen)")


def inference_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of :func:`add_inference_arguments` say, for ``TrainedModel.batches``."""
    workers = min(8, len(os.sched_getaffinity(0)) - 1) if options.workers is None else options.workers
    if workers < 0:
        raise ValueError(f"--workers: {workers} was given; allowed are values from 0 on")
    how = {"batch_size": options.batch_size, "precision": options.precision, "workers": workers}
    return how | {"flip": options.flip} if hasattr(options, "flip") else how


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], Result], arguments: Sequence[str]
) -> int:
    """Parse the arguments of a command, run it, and print its result or its error.

    Args:
        parser: of :func:`command_parser`; the options that every command has are added to it.
        run: the command; ValueError, TypeError, OSError and MemoryError mean that the request cannot be met.
        arguments: of the command line, without the command's name.

    Returns:
        The exit status: that of the result; 2, the request cannot be met; 1, a defect; 128 + N, ended by signal N.
    """
    add_common_options(parser)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:  # an error, or --help
        return int(end.code or 0)
    return finish(parser.prog, run, options)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def finish(
    prog: str,
    run: Callable[[argparse.Namespace], Result],
    options: argparse.Namespace,
    say: Callable[[str], None] = _say,
) -> int:
    """What :func:`run_command` does behind its parser.

    Args:
        prog: what the command is called in errors.
        run: the command.
        options: with those of :func:`add_common_options`.
        say: what prints an error.
    """
    aside = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    try:
        with raised_signals(), aside:
            result = run(options)
    except BrokenPipeError:  # the reader of the output has gone: run_program
        raise
    except (KeyboardInterrupt, TerminatedError) as end:
        # Every file of the package is written beside its target, whose place it takes when it is complete.
        untouched = f"; {options.output} is as it was" if getattr(options, "output", None) else ""
        say(f"{prog}: interrupted{untouched}")
        return 128 + (signal.SIGTERM if isinstance(end, TerminatedError) else signal.SIGINT)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        status, message = _what_it_means(error)
        say(f"{prog}: {message}")
        return status
    if options.json:
        if not options.quiet:
            print(result.text, file=sys.stderr)
        print(json.dumps(result.values, indent=2))
    else:
        print(result.text)
    return result.status


def _what_it_means(error: Exception) -> tuple[int, str]:
    """The exit status of an error, and what is said."""
    if isinstance(error, EndedError):
        return error.status, str(error)
    if isinstance(error, ValueError | TypeError | OSError | MemoryError):
        return 2, f"error: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return 2, f"error: {str(error).partition(chr(10))[0]}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename}:{place.lineno} (--debug shows the way there)"
    return 1, f"defect: {type(error).__name__}: {error} at {where}"


@contextlib.contextmanager
def silent(quiet: bool) -> Iterator[None]:
    """A block that, if `quiet`, writes nothing to standard output and standard error."""
    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM TerminatedError, unless the caller has them ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
