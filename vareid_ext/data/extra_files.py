"""Where the extra inputs of images lie, and how they are joined to the images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vareid_ext.data.body_maps import load_iuv, load_parsing
from vareid_ext.data.extras import EXTRAS, Extra, read_array
from vareid_ext.data.keypoints import (
    People,
    check_frame,
    load_person,
    market_file,
    read_keypoint_file,
    read_keypoint_list,
    read_market_points,
)
from vareid_ext.data.types import ImageList, left_out
from vareid_ext.data.viewpoints import ViewpointLabels

FORMATS = {
    "keypoints": "a JSON file of COCO or AlphaPose, a folder of OpenPose's or MMPose's JSON files or of .npy files, or "
    "one with market1501_14point_train.npz (or .mat of MATLAB 7 and before), _query and _gallery",
    "parsing": "a folder of LIP class maps (.png, .npy) or class scores [20, H, W] (.npy)",
    "iuv": "a folder of DensePose's I, U, V pictures (.png) or arrays [3, H, W] (.npy)",
    "views": "a folder of <image>_to_1.png to <image>_to_8.png",
}
"""What each extra input may be given as."""


_LOOKED_AT = 100  # images by which keypoints of another size are noticed


@dataclass(frozen=True)
class ExtraFiles:
    """Inputs beside the images, made by other programs. In folders they lie as the images do in the data set."""

    keypoints: str | None = None
    """14 joints of every person: a JSON file of COCO or AlphaPose, a folder of OpenPose's or MMPose's JSON files or of
    .npy files, or one with the public joints of Market-1501 (market1501_14point_train.npz, _query, _gallery)"""
    keypoints_order: Literal["auto", "cpm", "lsp", "mpii", "coco", "openpose18", "body25"] = "auto"
    """order in which keypoints are listed; auto: by their number, 16 mpii, 17 coco, 18 openpose18, 25 body25"""
    parsing: str | None = None
    """folder of LIP class maps (.png, .npy) or of class scores [20, H, W] (.npy), as SCHP writes them"""
    iuv: str | None = None
    """folder of DensePose's pictures of I, U, V (.png) or arrays [3, H, W] (.npy)"""
    views: str | None = None
    """folder of eight generated views of every image: <image>_to_1.png to <image>_to_8.png"""
    missing: Literal["error", "neutral"] = "error"
    """what happens to images without an extra that is read: error, or neutral: joints are unseen, all of the image is
    foreground, no part of the body is seen, views are black"""


def check_given(files: ExtraFiles, names: Sequence[str], what: str = "the method", prefix: str = "") -> None:
    """ValueError, which names the option and its formats, where `what` reads an extra that is not given."""
    for name in names:
        if getattr(files, name) is None:
            raise ValueError(
                f"{prefix}{name}: nothing was given; {what} needs --{prefix}{name}, which is {FORMATS[name]}"
            )


def join_extras(
    lists: Mapping[str, ImageList],
    files: ExtraFiles,
    wanted: Mapping[str, Sequence[str]],
    root: str | os.PathLike[str] = "",
    prefix: str = "",
) -> tuple[dict[str, ImageList], tuple[str, ...]]:
    """The lists with the extras that are wanted for them, and notes on images that have none, and on keypoints of
    no image.

    Args:
        lists: by name.
        files: where the extras lie.
        wanted: for each list names out of `EXTRAS`.
        root: folder that the images' relative paths start from; where all of them lie in one folder of it, paths that
            start from that folder are found too.
        prefix: of the options' names in messages, such as "data.extras.".

    Raises:
        ValueError: an extra is not given, a file of keypoints is not what it should be, or images have no extra and
            `files.missing` is "error"; the message counts them and shows one.
        OSError: a file or folder cannot be read.
    """
    joined, notes = dict(lists), []
    paths = [path for images in lists.values() for path in images.paths]
    for name in dict.fromkeys(name for names in wanted.values() for name in names):
        check_given(files, [name], prefix=prefix)
        source, form = Path(getattr(files, name)), EXTRAS[name]
        if not source.exists():
            raise FileNotFoundError(f"{name}: {source} does not exist; {FORMATS[name]} is needed")
        # Of all lists at once: a file name must fit one image only.
        every, unused = _entries(name, source, files.keypoints_order, paths, root)
        found = iter(every)
        missing, count, given = [], 0, []
        for key, images in lists.items():
            entries = [next(found) for _ in images.paths]
            given += [(images, i, entry) for i, entry in enumerate(entries) if entry is not None]
            if name in wanted[key]:
                extra = Extra(form.kind, entries, form.pairs, _Loader(name))
                joined[key] = replace(joined[key], extras={**joined[key].extras, name: extra})
                missing += [path for path, entry in zip(images.paths, entries, strict=True) if entry is None]
                count += len(entries)
        if name == "keypoints":
            _check_frame(given)
        if missing and files.missing == "error":
            raise ValueError(
                f"{name}: {len(missing):,} of {count:,} images have none in {source}, such as {missing[0]}; it holds "
                f"{FORMATS[name]} (--{prefix}missing neutral goes on without them)"
            )
        if missing:
            notes.append(f"{len(missing):,} of {count:,} images have no {name} in {source} and get neutral ones")
        notes += left_out(f"{name} in {source} that fit no image here, or several,", unused)
    return joined, tuple(notes)


