"""Readers: one file a layout in which people keep re-identification data sets, one entry each in `READERS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from vareid_ext.data.readers.cuhk03 import read_cuhk03_detected, read_cuhk03_labeled
from vareid_ext.data.readers.dukemtmc import read_dukemtmc
from vareid_ext.data.readers.manifest import read_manifest
from vareid_ext.data.readers.market1501 import read_market1501
from vareid_ext.data.readers.msmt17 import read_msmt17
from vareid_ext.data.readers.synthetic import synthetic_data
from vareid_ext.data.types import ReidData

READERS: dict[str, Callable[..., ReidData]] = {
    "synthetic": synthetic_data,
    "market1501": read_market1501,
    "dukemtmc-reid": read_dukemtmc,
    "cuhk03-np-labeled": read_cuhk03_labeled,
    "cuhk03-np-detected": read_cuhk03_detected,
    "msmt17": read_msmt17,
    "manifest": read_manifest,
}
"""Kind -> reader. A reader is given those of these arguments that it names: `root`, the path of the data set;
`settings`, the `SyntheticSettings` or None; `progress`, whether to show a bar."""


def needs_root(kind: str) -> bool:
    """Whether the reader of `kind` reads files, and does not render its images."""
    return "root" in inspect.signature(READERS[kind]).parameters


def check_kind(kind: str, root: object, prefix: str = "") -> None:
    """ValueError, whose message begins with `prefix`, unless `kind` has a reader, and a `root` where it reads one."""
    if kind not in READERS:
        raise ValueError(f"{prefix}kind: {kind!r:.60} was given; allowed are {', '.join(READERS)}")
    if needs_root(kind) and not root:
        option = f" (--{prefix}root)" if prefix else ""
        raise ValueError(f"{prefix}root: nothing was given; {prefix}kind {kind} needs the data set's path{option}")


def read(kind: str, **arguments: object) -> ReidData:
    """The data set that the reader of `kind` makes of those `arguments` that it names."""
    return READERS[kind](**{name: arguments[name] for name in inspect.signature(READERS[kind]).parameters})
