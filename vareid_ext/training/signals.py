"""Ctrl-C and SIGTERM, kept until the program is at a point where it can save."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import ClassVar


class RunInterruptedError(BaseException):
    """A signal asked the run to end; everything that matters is saved.

    It is no Exception, so that nobody who handles whatever a damaged file raises takes it for that.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """In its ``with`` block the first SIGINT or SIGTERM is only noted in `received`; a second one raises at once.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)
    _active: ClassVar[Signals | None] = None

    def __init__(self) -> None:
        self.received = 0
        """number of the signal that came, 0 for none"""
        self._reason = ""  # of a block in which a signal raises at once
        self._postponed = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):
            for number in self.NUMBERS:
                self._before[number] = signal.signal(number, self._note)
        Signals._active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Signals._active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, self.received or number
        if (self._reason or not first) and not self._postponed:
            raise RunInterruptedError(number, self._reason or "before the step's end; the last checkpoint stands")

    @contextlib.contextmanager
    def immediate(self, reason: str) -> Iterator[None]:
        """A block in which nothing is lost, such as an evaluation: a signal raises RunInterruptedError at once.

        Args:
            reason: what the error says.
        """
        if self.received:
            raise RunInterruptedError(self.received, reason)
        self._reason = reason
        try:
            yield
        finally:
            self._reason = ""
        # What a handler raises is lost where Python happens to run a destructor.
        if self.received:
            raise RunInterruptedError(self.received, reason)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """A short block that a signal may not leave half done: it raises at the end what it would have raised within."""
    signals = Signals._active
    if signals is not None:
        signals._postponed = True
    try:
        yield
    finally:
        if signals is not None:
            signals._postponed = False
    if signals is not None and signals.received and signals._reason:
        raise RunInterruptedError(signals.received, signals._reason)


def ignore_in_worker() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, and SIGTERM to the main process."""
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    # What a thread that hands images over calls where the main process, interrupted, does not take them.
    sys.excepthook = lambda *error: None
