"""Market-1501 (Zheng et al., ICCV 2015)."""

from __future__ import annotations

import os

from vareid_ext.data.readers.layout import SPLIT_FOLDERS, Layout, read_folders
from vareid_ext.data.types import ReidData

LAYOUT = Layout(
    "Market-1501",
    ("Market-1501-v15.09.15", "Market-1501", "market1501"),
    SPLIT_FOLDERS,
    """\
Market-1501-v15.09.15/
  bounding_box_train/  0002_c1s1_000451_03.jpg ...   (12,936 images)
  query/               0001_c1s1_001051_00.jpg ...   (3,368 images)
  bounding_box_test/   -1_c1s1_000401_03.jpg ...     (19,732 images, junk of identity -1 among them)""",
)


def read_market1501(root: str | os.PathLike[str]) -> ReidData:
    """Market-1501. Junk (identity -1) is left out, distractors (0) stay in the gallery."""
    return read_folders(root, "market1501", LAYOUT)
