"""Ctrl-C while a command is still importing: the process ends with the usual status and nothing to read.

The package imports this module before all else, and importing it does that for ``python -m vareid_ext COMMAND``; a
program that imports the package keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _is_starting() -> bool:
    """Whether ``python -m`` is importing this package to run it or one of its modules."""
    arguments = getattr(sys, "argv", [])
    return arguments[:1] == ["-m"] and sys.orig_argv[-len(arguments)].removeprefix("-m").split(".")[0] == "vareid_ext"


if _is_starting() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
