"""How long operations tell how far they are: a counter that whoever wants to show it sets."""

from __future__ import annotations

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
