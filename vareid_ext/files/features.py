"""Features and labels in files: .npy, .npz, .pt and .mat, memory-mapped where the format can be; labels in .txt too."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vareid_ext import _arrays
from vareid_ext._labels import COLUMN, NAMED, UNKNOWN, Labels, numbered
from vareid_ext._text import VIEWPOINTS
from vareid_ext.files.atomic import atomic_file
from vareid_ext.files.entries import MAX_RATIO, MAX_UNPACKED, Entry, FeatureFileError, Limit, PlainValue
from vareid_ext.files.matlab_files import open_mat
from vareid_ext.files.numpy_files import open_npy, open_npz
from vareid_ext.files.torch_files import open_pt

__all__ = [
    "LABELS",
    "MAX_RATIO",
    "MAX_UNPACKED",
    "FeatureFileError",
    "Features",
    "open_arrays",
    "read_arrays",
    "read_features",
]

SIDES = ("query", "gallery")
LABELS = ("identity", "camera", "viewpoint")

# Names by their meaning, the first that fits is taken. They are compared without case, "_" and "-", and each may have
# the side or its initial before it: query_camid, q_pids, qf.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "feature": ("feature", "features", "feat", "feats", "embedding", "embeddings", "f"),
    "identity": ("identity", "identities", "pid", "pids", "label", "labels", "id", "ids"),
    "camera": ("camera", "cameras", "cameraid", "cameraids", "camid", "camids", "cam", "cams"),
    "viewpoint": ("viewpoint", "viewpoints", "view", "views", "viewid", "viewids"),
    "path": ("path", "paths"),
    "viewpoint_class": ("viewpointclass",),
    "identity_name": ("identityname",),
    "camera_name": ("cameraname",),
}
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DESCRIBED = 20  # keys that an error lists


def _open_txt(path: Path, limit: Limit) -> dict[str, Entry]:
    """Numbers as text, a row a line, as ``numpy.savetxt`` writes them; int64 where all are whole."""
    lines = [line.partition("#")[0] for line in path.read_text(encoding="utf-8-sig").split("\n")]
    # NumPy looks characters up beyond the end of its table of white space, which can kill the process.
    if not all(map(str.isascii, lines)):
        raise ValueError("it holds characters that are in no number")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no numbers at all; a fraction cut off
        try:
            return {"": PlainValue(np.loadtxt(lines, np.int64, ndmin=2))}
        except (ValueError, DeprecationWarning):
            return {"": PlainValue(np.loadtxt(lines, ndmin=2))}


_OPENERS: Mapping[str, Callable[[Path, Limit], dict[str, Entry]]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".pt": open_pt,
    ".pth": open_pt,
    ".mat": open_mat,
    ".txt": _open_txt,
}


@contextlib.contextmanager
def _naming(path: Path, key: str = "") -> Iterator[None]:
    """Inside, errors are FeatureFileErrors that name the file and the key."""
    try:
        yield
    except Exception as error:  # the readers of damaged bytes raise whatever they stumble over
        reason = _shown(str(error).strip().partition("\n")[0]) or type(error).__name__
        where = f"{path}: {_shown(key)}" if key else f"{path}:"
        raise FeatureFileError(f"{where} cannot be read as a {path.suffix.lower()} file: {reason}") from error


def _shown(text: str) -> str:
    """Text out of a file as a terminal may show it."""
    return (text if text.isprintable() else repr(text))[:200]


def open_arrays(path: str | os.PathLike[str], max_unpacked: int = MAX_UNPACKED) -> dict[str, Entry]:
    """What a file holds, by key, not read yet; a file of one unnamed array has the key "".

    .npy, uncompressed .npz, .pt and uncompressed .mat arrays are memory maps when they are read; nothing is ever
    executed. The sizes that a file declares are compared with what it holds.

    Args:
        path: .npy, .npz, .pt, .pth, .mat (MATLAB 5) or .txt file.
        max_unpacked: bytes that a compressed file may unpack to; ``MAX_RATIO`` times its own size is always allowed.

    Raises:
        FeatureFileError: the file does not exist, is damaged or truncated, or is of an unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise FeatureFileError(f"{path}: {found}; a file is needed")
    if path.suffix.lower() not in _OPENERS:
        raise FeatureFileError(f"{path}: suffix {path.suffix!r} was given; allowed are {', '.join(_OPENERS)}")
    with _naming(path):
        return _OPENERS[path.suffix.lower()](path, Limit(path, max_unpacked))


