"""How long operations tell how far they are and what they did: to whoever wants to show it."""

from __future__ import annotations

import collections
import contextlib
import contextvars
from collections.abc import Callable, Iterator

_Listener = Callable[[int], object]
_listener: contextvars.ContextVar[_Listener | None] = contextvars.ContextVar("vareid_progress", default=None)


@contextlib.contextmanager
def listen(listener: Callable[[int], object]) -> Iterator[None]:
    """Inside, ``listener`` is called with the pairs of rows that were done since the last call."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def advance(pairs: int) -> None:
    """Tells the listener, if there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(pairs)


_counts: contextvars.ContextVar[collections.Counter[str] | None] = contextvars.ContextVar("vareid_counts", default=None)


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Inside, operations count what they do."""
    counts = collections.Counter[str]()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def count(what: str, amount: Callable[[], int]) -> None:
    """Counts something, if it is wanted."""
    counts = _counts.get()
    if counts is not None:
        counts[what] += amount()
