"""DukeMTMC-reID (Zheng et al., ICCV 2017)."""

from __future__ import annotations

import os

from vareid_ext.data.readers.layout import SPLIT_FOLDERS, Layout, read_folders
from vareid_ext.data.types import ReidData

LAYOUT = Layout(
    "DukeMTMC-reID",
    ("DukeMTMC-reID", "dukemtmc-reid"),
    SPLIT_FOLDERS,
    """\
DukeMTMC-reID/
  bounding_box_train/  0001_c2_f0046182.jpg ...      (16,522 images)
  query/               0005_c2_f0046985.jpg ...      (2,228 images)
  bounding_box_test/   0002_c1_f0044158.jpg ...      (17,661 images)""",
)


def read_dukemtmc(root: str | os.PathLike[str]) -> ReidData:
    """DukeMTMC-reID."""
    return read_folders(root, "dukemtmc-reid", LAYOUT)
