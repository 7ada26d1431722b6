"""Work in shares: which is whose, what of it is done already, and how the files of all are put together."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vareid_ext.files.atomic import atomic_file
from vareid_ext.files.features import FeatureFileError, read_arrays
from vareid_ext.files.lock import locked


def add_shard_arguments(parser: argparse._ActionsContainer, what: str, how: str = "") -> None:
    """``--shard`` and ``--merge``; `what` is shared out, and `how` where parts are not equal."""
    parser.add_argument(
        "--shard", metavar="I/N", type=_shard, help=f"take the I-th of N equal parts of the {what}{how}"
    )
    parser.add_argument("--merge", nargs="+", metavar="SHARD", help="put the outputs of all shards together")


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} was given; I/N is needed, such as 1/4, with I from 1 to N")
    return int(number), int(count)


def share(size: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    """The first of so many things that a shard takes, and the one behind its last; all of them without a shard."""
    number, count = shard or (1, 1)
    return size * (number - 1) // count, size * number // count


def check_merge_alone(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """ValueError where one of a command's own arguments was given beside ``--merge`` and ``--output``."""
    for action in parser._actions:
        value = getattr(options, action.dest, action.default)
        if action.dest not in ("merge", "output") and value != action.default:
            name = action.option_strings[0] if action.option_strings else action.dest.upper()
            raise ValueError(f"--merge: takes shards alone, but {name} was given too")


def marks(request: str, shard: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """What stands beside the arrays of a shard."""
    return {} if shard is None else {"shard": np.array(shard), "request": np.array(request)}


def is_done(output: Path, request: str, shard: tuple[int, int] | None) -> bool:
    """Whether a file, which is there or not, is the whole answer to a request, or this shard of it."""
    if not output.exists():
        return False
    try:
        found = read_arrays(output)
    except FeatureFileError:  # damaged, or of another kind
        return False
    there = found["shard"].tolist() if "shard" in found else None
    return str(found.get("request")) == request and there == (None if shard is None else list(shard))


def read_shards(
    names: Sequence[str], read: Callable[[Path], dict[str, Any]], what: str
) -> tuple[list[dict[str, Any]], str]:
    """The arrays of all shards of one request in order, without their marks; and the request.

    Args:
        names: of the files, in any order.
        read: gives a file's arrays.
        what: how shards differ that do not belong together.

    Raises:
        ValueError: a file is no shard, or of another request; one was given twice; some are missing.
    """
    shards: dict[int, dict[str, Any]] = {}
    count, request = 0, ""
    for name in names:
        arrays = read(Path(name))
        if "shard" not in arrays or "request" not in arrays:
            raise ValueError(f"{name}: is no shard: it was not made with --shard")
        number, total = arrays.pop("shard").tolist()
        asked = str(arrays.pop("request"))
        if shards and (asked, total) != (request, count):
            raise ValueError(f"{name}: is of {what} than {names[0]}")
        if number in shards:
            raise ValueError(f"{name}: shard {number}/{total} was given twice")
        shards[number], request, count = arrays, asked, total
    missing = [f"{i}/{count}" for i in range(1, count + 1) if i not in shards]
    if missing:
        raise ValueError(f"--merge: shards {', '.join(missing)} are missing")
    return [shards[i] for i in range(1, count + 1)], request


def read_shard(
    path: Path, command: str, shapes: Callable[[Any, tuple[int, int]], dict[str, tuple[int, ...]]]
) -> dict[str, Any]:
    """The arrays of a command's shard, for :func:`read_shards`.

    Args:
        path: of the file.
        command: that writes such shards.
        shapes: what arrays a shard has, from the request (out of JSON, of any kind) and its number and count.

    Raises:
        FeatureFileError: it is damaged, or not what it says that it is.
    """
    arrays: dict[str, Any] = dict(read_arrays(path))
    if "shard" not in arrays or "request" not in arrays:
        return arrays
    try:
        number, count = arrays["shard"].tolist()
        needed = shapes(json.loads(str(arrays["request"])), (number, count))
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise FeatureFileError(f"{path}: is no shard of vareid {command}") from error
    for name, shape in needed.items():
        held = list(arrays[name].shape) if name in arrays else "nothing"
        if held != list(shape):
            raise FeatureFileError(f"{path}: is damaged: {name} holds {held}; {list(shape)} is needed")
    return arrays


class Parts:
    """Rows of an array that are done, in files of a folder, until all are.

    Args:
        folder: made where it does not exist.
        request: a text that says what the rows are of.
        what: they are made of, for errors.

    Raises:
        ValueError: the folder holds the parts of another request.
        BlockingIOError: another process writes them.
    """

    def __init__(self, folder: Path, request: str, what: str) -> None:
        self.folder, self.done = folder, 0
        told = folder / "request"
        folder.mkdir(exist_ok=True)
        self._lock = contextlib.ExitStack()  # until they are removed, or the process ends
        self._lock.enter_context(locked(folder))
        if not told.exists():
            with atomic_file(told) as file:
                file.write(request.encode())
        if told.read_text() != request:
            raise ValueError(
                f"{folder}: holds what another command has begun (other {what}); give that command again, or remove "
                "the folder: what is in it is not used by any other"
            )
        self.done = sum(map(len, self._parts()))

    def _parts(self) -> Iterator[np.ndarray]:
        """The parts in order; each is named by the number of its first row."""
        begin = 0
        while (path := self.folder / f"{begin}.npy").exists():
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            yield part
            begin += len(part)

    def add(self, rows: np.ndarray) -> None:
        """Keep the next rows."""
        with atomic_file(self.folder / f"{self.done}.npy") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
            file.write(rows.tobytes())
        self.done += len(rows)

    def notes(self) -> tuple[str, ...]:
        """What is to be said about what was there before."""
        return (f"{self.done} of them by an earlier start",) if self.done else ()

    def read(self, count: int) -> list[np.ndarray]:
        """All parts, memory maps. Raises ValueError unless they have `count` rows: another process may remove some."""
        parts = list(self._parts())
        held = sum(map(len, parts))
        if held != count:
            raise ValueError(f"{self.folder}: holds {held} rows; {count} are needed; give the command again")
        return parts

    @classmethod
    def forget(cls, folder: Path, request: str) -> None:
        """Remove the parts of a request that is done, where its process was killed before it did; not another's."""
        told = folder / "request"
        if told.exists() and told.read_text() == request:
            with contextlib.suppress(BlockingIOError):  # it is at it
                cls(folder, request, "").remove()

    def remove(self) -> None:
        """Remove the folder; last what says whose the parts are, lest a kill leave them to another request."""
        for part in self.folder.glob("*.npy"):
            part.unlink()
        shutil.rmtree(self.folder)
        self._lock.close()
