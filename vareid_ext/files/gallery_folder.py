"""A gallery in a folder: its features, which are only ever appended to, and arrays about its rows.

``index.json`` says how many rows there are and which of the folders ``rows-N`` holds the arrays. It takes its place
last, so a folder is as it was until a change is complete; what lies beyond the rows that it counts is of a writer that
was killed, and the next one writes over it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vareid_ext._version import __version__
from vareid_ext.files.atomic import atomic_file, atomic_folder, naming
from vareid_ext.files.features import open_arrays

FORMAT = 1
"""Raised whenever what a folder holds changes its meaning."""
LIBRARY = "vareid_ext"
DESCRIPTION, FEATURES, ROWS = "index.json", "features.bin", "rows-"
DTYPES = ("float32", "float64", "float16")


@dataclass(frozen=True, eq=False)
class StoredGallery:
    """What a folder holds.

    Attributes:
        description: of :func:`write_gallery`, with "rows", "D" and "dtype" of the features and "change", the number of
            changes.
        feature: [rows, D], a memory map.
        arrays: by name, memory maps.
    """

    description: dict[str, Any]
    feature: np.ndarray
    arrays: dict[str, np.ndarray]


def read_gallery(folder: Path) -> StoredGallery:
    """Open a folder, whatever its size in no time.

    Raises:
        FileNotFoundError: there is none, or it was not finished.
        ValueError: it is damaged, of another program or of another version.
    """
    while True:
        description = _description(folder)
        try:
            return StoredGallery(description, _feature(folder, description), _arrays(folder, description))
        except (OSError, ValueError) as error:
            if _description(folder)["change"] != description["change"]:
                continue  # it has been added to meanwhile
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"index: {str(folder)!r} is damaged: {error}") from error


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        why = f"holds no {DESCRIPTION}: it is no index, or was not finished" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"index: {str(folder)!r} {why}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"index: {str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("library") != LIBRARY:
        raise ValueError(f'index: {str(path)!r} is of another program: it does not say "library": "{LIBRARY}"')
    if found.get("format") != FORMAT:
        raise ValueError(
            f"index: {str(folder)!r} has format {found.get('format')!r} of {LIBRARY} {found.get('version')!s:.20}; "
            f"this is {LIBRARY} {__version__}, which reads format {FORMAT}; make the index again"
        )
    sizes = [found.get(name) for name in ("rows", "D", "change")]
    if not all(isinstance(size, int) and 0 < size < 1 << 48 for size in sizes) or found.get("dtype") not in DTYPES:
        raise ValueError(f"index: {str(path)!r} is damaged: it does not say how many features of what kind there are")
    return found


def _feature(folder: Path, description: Mapping[str, Any]) -> np.ndarray:
    shape, dtype = (description["rows"], description["D"]), np.dtype(description["dtype"])
    needed, held = shape[0] * shape[1] * dtype.itemsize, (folder / FEATURES).stat().st_size
    if held < needed:
        raise ValueError(f"index: {str(folder / FEATURES)!r} is damaged: it has {held} bytes; {needed} are needed")
    return np.memmap(folder / FEATURES, dtype, "r", shape=shape)


def _arrays(folder: Path, description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    rows = folder / f"{ROWS}{description['change']}"
    return {path.stem: np.asanyarray(open_arrays(path)[""].read()) for path in sorted(rows.iterdir())}


def check_new(folder: Path) -> None:
    """An error if no index can be begun in a folder.

    Raises:
        FileExistsError: it holds an index, or other files.
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"index: {str(folder)!r} is a file; a folder is needed, or a name that is free")
    held = sorted(os.listdir(folder)) if folder.is_dir() else []
    if DESCRIPTION in held:
        raise FileExistsError(f"index: {str(folder)!r} holds an index already; add to it, or choose another folder")
    others = [name for name in held if not name.startswith((FEATURES, ROWS, "."))]
    if others:
        raise FileExistsError(f"index: {str(folder)!r} holds {others[0]!r}, which is no part of an index")


def write_gallery(
    folder: Path,
    before: StoredGallery | None,
    feature: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    description: Mapping[str, Any],
) -> None:
    """Append features to a folder, which the caller has locked, and replace its arrays.

    Args:
        folder: an existing one.
        before: what it holds, None if nothing.
        feature: [A, D], the new rows.
        arrays: of all rows.
        description: what else is to be known of them, for JSON.

    Raises:
        OSError: it cannot be written; the folder then holds what it did.
    """
    change, rows = (0, 0) if before is None else (before.description["change"], before.description["rows"])
    D, dtype = feature.shape[1], feature.dtype
    # What holds these has changed by one; an unfinished folder of that name is of a killed writer.
    target = folder / f"{ROWS}{change + 1}"
    shutil.rmtree(target, ignore_errors=True)
    end = rows * D * dtype.itemsize
    features = folder / FEATURES
    try:
        with naming(features), features.open("ab") as file:
            file.truncate(end)
            file.write(feature.tobytes())
            file.flush()
            os.fsync(file.fileno())
        with atomic_folder(target) as draft:
            for name, array in arrays.items():
                with naming(target), (draft / f"{name}.npy").open("wb") as file:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    np.lib.format.write_array_header_1_0(file, header)
                    file.write(array.tobytes())
        told = {
            "library": LIBRARY, "format": FORMAT, "version": __version__, "rows": rows + len(feature), "D": D,
            "dtype": dtype.name, "change": change + 1,
        }  # fmt: skip
        with atomic_file(folder / DESCRIPTION) as file:
            file.write(f"{json.dumps({**description, **told}, indent=2)}\n".encode())
    except BaseException:
        if not (folder / DESCRIPTION).is_file() or _description(folder)["change"] == change:
            shutil.rmtree(target, ignore_errors=True)
            if features.exists():
                os.truncate(features, end)
        raise
    for old in folder.glob(f"{ROWS}*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
