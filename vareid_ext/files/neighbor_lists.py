"""Neighbour lists in files: those of ``vareid neighbors`` and of other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vareid_ext.files.entries import MAX_UNPACKED, FeatureFileError
from vareid_ext.files.features import read_arrays

# Names by their meaning, the first that fits is taken; compared without case, "_" and "-".
_NAMES: Mapping[str, tuple[str, ...]] = {
    "index": ("index", "indices", "neighbors", "neighbours", "neighbor", "ids", "id", "i", "rows", "row"),
    "distance": ("distance", "distances", "dist", "d", "scores", "score", "similarity", "similarities", "squared"),
    "row_max": ("rowmax", "farthest"),
    "num_query": ("numquery", "numqueries", "queries"),
}
_METRICS = ("sqeuclidean", "cosine")  # of lists of vareid neighbors


@dataclass(frozen=True, eq=False)
class NeighborLists:
    """The lists of M rows.

    Attributes:
        index: [M, k] whole numbers, memory maps where the format can be.
        distance: [M, k].
        row_max: [M], or None.
        num_query: how many of the rows are queries, or None.
        gallery_row: the rows of the gallery's file that the M rows hold, or None for all.
        about: what `vareid neighbors` says of lists that it has made, with their "metric"; else None.
    """

    index: np.ndarray
    distance: np.ndarray
    row_max: np.ndarray | None = None
    num_query: int | None = None
    gallery_row: np.ndarray | None = None
    about: Mapping[str, Any] | None = None


def read_neighbor_lists(paths: Sequence[str], max_unpacked: int = MAX_UNPACKED) -> NeighborLists:
    """Lists out of one file that names its arrays, or out of two or three files: index, distance, row_max.

    Whole numbers without a sign are taken, too, where the largest that there is means that nothing was found.

    Raises:
        FeatureFileError: a file is missing, damaged, of an unknown kind or does not hold lists.
    """
    if len(paths) > 3:
        raise FeatureFileError(f"--neighbors: {len(paths)} files were given; 1 to 3 are needed")
    found: dict[str, Any] = {}
    if len(paths) == 1:
        arrays = read_arrays(paths[0], max_unpacked)
        keys = {key.lower().replace("_", "").replace("-", ""): key for key in reversed(arrays)}
        for name, usual in _NAMES.items():
            key = next((keys[one] for one in usual if one in keys), None)
            if key is None and name in ("index", "distance"):
                held = "one array without a name" if list(arrays) == [""] else ", ".join(arrays) or "nothing"
                raise FeatureFileError(
                    f"{paths[0]}: holds {held}; index and distance are needed, or a file for "
                    "each: --neighbors INDEX DISTANCE [ROW_MAX]"
                )
            found[name] = None if key is None else arrays[key]
        if "shard" in arrays:
            raise FeatureFileError(f"{paths[0]}: is one shard of lists; vareid neighbors --merge puts them together")
        found |= _of_vareid(paths[0], arrays)
    else:
        found = dict(zip(("index", "distance", "row_max"), (_only(path, max_unpacked) for path in paths), strict=False))
    if found.get("num_query") is not None:
        found["num_query"] = int(_whole(paths[0], "num_query", found["num_query"], ()))
    return NeighborLists(**{**found, "index": _signed(found["index"]), "distance": _single(found["distance"])})


def _of_vareid(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What lists of `vareid neighbors` say beside themselves."""
    if "request" not in arrays:
        return {}
    try:
        told = json.loads(str(arrays["request"]))
        metric, gallery = told["metric"], told["gallery"]
    except (ValueError, TypeError, KeyError):
        return {}
    if metric not in _METRICS:
        raise FeatureFileError(f"{path}: request names the metric {metric!r:.40}; {' or '.join(_METRICS)} is needed")
    row = arrays.get("gallery_row")
    return {"about": told, "gallery_row": None if row is None else _whole(path, "gallery_row", row, (gallery,))}


def _whole(path: str, name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if value.dtype.kind not in "iu" or value.shape != shape:
        what = f"{value.dtype} {list(value.shape)}"
        raise FeatureFileError(f"{path}: {name} is {what}; whole numbers {list(shape)} are needed")
    return value.astype(np.int64)


def _only(path: str, max_unpacked: int) -> np.ndarray:
    arrays = read_arrays(path, max_unpacked)
    if len(arrays) != 1:
        raise FeatureFileError(f"{path}: holds {', '.join(arrays) or 'nothing'}; one array is needed")
    return next(iter(arrays.values()))


def _signed(index: np.ndarray) -> np.ndarray:
    if index.dtype.kind != "u":
        return index if index.dtype.itemsize >= 4 or index.dtype.kind != "i" else index.astype(np.int32)
    return np.where(index == np.iinfo(index.dtype).max, -1, index.astype(np.int64))


def _single(distance: np.ndarray) -> np.ndarray:
    return distance.astype(np.float32) if distance.dtype == np.float16 else distance
