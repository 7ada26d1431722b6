"""A CSV file that lists anybody's own images."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from vareid_ext.data.readers import JUNK_IMAGES, NOT_IMAGES, Entry, build_data
from vareid_ext.data.text_files import no_file, read_table, shown
from vareid_ext.data.types import UNKNOWN, ImageList, ReidData, is_litter, left_out
from vareid_ext.data.viewpoint_labels import HARD_LABELS, hard_labels

SPLITS = ("train", "query", "gallery")
_REQUIRED = ("path", "identity", "split")
_OPTIONAL = ("camera", "viewpoint")

_LONGEST_PATH = 4096  # that Linux opens
_MINUS_ONE = re.compile(r"-0*1(\.0*)?")
_UNKNOWN_WORDS = ("", "nan", "none", "null", "na", "n/a", "unknown", "?")


@dataclass(frozen=True)
class _Row:
    path: str
    identity: str
    camera: str
    viewpoint: str
    split: str


def _known(text: str) -> str:
    """`text`, or "" where it says that there is none: -1, or what programs write for a missing value."""
    return "" if text.lower() in _UNKNOWN_WORDS or _MINUS_ONE.fullmatch(text) else text


def _is_number(text: str) -> bool:
    """Whether `text` is an integer >= 0 of 64 bits, written the one usual way, so that different texts differ."""
    return text.isascii() and text.isdigit() and len(text) <= 18 and str(int(text)) == text


def _numbers(texts: set[str]) -> dict[str, int]:
    """The integers that the texts are, or their places in sorted order from 1 on when some are none."""
    if all(_is_number(text) for text in texts):
        return {text: int(text) for text in texts}
    return {text: place for place, text in enumerate(sorted(texts), start=1)}


def _file_id(folder: str, path: str) -> str:
    """One text for all ways to write the path of a file; `folder`, which relative ones start from, is a real path."""
    joined = os.path.join(folder, path)
    # "link/.." is the folder above the link's target, which only the file system knows.
    return os.path.realpath(joined) if ".." in Path(path).parts else os.path.normpath(joined)


def _read_rows(path: Path) -> tuple[list[_Row], list[str], list[str]]:
    """The rows of a manifest, the paths of its junk, and those of operating systems' own files in it."""
    folder = os.path.realpath(path.parent)
    rows: list[_Row] = []
    junk: list[str] = []
    litter: list[str] = []
    lines: dict[str, int] = {}
    for line, row in read_table(path, "manifest", _REQUIRED, _OPTIONAL):
        where = f"manifest {path}, line {line}"
        if row["split"] not in SPLITS:
            raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {shown(row['split'])}")
        view = _known(row.get("viewpoint", ""))
        if view and view not in HARD_LABELS:
            raise ValueError(f"{where}: viewpoint must be empty or one of {', '.join(HARD_LABELS)}, got {shown(view)}")
        image = row["path"]
        if "\0" in image or len(image) > _LONGEST_PATH:
            raise ValueError(
                f"{where}: path {shown(image)}; allowed are {_LONGEST_PATH:,} characters, none of them zero"
            )
        if "\\" in image and not os.path.exists(os.path.join(folder, image)):
            image = image.replace("\\", "/")
        file_id = _file_id(folder, image)
        if file_id in lines:
            raise ValueError(f"{where}: path {shown(image)} was already given in line {lines[file_id]}")
        lines[file_id] = line
        if is_litter(image):
            litter.append(image)
        elif _MINUS_ONE.fullmatch(row["identity"]):
            junk.append(image)
        else:
            camera = _known(row.get("camera", ""))
            rows.append(_Row(str(path.parent / image), row["identity"], camera, view, row["split"]))
    return rows, junk, litter


def read_manifest(path: str | os.PathLike[str]) -> ReidData:
    """The data set listed in a CSV file with the columns `path,identity,split` and optionally `camera,viewpoint`.

    - path: relative to the CSV file's folder, or absolute; every image once. Backslashes separate folders.
    - identity: any text. The same text is the same person in all splits. Images of identity -1 are junk and left out.
    - split: train, query or gallery; each needs at least one image.
    - camera: any text.
    - viewpoint: front, front_side, side, back_side, back or noise.

    Cameras and viewpoints are unknown where they are empty, -1, nan, none, null, na, n/a, unknown or ?. Identities and
    cameras that are all integers, at least 0 and of at most 18 digits, keep their numbers, others are numbered in
    sorted order. Files of operating systems (`._a.jpg`, `Thumbs.db`) are left out. `notes` counts what is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not as described; the message names the line.
    """
    path = Path(path)
    if state := no_file(path):
        tree = "path,identity,camera,viewpoint,split\nimages/a.jpg,anna,1,front,train\n..."
        raise FileNotFoundError(f"manifest: expected a CSV file like\n{tree}\nfound instead: {state}")
    rows, junk, litter = _read_rows(path)
    cameras = _numbers({row.camera for row in rows if row.camera})
    identities = _numbers({row.identity for row in rows})
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    views: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        entries[row.split].append((row.path, row.identity, cameras.get(row.camera, UNKNOWN)))
        views[row.split].append(row.viewpoint)
    notes = (*left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, litter))
    data = build_data(f"manifest {path.name}", entries, lambda identity: identities[identity], notes)

    def seen(images: ImageList, split: str) -> ImageList:
        names = tuple(views[split])
        return replace(images, viewpoint=hard_labels(names), viewpoint_name=names)

    return replace(
        data,
        train=seen(data.train, "train"),
        query=seen(data.query, "query"),
        gallery=seen(data.gallery, "gallery"),
    )
