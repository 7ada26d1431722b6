"""What every reader returns: lists of labelled images, and the three of them that make a re-identification data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from vareid_ext._labels import UNKNOWN, Labels
from vareid_ext._text import table
from vareid_ext.data.viewpoint_classes import PERSON, ViewpointClasses, mirrored_viewpoints

if TYPE_CHECKING:
    from vareid_ext.data.extras import Extra

SPLITS = ("train", "query", "gallery")

IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
    ".tif", ".tiff", ".webp", ".avif", ".jp2", ".j2k", ".tga",
))  # fmt: skip
"""What marks a file in a data set's folder as an image, in small letters: the usual suffixes that Pillow reads."""

MAX_PIXELS = 50_000_000
"""Images with more pixels are refused before they are decoded. Phones take 50 megapixels; 8K video has 33."""


def is_litter(path: str) -> bool:
    """Whether `path` is an operating system's own file (`._a.jpg`, `Thumbs.db`), which is never an image."""
    *folders, name = path.replace("\\", "/").lower().split("/")
    return name.startswith("._") or name in (".ds_store", "thumbs.db", "desktop.ini") or "__macosx" in (*folders, name)


def left_out(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """A line that counts the `names` that were left out and shows the first three; nothing when there are none."""
    if not names:
        return ()
    # Names on disk need not be Unicode; the text must be, to be printed.
    first = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:3])
    return (f"{len(names):,} {what} left out: {first}{', ...' if len(names) > 3 else ''}",)


