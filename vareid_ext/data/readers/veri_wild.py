"""VERI-Wild (Lou et al., CVPR 2019), with its three test sets."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vareid_ext.data.readers.layout import ImageEntry, Layout, build_data, check_present, find_root
from vareid_ext.data.text_files import shown, text_lines
from vareid_ext.data.types import ReidData

_IMAGE = re.compile(r"([0-9]{1,18})/([0-9]{1,18})(?:\.jpg)?(?:\s.*)?")
_INFO = re.compile(r"([0-9]{1,18})/([0-9]{1,18})\s*;\s*([0-9]{1,18})\s*;.*")


def _layout(size: int) -> Layout:
    lists = ("train_list.txt", f"test_{size}_query.txt", f"test_{size}.txt")
    return Layout(
        f"VERI-Wild ({size:,} test vehicles)",
        ("VERI-Wild", "VeRi-Wild", "veri-wild", "VERI_Wild"),
        ("images", *(f"train_test_split/{name}" for name in (*lists, "vehicle_info.txt"))),
        f"""\
VERI-Wild/
  images/            00001/000001.jpg ...              (<vehicle>/<image>.jpg)
  train_test_split/  {"  ".join(lists)}  (lines: 00001/000001.jpg)
                     vehicle_info.txt                  (lines: 00001/000001;12;2018-03-11 07:03:21;...)""",
    )


def _read(root: str | os.PathLike[str], size: int) -> ReidData:
    layout = _layout(size)
    base = find_root(root, layout)
    split = base / "train_test_split"
    cameras: dict[str, int] = {}
    for number, (where, line) in enumerate(text_lines(split / "vehicle_info.txt", layout.title)):
        match = _INFO.fullmatch(line)
        if match is not None:
            cameras[match[2]] = int(match[3])
        elif number:  # the first line names the columns
            raise ValueError(f"{where}: expected <vehicle>/<image>;<camera>;..., got {shown(line)}")

    def read_list(name: str) -> list[ImageEntry]:
        entries = []
        for where, line in text_lines(split / name, layout.title):
            match = _IMAGE.fullmatch(line)
            if match is None or match[2] not in cameras:
                problem = "expected <vehicle>/<image>" if match is None else "vehicle_info.txt has no camera of"
                raise ValueError(f"{where}: {problem}, got {shown(line)}")
            path = Path(base, "images", match[1], f"{match[2]}.jpg")
            entries.append(ImageEntry(str(path), match[1], cameras[match[2]]))
        check_present(layout, base / "images", entries, name)
        return entries

    names = ("train_list.txt", f"test_{size}_query.txt", f"test_{size}.txt")
    lists = dict(zip(("train", "query", "gallery"), map(read_list, names), strict=True))
    return build_data(f"veri-wild-{size}", lists)


def read_veri_wild_3000(root: str | os.PathLike[str]) -> ReidData:
    """VERI-Wild with the small test set, 3,000 vehicles."""
    return _read(root, 3000)


def read_veri_wild_5000(root: str | os.PathLike[str]) -> ReidData:
    """VERI-Wild with the medium test set, 5,000 vehicles."""
    return _read(root, 5000)


def read_veri_wild_10000(root: str | os.PathLike[str]) -> ReidData:
    """VERI-Wild with the large test set, 10,000 vehicles."""
    return _read(root, 10000)
