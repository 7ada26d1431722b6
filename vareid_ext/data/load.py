"""One function that gets any data set: read, label, check."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from vareid_ext.data.manifest import read_manifest
from vareid_ext.data.readers import read_cuhk03, read_dukemtmc, read_market1501, read_msmt17
from vareid_ext.data.synthetic import SyntheticSettings, synthetic_data
from vareid_ext.data.types import ImageList, ReidData
from vareid_ext.data.viewpoint_labels import MODES, label_images, read_viewpoint_labels, with_soft_labels

_Reader = Callable[[str | os.PathLike[str]], ReidData]
_READERS: Mapping[str, _Reader] = {
    "market1501": read_market1501,
    "dukemtmc-reid": read_dukemtmc,
    "cuhk03-np-labeled": lambda root: read_cuhk03(root, "labeled"),
    "cuhk03-np-detected": lambda root: read_cuhk03(root, "detected"),
    "msmt17": read_msmt17,
    "manifest": read_manifest,
}

KINDS = ("synthetic", *_READERS)
"""What `load_data` can load."""

_SPLITS = ("train", "query", "gallery")
_NAMED_AT_MOST = 20


def unreadable_images(images: ImageList, *, progress: bool = False) -> list[tuple[int, str]]:
    """(index, why) of every image of the list that cannot be read completely, by reading them all."""

    def problem(index: int) -> str:
        try:
            images.load(index)
        except OSError as error:
            return str(error)
        return ""

    # Decoding releases the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(problem, range(len(images)))
        bar = tqdm(found, total=len(images), desc="checking images", unit="image", disable=not progress, leave=False)
        return [(index, why) for index, why in enumerate(bar) if why]


def _drop(data: ReidData, bad: Mapping[str, list[tuple[int, str]]]) -> ReidData:
    lists = {}
    for split in _SPLITS:
        images: ImageList = getattr(data, split)
        keep = np.ones(len(images), dtype=bool)
        keep[[index for index, _ in bad[split]]] = False
        if not keep.any():
            raise ValueError(f"{data.name}: every image of the {split} split is unreadable, {bad[split][0][1]}")
        lists[split] = images.select(keep)
    # Identities all of whose images are gone leave no gap.
    kept, identity = np.unique(lists["train"].identity, return_inverse=True)
    return replace(
        data,
        train=replace(lists["train"], identity=identity),
        query=lists["query"],
        gallery=lists["gallery"],
        identity_names=tuple(data.identity_names[index] for index in kept),
        skipped=tuple(getattr(data, split).paths[index] for split in _SPLITS for index, _ in bad[split]),
    )


def check_readable(data: ReidData, *, skip_bad_images: bool = False, progress: bool = False) -> ReidData:
    """Read every image once; `data` without the unreadable ones, or an error that names them.

    Raises:
        ValueError: images cannot be read and `skip_bad_images` is False, or a split has no readable image.
    """
    bad = {split: unreadable_images(getattr(data, split), progress=progress) for split in _SPLITS}
    problems = [why for split in _SPLITS for _, why in bad[split]]
    if not problems:
        return data
    if skip_bad_images:
        return _drop(data, bad)
    shown = "\n".join(f"  {why}" for why in problems[:_NAMED_AT_MOST])
    more = f"\n  ... and {len(problems) - _NAMED_AT_MOST:,} more" if len(problems) > _NAMED_AT_MOST else ""
    raise ValueError(
        f"{data.name}: {len(problems):,} unreadable images (skip_bad_images goes on without them):\n{shown}{more}"
    )


def load_data(
    kind: str,
    root: str | os.PathLike[str] | None = None,
    *,
    viewpoint_labels: str | os.PathLike[str] | None = None,
    viewpoint_mode: str = "hard",
    skip_bad_images: bool = False,
    check_images: bool = True,
    synthetic: SyntheticSettings | None = None,
    progress: bool = True,
) -> ReidData:
    """Load a data set.

    Args:
        kind: one of `KINDS`.
        root: the data set's folder; the CSV file for "manifest"; not used for "synthetic".
        viewpoint_labels: a label file (see `read_viewpoint_labels`); images are looked up by path, or by file name
            where that is enough, and those it does not name keep what the reader knows, if anything.
        viewpoint_mode: "hard" for one class per image; "soft" gives the training list a `viewpoint_weight`, in which
            ambiguous names share their weight.
        skip_bad_images: go on without unreadable images instead of stopping.
        check_images: read every image file once now, so that a bad one stops here and not in the middle of training.
        synthetic: size and seed for "synthetic", the default ones when None.
        progress: show bars.

    Raises:
        ValueError: an argument outside what is allowed, unreadable images, a manifest or label file with errors.
        FileNotFoundError: the data set is not there; the message shows what was expected and what was found.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if viewpoint_mode not in MODES:
        raise ValueError(f"viewpoint_mode must be one of {', '.join(MODES)}, got {viewpoint_mode!r}")
    if kind != "synthetic" and root is None:
        raise ValueError(f"root must be the {'CSV file' if kind == 'manifest' else 'folder'} of {kind!r}, got None")
    labels = None if viewpoint_labels is None else read_viewpoint_labels(viewpoint_labels)
    if kind == "synthetic":
        data, folder = synthetic_data(synthetic, progress=progress), None
    else:
        assert root is not None
        data, folder = _READERS[kind](root), os.path.dirname(root) if kind == "manifest" else root
    if labels is not None:
        # Before bad images are dropped: a file name must not become unique by that.
        data = label_images(data, labels, folder)
    if kind != "synthetic" and check_images:
        data = check_readable(data, skip_bad_images=skip_bad_images, progress=progress)
    if viewpoint_mode == "soft":
        data = replace(data, train=with_soft_labels(data.train))
    return data
