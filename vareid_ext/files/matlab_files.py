"""Arrays in MATLAB 5 files (MATLAB's -v6 and -v7, ``scipy.io.savemat``), read here without SciPy.

SciPy's reader believes what a file declares: one wrong byte can kill the process. The format of arrays of numbers is
small: a tag (type and number of bytes) before every element, padded to 8 bytes; a variable is an element of elements
(flags, dimensions, name, numbers), and may be compressed with zlib as a whole.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vareid_ext.files.entries import Entry, Limit, check_held

_HEADER, _TAG = 128, 8
_MATRIX, _COMPRESSED = 14, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_OTHER = {1: "cell array", 2: "structure", 3: "object", 4: "text", 5: "sparse array"}
_COMPLEX = 0x800
_START = 2**12  # enough for a variable's flags, dimensions (at most 64) and name


class _Variable(NamedTuple):
    """A variable's description, which stands before its numbers."""

    name: str
    flags: int
    shape: tuple[int, ...]
    size: int  # bytes of the description

    @property
    def kind(self) -> str | None:
        """The dtype of its numbers, None if it is something else."""
        return None if self.flags & _COMPLEX else _CLASSES.get(self.flags & 0xFF)


def _element(content: bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """The element at a position: its type, where its bytes begin, how many they are, and where the next begins."""
    first, second = np.frombuffer(content, order + "u4", 2, at).tolist()
    if first >> 16:  # up to four bytes stand within the tag
        return first & 0xFFFF, at + 4, first >> 16, at + _TAG
    return first, at + _TAG, second, at + _TAG + -(-second // 8) * 8


def _variable(content: bytes, order: str) -> _Variable:
    at, parts = 0, []
    for dtype in ("u4", "i4", "i1"):
        _, start, size, at = _element(content, at, order)
        if start + size > len(content):
            raise ValueError("a variable's description is cut short")
        parts.append(np.frombuffer(content, order + dtype, size // np.dtype(dtype).itemsize, start))
    flags, shape, name = parts
    return _Variable(name.tobytes().decode("latin1"), int(flags[0]), tuple(shape.tolist()), at)


class _Mat(Entry):
    """A variable of which the description is read."""

    def __init__(self, path: Path, order: str, limit: Limit, start: int, packed: int | None) -> None:
        """``start``: of its bytes in the file, behind the tag; ``packed``: how many there are, if compressed."""
        self.path, self.order, self.limit, self.start, self.packed = path, order, limit, start, packed

    def describe(self, content: bytes, size: int) -> str:
        """Reads the description from the variable's first bytes, of ``size``; returns the name."""
        self.size, self.variable = size, _variable(content, self.order)
        return self.variable.name

    def look(self) -> tuple[int, ...] | str:
        return self.variable.shape if self.variable.kind else _OTHER.get(self.variable.flags & 0xFF, "MATLAB value")

    def read(self) -> np.ndarray:
        if self.variable.kind is None:
            raise ValueError(f"it is a {self.look()}; an array of real numbers is needed")
        with self.path.open("rb") as file:
            file.seek(self.start)
            if self.packed is None:
                content = file.read(self.variable.size + _TAG)
            else:
                content = self._unpacked(file.read(self.packed))
        kind, at, size, _ = _element(content, self.variable.size, self.order)
        if kind not in _TYPES or at + size > self.size:
            raise ValueError("it is cut short, or no array of numbers")
        stored, dtype = np.dtype(self.order + _TYPES[kind]), np.dtype(self.variable.kind)
        check_held(self.variable.shape, stored.itemsize, size)
        if at + size <= len(content):
            numbers = np.frombuffer(content, stored, size // stored.itemsize, at)
        else:
            numbers = np.memmap(self.path, stored, "r", self.start + at, (size // stored.itemsize,))
        if stored != dtype:  # MATLAB keeps whole numbers in the smallest type that takes them
            self.limit.check(numbers.size * dtype.itemsize)
            numbers = numbers.astype(dtype, casting="same_kind")
        return numbers.reshape(self.variable.shape, order="F")

    def _unpacked(self, packed: bytes) -> bytes:
        self.limit.check(self.size)
        stream = zlib.decompressobj()
        content = stream.decompress(packed, _TAG + self.size + 1)
        if len(content) != _TAG + self.size or not stream.eof:
            raise ValueError(f"it unpacks to other than the {self.size:,} bytes that it declares")
        return content[_TAG:]


def open_mat(path: Path, limit: Limit) -> dict[str, Entry]:
    """The variables of a MATLAB 5 file; those that are not compressed are memory-mapped."""
    entries: dict[str, Entry] = {}
    with path.open("rb") as file:
        header, end = file.read(_HEADER), path.stat().st_size
        if header.startswith(b"MATLAB 7.3"):
            raise ValueError("it is a MATLAB 7.3 file; save it with -v7, or convert it to .npz")
        order = {b"IM": "<", b"MI": ">"}.get(header[126:])
        if order is None:
            raise ValueError("it is no file of MATLAB 5 or later; save it with -v7")
        at = _HEADER
        while at < end:
            file.seek(at)
            kind, size = np.frombuffer(file.read(_TAG), order + "u4").tolist()
            start, at = at + _TAG, at + _TAG + size
            if at > end or kind not in (_MATRIX, _COMPRESSED):
                raise ValueError(f"byte {start - _TAG}: an element of type {kind} and {size:,} bytes")
            content = file.read(min(size, 2 * _START))
            entry = _Mat(path, order, limit, start, size if kind == _COMPRESSED else None)
            if kind == _COMPRESSED:
                content = zlib.decompressobj().decompress(content, _START)
                kind, size = np.frombuffer(content, order + "u4", 2).tolist()
                if kind != _MATRIX:
                    raise ValueError(f"byte {start}: an element of type {kind} where a variable should be")
                content = content[_TAG:]
            entries[entry.describe(content, size)] = entry
    entries.pop("", None)  # MATLAB's own, not a variable
    return entries
