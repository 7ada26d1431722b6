"""What the readers of all formats share: an array that is not read yet, and the limit on what reading may unpack."""

from __future__ import annotations

import abc
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

MAX_UNPACKED = 2**27
"""Bytes that a file may unpack to, or ``MAX_RATIO`` times its own size if that is more; reading takes twice as many."""
MAX_RATIO = 16

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of its name and its extra field


class FeatureFileError(ValueError):
    """A file that is missing, damaged or does not hold what is needed; the message names it."""


class Entry(abc.ABC):
    """One value in a file; nothing of it is unpacked before :meth:`read`."""

    @abc.abstractmethod
    def look(self) -> tuple[int, ...] | str:
        """The shape of an array of numbers, or a word for what it is instead."""

    @abc.abstractmethod
    def read(self) -> Any:
        """A ``numpy.ndarray`` or a ``torch.Tensor``, over a memory map where it can be; or plain Python data."""


class PlainValue(Entry):
    """A value that is there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def look(self) -> tuple[int, ...] | str:
        """The shape of an array, else the type."""
        return getattr(self.value, "shape", ()) or type(self.value).__name__

    def read(self) -> Any:
        """The value."""
        return self.value


def entries_of(value: Any) -> dict[str, Entry]:
    """A dictionary's values by their keys, any other value under the key ""."""
    values = value if isinstance(value, dict) else {"": value}
    return {str(key): item if isinstance(item, Entry) else PlainValue(item) for key, item in values.items()}


class Limit:
    """How much one file may unpack to."""

    def __init__(self, path: Path, max_unpacked: int) -> None:
        self.bytes = max(max_unpacked, MAX_RATIO * os.path.getsize(path))
        self.steps = self.bytes // 128  # instructions of a pickle: the dearest take that much

    def check(self, needed: int) -> None:
        """Raises a ValueError if that many bytes are too many to unpack."""
        if needed > self.bytes:
            raise ValueError(
                f"it unpacks to {needed:,} bytes; allowed are {self.bytes:,} (--max-unpacked, max_unpacked)"
            )


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape out of a pickle, where it may be anything, and of any size when it is copied or printed."""
    if type(value) is not tuple or len(value) > 64 or any(type(size) is not int for size in value):
        raise ValueError("a shape that is no tuple of whole numbers")
    return value


def check_held(shape: tuple[int, ...], itemsize: int, held: int) -> None:
    """Raises a ValueError if ``held`` bytes are not what an array of this shape takes."""
    declared = math.prod(shape) * itemsize
    if declared != held:
        raise ValueError(f"an array {list(shape)} of {declared:,} bytes is declared, but {held:,} are there")


def stored_at(path: Path, member: zipfile.ZipInfo) -> int:
    """The position of a zip member's bytes in the file; a ValueError if they are compressed."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"{member.filename} is compressed, which it must not be")
    with path.open("rb") as file:
        file.seek(member.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return member.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
