"""A table that lists anybody's own images."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vareid_ext._labels import COLUMN, check_column
from vareid_ext.data.readers.dividing import DivisionSettings, divide
from vareid_ext.data.readers.layout import JUNK_IMAGES, NOT_IMAGES, ImageEntry, build_data
from vareid_ext.data.text_files import is_minus_one, known, no_file, read_table, shown
from vareid_ext.data.types import SPLITS, UNKNOWN, ReidData, is_litter, left_out
from vareid_ext.data.viewpoint_classes import ViewpointClasses, checked_classes

_REQUIRED = ("path", "identity")
_OPTIONAL = ("split", "camera", "viewpoint")

_NUMBER = re.compile(r"-?[0-9]+")
_SPELLED = re.compile(r"(-?)0*([0-9]+?)(?:\.0*)?")  # of a whole number: the sign, and its digits as they are usual
_UNDIVIDED = ""  # the split of every row, where the table has none
_LONGEST_PATH = 4096  # that Linux opens


def _is_number(text: str) -> bool:
    """Whether `text` is an integer >= 0 of 64 bits, written the one usual way, so that different texts differ."""
    return text.isascii() and text.isdigit() and len(text) <= 18 and str(int(text)) == text


def text_numbers(texts: set[str]) -> dict[str, int]:
    """The integers that the texts are, or their places in sorted order from 1 on when some are none."""
    if all(_is_number(text) for text in texts):
        return {text: int(text) for text in texts}
    return {text: place for place, text in enumerate(sorted(texts), start=1)}


def names_of(**numbers: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """What the numbers that :func:`text_numbers` has given to some labels are called, where they are no numbers."""
    return {
        label: ("", *of_text)
        for label, of_text in numbers.items()
        if any(str(n) != text for text, n in of_text.items())
    }


def _file_id(folder: str, path: str) -> str:
    """One text for all ways to write the path of a file; `folder`, which relative ones start from, is a real path."""
    joined = os.path.join(folder, path)
    # "link/.." is the folder above the link's target, which only the file system knows.
    return os.path.realpath(joined) if ".." in Path(path).parts else os.path.normpath(joined)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for column in columns:
        try:
            check_column(column.removeprefix(COLUMN))
        except ValueError as error:
            raise ValueError(f"manifest {path}, line 1: {error}") from None


def _check_spelling(
    first: dict[tuple[str, str], tuple[str, int]], column: str, text: str, where: str, line: int
) -> None:
    """ValueError where `text` is a number that an earlier row, kept in `first`, spells another way."""
    number = _SPELLED.fullmatch(text)
    if number is not None:
        other, before = first.setdefault((column, number[1] + number[2]), (text, line))
        if other != text:
            raise ValueError(
                f"{where}: {column} {shown(text)} was given, but {shown(other)} in line {before}; a number is written "
                "the same way in all lines"
            )


def _read_rows(
    path: Path, declared: ViewpointClasses | None
) -> tuple[list[tuple[str, dict[str, str], ImageEntry]], ViewpointClasses, list[str], list[str]]:
    """Of every row split, texts of camera and further columns, and the rest; viewpoints; paths of junk, and of systems'
    own files."""
    folder = os.path.realpath(path.parent)
    rows: list[tuple[str, dict[str, str], ImageEntry]] = []
    junk: list[str] = []
    litter: list[str] = []
    lines: dict[str, int] = {}
    views: list[tuple[str, str]] = []
    cameras: dict[tuple[str, bool], tuple[str, str]] = {}
    spelled: dict[tuple[str, str], tuple[str, int]] = {}
    for line, row in read_table(path, "manifest", _REQUIRED, _OPTIONAL, COLUMN):
        where = f"manifest {path}, line {line}"
        further = [column for column in row if column.startswith(COLUMN)]
        if not lines:
            _check_columns(path, further)
        split = row.get("split", _UNDIVIDED)
        if "split" in row and split not in SPLITS:
            raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {shown(split)}")
        view = known(row.get("viewpoint", ""))
        if view:
            views.append((where, view))
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
        elif is_minus_one(row["identity"]):
            junk.append(image)
        else:
            if not known(row["identity"]):
                raise ValueError(
                    f"{where}: identity {shown(row['identity'])} was given, which names nobody; every image needs one, "
                    "or -1 where it is junk"
                )
            texts = {name: known(row.get(name, "")) for name in ("camera", *further)}
            for name, text in (("identity", row["identity"]), *texts.items()):
                _check_spelling(spelled, name, text, where, line)
            entry = ImageEntry(str(path.parent / image), row["identity"], viewpoint=view)
            rows.append((split, texts, entry))
            if texts["camera"]:
                cameras.setdefault((split, _NUMBER.fullmatch(texts["camera"]) is not None), (where, texts["camera"]))
    _check_cameras(cameras)
    return rows, checked_classes(views, declared), junk, litter


def _check_cameras(first: Mapping[tuple[str, bool], tuple[str, str]]) -> None:
    """ValueError where the cameras of one split are numbers and those of another are not, so that none would be equal.

    Args:
        first: of (split, whether it is a number) the first camera: where it stands, and its text.
    """
    numbers = [split for split, is_number in first if is_number and (split, False) not in first]
    texts = [split for split, is_number in first if not is_number and (split, True) not in first]
    if numbers and texts:
        (_, number), (where, text) = first[numbers[0], True], first[texts[0], False]
        raise ValueError(
            f"{where}: camera {shown(text)} was given in {texts[0]}, but {numbers[0]} has numbers, such as "
            f"{shown(number)}; a camera is written the same way in all splits"
        )


def read_manifest(
    root: str | os.PathLike[str],
    *,
    viewpoints: ViewpointClasses | None = None,
    division: DivisionSettings | None = None,
    needed: Sequence[str] = SPLITS,
) -> ReidData:
    """The data set in a table with the columns `path,identity`, optionally `split,camera,viewpoint,column_NAME`.

    Cells are separated by commas, semicolons or tabs; the file is UTF-8, or UTF-16 with a byte order mark.

    - path: relative to the table's folder, or absolute; every image once. Backslashes separate folders.
    - identity: any text but those for unknown. The same text is the same person in all splits. Images of identity -1
      are junk and left out.
    - split: train, query or gallery; each that is `needed` has at least one image. Without this column the images are
      divided as `division` says (see `divide`), or where no split is needed, are all in the gallery.
    - camera: any text.
    - viewpoint: front, front_side, side, back_side, back or noise; or any names, which are then the viewpoints; or a
      label of those that `viewpoints` declares (see `ViewpointClasses`).
    - column_NAME: any text; further labels, such as `column_clothes`, which exclusion rules can name (clothes).

    Cameras, viewpoints and further labels are unknown where they are empty, -1, nan, none, null, na, n/a, unknown or ?.
    Identities, cameras and further labels that are all integers, at least 0 and of at most 18 digits, keep their
    numbers, others are numbered in sorted order; a number is written in one way (not 1 and 01). Files of operating
    systems (`._a.jpg`, `Thumbs.db`) are left out. `notes` counts what is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not as described; the message names the line.
    """
    path = Path(root)
    if state := no_file(path):
        tree = "path,identity,camera,viewpoint,split\nimages/a.jpg,anna,1,front,train\n..."
        raise FileNotFoundError(f"manifest: expected a table like\n{tree}\nfound instead: {state}")
    rows, classes, junk, litter = _read_rows(path, viewpoints)
    columns = rows[0][1] if rows else ()
    numbers = {name: text_numbers({texts[name] for _, texts, _ in rows if texts[name]}) for name in columns}
    identities = text_numbers({entry.identity for _, _, entry in rows})
    entries: dict[str, list[ImageEntry]] = {split: [] for split in (_UNDIVIDED, *SPLITS)}
    for split, texts, entry in rows:
        found = {name.removeprefix(COLUMN): numbers[name].get(text, UNKNOWN) for name, text in texts.items()}
        entries[split].append(entry._replace(camera=found.pop("camera"), columns=found))
    if not needed:
        entries["gallery"] += entries.pop(_UNDIVIDED)
    name, notes = f"manifest {path.name}", (*left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, litter))
    if entries.get(_UNDIVIDED):
        entries, said = divide(name, entries[_UNDIVIDED], division or DivisionSettings())
        notes = (*said, *notes)
    names = names_of(identity=identities, **{name.removeprefix(COLUMN): places for name, places in numbers.items()})
    return build_data(name, entries, identities.__getitem__, notes, classes, names, needed)