def read_arrays(path: str | os.PathLike[str], max_unpacked: int = MAX_UNPACKED) -> dict[str, np.ndarray]:
    """All that a file holds, by key, as :func:`open_arrays` opens it. Raises FeatureFileError where it is damaged."""
    found = {}
    for key, entry in open_arrays(path, max_unpacked).items():
        with _naming(Path(path), key):
            found[key] = np.asanyarray(entry.read())
    return found


def _look(entry: Entry) -> tuple[int, ...] | str:
    try:
        return entry.look()
    except Exception:  # it matters only when it is read
        return "unreadable"


def _describe(entries: Mapping[str, Entry]) -> str:
    found = []
    for key in list(entries)[:_DESCRIBED]:
        look = _look(entries[key])
        found.append(
            f"{_shown(key) or '(one array)'} {_shown(str(list(look))) if isinstance(look, tuple) else f'({look})'}"
        )
    if len(entries) > _DESCRIBED:
        found.append(f"and {len(entries) - _DESCRIBED} more")
    return ", ".join(found) or "nothing"


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _names(what: str, side: str) -> list[str]:
    usual = _NAMES.get(what) or (_plain(COLUMN + what), _plain(what))  # of a further column
    return [prefix + name for prefix in (side, side[0], "") for name in usual]


def _usual(entries: Mapping[str, Entry], what: str, side: str) -> str | None:
    """The key of this meaning, by the usual names."""
    keys = {_plain(key): key for key in reversed(list(entries))}
    return next((keys[name] for name in _names(what, side) if name in keys), None)


def _only(entries: Mapping[str, Entry]) -> str | None:
    """The key of the only array, besides those whose names say that they are something else."""
    known = {name for what in _NAMES for side in SIDES for name in _names(what, side)}
    keys = [key for key in entries if _plain(key) not in known]
    if len(keys) > 1:
        keys = [key for key in keys if isinstance(_look(entries[key]), tuple)]
    return keys[0] if len(keys) == 1 else None


def _as_numpy(value: Any) -> Any:
    """Tensors but the floating ones as NumPy arrays, which know how to compare and convert all of them."""
    return value.numpy() if isinstance(value, torch.Tensor) and not value.is_floating_point() else value


def _features(value: Any, name: str) -> torch.Tensor:
    value = _as_numpy(value)
    if not isinstance(value, torch.Tensor | np.ndarray):
        raise FeatureFileError(f"{name}: {type(value).__name__} was found; an array is needed")
    if isinstance(value, np.ndarray) and value.dtype.kind in "biu":
        if value.dtype.itemsize == 8 and value.size and max(-int(value.min()), int(value.max())) > 2**53:
            raise FeatureFileError(f"{name}: whole numbers beyond 2^53 were found; no floating type holds them")
        value = value.astype(np.float32 if value.dtype.itemsize <= 2 else np.float64)
    if isinstance(value, np.ndarray) and (value.dtype.kind != "f" or value.dtype.itemsize > 8):
        raise FeatureFileError(f"{name}: dtype {value.dtype} was found; real numbers of up to 64 bits are needed")
    feature = _arrays.to_tensor(value, name)
    if feature.dtype not in _FLOATS:
        raise FeatureFileError(f"{name}: dtype {feature.dtype} was found; allowed are {', '.join(map(str, _FLOATS))}")
    if feature.dim() != 2 or not feature.shape[1]:
        raise FeatureFileError(f"{name}: shape {list(feature.shape)} was found; [images, D] is needed")
    return feature


