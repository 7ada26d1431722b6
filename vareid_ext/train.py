"""Train and evaluate a re-identification model: ``python -m vareid_ext.train``, which ``--help`` explains."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vareid_ext._program import run_program
from vareid_ext.report import draw_figures
from vareid_ext.report.tables import closing_tables
from vareid_ext.training import program
from vareid_ext.training.command_line import parse_or_exit
from vareid_ext.training.console import tell
from vareid_ext.training.run import NonFiniteLossError
from vareid_ext.training.signals import RunInterruptedError, Signals


def main(arguments: Sequence[str] | None = None) -> int:
    """The program.

    Returns:
        Its exit code: 0 done; 2 the request cannot be met; 3 the loss became NaN or infinite; 128 + n: signal n.
    """
    try:
        folder, data = program.run(parse_or_exit(arguments))
        path = folder.path
        with Signals() as signals, signals.immediate(f"everything was saved; draw again with --resume {path}"):
            draw_figures(path, data)
        tell(f"\n{closing_tables(path)}\n\nmetrics.json, curves.png, ranking.png and checkpoints are in {path}")
    except BrokenPipeError:  # the reader of the output has gone: run_program
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except RunInterruptedError as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing to save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_program(main)
