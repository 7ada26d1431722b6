"""Ctrl-C while a command is not running yet, or no longer: the process ends with the usual status and nothing to read.

The package imports this module before all else, and importing it does that for ``python -m vareid_ext.COMMAND``, which
spends seconds importing; a program that imports the package keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _is_starting() -> bool:
    """Whether ``python -m`` is importing this package to run one of its modules."""
    arguments = getattr(sys, "argv", [])
    return arguments[:1] == ["-m"] and sys.orig_argv[-len(arguments)].removeprefix("-m").startswith("vareid_ext.")


def end_at_once() -> None:
    """From here on Ctrl-C ends the process, unless the program that started it has seen to Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_starting():
    end_at_once()
