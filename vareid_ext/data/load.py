"""One function that gets any data set: read, label, check."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vareid_ext.data.extra_files import ExtraFiles, check_given, join_extras
from vareid_ext.data.extras import EXTRAS
from vareid_ext.data.readers import check_kind, needs_root, read, renders_extras
from vareid_ext.data.readers.dividing import DivisionSettings
from vareid_ext.data.synthetic.renderer import SyntheticSettings
from vareid_ext.data.types import SPLITS, ImageList, ReidData
from vareid_ext.data.viewpoint_classes import ViewpointClasses
from vareid_ext.data.viewpoints import MODES, label_images, read_viewpoint_labels, with_soft_labels

_NAMED_AT_MOST = 20


class Unreadable(NamedTuple):
    """An image that cannot be read, or an input beside it."""

    number: int
    """of the image in its list"""
    what: str
    """ "images", or the extra's name"""
    why: str


def unreadable_images(images: ImageList, *, progress: bool = False) -> list[Unreadable]:
    """Every image of the list that cannot be read completely with its extras, by reading them all."""
    beside = {name: replace(images, extras={name: extra}) for name, extra in images.extras.items()}

    def problem(index: int) -> Unreadable | None:
        what = "images"
        try:
            picture = images.load(index)
            for what in beside:
                beside[what].load_extras(index, picture.height, picture.width)
        except (OSError, ValueError) as error:
            return Unreadable(index, what, str(error))
        return None

    # Decoding releases the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(problem, range(len(images)))
        bar = tqdm(found, total=len(images), desc="checking images", unit="image", disable=not progress, leave=False)
        return [problem for problem in bar if problem]


def listed(bad: Sequence[Unreadable], option: str) -> str:
    """How many images, and extras of each name, are unreadable, the option that goes on without them, and why."""
    counts = ", ".join(f"{count:,} unreadable {what}" for what, count in Counter(b.what for b in bad).items())
    shown = "".join(f"\n  {b.why}" for b in bad[:_NAMED_AT_MOST])
    more = f"\n  ... and {len(bad) - _NAMED_AT_MOST:,} more" if len(bad) > _NAMED_AT_MOST else ""
    return f"{counts} ({option} goes on without the images):{shown}{more}"


def _drop(data: ReidData, bad: Mapping[str, list[Unreadable]]) -> ReidData:
    lists = {}
    for split, images in data.splits.items():
        keep = np.ones(len(images), dtype=bool)
        keep[[b.number for b in bad[split]]] = False
        if len(images) and not keep.any():
            raise ValueError(f"{data.name}: every image of the {split} split is unreadable, {bad[split][0].why}")
        lists[split] = images.select(keep)
    # Identities all of whose images are gone leave no gap.
    kept, identity = np.unique(lists["train"].identity, return_inverse=True)
    return replace(
        data,
        train=replace(lists["train"], identity=identity),
        query=lists["query"],
        gallery=lists["gallery"],
        identity_names=tuple(data.identity_names[index] for index in kept),
        skipped=tuple(images.paths[number] for split, images in data.splits.items() for number, *_ in bad[split]),
    )


def check_readable(data: ReidData, *, skip_bad_images: bool = False, progress: bool = False) -> ReidData:
    """Read every image once; `data` without the unreadable ones, or an error that names them.

    Raises:
        ValueError: images cannot be read and `skip_bad_images` is False, or a split has no readable image.
    """
    bad = {split: unreadable_images(images, progress=progress) for split, images in data.splits.items()}
    problems = [problem for found in bad.values() for problem in found]
    if not problems:
        return data
    if skip_bad_images:
        return _drop(data, bad)
    raise ValueError(f"{data.name}: {listed(problems, 'skip_bad_images')}")


