"""Folders that one process at a time writes into."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block in which no other process has `folder`, an existing one, locked.

    The lock is on the file .lock in it. The system takes it away with the process, however that ends, and processes
    that this one has forked do not keep it. On file systems without locks nobody is kept out, nor are
    the threads of one process.

    Raises:
        BlockingIOError: another process has it.
    """
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in forked workers
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(
                    f"output: {str(folder)!r} was given, which another process is writing; let that end, or choose "
                    "another folder"
                ) from error
        yield
