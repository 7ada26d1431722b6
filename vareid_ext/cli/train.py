"""The command that trains."""

from __future__ import annotations

from collections.abc import Sequence

from vareid_ext import train
from vareid_ext.cli.common import raised_signals


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    with raised_signals():
        try:
            return train.main(arguments)
        except SystemExit as end:  # --help, or an error of the command line
            return int(end.code or 0)
