"""The program ``vareid``: which commands there are, and how it ends.

Outside the package, whose import brings PyTorch and takes a second: ``vareid --help`` needs none of that.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import NoReturn

COMMANDS = {
    "train": "train and evaluate a model",
    "ablate": "the losses of the paper's Table 2, or methods, trained and compared",
    "evaluate": "CMC, mAP and mINP of trained models, or of features in files",
    "compare": "which of several models is better, by how much, and how sure that is",
    "report": "what a model does, or features in files: one HTML page with numbers, plots and ranked lists",
    "extract": "features of images by a trained model",
    "index": "a gallery on disk, whose neighbour lists are made once",
    "search": "the best images of an index for each query",
    "views": "pictures of the people on images in eight poses, drawn by a trained PN-GAN",
    "label-viewpoints": "viewpoint labels of images of people, from keypoints or a small network",
    "export": "the feature of a trained model as an ONNX file or a torch.export program",
    "neighbors": "the exact neighbour lists of features in files, by one machine or by many",
    "rerank": "k-reciprocal re-ranking of features in files",
    "figures": "the pictures and tables of a finished run again",
    "methods": "every method: paper, claim, published and measured scores, what it needs",
    "doctor": "what is installed, and whether training can run here; what in a data set will hurt",
}
"""Every command, which is the module of that name in ``vareid_ext.cli`` (- written as _), and what it does."""

_HELP = """\
usage: vareid COMMAND ...     (also: python -m vareid_ext COMMAND ...)

Person re-identification: train models, use them, measure them.

commands:
{commands}

  vareid COMMAND --help       options and examples of a command
  vareid --version

Every command takes --json (results as one JSON document on standard output, everything else on standard error),
--quiet (results and errors only) and --debug (errors with a traceback).
Exit status: 0 done, 2 the request cannot be met, 1 a defect, 128 + N ended by signal N.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program: runs a command and ends the process with its exit status."""
    _end_at_ctrl_c()  # until the command runs
    run_program(lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name.

    Returns:
        Its exit status.
    """
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"vareid_ext {version('vareid_ext')}")
        return 0
    if name not in COMMANDS:
        what = f"there is no command {name!r}" if name else "a command is needed"
        print(f"vareid: error: {what}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"vareid_ext.cli.{name.replace('-', '_')}").main(arguments[1:])


def _help() -> str:
    return _HELP.format(commands="\n".join(f"  {name:<16} {purpose}" for name, purpose in COMMANDS.items()))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the known name that is most like `name`; all of them if none is."""
    names = {one.lstrip("-"): one for one in known}  # the dashes, which all options have, make none of them near
    found = difflib.get_close_matches(name.lstrip("-"), names, n=1)
    return f"; did you mean {names[found[0]]}?" if found else f"; known are {', '.join(names.values())}"


def run_program(command: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its exit status.

    That is 128 + SIGINT if it is interrupted; 128 + SIGPIPE, and nothing is said, if the reader of its output has gone,
    as in ``vareid doctor | head``; 2, and one line on standard error, if the output cannot be written for another
    reason, such as a full disk.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal lacks is no reason to fail
    try:
        status = command()
        if sys.stdout is not None:  # the caller has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
        _drop_what_is_left()
    except OSError as error:
        status = 2
        print(f"vareid: error: standard output: {error.strerror}", file=sys.stderr)
        _drop_what_is_left()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        print("vareid: interrupted", file=sys.stderr)
    _end_at_ctrl_c()
    sys.exit(status)


def _end_at_ctrl_c() -> None:
    """From here on Ctrl-C ends the process, and nothing is said, unless it is ignored as in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _drop_what_is_left() -> None:
    """Let the interpreter write what its buffers hold, as it does at its end, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


if __name__ == "__main__":
    main()
