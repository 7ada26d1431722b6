"""CUHK03 under the new protocol (Zhong et al., CVPR 2017)."""

from __future__ import annotations

import os

from vareid_ext.data.readers.layout import SPLIT_FOLDERS, Layout, read_folders
from vareid_ext.data.types import ReidData


def _layout(setting: str) -> Layout:
    return Layout(
        f"CUHK03-NP ({setting})",
        ("cuhk03-np", "CUHK03-NP", "cuhk03_np"),
        tuple(f"{setting}/{folder}" for folder in SPLIT_FOLDERS),
        f"""\
cuhk03-np/
  {setting}/
    bounding_box_train/  0003_c1_21.png ...   (767 identities)
    query/               0001_c1_1.png ...    (1,400 images)
    bounding_box_test/   0001_c1_2.png ...""",
    )


def read_cuhk03_labeled(root: str | os.PathLike[str]) -> ReidData:
    """CUHK03 with the boxes that people have drawn."""
    return read_folders(root, "cuhk03-np-labeled", _layout("labeled"))


def read_cuhk03_detected(root: str | os.PathLike[str]) -> ReidData:
    """CUHK03 with the boxes of a detector."""
    return read_folders(root, "cuhk03-np-detected", _layout("detected"))
