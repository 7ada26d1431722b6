"""Readers for the folder layouts in which Market-1501, DukeMTMC-reID, CUHK03-NP and MSMT17 are published."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vareid_ext.data.text_files import shown
from vareid_ext.data.types import IMAGE_SUFFIXES, UNKNOWN, ImageList, ReidData, is_litter, left_out

JUNK = -1
"""Identity of images that are neither right nor wrong answers; they are left out."""

JUNK_IMAGES = f"junk images (identity {JUNK})"
NOT_IMAGES = "entries that are not read as images"

Entry = tuple[str, str, int]
"""Path, the identity as it is written in the data set, camera."""


@dataclass(frozen=True)
class Layout:
    """How one data set looks on disk.

    Attributes:
        title: its name.
        folders: names under which it is commonly unpacked; the root may be such a folder or the one that holds it.
        required: files and folders that must be there.
        tree: what to show when they are not.
    """

    title: str
    folders: tuple[str, ...]
    required: tuple[str, ...]
    tree: str


# Numbers of up to 18 digits fit into 64 bits.
_NAMED = re.compile(r"(-1|[0-9]{1,18})_c([0-9]{1,18})(?![0-9])")
_MSMT17_NAMED = re.compile(r"[0-9]+_[0-9]+_([0-9]{1,18})_")
_MSMT17_IDENTITY = re.compile(r"[0-9]{1,18}")
_SPLIT_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")

MARKET1501 = Layout(
    "Market-1501",
    ("Market-1501-v15.09.15", "Market-1501", "market1501"),
    _SPLIT_FOLDERS,
    """\
Market-1501-v15.09.15/
  bounding_box_train/  0002_c1s1_000451_03.jpg ...   (12,936 images)
  query/               0001_c1s1_001051_00.jpg ...   (3,368 images)
  bounding_box_test/   -1_c1s1_000401_03.jpg ...     (19,732 images, junk of identity -1 among them)""",
)
DUKEMTMC = Layout(
    "DukeMTMC-reID",
    ("DukeMTMC-reID", "dukemtmc-reid"),
    _SPLIT_FOLDERS,
    """\
DukeMTMC-reID/
  bounding_box_train/  0001_c2_f0046182.jpg ...      (16,522 images)
  query/               0005_c2_f0046985.jpg ...      (2,228 images)
  bounding_box_test/   0002_c1_f0044158.jpg ...      (17,661 images)""",
)
MSMT17 = Layout(
    "MSMT17",
    ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
    ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt"),
    """\
MSMT17_V1/
  list_train.txt  list_val.txt  list_query.txt  list_gallery.txt   (lines: 0000/0000_000_01_0303morning_0008_0.jpg 0)
  train/          0000/0000_000_01_0303morning_0008_0.jpg ...      (or mask_train_v2/)
  test/           0000/0000_000_01_0303morning_0021_0.jpg ...      (or mask_test_v2/)""",
)


def _cuhk03(setting: str) -> Layout:
    return Layout(
        f"CUHK03-NP ({setting})",
        ("cuhk03-np", "CUHK03-NP", "cuhk03_np"),
        tuple(f"{setting}/{folder}" for folder in _SPLIT_FOLDERS),
        f"""\
