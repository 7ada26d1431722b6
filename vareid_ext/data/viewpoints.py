"""Viewpoint labels for images of existing data sets: the pickle files that the authors published, or a CSV file."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vareid_ext.data.plain_pickle import load_label_table
from vareid_ext.data.text_files import known, no_file, read_table, shown
from vareid_ext.data.types import IMAGE_SUFFIXES, ImageList, ReidData, left_out
from vareid_ext.data.viewpoint_classes import PERSON, ViewpointClasses, checked_classes

MODES = ("hard", "soft")

_MAX_BYTES = 8 << 20


def _plain(path: str) -> str:
    """`path` with slashes, and without `.`, `..` and a slash at its start: the same text however it is spelled."""
    parts = posixpath.normpath(path.replace("\\", "/")).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _without_suffixes(path: str) -> str:
    """`path` without the suffixes of an image at its end, also without doubled ones (`.jpg.jpg`)."""
    parts = path.split(".")
    while len(parts) > 1 and f".{parts[-1].lower()}" in IMAGE_SUFFIXES:
        parts.pop()
    return ".".join(parts)


def _owners(labels: Mapping[str, str], images: Sequence[str], relative: Sequence[str]) -> dict[int, str]:
    """Image index -> the label that is its `relative` path, or the longest that this image's path alone ends with."""
    depth = max((label.count("/") + 1 for label in labels), default=0)
    ends: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        parts = image.split("/")[-depth:]
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            if end in labels:
                ends.setdefault(end, []).append(index)
    shortest_first = sorted(ends, key=lambda label: label.count("/"))
    found = {ends[label][0]: label for label in shortest_first if len(ends[label]) == 1}
    same = Counter(relative)
    found.update((index, path) for index, path in enumerate(relative) if path in labels and same[path] == 1)
    return found


