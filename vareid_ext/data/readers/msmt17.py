"""MSMT17 (Wei et al., CVPR 2018), V1 or V2."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from vareid_ext.data.readers.layout import (
    NOT_IMAGES,
    ImageEntry,
    Layout,
    build_data,
    check_present,
    find_root,
    listing,
    unexpected,
)
from vareid_ext.data.text_files import shown, text_lines
from vareid_ext.data.types import ReidData, is_litter, left_out

_NAMED = re.compile(r"[0-9]+_[0-9]+_([0-9]{1,18})_")
_IDENTITY = re.compile(r"[0-9]{1,18}")

LAYOUT = Layout(
    "MSMT17",
    ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
    ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt"),
    """\
MSMT17_V1/
  list_train.txt  list_val.txt  list_query.txt  list_gallery.txt   (lines: 0000/0000_000_01_0303morning_0008_0.jpg 0)
  train/          0000/0000_000_01_0303morning_0008_0.jpg ...      (or mask_train_v2/)
  test/           0000/0000_000_01_0303morning_0021_0.jpg ...      (or mask_test_v2/)""",
)


def read_msmt17(root: str | os.PathLike[str]) -> ReidData:
    """MSMT17, V1 or V2. Its training and validation lists together are the training split."""
    base = find_root(root, LAYOUT)
    folders = {}
    for split in ("train", "test"):
        names = (split, f"mask_{split}_v2")
        found = next((base / name for name in names if (base / name).is_dir()), None)
        if found is None:
            raise unexpected(LAYOUT, f"{base} holds neither {names[0]} nor {names[1]}, but:\n{listing(base)}")
        folders[split] = found
    litter: list[str] = []

    def read_list(name: str, folder: Path) -> list[ImageEntry]:
        entries = []
        for where, line in text_lines(base / name, LAYOUT.title):
            *before, identity = line.rsplit(maxsplit=1)
            path = "".join(before).strip().replace("\\", "/")
            if is_litter(path):
                litter.append(path)
                continue
            match = _NAMED.match(os.path.basename(path))
            if match is None or not _IDENTITY.fullmatch(identity):
                raise ValueError(
                    f"{where}: expected a path like 0000/0000_000_01_0303morning_0008_0.jpg and an identity number, "
                    f"got {shown(line)}"
                )
            entries.append(ImageEntry(str(folder / path), identity, int(match[1])))
        check_present(LAYOUT, folder, entries, name)
        return entries

    data = build_data(
        "msmt17",
        {
            "train": read_list("list_train.txt", folders["train"]) + read_list("list_val.txt", folders["train"]),
            "query": read_list("list_query.txt", folders["test"]),
            "gallery": read_list("list_gallery.txt", folders["test"]),
        },
        notes=left_out(NOT_IMAGES, litter),
    )
    return replace(data, same_people=False)  # both are numbered from 0
