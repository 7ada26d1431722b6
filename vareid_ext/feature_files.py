"""Features and labels in files: .npy, .npz, .pt (weights_only) and .mat, memory-mapped where the format can be."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vareid_ext import _arrays

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".mat", ".txt")
SIDES = ("query", "gallery")
LABELS = ("identity", "camera", "viewpoint")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of its name and its extra field

# The keys tried, in order, when none is given; {side} is query or gallery.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "feature": ("{side}_feature", "{side}_features", "{side}_f", "feature", "features", "feat", "feats"),
    "identity": ("{side}_identity", "{side}_label", "{side}_id", "identity", "identities", "pid", "pids", "label",
                 "labels", "id", "ids"),
    "camera": ("{side}_camera", "{side}_cam", "camera", "cameras", "camid", "camids", "cam", "cams"),
    "viewpoint": ("{side}_viewpoint", "{side}_view", "viewpoint", "viewpoints", "view", "views"),
}  # fmt: skip


class FeatureFileError(ValueError):
    """A file that is missing, damaged or does not hold what is needed; the message names it."""


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an .npz file: memory-mapped if it was stored without compression, else read."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        header = stream.tell()
        if dtype.hasobject:
            raise FeatureFileError(f"{path}: {member.filename} holds Python objects, which are not read")
        if member.compress_type != zipfile.ZIP_STORED or 0 in shape:
            stream.seek(0)
            return np.lib.format.read_array(stream, allow_pickle=False)
    with path.open("rb") as file:
        file.seek(member.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length + header
    order: Literal["C", "F"] = "F" if fortran else "C"
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order=order)


def _read_npz(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist()}
        return {name: _npz_member(path, archive, member) for name, member in members.items()}


def _read_pt(path: Path) -> dict[str, Any]:
    mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    if isinstance(content, torch.Tensor):
        return {"": content}
    if not isinstance(content, Mapping):
        raise FeatureFileError(f"{path}: holds a {type(content).__name__}; a tensor or a dictionary of them is needed")
    return {str(key): value for key, value in content.items()}


def _read_mat(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.read(10) == b"MATLAB 7.3":
            raise FeatureFileError(f"{path}: is a MATLAB 7.3 file; save it with -v7, or convert it to .npz")
    try:
        import scipy.io
    except ModuleNotFoundError:
        raise FeatureFileError(f"{path}: reading .mat files needs SciPy (pip install scipy)") from None
    try:
        content = scipy.io.loadmat(path)
    except (scipy.io.matlab.MatReadError, NotImplementedError, TypeError, IndexError) as error:
        raise FeatureFileError(f"{path}: cannot be read as a MATLAB file: {error}") from error
    return {key: value for key, value in content.items() if not key.startswith("__")}


def _read_txt(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").split()
    for number, line in enumerate(lines):
        if not line.removeprefix("-").isdecimal():
            raise FeatureFileError(f"{path}: entry {number + 1} is {line[:40]!r}; whole numbers are needed")
    return {"": np.array([int(line) for line in lines], dtype=np.int64)}


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All arrays of a file by key; a file of one unnamed array has the key "".

    .npy and uncompressed .npz arrays are memory maps, .pt tensors are mapped where the format can be; nothing but
    arrays is ever unpickled.

    Raises:
        FeatureFileError: the file does not exist, is damaged or truncated, or is of an unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FeatureFileError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}; a file is needed")
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        if kind == ".npz":
            return _read_npz(path)
        if kind in (".pt", ".pth"):
            return _read_pt(path)
        if kind == ".mat":
            return _read_mat(path)
        if kind == ".txt":
            return _read_txt(path)
    except FeatureFileError:
        raise
    except Exception as error:  # the readers of damaged bytes raise whatever they stumble over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FeatureFileError(f"{path}: is damaged, truncated or not a {kind} file: {reason}") from error
    raise FeatureFileError(f"{path}: suffix {path.suffix!r} was given; allowed are {', '.join(SUFFIXES)}")


def _describe(arrays: Mapping[str, Any]) -> str:
    def kind(value: Any) -> str:
        return str(list(value.shape)) if hasattr(value, "shape") else f"({type(value).__name__})"

    return ", ".join(f"{key or '(one array)'} {kind(value)}" for key, value in arrays.items()) or "nothing"


def _pick(path: Path, arrays: Mapping[str, Any], what: str, side: str, key: str | None) -> Any:
    """The array of this meaning, by its key or by the usual names; None if nothing fits and no key was given."""
    if key is not None:
        if key not in arrays:
            raise FeatureFileError(f"{path}: has no key {key!r}; it holds {_describe(arrays)}")
        return arrays[key]
    by_lower_case = {name.lower(): value for name, value in arrays.items()}
    for pattern in _KEYS[what]:
        if pattern.format(side=side) in by_lower_case:
            return by_lower_case[pattern.format(side=side)]
    return arrays[""] if what == "feature" and "" in arrays else None


def _vector(value: Any, name: str, length: int) -> torch.Tensor:
    """Labels as int64 [length]; one row or one column will do, and whole numbers kept as floats (MATLAB does)."""
    tensor = _arrays.to_tensor(np.asarray(value) if isinstance(value, list | tuple) else value, name)
    if tensor.dim() == 2 and 1 in tensor.shape:
        tensor = tensor.reshape(-1)
    if tensor.dim() != 1:
        raise FeatureFileError(f"{name}: shape {list(tensor.shape)} was given; one dimension is needed")
    if len(tensor) != length:
        raise FeatureFileError(f"{name}: length {len(tensor)} was given; {length} is needed, one for each feature")
    whole = tensor.to(torch.int64)
    if tensor.dtype == torch.bool or tensor.is_complex() or not bool((whole == tensor).all()):
        raise FeatureFileError(f"{name}: holds values that are not whole numbers")
    return whole


@dataclass(frozen=True)
class FeatureSet:
    """The features of one side and their labels.

    Attributes:
        feature: ``[N, D]`` tensor, float32, float64, float16 or bfloat16; over a memory map where the file can be one.
        identity: ``[N]`` int64, or None if the file has none.
        camera: ``[N]`` int64, or None.
        viewpoint: ``[N]`` int64, or None.
    """

    feature: torch.Tensor
    identity: torch.Tensor | None
    camera: torch.Tensor | None
    viewpoint: torch.Tensor | None


def read_features(
    path: str | os.PathLike[str],
    side: str,
    *,
    key: str | None = None,
    identity: str | None = None,
    camera: str | None = None,
    viewpoint: str | None = None,
    labels: Collection[str] = LABELS,
) -> FeatureSet:
    """The features of one side of a retrieval, with what labels there are.

    Args:
        path: .npy, .npz, .pt or .mat file.
        side: "query" or "gallery": a file may hold both, under keys such as ``query_feature`` and ``gallery_feature``.
        key: of the features; None for the usual names, or the only array.
        identity: a key of the same file; a file of its own; or ``file:key``. None for the usual names in the same file.
        camera: likewise.
        viewpoint: likewise.
        labels: which of ``LABELS`` to look for.

    Raises:
        FeatureFileError: a file is missing, damaged, or does not hold what was asked for; lengths do not fit.
    """
    path = Path(path)
    arrays = read_arrays(path)
    found = _pick(path, arrays, "feature", side, key)
    if found is None:
        raise FeatureFileError(
            f"{path}: has no key of the usual names ({', '.join(k.format(side=side) for k in _KEYS['feature'])}); "
            f"it holds {_describe(arrays)}; name the key"
        )
    named = f"{path}: {side} features"
    if not isinstance(found, torch.Tensor | np.ndarray):
        raise FeatureFileError(f"{named}: {type(found).__name__} was found; an array is needed")
    feature = _arrays.to_tensor(found, named) if not _is_foreign(found) else None
    if feature is None or not feature.is_floating_point():
        raise FeatureFileError(f"{named}: dtype {found.dtype} was found; a floating type is needed")
    if feature.dim() != 2:
        raise FeatureFileError(f"{named}: shape {list(feature.shape)} was found; [images, D] is needed")
    given_labels = {"identity": identity, "camera": camera, "viewpoint": viewpoint}
    found_labels: dict[str, torch.Tensor | None] = dict.fromkeys(given_labels)
    for what in labels:
        given = given_labels[what]
        source, content, label_key = path, arrays, given
        if given is not None and given not in arrays:
            name, _, label_key = (given, "", None) if Path(given).is_file() else given.rpartition(":")
            if not name:
                raise FeatureFileError(
                    f"{given}: is neither a file nor a key of {path}, which holds {_describe(arrays)}"
                )
            source, content = Path(name), read_arrays(name)
            label_key = "" if label_key is None and "" in content else label_key
        value = _pick(source, content, what, side, label_key)
        if given is not None and value is None:
            raise FeatureFileError(f"{source}: has no {what} under the usual names; it holds {_describe(content)}")
        if value is not None and _is_foreign(value):
            raise FeatureFileError(f"{source}: {side} {what} holds values that are not whole numbers")
        if value is not None:
            found_labels[what] = _vector(value, f"{source}: {side} {what}", len(feature))
    return FeatureSet(feature, **found_labels)


def _is_foreign(value: Any) -> bool:
    """Whether PyTorch has no such numbers (text, dates, records)."""
    return isinstance(value, np.ndarray) and value.dtype.kind not in "biuf"
