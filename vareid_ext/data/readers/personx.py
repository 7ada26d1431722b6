"""PersonX (Sun and Zheng, CVPR 2019): rendered people, each from 36 known angles before each background."""

from __future__ import annotations

import os
import re

from vareid_ext.data.readers.layout import (
    JUNK_IMAGES,
    NOT_IMAGES,
    SPLIT_FOLDERS,
    ImageEntry,
    Layout,
    build_data,
    find_root,
    scan,
)
from vareid_ext.data.types import SPLITS, ReidData, left_out
from vareid_ext.data.viewpoint_classes import ViewpointClasses

BINS = 8
"""Viewpoint classes where the user declares none."""

_ANGLES = 36


def _layout(backgrounds: str) -> Layout:
    first, others = backgrounds[0], "  ".join(f"{background}/" for background in backgrounds[1:])
    return Layout(
        f"PersonX (backgrounds {', '.join(backgrounds)})",
        ("PersonX_v1", "PersonX", "personx"),
        tuple(f"{background}/{folder}" for background in backgrounds for folder in SPLIT_FOLDERS),
        f"""\
PersonX_v1/
  {first}/  (a background)
    bounding_box_train/  0004_c{first}s1_01.jpg ...   (<identity>_c<camera>s1_<viewpoint>, 01 to {_ANGLES})
    query/               0001_c{first}s1_32.jpg ...
    bounding_box_test/   0001_c{first}s1_01.jpg ...
  {others}""",
        re.compile(r"(?P<identity>[0-9]{1,18})_c(?P<camera>[0-9]{1,18})s1_(?P<viewpoint>[0-9]{1,18})(?![0-9])"),
    )


def _with_angle(entry: ImageEntry) -> ImageEntry:
    """The entry with its angle: 0 from the front, 90 with the face to the right of the picture.

    Number 1 is a face to the left, and a person then turns by 10 degrees over the front to the right and the back.
    """
    number = entry.columns["viewpoint"]
    if not 1 <= number <= _ANGLES:
        raise ValueError(
            f"PersonX: viewpoint {number} was given in the name of {entry.path}; allowed are 1 to {_ANGLES}"
        )
    degrees = ((number - 1) * 360 // _ANGLES - 90) % 360
    return entry._replace(viewpoint=str(degrees), columns={})


def _read(root: str | os.PathLike[str], backgrounds: str, viewpoints: ViewpointClasses | None) -> ReidData:
    layout = _layout(backgrounds)
    base = find_root(root, layout)
    junk: list[str] = []
    others: list[str] = []
    entries = {
        split: [
            _with_angle(entry)
            for background in backgrounds
            for entry in scan(base / background / folder, layout, junk, others)
        ]
        for split, folder in zip(SPLITS, SPLIT_FOLDERS, strict=True)
    }
    notes = (*left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, others))
    angles = viewpoints if viewpoints is not None and viewpoints.angles else ViewpointClasses.of_angles(BINS)
    return build_data(f"personx-{backgrounds}", entries, notes=notes, classes=angles)


def read_personx_123(root: str | os.PathLike[str], *, viewpoints: ViewpointClasses | None = None) -> ReidData:
    """PersonX before backgrounds of one colour, each of which is a camera.

    Viewpoints are the exact angles, in `viewpoints` where these are angles, else in eight classes.
    """
    return _read(root, "123", viewpoints)


def read_personx_12(root: str | os.PathLike[str], *, viewpoints: ViewpointClasses | None = None) -> ReidData:
    """PersonX before two like colours; viewpoints as :func:`read_personx_123`."""
    return _read(root, "12", viewpoints)


def read_personx_13(root: str | os.PathLike[str], *, viewpoints: ViewpointClasses | None = None) -> ReidData:
    """PersonX before two unlike colours; viewpoints as :func:`read_personx_123`."""
    return _read(root, "13", viewpoints)


def read_personx_456(root: str | os.PathLike[str], *, viewpoints: ViewpointClasses | None = None) -> ReidData:
    """PersonX in rendered streets; viewpoints as :func:`read_personx_123`."""
    return _read(root, "456", viewpoints)


def read_personx_45(root: str | os.PathLike[str], *, viewpoints: ViewpointClasses | None = None) -> ReidData:
    """PersonX in two like streets; viewpoints as :func:`read_personx_123`."""
    return _read(root, "45", viewpoints)


def read_personx_46(root: str | os.PathLike[str], *, viewpoints: ViewpointClasses | None = None) -> ReidData:
    """PersonX in two unlike streets; viewpoints as :func:`read_personx_123`."""
    return _read(root, "46", viewpoints)
