"""Readers: one file a layout in which people keep re-identification data sets, one entry each in `READERS`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from vareid_ext.data.types import ReidData

READERS: dict[str, Callable[..., ReidData]] = {
    kind: getattr(importlib.import_module(f"{__name__}.{place.partition('.')[0]}"), place.partition(".")[2])
    for kind, place in {
        "synthetic": "synthetic.synthetic_data",
        "market1501": "market1501.read_market1501",
        "dukemtmc-reid": "dukemtmc.read_dukemtmc",
        "cuhk03-np-labeled": "cuhk03.read_cuhk03_labeled",
        "cuhk03-np-detected": "cuhk03.read_cuhk03_detected",
        "msmt17": "msmt17.read_msmt17",
        "veri776": "veri776.read_veri776",
        "veri-wild-3000": "veri_wild.read_veri_wild_3000",
        "veri-wild-5000": "veri_wild.read_veri_wild_5000",
        "veri-wild-10000": "veri_wild.read_veri_wild_10000",
        "vehicleid-800": "vehicleid.read_vehicleid_800",
        "vehicleid-1600": "vehicleid.read_vehicleid_1600",
        "vehicleid-2400": "vehicleid.read_vehicleid_2400",
        "ltcc": "ltcc.read_ltcc",
        "prcc": "prcc.read_prcc",
        "prcc-same-clothes": "prcc.read_prcc_same_clothes",
        "cargo": "cargo.read_cargo",
        "cargo-a-a": "cargo.read_cargo_aerial",
        "cargo-g-g": "cargo.read_cargo_ground",
        "cargo-a-g": "cargo.read_cargo_aerial_ground",
        "ag-reid-v2": "ag_reid.read_ag_reid_v2",
        "ag-reid-v2-aerial-to-cctv": "ag_reid.read_aerial_to_cctv",
        "ag-reid-v2-aerial-to-wearable": "ag_reid.read_aerial_to_wearable",
        "ag-reid-v2-cctv-to-aerial": "ag_reid.read_cctv_to_aerial",
        "ag-reid-v2-wearable-to-aerial": "ag_reid.read_wearable_to_aerial",
        "personx-456": "personx.read_personx_456",
        "personx-45": "personx.read_personx_45",
        "personx-46": "personx.read_personx_46",
        "personx-123": "personx.read_personx_123",
        "personx-12": "personx.read_personx_12",
        "personx-13": "personx.read_personx_13",
        "manifest": "manifest.read_manifest",
        "auto": "auto.read_auto",
    }.items()
}
"""Kind -> reader. A reader is given those of these arguments that it names: `root`, the path of the data set;
`settings`, the `SyntheticSettings` or None; `extras`, names out of `EXTRAS` of what it is to make beside the images;
`viewpoints`, the `ViewpointClasses` that the user declares or None; `division`, the `DivisionSettings` of one without
splits, or None; `needed`, the splits that must have images, all by default; `progress`, whether to show a bar."""


def needs_root(kind: str) -> bool:
    """Whether the reader of `kind` reads files, and does not render its images."""
    return "root" in inspect.signature(READERS[kind]).parameters


def renders_extras(kind: str) -> bool:
    """Whether the reader of `kind` makes inputs beside the images."""
    return "extras" in inspect.signature(READERS[kind]).parameters


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