def _labels(value: Any, name: str, length: int) -> np.ndarray:
    """Labels as int64 [length]; one row or one column will do, and whole numbers kept as floats (MATLAB does)."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        value = value.double()
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float | np.number) for item in value):
        raise FeatureFileError(f"{name}: holds values that are not whole numbers")
    array = np.asarray(_as_numpy(value))
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1:
        raise FeatureFileError(f"{name}: shape {list(array.shape)} was given; one dimension is needed")
    if len(array) != length:
        raise FeatureFileError(f"{name}: length {len(array)} was given; {length} is needed, one for each feature")
    if array.dtype.kind not in "iuf":
        raise FeatureFileError(f"{name}: dtype {array.dtype} was given; whole numbers are needed")
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64)
    if not (whole == array).all():
        raise FeatureFileError(f"{name}: holds values that are not whole numbers of 64 bits")
    return whole


def _address(path: Path, key: str) -> str:
    return f"{path}:{key}" if key else str(path)


@dataclass(frozen=True, eq=False, kw_only=True)
class Features(Labels):
    """The features of N images and their labels.

    Attributes:
        feature: ``[N, D]`` tensor, float32, float64, float16 or bfloat16.
        paths: of the images, where they are known; else empty.
        file: where the features were read, None if they were not.
        sources: where each of feature and labels was read, as ``file:key``, or ``file`` if that holds one array without
            a key; of names that were left aside, why. Labels that are not there are -1.
    """

    feature: torch.Tensor
    paths: tuple[str, ...] = ()
    file: Path | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, feature: torch.Tensor, images: Labels, paths: tuple[str, ...] = ()) -> Features:
        """The features ``[N, D]`` of `images`."""
        labels: dict[str, Any] = {f.name: getattr(images, f.name) for f in fields(Labels)}
        return cls(**labels, feature=feature, paths=paths)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths(feature=self.feature, paths=self.paths or None)

    def rows(self, chosen: np.ndarray) -> dict[str, Any]:
        """As for `Labels`."""
        feature = self.feature[torch.from_numpy(chosen).to(self.feature.device)]
        paths = tuple(self.paths[i] for i in chosen) if self.paths else ()
        return {**super().rows(chosen), "feature": feature, "paths": paths}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write feature, identity, camera, viewpoint, their names, further columns and, if known, path to an .npz file.

        The file is written atomically. bfloat16, which NumPy lacks, is written as float32.
        """
        feature = self.feature.detach().cpu()
        feature = feature.float() if feature.dtype == torch.bfloat16 else feature
        arrays: dict[str, Any] = {"feature": feature.numpy(), **{name: getattr(self, name) for name in LABELS}}
        if (self.viewpoint != UNKNOWN).any():
            arrays["viewpoint_class"] = self.viewpoint_classes()
        arrays.update({COLUMN + name: values for name, values in self.columns.items()})
        arrays.update(self.called_by_key())
        if self.paths:
            arrays["path"] = np.array(self.paths)
        with atomic_file(Path(path)) as file:
            np.savez(file, **arrays)

    def used(self) -> str:
        """What was read for what, in words."""
        own = f"{self.file}:"
        found = [f"{what}: {_shown(source.removeprefix(own))}" for what, source in self.sources.items()]
        return f"{self.file} ({', '.join(found)})"


def read_features(
    path: str | os.PathLike[str],
    side: str,
    *,
    key: str | None = None,
    identity: str | None = None,
    camera: str | None = None,
    viewpoint: str | None = None,
    labels: Collection[str] = LABELS,
    columns: Mapping[str, str | None] | None = None,
    paths: bool = False,
    max_unpacked: int = MAX_UNPACKED,
) -> Features:
    """The features of one side of a retrieval, with what labels there are. Nothing else in the file is read.

    Identities, cameras and columns under a usual name of their file that have names there (``identity_name``,
    ``camera_name``, ``column_NAME_name``) are numbered by these.

    Args:
        path: .npy, .npz, .pt or .mat file.
        side: "query" or "gallery": a file may hold both, under keys such as ``query_feature`` and ``gallery_feature``.
        key: of the features; None for the usual names, or the only array.
        identity: a key of the same file; a file of its own; or ``file:key``. None for the usual names in the same file.
        camera: likewise.
        viewpoint: likewise.
        labels: which of ``LABELS`` to look for; others are -1.
        columns: further columns to look for, with what ``identity`` takes: None looks for ``column_NAME`` and ``NAME``.
            Those that are not there are left out.
        paths: whether to look for the images' paths.
        max_unpacked: as in :func:`open_arrays`, for each file.

    Raises:
        FeatureFileError: a file is missing, damaged, or does not hold what was asked for; lengths do not fit.
    """
    path = Path(path)
    entries = open_arrays(path, max_unpacked)
    if key is None:
        key = _usual(entries, "feature", side)
    if key is None:
        key = _only(entries)
    if key is None:
        raise FeatureFileError(
            f"{path}: has no key of the usual names ({', '.join(_NAMES['feature'])}, also with {side}_ before them) "
            f"and not one array alone; it holds {_describe(entries)}; name the key"
        )
    if key not in entries:
        raise FeatureFileError(f"{path}: has no key {key!r}; it holds {_describe(entries)}")
    with _naming(path, key):
        found = entries[key].read()
    feature = _features(found, f"{path}: {side} features")
    sources = {"feature": _address(path, key)}
    values: dict[str, Any] = {name: np.full(len(feature), UNKNOWN) for name in LABELS}
    values["columns"], values["names"] = {}, {}
    given = {"identity": identity, "camera": camera, "viewpoint": viewpoint, **(columns or {})}
    for what in (*labels, *(columns or ())):
        source = _label_source(path, entries, what, side, given[what], max_unpacked)
        if source is None:
            continue
        file, label_key, content = source
        with _naming(file, label_key):
            found = content[label_key].read()
        of = values if what in LABELS else values["columns"]
        of[what] = _labels(found, f"{file}: {side} {what}", len(feature))
        sources[what] = _address(file, label_key)
        usual: str | None = label_key
        name_key: str | None = None
        if what in NAMED:
            usual, name_key = _usual(content, what, side), _usual(content, f"{what}_name", side)
        elif what not in LABELS and f"{label_key}_name" in content:
            name_key = f"{label_key}_name"
        if name_key is not None and label_key != usual:
            sources[f"{what}_name"] = f"left aside, as {name_key} may not be that of {label_key}"
        elif name_key is not None:
            with _naming(file, name_key):
                texts = _texts(content[name_key].read(), len(feature))
            _check_names(of[what], texts, f"{file}: {side} {name_key}")
            of[what], values["names"][what] = numbered(texts)
            sources[f"{what}_name"] = _address(file, name_key)
    if "viewpoint" in sources:
        name_key = _usual(entries, "viewpoint_class", side)
        named = None
        if name_key is not None:
            with _naming(path, name_key):
                named = _texts(entries[name_key].read(), len(feature))
        values["viewpoints"] = _called(values["viewpoint"], named, f"{path}: {side} viewpoint_class")
    path_key = _usual(entries, "path", side) if paths else None
    if path_key is not None:
        with _naming(path, path_key):
            values["paths"] = _texts(entries[path_key].read(), len(feature))
        sources["path"] = _address(path, path_key)
    return Features(feature=feature, **values, file=path, sources=sources)


