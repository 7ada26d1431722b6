"""What a data set holds that will hurt: unreadable, doubled and contradicting images, people who are seen once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from vareid_ext._labels import UNKNOWN
from vareid_ext.data.types import SPLITS, ReidData

NEAR = 4
"""Pictures whose 64-bit difference hashes differ in at most so many bits are near-duplicates."""

_SHOWN = 3
_ROWS = 1024  # hashes compared with all others at a time


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: what it is, in one word for programs, such as "unreadable".
        count: how often.
        text: in words.
        problem: whether training or evaluation will stop or be wrong; else it is worth knowing.
    """

    name: str
    count: int
    text: str
    problem: bool


class _Picture(NamedTuple):
    split: str
    place: int
    path: str
    person: str
    digest: bytes
    hash: int
    size: tuple[int, int]
    error: str


def difference_hash(picture: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 cells of the grey picture is brighter than its right neighbour (dHash)."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def _pictures(data: ReidData, *, progress: bool) -> list[_Picture]:
    """Every picture of the data set, read once."""

    def look(item: tuple[str, int]) -> _Picture:
        split, place = item
        images = data.splits[split]
        number = int(images.identity[place])
        person = f"training {number}" if split == "train" else f"test {number}"
        try:
            picture = images.load(place)
        except OSError as error:
            return _Picture(split, place, images.paths[place], person, b"", 0, (0, 0), str(error))
        digest = hashlib.sha1(picture.tobytes() + repr(picture.size).encode(), usedforsecurity=False).digest()
        return _Picture(split, place, images.paths[place], person, digest, difference_hash(picture), picture.size, "")

    items = [(split, place) for split, images in data.splits.items() for place in range(len(images))]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(look, items)
        return list(tqdm(found, total=len(items), desc="looking", unit="image", disable=not progress, leave=False))


def _near_pairs(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs i < j of hashes uint64 [n] that differ in at most ``NEAR`` bits."""
    bits = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)
    parts = hashes[:, None].view(np.uint16)
    for begin in range(0, len(hashes), _ROWS):
        rows = parts[begin : begin + _ROWS]
        apart = np.zeros((len(rows), len(parts) - begin), dtype=np.uint8)
        for part in range(4):
            apart += bits[rows[:, part, None] ^ parts[None, begin:, part]]
        for i, j in zip(*np.nonzero(apart <= NEAR), strict=True):
            if i < j:
                yield begin + int(i), begin + int(j)


def _found(name: str, names: Sequence[str], text: str, problem: bool = False) -> Iterator[Finding]:
    """What the `names` are an example of; nothing where there are none."""
    if names:
        more = ", ..." if len(names) > _SHOWN else ""
        yield Finding(name, len(names), f"{text}: {', '.join(names[:_SHOWN])}{more}", problem)


def _pairs(groups: Sequence[Sequence[_Picture]]) -> list[str]:
    """Of each group a picture and one of another person, or else the next."""
    return [f"{g[0].path} = {next((p for p in g if p.person != g[0].person), g[1]).path}" for g in groups]


def _of_pictures(data: ReidData, pictures: Sequence[_Picture]) -> Iterator[Finding]:
    bad = [picture.error for picture in pictures if picture.error]
    yield from _found("unreadable", bad, "images cannot be read", True)
    good = [picture for picture in pictures if not picture.error]
    same: dict[bytes, list[_Picture]] = {}
    for picture in good:
        same.setdefault(picture.digest, []).append(picture)
    sorts: dict[str, list[list[_Picture]]] = {
        name: [] for name in ("train_and_test", "identity_clash", "query_and_gallery", "doubled")
    }
    views = []
    for group in same.values():
        if len(group) > 1:
            both, people = ({p.split == "train" for p in group}, {p.person for p in group})
            sort = "train_and_test" if len(both) > 1 else "identity_clash" if len(people) > 1 else "doubled"
            if sort == "doubled" and _finds_itself(data, group):
                sort = "query_and_gallery"
            sorts[sort].append(group)
            if len({data.splits[p.split].viewpoint[p.place] for p in group} - {UNKNOWN}) > 1:
                views.append(group)
    yield from _found("train_and_test", _pairs(sorts["train_and_test"]), "pictures are in training and in test", True)
    yield from _found("identity_clash", _pairs(sorts["identity_clash"]), "pictures are of different people", True)
    text = "pictures are in query and gallery, and not by one known camera, so that a query finds itself"
    yield from _found("query_and_gallery", _pairs(sorts["query_and_gallery"]), text, True)
    yield from _found("viewpoint_clash", _pairs(views), "pictures are given different viewpoints", True)
    yield from _found("doubled", _pairs(sorts["doubled"]), "pictures of one person occur more than once")
    near = [
        f"{good[i].path} ~ {good[j].path}"
        for i, j in _near_pairs(np.array([picture.hash for picture in good], dtype=np.uint64))
        if good[i].person != good[j].person and good[i].digest != good[j].digest
    ]
    yield from _found("near_duplicates", near, "pairs of pictures of different people look the same")
    if good:
        sizes = np.array([picture.size for picture in good]).T
        count = len({picture.size for picture in good})
        least, most, half = (of(sizes, axis=1).astype(int) for of in (np.min, np.max, np.median))
        text = (
            f"sizes: {least[0]} to {most[0]} pixels wide, median {half[0]}; {least[1]} to {most[1]} high, "
            f"median {half[1]}"
        )
        yield Finding("size", count, text if count > 1 else f"size: {least[0]} pixels wide, {least[1]} high", False)


def _finds_itself(data: ReidData, group: Sequence[_Picture]) -> bool:
    """Whether one of these equal pictures asks, and another is in the gallery and not left out by its camera."""
    cameras = {split: [int(data.splits[split].camera[p.place]) for p in group if p.split == split] for split in SPLITS}
    return any(asks != found or asks == UNKNOWN for asks in cameras["query"] for found in cameras["gallery"])


def _of_labels(data: ReidData) -> Iterator[Finding]:
    train, names = data.train, data.identity_names
    K, V = data.num_identities, data.num_viewpoints
    if K < 2:
        yield Finding("few_identities", K, "training identity; two are needed to tell apart", True)
    counts = np.bincount(train.identity, minlength=K)
    once = [names[i] for i in np.flatnonzero(counts == 1)]
    yield from _found("one_image", once, "training identities have one image")
    known = train.camera != UNKNOWN
    of_each = np.bincount(np.unique(np.stack([train.identity, train.camera])[:, known], axis=1)[0], minlength=K)
    alone = [names[i] for i in np.flatnonzero((of_each == 1) & (counts > 1))]
    yield from _found("one_camera", alone, "training identities are seen by one camera")
    known = train.viewpoint != UNKNOWN
    unlabelled = [path for path, label in zip(train.paths, known, strict=True) if not label]
    yield from _found("no_viewpoint", unlabelled, "training images have no viewpoint")
    if known.any():
        absent = [name for v, name in enumerate(data.classes.names) if not (train.viewpoint == v).any()]
        yield from _found("absent_viewpoint", absent, "viewpoints are in no training image")
        missing = K * V - len(np.unique(train.identity[known] * V + train.viewpoint[known]))
        if missing:
            text = f"of {K * V:,} pairs of a training identity and a viewpoint do not occur"
            yield Finding("missing_views", missing, text, False)
    own = data.with_own_identities()
    if data.same_people and own.names.get("identity") == data.query.names.get("identity"):
        tested = {*data.query.identity.tolist(), *data.gallery.identity.tolist()}
        number = dict(zip(train.identity.tolist(), own.identity.tolist(), strict=True))
        both = [name for i, name in enumerate(names) if number[i] in tested]
        yield from _found("trained_and_tested", both, "identities are in training and in test", True)
    lost = _without_match(data)
    text = f"of {len(data.query):,} queries have no match in the gallery (by another camera)"
    yield from _found("no_match", lost, text, len(lost) == len(data.query))


def _without_match(data: ReidData) -> list[str]:
    """The paths of queries that can find nothing."""
    cameras: dict[int, set[int]] = {}
    for identity, camera in zip(data.gallery.identity.tolist(), data.gallery.camera.tolist(), strict=True):
        cameras.setdefault(identity, set()).add(camera)
    query = data.query
    labels = zip(query.paths, query.identity.tolist(), query.camera.tolist(), strict=True)
    # A gallery image of unknown camera is by another one.
    return [path for path, i, camera in labels if not cameras.get(i, set()) - ({camera} - {UNKNOWN})]


def inspect(data: ReidData, *, progress: bool = False) -> list[Finding]:
    """What a data set holds that will hurt, problems first. Every image is read once.

    Two pictures are the same where their pixels are, and near-duplicates where their difference hashes differ in at
    most ``NEAR`` of 64 bits, which is looked for between people alone: a tracker's images of one person are all alike.
    """
    pictures = _pictures(data, progress=progress)
    found = [*_of_labels(data), *_of_pictures(data, pictures)]
    return sorted(found, key=lambda finding: not finding.problem)
