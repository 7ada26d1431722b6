"""A CSV file that lists anybody's own images."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, replace
from pathlib import Path

from vareid_ext.data.readers import JUNK, Entry, build_data
from vareid_ext.data.types import UNKNOWN, ImageList, ReidData
from vareid_ext.data.viewpoint_labels import HARD_LABELS, hard_labels

SPLITS = ("train", "query", "gallery")
_REQUIRED = ("path", "identity", "split")
_OPTIONAL = ("camera", "viewpoint")


@dataclass(frozen=True)
class _Row:
    path: str
    identity: str
    camera: str
    viewpoint: str
    split: str


def _is_number(text: str) -> bool:
    """Whether `text` is an integer written the one usual way, so that different texts are different integers."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 18 and str(int(text)) == text


def _numbers(texts: set[str], first: int) -> dict[str, int]:
    """The integers that the texts are, or their places in sorted order from `first` on when some are none."""
    if all(_is_number(text) for text in texts):
        return {text: int(text) for text in texts}
    return {text: first + place for place, text in enumerate(sorted(texts))}


def _file_id(folder: str, path: str) -> str:
    """One text for all ways to write the path of a file; `folder`, which relative ones start from, is a real path."""
    joined = os.path.join(folder, path)
    # "link/.." is the folder above the link's target, which only the file system knows.
    return os.path.realpath(joined) if ".." in Path(path).parts else os.path.normpath(joined)


def _read_rows(path: Path) -> list[_Row]:
    folder = os.path.realpath(path.parent)
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            where = f"manifest {path}, line 1"
            allowed = f"columns are {', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}"
            for column in header:
                if column not in (*_REQUIRED, *_OPTIONAL):
                    raise ValueError(f"{where}: unknown column {column!r}; {allowed}")
                if header.count(column) > 1:
                    raise ValueError(f"{where}: column {column!r} is given twice")
            missing = [column for column in _REQUIRED if column not in header]
            if missing:
                raise ValueError(f"{where}: missing column {', '.join(missing)}; {allowed}")
            for cells in reader:
                where = f"manifest {path}, line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{where}: expected {len(header)} cells ({','.join(header)}), got {len(cells)}")
                row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
                for column in _REQUIRED:
                    if not row[column]:
                        raise ValueError(f"{where}: {column} is empty")
                if row["split"] not in SPLITS:
                    raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
                view = row.get("viewpoint", "")
                if view and view not in HARD_LABELS:
                    raise ValueError(
                        f"{where}: viewpoint must be empty or one of {', '.join(HARD_LABELS)}, got {view!r}"
                    )
                image = str(path.parent / row["path"])
                file_id = _file_id(folder, row["path"])
                if file_id in lines:
                    raise ValueError(f"{where}: path {row['path']!r} was already given in line {lines[file_id]}")
                lines[file_id] = reader.line_num
                rows.append(_Row(image, row["identity"], row.get("camera", ""), view, row["split"]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"manifest {path}: not a readable CSV file: {error}") from None
    return rows


def read_manifest(path: str | os.PathLike[str]) -> ReidData:
    """The data set listed in a CSV file with the columns `path,identity,split` and optionally `camera,viewpoint`.

    - path: relative to the CSV file's folder, or absolute; every image once.
    - identity: any text. The same text is the same person in all splits. In query and gallery -1 is junk and dropped.
    - split: train, query or gallery; each needs at least one image.
    - camera: any text, empty where unknown.
    - viewpoint: front, front_side, side, back_side, back or noise, empty where unknown.

    Identities and cameras that are all integers keep their numbers, others are numbered in sorted order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not as described; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        tree = "path,identity,camera,viewpoint,split\nimages/a.jpg,anna,1,front,train\n..."
        state = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"manifest: expected a CSV file like\n{tree}\nfound instead: {path} {state}")
    rows = [row for row in _read_rows(path) if row.split == "train" or row.identity != str(JUNK)]
    cameras = _numbers({row.camera for row in rows if row.camera}, first=1)
    identities = _numbers({row.identity for row in rows}, first=1)
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    views: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        entries[row.split].append((row.path, row.identity, cameras.get(row.camera, UNKNOWN)))
        views[row.split].append(row.viewpoint)
    data = build_data(f"manifest {path.name}", entries, lambda identity: identities[identity])

    def seen(images: ImageList, split: str) -> ImageList:
        names = tuple(views[split])
        return replace(images, viewpoint=hard_labels(names), viewpoint_name=names)

    return replace(
        data,
        train=seen(data.train, "train"),
        query=seen(data.query, "query"),
        gallery=seen(data.gallery, "gallery"),
    )