def open_image(path: str) -> Image.Image:
    """Read the image file at `path` completely and return it upright, as RGB (8 bits per channel).

    Of an animation that is the first picture. Grey values of more than 8 bits are taken as 16-bit ones where one is
    above 255, and divided by 256; floating point numbers that are all within 0..1 are multiplied by 255.

    Raises OSError, naming the file, when it is missing, cut short, damaged or no image, when it is a pipe, a device or
    an EPS file, has more than `MAX_PIXELS` pixels, or values that are no grey values.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # opening a pipe could wait for ever
        with Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("EPS files are programs, and are not run")
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} in all are allowed")
            # Phones store pictures as the sensor saw them, with a note which way is up.
            ImageOps.exif_transpose(image, in_place=True)
            return _eight_bits(image).convert("RGB")
    except Exception as error:  # the decoders fail on damaged files with whatever they happen to run into
        raise OSError(f"cannot read the image {path}: {str(error) or type(error).__name__}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8-bit values; Pillow would clip other ones, and nearly all would be white or black."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"values from {low} to {high}; allowed are 0..1 (floating point), 0..255 and 0..65535")
    if high > 255:
        values = values // 256
    elif image.mode == "F":
        values = np.rint(values * 255 if high < 2 else values)  # resizing leaves values a little above 1
    return Image.fromarray(values.clip(max=255).astype(np.uint8))


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageList(Labels):
    """The labelled images of one split, N of them.

    Its identities are 0..K-1 without gaps in the training split, in query and gallery the data set's own numbers
    (distractors, where a data set has them, are 0).

    Attributes:
        paths: one string per image: a file path, or a stable name when the image is rendered.
        viewpoint_name: one string per image: the annotators' label (see `ViewpointClasses`), "" where unknown.
        loader: how a path becomes an RGB image.
        extras: further inputs of each image by name.
    """

    paths: tuple[str, ...]
    viewpoint_name: tuple[str, ...]
    loader: Callable[[str], Image.Image] = field(default=open_image, repr=False)
    extras: Mapping[str, Extra] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths(paths=self.paths, viewpoint_name=self.viewpoint_name, **self.extras)

    def load(self, index: int) -> Image.Image:
        """The image at `index` as RGB. Raises IndexError outside 0..N-1, OSError when the file cannot be read."""
        if not 0 <= index < len(self.paths):
            raise IndexError(f"index must be in [0, {len(self.paths)}), got {index}")
        return self.loader(self.paths[index])

    def load_extras(self, index: int, height: int, width: int) -> dict[str, Any]:
        """The extras of the image at `index`, which is `height` x `width` pixels, by name (see `Extra.load`).

        Raises OSError where a file cannot be read, and ValueError, which names image and extra, for what is none.
        """
        loaded = {}
        for name, extra in self.extras.items():
            try:
                loaded[name] = extra.load(index, height, width)
            except ValueError as error:
                raise ValueError(f"{name} of {self.paths[index]}: {error}") from error
        return loaded

    def rows(self, chosen: np.ndarray) -> dict[str, Any]:
        """As for `Labels`."""
        return {
            **super().rows(chosen),
            "paths": tuple(self.paths[i] for i in chosen),
            "viewpoint_name": tuple(self.viewpoint_name[i] for i in chosen),
            "extras": {name: extra.select(chosen) for name, extra in self.extras.items()},
        }


def unreadable_of(*lists: ImageList) -> str:
    """What images are called that were left out as they, or extras of theirs, are unreadable."""
    names = dict.fromkeys(name for images in lists for name in images.extras)
    return f"images with unreadable files (image, {', '.join(names)})" if names else "unreadable images"


@dataclass(frozen=True, eq=False)
class ReidData:
    """A data set: training images, query images and the gallery they are searched in.

    Attributes:
        name: what it is called in logs.
        train, query, gallery: the splits. Junk is gone before this object exists; distractors are in the gallery.
        identity_names: training identity index -> the data set's own name for it.
        classes: the viewpoints, and what the images' labels mean.
        skipped: paths of unreadable images that were left out.
        notes: one line for everything else that was left out, or does not fit.
        same_people: whether a number is the same person in training and test.
    """

    name: str
    train: ImageList
    query: ImageList
    gallery: ImageList
    identity_names: tuple[str, ...]
    classes: ViewpointClasses = PERSON
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    same_people: bool = True

    def __post_init__(self) -> None:
        found = np.unique(self.train.identity)
        if not np.array_equal(found, np.arange(len(self.identity_names))):
            raise ValueError(
                f"training identities must be 0..{len(self.identity_names) - 1} without gaps, one per entry of "
                f"identity_names, got {found.size} different ones"
            )

    def with_notes(self, *notes: str) -> ReidData:
        """The same with these notes before its own."""
        return replace(self, notes=(*notes, *self.notes))

    @property
    def splits(self) -> dict[str, ImageList]:
        """The three lists by name."""
        return {split: getattr(self, split) for split in SPLITS}

    def with_own_identities(self) -> ImageList:
        """The training images with the data set's own identities, numbered as those of query and gallery."""
        names = self.query.names
        if "identity" in names:
            place = {name: number for number, name in enumerate(names["identity"])}
            own = [place[name] for name in self.identity_names]
        elif all(name.isdecimal() for name in self.identity_names):
            own = [int(name) for name in self.identity_names]
        else:  # the reader numbers query and gallery by a rule of its own
            return replace(self.train, names={**names, "identity": self.identity_names})
        return replace(self.train, identity=np.array(own, dtype=np.int64)[self.train.identity], names=names)

    @property
    def num_identities(self) -> int:
        """K, the number of training identities."""
        return len(self.identity_names)

    @property
    def num_viewpoints(self) -> int:
        """V."""
        return len(self.classes)

    @property
    def num_train_viewpoints_known(self) -> int:
        """How many training images have a viewpoint label."""
        return int((self.train.viewpoint >= 0).sum())

    def subclass_mask(self) -> np.ndarray:
        """bool [K, V]: the (identity, viewpoint) pairs that occur in the training split.

        With soft labels a pair occurs when some image of the identity gives that viewpoint a weight above 0. An image
        whose viewpoint is unknown adds nothing; an identity that has only such images gets all V viewpoints, since
        its samples are spread over the existing viewpoints and there must be one. What a mirrored image shows occurs.
        """
        mask = np.zeros((self.num_identities, self.num_viewpoints), dtype=bool)
        if self.train.viewpoint_weight is not None:
            rows, views = np.nonzero(self.train.viewpoint_weight > 0)
            mask[self.train.identity[rows], views] = True
        else:
            known = self.train.viewpoint >= 0
            mask[self.train.identity[known], self.train.viewpoint[known]] = True
        mask |= mask[:, list(mirrored_viewpoints(self.classes.names))]
        mask[~mask.any(axis=1)] = True
        return mask

    def summary(self) -> str:
        """A table of images, identities, cameras and viewpoints per split; how many are labelled; what was left out."""
        header = ("split", "images", "identities", "cameras", *self.classes.names, "unknown")
        rows = []
        for split, images in self.splits.items():
            cameras = np.unique(images.camera[images.camera >= 0]).size
            views = [int((images.viewpoint == view).sum()) for view in (*range(self.num_viewpoints), UNKNOWN)]
            counts = (len(images), np.unique(images.identity).size, cameras, *views)
            rows.append((split, *(f"{count:,}" for count in counts)))
        lines = [table(header, rows)]
        known, total = self.num_train_viewpoints_known, len(self.train)
        kind = "soft " if self.train.viewpoint_weight is not None else ""
        lines.append(f"{self.name}: {known:,} of {total:,} training images have {kind}viewpoint labels")
        lists = self.splits.values()
        for column in dict.fromkeys(name for images in lists for name in images.columns):
            values = {v for images in lists for v in images.columns.get(column, ())} - {UNKNOWN}
            lines.append(f"{self.name}: column {column} with {len(values):,} values")
        notes = (*left_out(unreadable_of(self.train, self.query), self.skipped), *self.notes)
        lines += [f"{self.name}: {note}" for note in notes]
        return "\n".join(lines)
