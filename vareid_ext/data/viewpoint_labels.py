"""Viewpoint labels for images of existing data sets: the pickle files that the authors of VA-reID published, or a CSV.

Both map an image's file name to one of six names, the ambiguous ones kept as the annotators gave them.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vareid_ext.data.plain_pickle import load_label_table
from vareid_ext.data.types import UNKNOWN, VIEWPOINTS, ImageList

HARD_LABELS: Mapping[str, int] = {"front": 0, "front_side": 0, "side": 1, "noise": 1, "back_side": 2, "back": 2}
"""Name -> class, as the authors trained: noise (no clear viewpoint) counts as side."""

SOFT_LABELS: Mapping[str, tuple[float, float, float]] = {
    "front": (1.0, 0.0, 0.0),
    "front_side": (0.5, 0.5, 0.0),
    "side": (0.0, 1.0, 0.0),
    "back_side": (0.0, 0.5, 0.5),
    "back": (0.0, 0.0, 1.0),
    "noise": (1 / 3, 1 / 3, 1 / 3),
}
"""Name -> weights of front, side and back."""

MODES = ("hard", "soft")

_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class ViewpointLabels:
    """File name -> viewpoint name.

    Attributes:
        names: the labels; its keys are bare file names.
        dropped: how many entries of the file were left out because they repeat another one under a doubled suffix.
        source: the file they come from.
    """

    names: Mapping[str, str]
    dropped: int
    source: str
    _stems: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stems", {os.path.splitext(name)[0]: view for name, view in self.names.items()})

    def __len__(self) -> int:
        return len(self.names)

    def find(self, file_name: str) -> str:
        """The viewpoint name of `file_name`, "" when it has none. The suffix may differ (.png for .jpg)."""
        found = self.names.get(file_name)
        return self._stems.get(os.path.splitext(file_name)[0], "") if found is None else found


def _labels_from_pickle(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"viewpoint labels {path}: {size:,} bytes; a label file has at most {_MAX_BYTES:,}")
    try:
        table = load_label_table(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"viewpoint labels {path}: not a pickled table of file name -> (label, name): {error}"
        ) from None
    for name, (label, view) in table.items():
        if HARD_LABELS.get(view) != label:
            allowed = ", ".join(repr((number, known)) for known, number in HARD_LABELS.items())
            raise ValueError(f"viewpoint labels {path}: {name!r} has {(label, view)!r}; allowed are {allowed}")
    return {name: view for name, (_, view) in table.items()}


def _labels_from_csv(path: Path) -> dict[str, str]:
    labels: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            if sorted(header) != ["path", "viewpoint"]:
                raise ValueError(f"viewpoint labels {path}, line 1: expected the columns path,viewpoint, got {header}")
            for row in reader:
                where = f"viewpoint labels {path}, line {reader.line_num}"
                if not row:
                    continue
                if len(row) != 2:
                    raise ValueError(f"{where}: expected 2 cells, got {len(row)}")
                cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
                name, view = os.path.basename(cells["path"]), cells["viewpoint"]
                if view not in HARD_LABELS:
                    raise ValueError(f"{where}: viewpoint must be one of {', '.join(HARD_LABELS)}, got {view!r}")
                if name in labels:
                    raise ValueError(f"{where}: {name!r} is given twice")
                labels[name] = view
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"viewpoint labels {path}: not a readable CSV file: {error}") from None
    return labels


def read_viewpoint_labels(path: str | os.PathLike[str]) -> ViewpointLabels:
    """Read viewpoint labels from a `.pkl` or `.csv` file.

    A `.pkl` is one of the authors' `*_image_map_direction.pkl`: file name -> (label, name). It is read
    by an unpickler that admits no globals and only plain data, so that a hostile file raises and runs nothing. A `.csv`
    has the columns `path,viewpoint` with names out of `HARD_LABELS`. Names ending in a doubled suffix (`.jpg.jpg`)
    repeat another entry and are dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, or the file is not what it should be; the message says where.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".pkl", ".csv"):
        raise ValueError(f"viewpoint labels must be a .pkl or a .csv file, got {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"viewpoint labels: there is no file {path}")
    labels = _labels_from_pickle(path) if suffix == ".pkl" else _labels_from_csv(path)
    doubled = []
    for name in labels:
        stem, last = os.path.splitext(name)
        if last and os.path.splitext(stem)[1] == last and stem in labels:
            doubled.append(name)
    for name in doubled:
        del labels[name]
    return ViewpointLabels(labels, len(doubled), str(path))


def label_images(images: ImageList, names: ViewpointLabels) -> ImageList:
    """`images` with their viewpoints looked up by file name; those without an entry keep theirs."""
    known = zip(images.paths, images.viewpoint_name, strict=True)
    found = tuple(names.find(os.path.basename(path)) or view for path, view in known)
    return replace(images, viewpoint=hard_labels(found), viewpoint_name=found, viewpoint_weight=None)


def hard_labels(names: tuple[str, ...]) -> np.ndarray:
    """int64 [N]: the class of each viewpoint name, -1 for ""."""
    return np.array([HARD_LABELS[name] if name else UNKNOWN for name in names], dtype=np.int64)


def with_soft_labels(images: ImageList) -> ImageList:
    """`images` with `viewpoint_weight` from their viewpoint names (see `SOFT_LABELS`).

    Where the viewpoint is unknown the weight is uniform over the viewpoints that occur, with any weight, for the same
    identity in this list; uniform over all when there are none.
    """
    weight = np.zeros((len(images), len(VIEWPOINTS)), dtype=np.float64)
    known = np.array([bool(name) for name in images.viewpoint_name], dtype=bool)
    for index in np.flatnonzero(known):
        weight[index] = SOFT_LABELS[images.viewpoint_name[index]]
    occurs: dict[int, np.ndarray] = {}
    for index in np.flatnonzero(known):
        identity = int(images.identity[index])
        occurs[identity] = occurs.get(identity, np.zeros(len(VIEWPOINTS), dtype=bool)) | (weight[index] > 0)
    everywhere = np.ones(len(VIEWPOINTS), dtype=bool)
    for index in np.flatnonzero(~known):
        exists = occurs.get(int(images.identity[index]), everywhere)
        weight[index] = exists / exists.sum()
    return replace(images, viewpoint_weight=weight.astype(np.float32))