def _check_frame(given: Sequence[tuple[ImageList, int, People]]) -> None:
    """ValueError where keypoints are those of images of another size, by some of the images."""
    looked_at = []
    for images, index, people in given[:: -(-len(given) // _LOOKED_AT) or 1]:
        with contextlib.suppress(OSError):  # it is named when all images are read
            width, height = images.load(index).size
            looked_at.append((people.joints, height, width))
    check_frame(looked_at)


def _load_keypoints(people: People, height: int, width: int) -> np.ndarray:
    return load_person(people.joints, height, width, people.size)


@dataclass(frozen=True)
class _Loader:
    """The loader of an extra's entries; None, where it is missing, becomes the neutral one."""

    name: str

    def __call__(self, entry: Any, height: int, width: int) -> np.ndarray:
        return EXTRAS[self.name].neutral if entry is None else _LOADERS[self.name](entry, height, width)


def _entries(
    name: str, source: Path, order: str, paths: Sequence[str], root: str | os.PathLike[str]
) -> tuple[list[Any], tuple[str, ...]]:
    """The entry of an extra of each image, None where there is none; and of one file's keypoints what was not used."""
    if name == "keypoints":
        return _keypoints(source, order, paths, root)
    return [_FINDERS[name](source, places) for places in _relative(paths, root)], ()


def _relative(paths: Sequence[str], root: str | os.PathLike[str]) -> list[tuple[str, ...]]:
    """The relative paths, without suffix, at which an image's extra may lie."""
    inside = [os.path.relpath(path, root or ".") for path in paths]
    first = {path.split(os.sep)[0] for path in inside}
    shared = len(first) == 1 and all(os.sep in path for path in inside)
    stems = [os.path.splitext(path)[0] for path in inside]
    return [(stem, stem.split(os.sep, 1)[1]) if shared else (stem,) for stem in stems]


def _find(folder: Path, places: Sequence[str], suffixes: Sequence[str]) -> str | None:
    candidates = (f"{folder / place}{suffix}" for place in places for suffix in suffixes)
    return next((path for path in candidates if os.path.isfile(path)), None)


def _find_map(folder: Path, places: Sequence[str]) -> str | None:
    return _find(folder, places, (".png", ".npy", ".npz"))


def _find_iuv(folder: Path, places: Sequence[str]) -> str | None:
    return _find(folder, places, (".png", "_IUV.png", ".npy", ".npz"))


def _find_views(folder: Path, places: Sequence[str]) -> tuple[str, ...] | None:
    found = tuple(_find(folder, places, (f"_to_{k}.png",)) for k in range(1, 9))
    return found if all(found) else None  # type: ignore[return-value]


def _load_views(entry: Sequence[str], *_: int) -> np.ndarray:
    """Pictures of eight files -> uint8 [8, 3, H, W]."""
    views = [read_array(Path(path)) for path in entry]
    if len({view.shape for view in views}) > 1 or views[0].ndim != 3 or len(views[0]) != 3:
        shapes = ", ".join(str(list(view.shape)) for view in views)
        raise ValueError(f"views {entry[0]} ...: {shapes} were given; eight RGB pictures of one size are needed")
    return np.stack(views)


_FINDERS: dict[str, Callable[[Path, Sequence[str]], Any]] = {
    "parsing": _find_map,
    "iuv": _find_iuv,
    "views": _find_views,
}
_LOADERS: dict[str, Callable[[Any, int, int], np.ndarray]] = {
    "keypoints": _load_keypoints,
    "parsing": load_parsing,
    "iuv": load_iuv,
    "views": _load_views,
}


def _keypoints(
    source: Path, order: str, paths: Sequence[str], root: str | os.PathLike[str]
) -> tuple[list[People | None], tuple[str, ...]]:
    """The people on each image, None where there is nobody; and what one file calls those that fit no image."""
    if source.is_file():
        people = read_keypoint_list(source, order)
        # As viewpoint labels are: by relative path, or by file name where it fits one image only.
        found, unused = ViewpointLabels({name: name for name in people}, str(source)).find(paths, root or None)
        return [people[name] if name else None for name in found], unused
    public = {folder: market_file(source, folder) for folder in {Path(path).parent for path in paths}}
    if all(public.values()):
        joints = {}
        for folder, file in public.items():
            joints.update(read_market_points(file, folder))  # type: ignore[arg-type]
        people_of = [joints.get(str(Path(path))) for path in paths]
        return [None if people is None else People(people) for people in people_of], ()
    suffixes = (".json", "_keypoints.json", ".npy", ".npz")
    files = [_find(source, places, suffixes) for places in _relative(paths, root)]
    people_of = [None if file is None else read_keypoint_file(Path(file), order) for file in files]
    return [People(people) if people is not None and len(people) else None for people in people_of], ()
