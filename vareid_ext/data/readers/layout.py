"""What readers are made of: finding a data set on disk, and turning what it lists into a `ReidData`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from vareid_ext.data.types import IMAGE_SUFFIXES, SPLITS, UNKNOWN, ImageList, ReidData, is_litter, left_out
from vareid_ext.data.viewpoint_classes import PERSON, ViewpointClasses

JUNK = -1
"""Identity of images that are neither right nor wrong answers; they are left out."""

JUNK_IMAGES = f"junk images (identity {JUNK})"
NOT_IMAGES = "entries that are not read as images"


class ImageEntry(NamedTuple):
    """One image of a data set, as it is listed there."""

    path: str
    identity: str
    """as it is written in the data set"""
    camera: int = UNKNOWN
    viewpoint: str = ""
    """a label (see `ViewpointClasses`); "" where it is unknown"""
    columns: Mapping[str, int] = MappingProxyType({})
    """further labels by name, such as clothes"""


# Numbers of up to 18 digits fit into 64 bits.
NAMED = re.compile(r"(?P<identity>-1|[0-9]{1,18})_c(?P<camera>[0-9]{1,18})(?![0-9])")


@dataclass(frozen=True)
class Layout:
    """How one data set looks on disk.

    Attributes:
        title: its name.
        folders: names under which it is commonly unpacked; the root may be such a folder or the one that holds it.
        required: files and folders that must be there.
        tree: what to show when they are not.
        pattern: what file names begin with; its groups are identity, and camera and further labels, which are numbers.
        nested: whether images lie in folders of those of a split, at any depth.
    """

    title: str
    folders: tuple[str, ...]
    required: tuple[str, ...]
    tree: str
    pattern: re.Pattern[str] = NAMED
    nested: bool = False


class MisnamedError(ValueError):
    """No image's name is as the layout of a data set says, though the folders are."""


SPLIT_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")


def listing(folder: Path, limit: int = 12) -> str:
    """The first entries of a folder, and a look into each, as an error shows them."""
    lines = []
    entries = sorted(folder.iterdir())
    for entry in entries[:limit]:
        inside = ""
        if entry.is_dir():
            names = sorted(os.listdir(entry))
            inside = "/  " + (" ".join(names[:3]) + (f" ... ({len(names):,} entries)" if len(names) > 3 else ""))
        lines.append(f"  {entry.name}{inside}".rstrip())
    if len(entries) > limit:
        lines.append(f"  ... ({len(entries):,} entries)")
    return "\n".join(lines) if lines else "  (nothing)"


def unexpected(layout: Layout, found: str) -> FileNotFoundError:
    """The error for a data set that is not laid out as it should be."""
    return FileNotFoundError(f"{layout.title}: expected\n{layout.tree}\nfound instead: {found}")


def check_present(layout: Layout, folder: Path, entries: Sequence[ImageEntry], name: str) -> None:
    """FileNotFoundError where a list names images, none of which is there: `folder` is another than it should be."""
    if entries and not any(os.path.isfile(entry.path) for entry in entries):
        raise unexpected(layout, f"{folder} holds none of the images of {name}, but:\n{listing(folder)}")


def find_root(root: str | os.PathLike[str], layout: Layout) -> Path:
    """The folder that holds a data set laid out as `layout`: `root` itself or a folder of a usual name in it.

    Raises FileNotFoundError with the expected tree and what was found instead.
    """
    root = Path(root)

    def missing(folder: Path) -> list[str]:
        def there(entry: Path) -> bool:
            return entry.is_file() if entry.suffix else entry.is_dir()

        return [name for name in layout.required if not there(folder / name)]

    for candidate in (root, *(root / folder for folder in layout.folders)):
        if not missing(candidate):
            return candidate
    if root.is_dir():
        existing = next((root / folder for folder in layout.folders if (root / folder).is_dir()), root)
        raise unexpected(layout, f"{existing} holds no {', no '.join(missing(existing))}, but:\n{listing(existing)}")
    if root.exists():
        raise unexpected(layout, f"{root} is a file")
    parent = next(folder for folder in (*root.absolute().parents,) if folder.is_dir())
    raise unexpected(layout, f"there is no {root}; {parent} holds:\n{listing(parent)}")


def _check_once(name: str, entries: Mapping[str, Sequence[ImageEntry]]) -> None:
    """ValueError where an image is given twice, but for a query that is in the gallery under its known camera."""
    first: dict[str, tuple[str, ImageEntry]] = {}
    for split in SPLITS:
        for entry in entries[split]:
            before, other = first.setdefault(entry.path, (split, entry))
            unfound = (before, split) == ("query", "gallery") and entry[1:3] == other[1:3] and entry.camera != UNKNOWN
            if unfound:
                first[entry.path] = split, entry  # once
            elif other is not entry:
                raise ValueError(
                    f"{name}: the image {entry.path} is given twice, in {before} (identity {other.identity}) and in "
                    f"{split} (identity {entry.identity}); allowed is once"
                )


