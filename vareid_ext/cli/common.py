"""How the commands end: with their exit status, and quietly where nobody reads what they print any more."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from vareid_ext._interrupt import end_at_once, raise_again
from vareid_ext.files.atomic import naming


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its exit status.

    That is 128 + SIGINT if it is interrupted; 128 + SIGPIPE, and nothing is said, if the reader of its output has gone,
    as in ``command | head``; 2, and one line on standard error, if the output cannot be written for another reason,
    such as a full disk.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal lacks is no reason to fail
    try:
        with naming("standard output"):
            try:
                raise_again()
                status: str | int | None = main()
            except SystemExit as end:  # of --help, whose text is written here
                status = end.code
            if sys.stdout is not None:  # the caller has closed it
                sys.stdout.flush()
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
        _drop_what_is_left()
    except OSError as error:
        status = 2
        print(f"error: {error}", file=sys.stderr)
        _drop_what_is_left()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        print("interrupted", file=sys.stderr)
    end_at_once()
    sys.exit(status)


def _drop_what_is_left() -> None:
    """Let the interpreter write what its buffers hold, as it does at its end, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