def load_data(
    kind: str,
    root: str | os.PathLike[str] | None = None,
    *,
    viewpoint_file: str | os.PathLike[str] | None = None,
    viewpoint_labels: str = "hard",
    viewpoints: ViewpointClasses | None = None,
    division: DivisionSettings | None = None,
    skip_bad_images: bool = False,
    check_images: bool = True,
    synthetic: SyntheticSettings | None = None,
    extras: ExtraFiles | None = None,
    train_extras: Sequence[str] = (),
    test_extras: Sequence[str] = (),
    needed: Sequence[str] = SPLITS,
    progress: bool = True,
) -> ReidData:
    """Load a data set.

    Args:
        kind: a key of `READERS`.
        root: the data set's folder; the table for "manifest"; None for "synthetic".
        viewpoint_file: a label file (see `read_viewpoint_labels`); images are looked up by path, or by file name
            where that is enough, and those it does not name keep what the reader knows, if anything.
        viewpoint_labels: "hard" for one class per image; "soft" gives the training list a `viewpoint_weight`, in which
            ambiguous labels share their weight.
        viewpoints: the viewpoints and what labels mean; None for the data set's own, or those that its labels name.
        division: who is tested on, where the data set does not say (see `divide`); None for the default.
        skip_bad_images: go on without unreadable images instead of stopping.
        check_images: read every image file once now, so that a bad one stops here and not in the middle of training.
        synthetic: size and seed for "synthetic", the default ones when None.
        extras: where inputs beside the images lie; "synthetic" renders those that are not given.
        train_extras, test_extras: which of `EXTRAS` the training images, and query and gallery, come with.
        needed: splits that must have images in a manifest; where none must, one that is not divided stays so, and is
            all gallery.
        progress: show bars.

    Raises:
        ValueError: an argument outside what is allowed, unreadable images, a manifest or label file with errors, extras
            that are not given, are missing, or are not what they should be.
        FileNotFoundError: the data set is not there; the message shows what was expected and what was found.
    """
    check_kind(kind, root)
    if root and not needs_root(kind):
        raise ValueError(f"data.root: {str(root)!r:.60} was given, but kind {kind} reads no files; kind auto does")
    if viewpoint_labels not in MODES:
        raise ValueError(f"viewpoint_labels: {viewpoint_labels!r} was given; allowed are {', '.join(MODES)}")
    files = ExtraFiles() if extras is None else extras
    names = tuple(dict.fromkeys((*train_extras, *test_extras)))
    given = [name for name in EXTRAS if getattr(files, name) is not None]
    rendered = tuple(name for name in names if name not in given)
    if not renders_extras(kind):
        check_given(files, names, prefix="data.extras.")
    labels = None if viewpoint_file is None else read_viewpoint_labels(viewpoint_file, viewpoints)
    data = read(
        kind,
        root=root,
        settings=synthetic,
        extras=rendered,
        viewpoints=viewpoints,
        division=division,
        needed=needed,
        progress=progress,
    )
    folder = os.path.dirname(root) if root and os.path.isfile(root) else root
    if labels is not None:
        # Before bad images are dropped: a file name must not become unique by that.
        data = label_images(data, labels, folder)
    if viewpoints is not None and viewpoints != data.classes:
        raise ValueError(
            f"viewpoints: {', '.join(viewpoints.names)} were given; {data.name} has its own, "
            f"{', '.join(data.classes.names)}"
        )
    wanted = {"train": train_extras, "query": test_extras, "gallery": test_extras}
    lists = {
        split: replace(images, extras={name: images.extras[name] for name in rendered if name in wanted[split]})
        for split, images in data.splits.items()
    }
    from_files = {split: [name for name in own if name in given] for split, own in wanted.items()}
    lists, notes = join_extras(lists, files, from_files, folder or "", prefix="data.extras.")
    unread = tuple(f"{name} are given, but the method does not read them" for name in given if name not in names)
    data = replace(data, **lists, notes=(*data.notes, *notes, *unread))  # type: ignore[arg-type]
    if check_images and root is not None:
        data = check_readable(data, skip_bad_images=skip_bad_images, progress=progress)
    if viewpoint_labels == "soft":
        data = replace(data, train=with_soft_labels(data.train, data.classes))
    return data
