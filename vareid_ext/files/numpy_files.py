"""Arrays in .npy and .npz files, and NumPy arrays within a pickle."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from vareid_ext.files.entries import Entry, Limit, check_held, entries_of, shape_of, stored_at
from vareid_ext.files.pickles import read_pickle

_WRITTEN = 2**22  # bytes written at once
_HEAD = 2**14  # NumPy reads headers of at most 10,000 characters
_NUMBERS = "biufc"  # kinds of dtypes
_LONGEST_NAME = 20  # of a dtype: "U" and the number of its letters


def _look(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, ...] | str:
    if dtype.hasobject:
        return "Python objects"
    return shape if dtype.kind in _NUMBERS else f"dtype {dtype}"


class _Header(NamedTuple):
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    size: int  # bytes of the header itself

    def look(self) -> tuple[int, ...] | str:
        return _look(self.dtype, self.shape)

    def map(self, path: Path, start: int, end: int) -> np.ndarray:
        """The array over a memory map; it is those bytes of the file, after its header."""
        check_held(self.shape, self.dtype.itemsize, end - start - self.size)
        if start + self.size == end:
            return np.empty(self.shape, self.dtype)
        return np.memmap(path, self.dtype, "r", start + self.size, self.shape, self.order)


def _header(head: bytes) -> _Header:
    """The header of a .npy file from its first ``_HEAD`` bytes."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return _Header(shape, "F" if fortran else "C", dtype, stream.tell())


class _Npy(Entry):
    def __init__(self, path: Path, header: _Header) -> None:
        self.path, self.header = path, header

    def look(self) -> tuple[int, ...] | str:
        return self.header.look()

    def read(self) -> np.ndarray:
        return self.header.map(self.path, 0, self.path.stat().st_size)


class _NpzMember(Entry):
    def __init__(self, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: Limit) -> None:
        self.path, self.archive, self.member, self.limit = path, archive, member, limit

    def _bytes(self, count: int) -> bytes:
        if self.member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{self.member.filename}: compression method {self.member.compress_type}, not NumPy's")
        with self.archive.open(self.member) as stream:
            return stream.read(count)

    def look(self) -> tuple[int, ...] | str:
        return _header(self._bytes(_HEAD)).look()

    def read(self) -> Any:
        header, size = _header(self._bytes(_HEAD)), self.member.file_size
        if self.member.compress_type == zipfile.ZIP_STORED and not header.dtype.hasobject:
            start = stored_at(self.path, self.member)
            return header.map(self.path, start, start + size)
        self.limit.check(size)
        content = self._bytes(size)
        if header.dtype.hasobject:
            return _objects(io.BytesIO(content[header.size :]), self.limit)
        check_held(header.shape, header.dtype.itemsize, len(content) - header.size)
        array = np.frombuffer(content, header.dtype, math.prod(header.shape), header.size)
        return array.reshape(header.shape, order=header.order)


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]]) -> None:
    """Write an uncompressed .npz file, with the same bytes for the same arrays.

    Args:
        file: receives it.
        arrays: each whole, or cut along its first dimension; of such parts no more than a few MiB are held at once.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in arrays.items():
            parts = [value] if isinstance(value, np.ndarray) else value
            shape = parts[0].shape if parts[0].ndim == 0 else (sum(map(len, parts)), *parts[0].shape[1:])
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                head = {"descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, head)
                for part in map(np.atleast_1d, parts):
                    step = max(1, _WRITTEN // max(1, part[:1].nbytes))
                    for begin in range(0, len(part), step):
                        member.write(part[begin : begin + step].tobytes())


def open_npy(path: Path, limit: Limit) -> dict[str, Entry]:
    """The array of a .npy file, or what a saved dictionary holds."""
    with path.open("rb") as file:
        header = _header(file.read(_HEAD))
        if not header.dtype.hasobject:
            return {"": _Npy(path, header)}
        file.seek(header.size)
        return entries_of(_objects(file, limit))


def open_npz(path: Path, limit: Limit) -> dict[str, Entry]:
    """The arrays of an .npz file; those stored without compression are memory-mapped."""
    archive = zipfile.ZipFile(path)  # closed with the last of its members
    return {
        member.filename.removesuffix(".npy"): _NpzMember(path, archive, member, limit) for member in archive.infolist()
    }


# ---- NumPy arrays within a pickle


class _PickledDtype:
    """A dtype by its name; its state sets the order of its bytes."""

    def __init__(self, name: str, *_: Any) -> None:
        # A longer one, a list of a thousand types, takes long to understand each time that it is named.
        self.dtype = np.dtype(name if type(name) is str and len(name) <= _LONGEST_NAME else "V")

    def build(self, state: Any) -> None:
        if state[1] in (">", "<"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray(Entry):
    """An array whose bytes are in the pickle."""

    shape: tuple[int, ...] = ()
    dtype: np.dtype = np.dtype(object)
    data: Any = (None,)  # bytes, the same as a string of Latin-1, or a list of objects

    def build(self, state: Any) -> None:
        _, shape, kind, self.fortran, self.data = state
        self.shape, self.dtype = shape_of(shape), kind.dtype

    def look(self) -> tuple[int, ...] | str:
        return _look(self.dtype, self.shape)

    def read(self) -> Any:
        if self.dtype.hasobject:
            return self.data[0] if self.shape == () else self.data
        order: Literal["C", "F"] = "F" if self.fortran else "C"
        return np.frombuffer(_to_bytes(self.data), self.dtype).reshape(self.shape, order=order)


def _to_bytes(data: str | bytes) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _scalar(kind: _PickledDtype, data: str | bytes) -> Any:
    if kind.dtype.kind not in _NUMBERS:  # of any length, and copied each time that it is named
        return str(kind.dtype)
    return np.frombuffer(_to_bytes(data[:16]), kind.dtype, 1)[0]


def _names(module: str) -> dict[str, Any]:
    return {
        f"{module}.multiarray._reconstruct": lambda *_: _PickledArray(),
        f"{module}.multiarray.scalar": _scalar,
    }


NAMES: dict[str, Any] = {
    **_names("numpy.core"),
    **_names("numpy._core"),
    "numpy.ndarray": None,
    "numpy.dtype": _PickledDtype,
    "_codecs.encode": lambda text, _: text,  # bytes in the protocols that have none; encoded when they are needed
}
"""What NumPy's own pickles name, for :func:`read_pickle`."""


def _objects(file: Any, limit: Limit) -> Any:
    """What a pickled array of objects holds: a list, or its only value."""
    value = read_pickle(file, NAMES, max_steps=limit.steps)
    return value.read() if isinstance(value, _PickledArray) else value