@dataclass(frozen=True)
class ViewpointLabels:
    """Image -> viewpoint label.

    Attributes:
        names: the labels; its keys are paths or bare file names.
        source: the file they come from.
        classes: what the labels mean.
    """

    names: Mapping[str, str]
    source: str
    classes: ViewpointClasses = PERSON

    def __len__(self) -> int:
        return len(self.names)

    def find(
        self, paths: Sequence[str], root: str | os.PathLike[str] | None = None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The viewpoint name of each of a data set's images, "" where it has none; and the labels that were not used.

        A label belongs to the image of its path, relative to `root` or else to any folder above the image; one that
        fits several images, as a bare file name may, belongs to none. Slashes and backslashes are the same, and so are
        the suffixes of images, also doubled ones (`.png`, `.jpg`, `.jpg.jpg`), where that leaves no doubt.
        """
        images = [_plain(os.path.abspath(path)) for path in paths]
        base = "" if root is None else _plain(os.path.abspath(root)) + "/"
        found = [""] * len(paths)
        plain = {name: _plain(name) for name in self.names}
        used = set()
        for spelled in (str, _without_suffixes):
            labels: dict[str, str] = {}
            for name, view in self.names.items():
                label = spelled(plain[name])
                # Labels that differ in nothing but their suffixes and disagree say nothing about other suffixes.
                labels[label] = view if labels.get(label, view) == view else ""
            known = [spelled(image) for image in images]
            for index, label in _owners(labels, known, [image.removeprefix(base) for image in known]).items():
                found[index] = found[index] or labels[label]
                if labels[label]:
                    used.add((_without_suffixes(label), labels[label]))
        unused = [name for name, view in self.names.items() if (_without_suffixes(plain[name]), view) not in used]
        return tuple(found), tuple(unused)


def _labels_from_pickle(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(
            f"viewpoint labels {path}: {size:,} bytes; a pickle may have {_MAX_BYTES:,}, a CSV file any number"
        )
    try:
        table = load_label_table(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"viewpoint labels {path}: not a pickled table of file name -> (label, name): {error}"
        ) from None
    allowed = {name: PERSON.number(name) for name in (*PERSON.names, *PERSON.between)}
    for name, (label, view) in table.items():
        if allowed.get(view) != label:
            pairs = ", ".join(repr((number, known)) for known, number in allowed.items())
            raise ValueError(f"viewpoint labels {path}: {shown(name)} has {shown((label, view))}; allowed are {pairs}")
    return {name: view for name, (_, view) in table.items()}


def read_viewpoint_labels(path: str | os.PathLike[str], classes: ViewpointClasses | None = None) -> ViewpointLabels:
    """Read viewpoint labels from a `.pkl` or `.csv` file.

    A `.pkl` is one of the authors' `*_image_map_direction.pkl`: file name -> (label, name). It is read
    by an unpickler that admits no globals and only plain data, so that a hostile file raises and runs nothing. A `.csv`
    has the columns `path,viewpoint` and perhaps `confidence`, which is not read; the viewpoint is a label of `classes`
    (see `ViewpointClasses`), and unknown where a manifest's would be.

    Args:
        path: the file.
        classes: the viewpoints that were declared; None takes those that are found (see `found_classes`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, or the file is not what it should be; the message says where.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".pkl", ".csv"):
        raise ValueError(f"viewpoint labels must be a .pkl or a .csv file, got {str(path)!r}")
    if problem := no_file(path):
        raise FileNotFoundError(f"viewpoint labels: {problem}")
    names: dict[str, str] = {}
    seen = set()
    if suffix == ".pkl":
        rows = ((f"viewpoint labels {path}", name, view) for name, view in _labels_from_pickle(path).items())
    else:
        rows = (
            (f"viewpoint labels {path}, line {line}", row["path"], known(row["viewpoint"]))
            for line, row in read_table(path, "viewpoint labels", ("path", "viewpoint"), ("confidence",))
        )
    labels = []
    for where, name, view in rows:
        if _plain(name) in seen:
            raise ValueError(f"{where}: {shown(name)} is given twice")
        seen.add(_plain(name))
        if view:
            names[name] = view
            labels.append((where, view))
    return ViewpointLabels(names, str(path), checked_classes(labels, classes))


def label_images(data: ReidData, labels: ViewpointLabels, root: str | os.PathLike[str] | None = None) -> ReidData:
    """`data` with the viewpoints that `labels` gives to its images (see `ViewpointLabels.find`).

    Images without a label keep their viewpoint. `notes` counts the labels that fit no image, or more than one.

    Raises:
        ValueError: an image that keeps its viewpoint has one that is not among those of the labels.
    """
    splits: dict[str, Any] = data.splits
    found, unused = labels.find([path for images in splits.values() for path in images.paths], root)
    own = tuple(name for images in splits.values() for name in images.viewpoint_name)
    names = tuple(label or name for label, name in zip(found, own, strict=True))
    classes = next((c for c in (labels.classes, data.classes) if c.know(names)), None)
    if classes is None:
        raise ValueError(
            f"viewpoint labels {labels.source}: its viewpoints ({', '.join(labels.classes.names)}) are not those of "
            f"{data.name} ({', '.join(data.classes.names)}), some of whose images it does not name; declare all "
            "(--data.viewpoints)"
        )
    begin = 0
    for split, images in splits.items():
        of_split = names[begin : begin + len(images)]
        begin += len(images)
        splits[split] = replace(images, viewpoint_name=of_split, viewpoint_weight=None, **classes.columns(of_split))
    what = f"viewpoint labels that fit no image, or several, of {len(labels):,} in {labels.source},"
    return replace(data, **splits, classes=classes, notes=(*data.notes, *left_out(what, unused)))


def with_soft_labels(images: ImageList, classes: ViewpointClasses = PERSON) -> ImageList:
    """`images` with `viewpoint_weight` from their viewpoint labels (see `ViewpointClasses.weights`).

    Where the viewpoint is unknown the weight is uniform over the viewpoints that occur, with any weight, for the same
    identity in this list; uniform over all when there are none.
    """
    weight = np.zeros((len(images), len(classes)), dtype=np.float64)
    known = np.array([bool(name) for name in images.viewpoint_name], dtype=bool)
    for index in np.flatnonzero(known):
        weight[index] = classes.weights(images.viewpoint_name[index])
    occurs: dict[int, np.ndarray] = {}
    for index in np.flatnonzero(known):
        identity = int(images.identity[index])
        occurs[identity] = occurs.get(identity, np.zeros(len(classes), dtype=bool)) | (weight[index] > 0)
    everywhere = np.ones(len(classes), dtype=bool)
    for index in np.flatnonzero(~known):
        exists = occurs.get(int(images.identity[index]), everywhere)
        weight[index] = exists / exists.sum()
    return replace(images, viewpoint_weight=weight.astype(np.float32))
