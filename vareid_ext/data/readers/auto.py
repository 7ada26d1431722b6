"""Anybody's images, however they lie: which of the usual ways it is, is found out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vareid_ext.data.readers.dividing import DivisionSettings, divide
from vareid_ext.data.readers.layout import JUNK, JUNK_IMAGES, NAMED, NOT_IMAGES, ImageEntry, build_data, listing
from vareid_ext.data.readers.manifest import names_of, read_manifest, text_numbers
from vareid_ext.data.types import IMAGE_SUFFIXES, SPLITS, UNKNOWN, ReidData, is_litter, left_out
from vareid_ext.data.viewpoint_classes import ViewpointClasses

_CAMERA = re.compile(r"_c(?:am)?([0-9]{1,18})(?![0-9])")
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
    gallery. In identity folders cameras are known
    where every file's name has a `_c<camera>`. `notes` say what was found and count what is left out.

    Raises:
        FileNotFoundError: there is nothing, or nothing of these kinds.
        ValueError: as for :func:`read_manifest` and :func:`divide`.
    """
    root = Path(root)
    if root.is_file():
        return read_manifest(root, viewpoints=viewpoints, division=division, needed=needed)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such file or folder; allowed are\n{_WAYS}")
    known = _known(root, viewpoints=viewpoints, division=division)
    if known is not None:
        return known
    junk: list[str] = []
    others: list[str] = []
    if all((root / split).is_dir() for split in SPLITS):
        what = "folders train, query and gallery"
        found = {split: _entries(root / split, junk, others) for split in SPLITS}
        others += [entry.name for entry in root.iterdir() if entry.name not in SPLITS and not is_litter(entry.name)]
    else:
        what = "a folder that is not divided"
        found = {"": _entries(root, junk, others)}
    everything = [entry for entries in found.values() for entry in entries]
    if not everything:
        raise FileNotFoundError(f"{root}: allowed are\n{_WAYS}\nfound instead:\n{listing(root)}")
    cameras = [_CAMERA.search(os.path.basename(entry.path)) for entry in everything]
    if all(cameras):
        what += ", cameras from the files' names"
        of_path = {entry.path: int(camera[1]) for entry, camera in zip(everything, cameras, strict=True) if camera}
        found = {s: [e._replace(camera=of_path[e.path]) for e in entries] for s, entries in found.items()}
    number = text_numbers({entry.identity for entry in everything})
    notes = [f"read as {what}", *left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, others)]
    if "" in found and not needed:
        found = {"train": [], "query": [], "gallery": found[""]}
    elif "" in found:
        found, said = divide(str(root), found[""], division or DivisionSettings())
        notes += said
    names = names_of(identity=number)
    return build_data(root.name or str(root), found, number.__getitem__, tuple(notes), names=names, needed=needed)


def _known(root: Path, **arguments: object) -> ReidData | None:
    """The data set at `root` if one of the other readers knows its layout; `arguments` as for `read`."""
    from vareid_ext.data.readers import READERS, needs_root, read  # which list this reader too

    for kind in READERS:
        if needs_root(kind) and kind not in ("auto", "manifest"):
            try:
                data = read(kind, root=root, **arguments)
            except FileNotFoundError:
                continue
            return data.with_notes(f"read as it is unpacked (--data.kind {kind})")
    return None


def _entries(folder: Path, junk: list[str], others: list[str]) -> list[ImageEntry]:
    """The images in a folder of identity folders, at any depth, or of named images; the names of what is left out."""
    entries: list[ImageEntry] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
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
