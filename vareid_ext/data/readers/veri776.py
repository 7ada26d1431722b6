"""VeRi-776 (Liu et al., ECCV 2016), with the orientations of Wang et al. (ICCV 2017)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vareid_ext.data.readers.layout import Layout, read_folders
from vareid_ext.data.text_files import shown, text_lines
from vareid_ext.data.types import ReidData
from vareid_ext.data.viewpoint_classes import ViewpointClasses

LAYOUT = Layout(
    "VeRi-776",
    ("VeRi", "VeRi-776", "VeRi776", "veri"),
    ("image_train", "image_query", "image_test"),
    """\
VeRi/
  image_train/  0001_c001_00016450_0.jpg ...   (37,778 images)
  image_query/  0002_c002_00030600_0.jpg ...   (1,678 images)
  image_test/   0002_c002_00030600_0.jpg ...   (11,579 images)
  keypoint_train.txt  keypoint_test.txt        (orientations; not part of VeRi-776, may be missing)""",
)
ORIENTATIONS = ("front", "rear", "left", "left_front", "left_rear", "right", "right_front", "right_rear")
"""In the order of their numbers in the annotation."""

_FILES = ("keypoint_train.txt", "keypoint_test.txt")
_NUMBERS = 41  # of a line: x and y of 20 key points, the orientation


def _orientations(base: Path) -> tuple[Mapping[str, str], ViewpointClasses]:
    found: dict[str, str] = {}
    for name in _FILES:
        path = base / name
        if not path.is_file():
            continue
        for where, line in text_lines(path, LAYOUT.title):
            image, *numbers = line.rsplit(maxsplit=_NUMBERS)
            label = numbers[-1] if len(numbers) == _NUMBERS else ""
            if not (label.isdecimal() and int(label) < len(ORIENTATIONS)):
                raise ValueError(
                    f"{where}: expected an image, {_NUMBERS - 1} coordinates and an orientation from 0 to "
                    f"{len(ORIENTATIONS) - 1}, got {shown(line)}"
                )
            file = image.replace("\\", "/").rpartition("/")[2]
            if found.setdefault(file, ORIENTATIONS[int(label)]) != ORIENTATIONS[int(label)]:
                raise ValueError(f"{where}: {shown(file)} has another orientation before")
    return found, ViewpointClasses(ORIENTATIONS)


def read_veri776(root: str | os.PathLike[str]) -> ReidData:
    """VeRi-776. Viewpoints are the eight orientations where the annotation lies beside the images."""
    return read_folders(root, "veri776", LAYOUT, _orientations)