cuhk03-np/
  {setting}/
    bounding_box_train/  0003_c1_21.png ...   (767 identities)
    query/               0001_c1_1.png ...    (1,400 images)
    bounding_box_test/   0001_c1_2.png ...""",
    )


CUHK03_LABELED = _cuhk03("labeled")
CUHK03_DETECTED = _cuhk03("detected")


def _listing(folder: Path, most: int = 12) -> str:
    lines = []
    entries = sorted(folder.iterdir())
    for entry in entries[:most]:
        inside = ""
        if entry.is_dir():
            names = sorted(os.listdir(entry))
            inside = "/  " + (" ".join(names[:3]) + (f" ... ({len(names):,} entries)" if len(names) > 3 else ""))
        lines.append(f"  {entry.name}{inside}".rstrip())
    if len(entries) > most:
        lines.append(f"  ... ({len(entries):,} entries)")
    return "\n".join(lines) if lines else "  (nothing)"


def _unexpected(layout: Layout, found: str) -> FileNotFoundError:
    return FileNotFoundError(f"{layout.title}: expected\n{layout.tree}\nfound instead: {found}")


def find_root(root: str | os.PathLike[str], layout: Layout) -> Path:
    """The folder that holds a data set laid out as `layout`: `root` itself or a folder of a usual name in it.

    Raises FileNotFoundError with the expected tree and what was found instead.
    """
    root = Path(root)

    def missing(folder: Path) -> list[str]:
        def there(entry: Path) -> bool:
            return entry.is_file() if entry.suffix else entry.is_dir()

        return [name for name in layout.required if not there(folder / name)]

    for candidate in (root, *(root / folder for folder in layout.folders)):
        if not missing(candidate):
            return candidate
    if root.is_dir():
        existing = next((root / folder for folder in layout.folders if (root / folder).is_dir()), root)
        raise _unexpected(layout, f"{existing} holds no {', no '.join(missing(existing))}, but:\n{_listing(existing)}")
    if root.exists():
        raise _unexpected(layout, f"{root} is a file")
    parent = next(folder for folder in (*root.absolute().parents,) if folder.is_dir())
    raise _unexpected(layout, f"there is no {root}; {parent} holds:\n{_listing(parent)}")


def build_list(entries: Sequence[Entry], identity: Sequence[int] | np.ndarray) -> ImageList:
    """An image list of `entries` with these identity numbers and no viewpoints."""
    count = len(entries)
    return ImageList(
        paths=tuple(path for path, _, _ in entries),
        identity=np.asarray(identity, dtype=np.int64),
        camera=np.array([camera for _, _, camera in entries], dtype=np.int64),
        viewpoint=np.full(count, UNKNOWN, dtype=np.int64),
        viewpoint_name=("",) * count,
    )


def build_data(
    name: str,
    entries: dict[str, list[Entry]],
    number: Callable[[str], int] = int,
    notes: tuple[str, ...] = (),
) -> ReidData:
    """A data set of the entries of `train`, `query` and `gallery`.

    Training identities are numbered in the order of `number`, which also gives the identities of query and gallery.
    Raises ValueError when a split is empty.
    """
    for split in ("train", "query", "gallery"):
        if not entries[split]:
            raise ValueError(f"{name}: the {split} split has no images")
    names = sorted({identity for _, identity, _ in entries["train"]}, key=lambda identity: (number(identity), identity))
    index = {identity: position for position, identity in enumerate(names)}
    return ReidData(
        name,
        build_list(entries["train"], [index[identity] for _, identity, _ in entries["train"]]),
        build_list(entries["query"], [number(identity) for _, identity, _ in entries["query"]]),
        build_list(entries["gallery"], [number(identity) for _, identity, _ in entries["gallery"]]),
        tuple(names),
        notes=notes,
    )


def _scan(folder: Path, layout: Layout, junk: list[str], others: list[str]) -> list[Entry]:
    """The images in `folder`; the names of junk images are added to `junk`, those of other entries to `others`."""
    entries: list[Entry] = []
    for file in sorted(os.listdir(folder)):
        if is_litter(file):
            continue
        if os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
            others.append(f"{folder.name}/{file}")
            continue
        match = _NAMED.match(file)
        if match is None:
            raise ValueError(
                f"{layout.title}: the name of {folder / file} must begin with <identity>_c<camera>, numbers of at most "
                f"18 digits, as in\n{layout.tree}"
            )
        if int(match[1]) == JUNK:
            junk.append(f"{folder.name}/{file}")
        else:
            entries.append((str(folder / file), match[1], int(match[2])))
    if not entries:
        raise _unexpected(layout, f"{folder} has no images, but:\n{_listing(folder)}")
    return entries


def _read_folders(root: str | os.PathLike[str], name: str, layout: Layout) -> ReidData:
    base = find_root(root, layout)
    entries: dict[str, list[Entry]] = {}
    junk: list[str] = []
    others: list[str] = []
    for split, folder in zip(("train", "query", "gallery"), layout.required, strict=True):
        entries[split] = _scan(base / folder, layout, junk, others)
    notes = (*left_out(JUNK_IMAGES, junk), *left_out(NOT_IMAGES, others))
    return build_data(name, entries, notes=notes)


def read_market1501(root: str | os.PathLike[str]) -> ReidData:
    """Market-1501 (Zheng et al., ICCV 2015). Junk (identity -1) is left out, distractors (0) stay in the gallery."""
    return _read_folders(root, "market1501", MARKET1501)


def read_dukemtmc(root: str | os.PathLike[str]) -> ReidData:
    """DukeMTMC-reID (Zheng et al., ICCV 2017)."""
    return _read_folders(root, "dukemtmc-reid", DUKEMTMC)


def read_cuhk03(root: str | os.PathLike[str], setting: str) -> ReidData:
    """CUHK03 under the new protocol (Zhong et al., CVPR 2017); `setting` is labeled or detected boxes."""
    layouts = {"labeled": CUHK03_LABELED, "detected": CUHK03_DETECTED}
    if setting not in layouts:
        raise ValueError(f"setting must be labeled or detected, got {setting!r}")
    return _read_folders(root, f"cuhk03-np-{setting}", layouts[setting])


def read_msmt17(root: str | os.PathLike[str]) -> ReidData:
    """MSMT17 (Wei et al., CVPR 2018), V1 or V2. Its training and validation lists together are the training split."""
    base = find_root(root, MSMT17)
    folders = {}
    for split in ("train", "test"):
        names = (split, f"mask_{split}_v2")
        found = next((base / name for name in names if (base / name).is_dir()), None)
        if found is None:
            raise _unexpected(MSMT17, f"{base} holds neither {names[0]} nor {names[1]}, but:\n{_listing(base)}")
        folders[split] = found
    litter: list[str] = []

    def read_list(name: str, folder: Path) -> list[Entry]:
        entries = []
        try:
            text = (base / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{MSMT17.title}: {base / name} is not text in UTF-8: {error}") from None
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            *before, identity = line.rsplit(maxsplit=1)
            path = "".join(before).strip().replace("\\", "/")
            if is_litter(path):
                litter.append(path)
                continue
            match = _MSMT17_NAMED.match(os.path.basename(path))
            if match is None or not _MSMT17_IDENTITY.fullmatch(identity):
                raise ValueError(
                    f"{MSMT17.title}: {base / name}, line {number}: expected a path like "
                    f"0000/0000_000_01_0303morning_0008_0.jpg and an identity number, got {shown(line.strip())}"
                )
            entries.append((str(folder / path), identity, int(match[1])))
        if entries and not any(os.path.isfile(path) for path, _, _ in entries):
            raise _unexpected(MSMT17, f"{folder} holds none of the images of {name}, but:\n{_listing(folder)}")
        return entries

    return build_data(
        "msmt17",
        {
            "train": read_list("list_train.txt", folders["train"]) + read_list("list_val.txt", folders["train"]),
            "query": read_list("list_query.txt", folders["test"]),
            "gallery": read_list("list_gallery.txt", folders["test"]),
        },
        notes=left_out(NOT_IMAGES, litter),
    )
