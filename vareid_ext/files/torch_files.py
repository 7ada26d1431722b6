"""Tensors and NumPy arrays in files of ``torch.save``, memory-mapped.

``torch.load`` maps what a file declares without a look at what it holds, reads every key, and allows functions that
allocate any amount of memory; so the file's small pickle is read here, and nothing else until it is asked for.
"""

from __future__ import annotations

import math
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vareid_ext import _arrays
from vareid_ext.files import numpy_files
from vareid_ext.files.entries import Entry, Limit, entries_of, shape_of, stored_at
from vareid_ext.files.pickles import read_pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip


class _Storage:
    """A run of bytes in the file: where it begins is asked when it is needed."""

    def __init__(self, dtype: torch.dtype, count: int, position: Callable[[int], int]) -> None:
        self.dtype, self.nbytes, self._position = dtype, int(count) * dtype.itemsize, position

    def map(self, path: Path, dtype: torch.dtype) -> torch.Tensor:
        position = self._position(self.nbytes)
        if not self.nbytes:
            return torch.empty(0, dtype=dtype)
        content: np.ndarray = np.memmap(path, np.uint8, "r", position, (self.nbytes,))
        if position % dtype.itemsize:
            content = np.array(content)
        return _arrays.to_tensor(content, str(path)).view(dtype)


class _Tensor(Entry):
    def __init__(self, path: Path, limit: Limit, storage: _Storage, view: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.path, self.limit, self.storage, self.dtype = path, limit, storage, dtype
        self.offset, self.shape, self.stride = view[0], shape_of(view[1]), shape_of(view[2])

    def look(self) -> tuple[int, ...]:
        return self.shape

    def read(self) -> torch.Tensor:
        needed = math.prod(self.shape) * self.dtype.itemsize
        if needed > self.storage.nbytes:  # rows that are the same bytes
            self.limit.check(needed)
        return self.storage.map(self.path, self.dtype).as_strided(self.shape, self.stride, self.offset)


def _names(path: Path, limit: Limit) -> dict[str, Any]:
    """What the pickles of ``torch.save`` name."""

    def tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
        return _Tensor(path, limit, storage, (offset, shape, stride), storage.dtype)

    def typed_tensor(
        storage: _Storage, offset: int, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
    ) -> _Tensor:
        return _Tensor(path, limit, storage, (offset, shape, stride), dtype)

    return {
        **numpy_files.NAMES,
        **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
        **{f"torch.{name}": getattr(torch, name) for name in ("uint16", "uint32", "uint64")},
        "torch.storage.UntypedStorage": torch.uint8,
        "torch.Size": lambda sizes: sizes,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed_tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "collections.OrderedDict": lambda: {},
    }


def open_pt(path: Path, limit: Limit) -> dict[str, Entry]:
    """The tensors and arrays of a file of ``torch.save``, of today's format or the one before PyTorch 1.6."""
    return entries_of(read_pt(path, limit))


def read_pt(path: Path, limit: Limit, *, unread: bool = False) -> Any:
    """What a file of ``torch.save`` holds, an :class:`Entry` in place of each tensor and array.

    With `unread`, objects of other classes are :class:`vareid_ext.files.pickles.Unread`, not errors.
    """
    return (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path, limit, unread)


def _check_key(key: Any) -> None:
    if type(key) is not str:  # another could be made to take for ever to hash or print
        raise ValueError("a storage whose key is no string")


def _check_order(order: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"its numbers are {order}-endian, this machine's {sys.byteorder}-endian")


def _read_zip(path: Path, limit: Limit, unread: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}

    def storage(identifier: Any) -> _Storage:
        _, dtype, key, _, count = identifier
        _check_key(key)

        def position(nbytes: int) -> int:
            member = members[f"data/{key}"]
            if nbytes != member.file_size:
                raise ValueError(f"{nbytes:,} bytes are declared, but {member.filename} holds {member.file_size:,}")
            return stored_at(path, member)

        return _Storage(dtype, count, position)

    if "data.pkl" not in members:
        raise ValueError("it is a zip file, but not one of torch.save")
    with path.open("rb") as file:
        if "byteorder" in members:
            file.seek(stored_at(path, members["byteorder"]))
            _check_order(file.read(members["byteorder"].file_size).decode())
        file.seek(stored_at(path, members["data.pkl"]))
        return read_pickle(file, _names(path, limit), storage, limit.steps, unread)


def _read_legacy(path: Path, limit: Limit, unread: bool) -> Any:
    storages: dict[str, _Storage] = {}
    positions: dict[str, int] = {}

    def storage(identifier: Any) -> Any:
        if identifier[0] == "module":  # a class, with its source
            return identifier[1]
        _, dtype, key, _, count, view = identifier
        _check_key(key)
        if view is not None:
            raise ValueError("a view of a storage; save the tensors with today's torch.save")
        return storages.setdefault(key, _Storage(dtype, count, lambda _: positions[key]))

    with path.open("rb") as file:
        if read_pickle(file, max_steps=limit.steps) != _LEGACY_MAGIC:
            raise ValueError("it is no file of torch.save")
        read_pickle(file, max_steps=limit.steps)  # the format's number
        system = read_pickle(file, max_steps=limit.steps)
        _check_order("little" if system["little_endian"] else "big")
        value = read_pickle(file, _names(path, limit), storage, limit.steps, unread)
        for key in read_pickle(file, max_steps=limit.steps):
            held = int.from_bytes(file.read(8), sys.byteorder) * storages[key].dtype.itemsize
            if held != storages[key].nbytes:
                raise ValueError(f"{storages[key].nbytes:,} bytes are declared, but {held:,} are there")
            positions[key] = file.tell()
            file.seek(held, os.SEEK_CUR)
    return value
