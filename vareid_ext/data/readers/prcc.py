"""PRCC (Yang et al., TPAMI 2021): people by cameras A and B in the same clothes, by C in others."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vareid_ext.data.readers.layout import NOT_IMAGES, ImageEntry, Layout, build_data, find_root, listing, unexpected
from vareid_ext.data.types import IMAGE_SUFFIXES, ReidData, is_litter, left_out

LAYOUT = Layout(
    "PRCC",
    ("rgb", "prcc/rgb", "PRCC/rgb", "prcc", "PRCC"),
    ("train", "test/A", "test/B", "test/C"),
    """\
prcc/rgb/
  train/   001/A_cropped_rgb001.jpg  001/B_...  001/C_...   (150 people; val/ holds some of their images)
  test/A/  002/cropped_rgb001.jpg ...                       (71 people: the gallery)
  test/B/  002/cropped_rgb001.jpg ...                       (in the same clothes as by A)
  test/C/  002/cropped_rgb001.jpg ...                       (in other clothes)""",
)
_CAMERAS = {"A": 1, "B": 2, "C": 3}
_CLOTHES = {"A": 1, "B": 1, "C": 2}
_TRAIN = re.compile(r"([ABC])_")


def _entries(folder: Path, camera: str, others: list[str]) -> list[ImageEntry]:
    """The images in a folder of people, by `camera`, or where that is "" by the one that begins their names."""
    entries = []
    for path in sorted(folder.glob("*/*")):
        if is_litter(str(path)):
            continue
        named = _TRAIN.match(path.name)
        known = camera or (named[1] if named else "")
        if not known or path.suffix.lower() not in IMAGE_SUFFIXES or not path.parent.name.isdecimal():
            others.append(str(path.relative_to(folder.parent)))
            continue
        entries.append(ImageEntry(str(path), path.parent.name, _CAMERAS[known], columns={"clothes": _CLOTHES[known]}))
    if not entries:
        raise unexpected(LAYOUT, f"{folder} has no images of people, but:\n{listing(folder)}")
    return entries


def _read(root: str | os.PathLike[str], kind: str, asking: str) -> ReidData:
    base = find_root(root, LAYOUT)
    others: list[str] = []
    splits = {
        "train": _entries(base / "train", "", others),
        "query": _entries(base / "test" / asking, asking, others),
        "gallery": _entries(base / "test" / "A", "A", others),
    }
    return build_data(kind, splits, notes=left_out(NOT_IMAGES, others))


def read_prcc(root: str | os.PathLike[str]) -> ReidData:
    """PRCC, its cloth-changing setting: camera C asks. The gallery holds all images by A, not one of each person.

    Clothes are a further label, numbered within a person.
    """
    return _read(root, "prcc", "C")


def read_prcc_same_clothes(root: str | os.PathLike[str]) -> ReidData:
    """PRCC, its setting without change of clothes: as :func:`read_prcc`, but camera B asks."""
    return _read(root, "prcc-same-clothes", "B")
