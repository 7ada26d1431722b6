"""LTCC (Qian et al., ACCV 2020): people who change their clothes."""

from __future__ import annotations

import os
import re

from vareid_ext.data.readers.layout import Layout, read_folders
from vareid_ext.data.types import ReidData

LAYOUT = Layout(
    "LTCC",
    ("LTCC_ReID", "LTCC", "ltcc"),
    ("train", "query", "test"),
    """\
LTCC_ReID/
  train/  094_1_c9_015833.png ...   (9,576 images: <identity>_<clothes>_c<camera>_...)
  query/  000_1_c11_013367.png ...  (493 images)
  test/   000_1_c11_013368.png ...  (7,050 images)""",
    re.compile(r"(?P<identity>[0-9]{1,18})_(?P<clothes>[0-9]{1,18})_c(?P<camera>[0-9]{1,18})(?![0-9])"),
)


def read_ltcc(root: str | os.PathLike[str]) -> ReidData:
    """LTCC, with clothes as a further label, numbered within a person.

    Its standard setting is the usual exclusion rule; its cloth-changing one is "identity&camera | identity&clothes".
    """
    return read_folders(root, "ltcc", LAYOUT)
