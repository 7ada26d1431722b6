"""CARGO (Zhang et al., CVPR 2024): rendered people, from the air and from the ground, with its four protocols."""

from __future__ import annotations

import os
import re

from vareid_ext.data.readers.layout import NOT_IMAGES, ImageEntry, Layout, build_data, find_root, scan
from vareid_ext.data.types import SPLITS, ReidData, left_out

LAYOUT = Layout(
    "CARGO",
    ("CARGO", "cargo"),
    (*SPLITS, "train/Cam1"),
    """\
CARGO/
  train/    Cam1/Cam1_day_0001_1.jpg ...     (51,451 images: Cam<camera>_<day or night>_<identity>_...)
  query/    Cam2/Cam2_day_2519_320.jpg ...   (cameras 1 to 5 are in the air, 6 to 13 on the ground)
  gallery/  Cam6/Cam6_night_2519_7.jpg ...""",
    re.compile(r"Cam(?P<camera>[0-9]{1,18})_[a-z]+_(?P<identity>[0-9]{1,18})(?![0-9])"),
    nested=True,
)
AERIAL, GROUND = 1, 2
"""The numbers of the column `platform`."""

_AERIAL_CAMERAS = 5


def _platform(entry: ImageEntry) -> int:
    return AERIAL if entry.camera <= _AERIAL_CAMERAS else GROUND


def _read(root: str | os.PathLike[str]) -> tuple[dict[str, list[ImageEntry]], tuple[str, ...]]:
    base = find_root(root, LAYOUT)
    others: list[str] = []
    found = {split: scan(base / split, LAYOUT, [], others) for split in SPLITS}
    entries = {split: [e._replace(columns={"platform": _platform(e)}) for e in of] for split, of in found.items()}
    return entries, left_out(NOT_IMAGES, others)


def _one_platform(root: str | os.PathLike[str], kind: str, platform: int) -> ReidData:
    entries, notes = _read(root)
    for split in ("query", "gallery"):
        entries[split] = [entry for entry in entries[split] if entry.columns["platform"] == platform]
    return build_data(kind, entries, notes=notes)


def read_cargo(root: str | os.PathLike[str]) -> ReidData:
    """CARGO, all of its test images. `platform` is a further label: 1 in the air, 2 on the ground."""
    entries, notes = _read(root)
    return build_data("cargo", entries, notes=notes)


def read_cargo_aerial(root: str | os.PathLike[str]) -> ReidData:
    """CARGO, its protocol A-A: of the test images those from the air. All of its protocols train on the same."""
    return _one_platform(root, "cargo-a-a", AERIAL)


def read_cargo_ground(root: str | os.PathLike[str]) -> ReidData:
    """CARGO, its protocol G-G: of the test images those from the ground."""
    return _one_platform(root, "cargo-g-g", GROUND)


def read_cargo_aerial_ground(root: str | os.PathLike[str]) -> ReidData:
    """CARGO, its protocol A-G: the cameras of the test images are 1 in the air and 2 on the ground.

    So the usual rule leaves out images of the query's person from the same platform; other people's stay.
    """
    entries, notes = _read(root)
    for split in ("query", "gallery"):
        entries[split] = [entry._replace(camera=entry.columns["platform"]) for entry in entries[split]]
    return build_data("cargo-a-g", entries, notes=notes)
