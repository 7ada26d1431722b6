"""VehicleID (Liu et al., CVPR 2016), with its three test sets."""

from __future__ import annotations

import os
import re

import numpy as np

from vareid_ext._labels import one_of_each
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

    # In an order that --protocol drawn-gallery knows, too: it then draws the same.
    test = sorted(read_list(f"test_list_{size}.txt"), key=lambda entry: entry.path)
    seed = (division or DivisionSettings()).seed
    drawn = one_of_each([entry.identity for entry in test], np.random.default_rng(seed))
    splits = {
        "train": read_list("train_list.txt"),
        "query": [entry for entry, inside in zip(test, drawn, strict=True) if not inside],
        "gallery": [entry for entry, inside in zip(test, drawn, strict=True) if inside],
    }
    said = (
        f"the gallery is one random image of each test vehicle (seed {seed}); results are means over ten draws: "
        "vareid evaluate RUN --protocol drawn-gallery"
    )
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
