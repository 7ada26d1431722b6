"""VehicleID (Liu et al., CVPR 2016), with its three test sets."""

from __future__ import annotations

import os
import re

import numpy as np

from vareid_ext.data.readers.dividing import DivisionSettings
from vareid_ext.data.readers.layout import ImageEntry, Layout, build_data, check_present, find_root
from vareid_ext.data.text_files import shown, text_lines
from vareid_ext.data.types import ReidData

_LINE = re.compile(r"([0-9]{1,18})(?:\.jpg)?\s+([0-9]{1,18})")


def _layout(size: int) -> Layout:
    lists = ("train_list.txt", f"test_list_{size}.txt")
    return Layout(
        f"VehicleID ({size:,} test vehicles)",
        ("VehicleID_V1.0", "VehicleID", "vehicleid"),
        ("image", *(f"train_test_split/{name}" for name in lists)),
        f"""\
VehicleID_V1.0/
  image/             0000001.jpg ...
  train_test_split/  {"  ".join(lists)}   (lines: 0000001 15, the image and its vehicle)""",
    )


def _read(root: str | os.PathLike[str], size: int, division: DivisionSettings | None) -> ReidData:
    layout = _layout(size)
    base = find_root(root, layout)

    def read_list(name: str) -> list[ImageEntry]:
        entries = []
        path = base / "train_test_split" / name
        for where, line in text_lines(path, layout.title):
            match = _LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"{where}: expected an image and its vehicle (0000001 15), got {shown(line)}")
            entries.append(ImageEntry(str(base / "image" / f"{match[1]}.jpg"), match[2]))
        check_present(layout, base / "image", entries, name)
        return entries

    test = read_list(f"test_list_{size}.txt")
    seed = (division or DivisionSettings()).seed
    generator = np.random.default_rng(seed)
    found: set[str] = set()
    places: set[int] = set()
    for place in generator.permutation(len(test)).tolist():
        if test[place].identity not in found:
            found.add(test[place].identity)
            places.add(place)
    splits = {
        "train": read_list("train_list.txt"),
        "query": [entry for place, entry in enumerate(test) if place not in places],
        "gallery": [entry for place, entry in enumerate(test) if place in places],
    }
    said = f"the gallery is one random image of each test vehicle (seed {seed}); results are means over ten seeds"
    return build_data(f"vehicleid-{size}", splits, notes=(said,))


def read_vehicleid_800(root: str | os.PathLike[str], *, division: DivisionSettings | None = None) -> ReidData:
    """VehicleID with the small test set: a random image of each of 800 vehicles is the gallery, the others ask.

    Of `division` the seed counts, which draws the gallery.
    """
    return _read(root, 800, division)


def read_vehicleid_1600(root: str | os.PathLike[str], *, division: DivisionSettings | None = None) -> ReidData:
    """VehicleID with the medium test set, 1,600 vehicles; else as :func:`read_vehicleid_800`."""
    return _read(root, 1600, division)


def read_vehicleid_2400(root: str | os.PathLike[str], *, division: DivisionSettings | None = None) -> ReidData:
    """VehicleID with the large test set, 2,400 vehicles; else as :func:`read_vehicleid_800`."""
    return _read(root, 2400, division)
