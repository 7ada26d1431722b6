"""Files that appear when they are complete: written beside their target, whose place they take at the end."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_UNFINISHED = re.compile(r"(\..*\.[0-9a-f]{8}\.)[0-9a-f]{8}\.part", re.DOTALL)  # the names that _locked_file gives


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, tidy: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write in a ``with`` block; `path` holds the old content or all of the new.

    The file may also be written by its ``name``, as a memory map is. Where `path` is a symbolic link, the file that it
    points to is replaced. With `tidy` what killed writers of `path` have left is removed first, for which its folder is
    listed; who writes many files into one folder does that once (:func:`remove_unfinished`).

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    target = Path(os.path.realpath(path))
    if tidy:
        remove_unfinished(target)
    with naming(path):
        raw = _locked_file(target)
        try:
            with io.BufferedWriter(raw) as file:
                yield file
                file.flush()
                os.fsync(raw.fileno())
                os.replace(raw.name, target)  # before the file is closed, and with that unlocked
        finally:
            Path(raw.name).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill with files in a ``with`` block; then it stands at `path` as a whole, in place of what did.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    target = Path(os.path.realpath(path))
    draft, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}") for kind in ("part", "old"))
    with naming(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        try:
            yield draft
            for file in draft.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if target.exists():
                os.rename(target, old)
            try:
                os.rename(draft, target)
            except OSError:
                if old.exists():
                    os.rename(old, target)
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that writes `path`: its errors name `path` where they name no file (a full disk) or an unfinished one."""
    try:
        yield
    except OSError as error:
        unfinished = _UNFINISHED.fullmatch(os.path.basename(str(error.filename)))
        if error.errno is not None and (error.filename is None or unfinished):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def check_writable(path: str | os.PathLike[str], suffixes: tuple[str, ...], inputs: Iterable[str] = ()) -> Path:
    """The path as a Path, or a ValueError if no such result can be written there, or it is one of `inputs`."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: suffix {path.suffix!r} was given; allowed are {', '.join(suffixes)}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a {'folder' if path.is_dir() else 'device or pipe'}; a file is needed")
    for name in inputs:
        if path.exists() and Path(name).exists() and path.samefile(name):
            raise ValueError(f"{path}: is one of the input files, which the result would replace")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"{path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: the folder {folder} cannot be written to")
    return path


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what :func:`atomic_file` left of `path`, or of all files in the folder `path`, in killed processes of this
    machine.

    A writer keeps its file locked, and the system unlocks it when the process ends, however it ends.
    """
    target = Path(os.path.realpath(path))
    whole = target.is_dir()
    folder = target if whole else target.parent
    with contextlib.suppress(OSError):  # the folder cannot be read
        for name in os.listdir(folder):
            match = _UNFINISHED.fullmatch(name)
            if match and (match[1].endswith(_machine()) if whole else match[1] == _prefix(target)):
                with contextlib.suppress(OSError):  # it is locked, another user's, or gone
                    _remove_unlocked(folder / name)


def _remove_unlocked(path: Path) -> None:
    if stat.S_ISREG(path.lstat().st_mode):
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _prefix(target: Path) -> str:
    """What the names of unfinished files begin with."""
    return f".{target.name}{_machine()}"


def _machine() -> str:
    """Machines that share a folder need not share its locks."""
    return f".{zlib.crc32(os.uname().nodename.encode()):08x}."


def _locked_file(target: Path) -> io.FileIO:
    """A new file beside `target`."""
    while True:
        file = io.FileIO(str(target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.part")), "xb")
        with contextlib.suppress(OSError):  # without locks nothing is ever taken for left behind
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else it was taken for that before it was locked
            return file
        file.close()
