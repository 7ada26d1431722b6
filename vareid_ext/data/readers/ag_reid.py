"""AG-ReID.v2 (Nguyen et al., TIFS 2024): people by a drone, a fixed camera and a camera worn on the head."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vareid_ext.data.readers.layout import (
    NOT_IMAGES,
    ImageEntry,
    Layout,
    build_data,
    check_present,
    find_root,
    listing,
    scan,
    unexpected,
)
from vareid_ext.data.text_files import shown, text_lines
from vareid_ext.data.types import ReidData, left_out

_NAMED = r"(?P<identity>P[0-9]{1,6}T[0-9]{1,8}A[0-9]{1,2})C(?P<camera>[0-9]{1,18})(?![0-9])"
_LINE = re.compile(rf"(query|gallery)/(?:.*/)?{_NAMED}.*")

LAYOUT = Layout(
    "AG-ReID.v2",
    ("AG-ReID.v2", "AG-ReID.v2/AG-ReID.v2", "AG-ReIDv2", "AG_ReID_v2", "ag-reid-v2"),
    ("train_all", "query", "gallery"),
    """\
AG-ReID.v2/
  train_all/  P0001T04041A0/P0001T04041A0C0F31.jpg ...   (<identity>C<camera>F<frame>)
  query/      P0000T02140A0/P0000T02140A0C0F91.jpg ...   (cameras: 0 aerial, 2 wearable, 3 CCTV)
  gallery/    P0000T02140A0/P0000T02140A0C3F31.jpg ...
  exp1_aerial_to_cctv.txt  exp2_aerial_to_wearable.txt  exp4_cctv_to_aerial.txt  exp5_wearable_to_aerial.txt
              (of its protocols, here or in the folder above; lines: query/P0000T02140A0/P0000T02140A0C0F91.jpg)""",
    re.compile(_NAMED),
    nested=True,
)


def _number(identity: str) -> int:
    """Its digits, of the person, the day and the altitude: together they are who it is."""
    return int(re.sub("[A-Z]", "", identity))


def _listed(base: Path, name: str) -> dict[str, list[ImageEntry]]:
    """Query and gallery of one protocol."""
    path = next((folder / name for folder in (base, base.parent) if (folder / name).is_file()), None)
    if path is None:
        raise unexpected(LAYOUT, f"{base} holds no {name}, but:\n{listing(base)}")
    entries: dict[str, list[ImageEntry]] = {"query": [], "gallery": []}
    for where, line in text_lines(path, LAYOUT.title):
        image = line.replace("\\", "/")
        match = _LINE.fullmatch(image)
        if match is None:
            raise ValueError(f"{where}: expected query/... or gallery/... and <identity>C<camera>, got {shown(line)}")
        entries[match[1]].append(ImageEntry(str(base / image), match["identity"], int(match["camera"])))
    for split, of_split in entries.items():
        check_present(LAYOUT, base / split, of_split, name)
    return entries


def _read(root: str | os.PathLike[str], kind: str, protocol: str = "") -> ReidData:
    base = find_root(root, LAYOUT)
    others: list[str] = []
    entries = {"train": scan(base / "train_all", LAYOUT, [], others)}
    if protocol:
        entries |= _listed(base, protocol)
    else:
        entries |= {split: scan(base / split, LAYOUT, [], others) for split in ("query", "gallery")}
    return build_data(kind, entries, _number, left_out(NOT_IMAGES, others))


def read_ag_reid_v2(root: str | os.PathLike[str]) -> ReidData:
    """AG-ReID.v2, all of its test images. Cameras are 0 in the air, 2 worn, 3 fixed."""
    return _read(root, "ag-reid-v2")


def read_aerial_to_cctv(root: str | os.PathLike[str]) -> ReidData:
    """AG-ReID.v2, its protocol that looks for people from the air among those of the fixed camera.

    All of its protocols train on the same images.
    """
    return _read(root, "ag-reid-v2-aerial-to-cctv", "exp1_aerial_to_cctv.txt")


def read_aerial_to_wearable(root: str | os.PathLike[str]) -> ReidData:
    """AG-ReID.v2: people from the air among those of the worn camera."""
    return _read(root, "ag-reid-v2-aerial-to-wearable", "exp2_aerial_to_wearable.txt")


def read_cctv_to_aerial(root: str | os.PathLike[str]) -> ReidData:
    """AG-ReID.v2: people of the fixed camera among those from the air."""
    return _read(root, "ag-reid-v2-cctv-to-aerial", "exp4_cctv_to_aerial.txt")


def read_wearable_to_aerial(root: str | os.PathLike[str]) -> ReidData:
    """AG-ReID.v2: people of the worn camera among those from the air."""
    return _read(root, "ag-reid-v2-wearable-to-aerial", "exp5_wearable_to_aerial.txt")