def _check_names(number: np.ndarray, texts: Sequence[str], where: str) -> None:
    """FeatureFileError unless every number, and nothing else, has a name of its own."""
    pairs = {(n, text) for n, text in zip(number.tolist(), texts, strict=True) if (n, text) != (UNKNOWN, "")}
    numbers, names = ({pair[i] for pair in pairs} for i in (0, 1))
    if not len(numbers) == len(names) == len(pairs) or UNKNOWN in numbers or "" in names:
        raise FeatureFileError(f"{where}: a number has no name or two, or a name belongs to two numbers")


def _called(viewpoint: np.ndarray, named: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """What the viewpoints 0, 1, ... are called: as the images say, else as in the paper, or by number beyond three."""
    count = int(viewpoint.max(initial=-1)) + 1
    pairs = set() if named is None else {(v, n) for v, n in zip(viewpoint.tolist(), named, strict=True) if v >= 0}
    names = dict(pairs)
    if len(names) < len(pairs) or len(set(names.values())) < len(pairs):
        raise FeatureFileError(f"{where}: a viewpoint has two names, or a name belongs to two viewpoints")
    if count <= len(VIEWPOINTS) and all(VIEWPOINTS[v] == name for v, name in pairs):
        return VIEWPOINTS
    return tuple(names.get(v, str(v)) for v in range(count))


def _texts(value: Any, length: int) -> tuple[str, ...]:
    array = np.asarray(value)
    if array.dtype.kind != "U" or array.shape != (length,):
        raise ValueError(f"{array.dtype} {list(array.shape)} was found; text [{length}] is needed")
    return tuple(array.tolist())


def _label_source(
    path: Path, entries: Mapping[str, Entry], what: str, side: str, given: str | None, max_unpacked: int
) -> tuple[Path, str, Mapping[str, Entry]] | None:
    """The file of a label, the key and what the file holds; None if none is given and none has a usual name."""
    if given is None:
        key = _usual(entries, what, side)
        return None if key is None else (path, key, entries)
    if given in entries:
        return path, given, entries
    name, key = (given, None) if Path(given).exists() else given.rpartition(":")[::2]
    if not name:
        raise FeatureFileError(f"{given}: is neither a file nor a key of {path}, which holds {_describe(entries)}")
    content = open_arrays(name, max_unpacked)
    if key is None:
        key = _usual(content, what, side) or _only(content)
        if key is None:
            raise FeatureFileError(f"{name}: has no {what} under the usual names; it holds {_describe(content)}")
    if key not in content:
        raise FeatureFileError(f"{name}: has no key {key!r}; it holds {_describe(content)}")
    return Path(name), key, content
