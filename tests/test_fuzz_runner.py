"""The fuzz of `tests/fuzz` can fail: whatever goes wrong with a case is reported, and the cases after it are read."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import runner


def fail(error: BaseException) -> None:
    raise error


def use_memory() -> None:
    bytearray(b"x" * (runner.MEGABYTES << 19)) + bytearray(b"x" * (runner.MEGABYTES << 19))


def work_forever() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("fault", "reported"),
    [
        (lambda: fail(ValueError("x" * 3000)), "message"),
        (lambda: fail(IndexError()), "IndexError"),
        (lambda: fail(SystemExit(0)), "SystemExit"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: os._exit(0), "exit status 0"),
        (lambda: time.sleep(60), "SIGALRM"),
        (work_forever, "SIGPROF"),
        (use_memory, "MB"),
    ],
)
def test_a_planted_fault_of_a_reader_is_reported(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[], object], reported: str
) -> None:
    # Only the limit that is meant is short: a busy machine may take seconds for the other faults.
    if reported in ("SIGPROF", "SIGALRM"):
        monkeypatch.setattr(runner, "SECONDS" if reported == "SIGPROF" else "PATIENCE", 1)

    def read(path: Path) -> None:
        if path.name == "faulty":
            fault()

    contents = {"first": b"", "faulty": b"", "last": b""}
    subject = runner.Subject(lambda: contents, read, ValueError, ())
    before, faulty, after = runner.outcomes(subject, contents, range(3))
    assert (before, after) == ("read", "read")
    assert reported in faulty