def build_data(
    name: str,
    entries: Mapping[str, Sequence[ImageEntry]],
    number: Callable[[str], int] = int,
    notes: tuple[str, ...] = (),
    classes: ViewpointClasses = PERSON,
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    needed: Sequence[str] = SPLITS,
) -> ReidData:
    """A data set of the entries of `train`, `query` and `gallery`.

    Training identities are numbered in the order of `number`, which also gives the identities of query and gallery;
    `classes` are what the entries' viewpoints mean, `names` those of identities and cameras, as for `Labels`.
    Raises ValueError when one of the splits that are `needed`, or all, are empty, and for an image that is given twice;
    a query may also be in the gallery under its camera, where no query finds itself.
    """
    for split in needed:
        if not entries[split]:
            raise ValueError(f"{name}: the {split} split has no images")
    if not any(entries[split] for split in SPLITS):
        raise ValueError(f"{name}: has no images")
    _check_once(name, entries)
    trained = sorted({entry.identity for entry in entries["train"]}, key=lambda identity: (number(identity), identity))
    index = {identity: position for position, identity in enumerate(trained)}
    columns = dict.fromkeys(column for split in SPLITS for entry in entries[split] for column in entry.columns)

    def images(split: str, identity: Callable[[str], int]) -> ImageList:
        views = tuple(entry.viewpoint for entry in entries[split])
        return ImageList(
            paths=tuple(entry.path for entry in entries[split]),
            identity=np.array([identity(entry.identity) for entry in entries[split]], dtype=np.int64),
            camera=np.array([entry.camera for entry in entries[split]], dtype=np.int64),
            viewpoint_name=views,
            # Training identities are numbered by themselves; `identity_names` says what they are called.
            names={label: called for label, called in names.items() if (split, label) != ("train", "identity")},
            **classes.columns(views),
            columns={
                column: np.array([entry.columns.get(column, UNKNOWN) for entry in entries[split]], dtype=np.int64)
                for column in columns
            },
        )

    return ReidData(
        name,
        images("train", index.__getitem__),
        images("query", number),
        images("gallery", number),
        tuple(trained),
        classes=classes,
        notes=notes,
    )


def _form(pattern: re.Pattern[str]) -> str:
    """<identity>_c<camera>, as a name is described."""
    named = re.sub(r"\(\?P<(\w+)>[^)]*\)", r"<\1>", pattern.pattern).replace("[a-z]+", "<word>")
    return re.sub(r"\(\?![^)]*\)", "", named)


def walk(folder: Path, others: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(place, names of files) of `folder` and all folders in it, links too, but each folder once.

    Links to folders that are read anyway, or that hold `folder`, are added to `others`.
    """
    root = Path(os.path.realpath(folder))
    seen = {root}
    for place, folders, files in os.walk(folder, followlinks=True):
        new = []
        for name in sorted(folders):
            path = os.path.join(place, name)
            real = Path(os.path.realpath(path))
            within = os.path.islink(path) and (real.is_relative_to(root) or root.is_relative_to(real))
            if within or real in seen:
                others.append(f"{os.path.relpath(path, folder)} (a link to {real}, which is read once)")
            else:
                new.append(name)
                seen.add(real)
        folders[:] = new
        yield place, files


def _files(folder: Path, layout: Layout, others: list[str]) -> list[str]:
    """What `layout` looks at in `folder`, as paths from there."""
    if not layout.nested:
        return sorted(os.listdir(folder))
    places = walk(folder, others)
    return sorted(os.path.relpath(os.path.join(place, file), folder) for place, files in places for file in files)


def _fits_beside(folder: Path, layout: Layout) -> bool:
    beside = (other for other in folder.parent.iterdir() if other.is_dir())
    return any(layout.pattern.match(os.path.basename(file)) for other in beside for file in _files(other, layout, []))


def scan(folder: Path, layout: Layout, junk: list[str], others: list[str]) -> list[ImageEntry]:
    """The images in `folder`; the names of junk images are added to `junk`, those of other entries to `others`.

    Raises FileNotFoundError where there are none, ValueError for a name that is not as `layout.pattern` says, and
    MisnamedError where none is, here and in the folders beside this one.
    """
    entries: list[ImageEntry] = []
    for file in _files(folder, layout, others):
        if is_litter(file):
            continue
        if os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
            others.append(f"{folder.name}/{file}")
            continue
        match = layout.pattern.match(os.path.basename(file))
        if match is None:
            raise (ValueError if _fits_beside(folder, layout) else MisnamedError)(
                f"{layout.title}: the name of {folder / file} must begin with {_form(layout.pattern)}, numbers of at "
                f"most 18 digits, as in\n{layout.tree}"
            )
        numbers = {name: int(text) for name, text in match.groupdict().items() if name != "identity"}
        if match["identity"] == str(JUNK):
            junk.append(f"{folder.name}/{file}")
        else:
            entries.append(ImageEntry(str(folder / file), match["identity"], numbers.pop("camera"), columns=numbers))
    if not entries:
        raise unexpected(layout, f"{folder} has no images, but:\n{listing(folder)}")
    return entries


def read_folders(
    root: str | os.PathLike[str],
    name: str,
    layout: Layout,
    labels: Callable[[Path], tuple[Mapping[str, str], ViewpointClasses]] | None = None,
) -> ReidData:
    """A data set of one folder a split (`layout.required`), with files named as `layout.pattern` says.

    `labels` gives, for the folder of the data set, the viewpoints of images by their file name, and the classes.
    """
    base = find_root(root, layout)
    entries: dict[str, list[ImageEntry]] = {}
    junk: list[str] = []
    others: list[str] = []
    for split, folder in zip(SPLITS, layout.required, strict=True):
        entries[split] = scan(base / folder, layout, junk, others)
    notes = (*left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, others))
    if labels is None:
        return build_data(name, entries, notes=notes)
    views, classes = labels(base)
    images = {os.path.basename(entry.path) for of_split in entries.values() for entry in of_split}
    notes += left_out("viewpoints that belong to no image", sorted(views.keys() - images))
    entries = {
        split: [entry._replace(viewpoint=views.get(os.path.basename(entry.path), "")) for entry in of_split]
        for split, of_split in entries.items()
    }
    return build_data(name, entries, notes=notes, classes=classes)
