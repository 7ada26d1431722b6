"""Anybody's images, however they lie: which of the usual ways it is, is found out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vareid_ext.data.readers.dividing import DivisionSettings, divide
from vareid_ext.data.readers.layout import (
    JUNK,
    JUNK_IMAGES,
    NAMED,
    NOT_IMAGES,
    ImageEntry,
    MisnamedError,
    build_data,
    listing,
    walk,
)
from vareid_ext.data.readers.manifest import names_of, read_manifest, text_numbers
from vareid_ext.data.types import IMAGE_SUFFIXES, SPLITS, UNKNOWN, ReidData, is_litter, left_out
from vareid_ext.data.viewpoint_classes import ViewpointClasses

_CAMERA = re.compile(r"_c(?:am)?([0-9]{1,18})(?![0-9])")
_SPLIT_NAMES = frozenset((
    *SPLITS, "training", "val", "valid", "validation", "trainval", "test", "testing", "queries", "probe",
    "bounding_box_train", "bounding_box_test", "gt_bbox", "gt_query", "image_train", "image_query", "image_test",
    "train_all", "mask_train_v2", "mask_test_v2", "train_test_split",
))  # fmt: skip
"""Folders, in small letters, that are parts of a data set and hardly people."""

_WAYS = """\
  a manifest                    a table with the columns path, identity and perhaps camera, viewpoint, split
  a folder of identity folders  anna/1.jpg  anna/2.jpg  bert/1.jpg ...
  the same for each split       train/anna/1.jpg  query/bert/1.jpg  gallery/bert/2.jpg ...
  a folder of named images      0002_c1s1_000451_03.jpg ..., <identity>_c<camera> and anything
  a known data set              as it is unpacked"""


def read_auto(
    root: str | os.PathLike[str],
    *,
    viewpoints: ViewpointClasses | None = None,
    division: DivisionSettings | None = None,
    needed: Sequence[str] = SPLITS,
) -> ReidData:
    """The data set at `root`: a manifest, a folder of identity folders, these in folders named train, query and
    gallery, a folder of images named <identity>_c<camera>..., or a known data set as it is unpacked.

    Where there are no splits, it is divided as `division` says (see `divide`), or where no split is `needed`, is all
    gallery; named images of identity 0 are then distractors in the gallery. Cameras are known where every file's name
    has a `_c<camera>`. `notes` say what was found and count what is left out.

    Raises:
        FileNotFoundError: there is nothing, or nothing of these kinds.
        ValueError: as for :func:`read_manifest` and :func:`divide`; folders that are some parts of a data set and not
            all, or that hold folders alone.
    """
    root = Path(root)
    if root.is_file():
        return read_manifest(root, viewpoints=viewpoints, division=division, needed=needed)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such file or folder; allowed are\n{_WAYS}")
    misnamed: list[str] = []
    known = _known(root, misnamed, viewpoints=viewpoints, division=division)
    why = "".join(f"\n{text}" for text in misnamed)
    if known is not None:
        return known
    junk: list[str] = []
    others: list[str] = []
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    parts = [entry.name for name, entry in folders.items() if name in _SPLIT_NAMES]
    if all(split in folders for split in SPLITS):
        what = "folders train, query and gallery"
        read = [folders[split] for split in SPLITS]
        found = {split: _entries(folders[split], junk, others) for split in SPLITS}
        others += [entry.name for entry in sorted(root.iterdir()) if entry not in read and not is_litter(entry.name)]
    elif len(parts) * 2 >= len(folders) > 0:
        raise ValueError(
            f"{root}: the folders {', '.join(parts)} are some parts of a data set, but not all of a known one, nor "
            f"train, query and gallery; allowed are\n{_WAYS}{why}"
        )
    else:
        what = "a folder that is not divided"
        found = {"": _entries(root, junk, others)}
    everything = [entry for entries in found.values() for entry in entries]
    if not everything:
        raise FileNotFoundError(f"{root}: allowed are\n{_WAYS}\nfound instead:\n{listing(root)}")
    for split, entries in found.items():
        top = root / split
        inside = [Path(entry.path).relative_to(folders.get(split, top)) for entry in entries]
        if inside and all(len(path.parts) > 2 for path in inside):
            raise ValueError(
                f"{top}: its folders hold no images, but folders of them, such as {inside[0].parent}; the first "
                f"would be the identity. Allowed are\n{_WAYS}{why}"
            )
    cameras = [_CAMERA.search(os.path.basename(entry.path)) for entry in everything]
    if all(cameras):
        what += ", cameras from the files' names"
        of_path = {entry.path: int(camera[1]) for entry, camera in zip(everything, cameras, strict=True) if camera}
        found = {s: [e._replace(camera=of_path[e.path]) for e in entries] for s, entries in found.items()}
    unnamed = [e.path for e, camera in zip(everything, cameras, strict=True) if camera is None]
    number = text_numbers({entry.identity for entry in everything})
    notes = [f"read as {what}", *left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, others)]
    if 0 < len(unnamed) < len(everything):
        notes.append(
            f"no cameras: {len(unnamed):,} of {len(everything):,} images have no _c<camera> in their names, such as "
            f"{os.path.relpath(unnamed[0], root)}"
        )
    if "" in found and not needed:
        found = {"train": [], "query": [], "gallery": found[""]}
    elif "" in found:
        distractors: list[ImageEntry] = []
        people: list[ImageEntry] = []
        for e in found[""]:
            named = os.path.dirname(e.path) == str(root)
            (distractors if named and not e.identity.strip("0") else people).append(e)
        found, said = divide(str(root), people, division or DivisionSettings())
        found["gallery"] += distractors
        notes += said
        if distractors:
            notes.append(
                f"{len(distractors):,} images of identity {distractors[0].identity} are distractors: gallery alone"
            )
    names = names_of(identity=number)
    return build_data(root.name or str(root), found, number.__getitem__, tuple(notes), names=names, needed=needed)


def _known(root: Path, misnamed: list[str], **arguments: object) -> ReidData | None:
    """The data set at `root` if one of the other readers knows its layout; `arguments` as for `read`.

    Where one knows the folders, but not the names in them, the reason is added to `misnamed`.
    """
    from vareid_ext.data.readers import READERS, needs_root, read  # which list this reader too

    for kind in READERS:
        if needs_root(kind) and kind not in ("auto", "manifest"):
            try:
                data = read(kind, root=root, **arguments)
            except FileNotFoundError:
                continue
            except MisnamedError as error:
                misnamed.append(str(error))
                continue
            return data.with_notes(f"read as it is unpacked (--data.kind {kind})")
    return None


def _entries(folder: Path, junk: list[str], others: list[str]) -> list[ImageEntry]:
    """The images in a folder of identity folders, at any depth, or of named images; the names of what is left out."""
    entries: list[ImageEntry] = []
    for place, files in walk(folder, others):
        inside = os.path.relpath(place, folder)
        person = "" if inside == "." else Path(inside).parts[0]
        for file in sorted(files):
            path = os.path.join(place, file)
            if is_litter(path):
                continue
            named = NAMED.match(file)
            identity = person or (named["identity"] if named else "")
            if not identity or os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
                others.append(os.path.relpath(path, folder))
            elif identity == str(JUNK):
                junk.append(os.path.relpath(path, folder))
            else:
                entries.append(ImageEntry(path, identity, UNKNOWN))
    return entries
