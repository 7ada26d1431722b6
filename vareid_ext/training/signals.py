"""Ctrl-C and SIGTERM, kept until the program is at a point where it can save."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType


class RunInterruptedError(Exception):
    """A signal asked the run to end; everything that matters is saved.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """In its ``with`` block the first SIGINT or SIGTERM is only noted in `received`; a second one ends the program.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        """number of the signal that came, 0 for none"""
        self._immediate = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):
            for number in self._NUMBERS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._immediate or self.received:
            raise RunInterruptedError(number, "before the step's end; the last checkpoint stands")
        self.received = number

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """A block, such as an evaluation, before which all was saved: a signal raises RunInterruptedError at once."""
        if self.received:
            raise RunInterruptedError(self.received, "everything was saved")
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False


def ignore_in_worker() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, and SIGTERM to the main process."""
    for number in Signals._NUMBERS:
        signal.signal(number, signal.SIG_IGN)
