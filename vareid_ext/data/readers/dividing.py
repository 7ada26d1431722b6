"""Images that nobody has divided yet: who is trained on, who is tested on, and which images ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vareid_ext._labels import UNKNOWN
from vareid_ext._limits import check_limits
from vareid_ext.data.readers.layout import ImageEntry

_FEWEST = 3  # identities: two to tell apart in training, one to test on


@dataclass(frozen=True)
class DivisionSettings:
    """How a data set without a division into train, query and gallery is divided."""

    test: float = 0.5
    """share of the identities that are tested on; the others are trained on"""
    seed: int = 0
    """of the draw of these identities and of their queries"""

    def __post_init__(self) -> None:
        check_limits("data.division", self, test=(0, 1), seed=(0, 2**63 - 1))


def divide(
    name: str, entries: Sequence[ImageEntry], settings: DivisionSettings
) -> tuple[dict[str, list[ImageEntry]], tuple[str, ...]]:
    """The entries of train, query and gallery, and what is to be said about them.

    Whole identities are drawn; those whose images could not find each other are trained on. Of a test identity one
    image by each camera is a query (from each viewpoint, where no cameras are known; one image, where neither is), as
    far as an image that it can find stays in the gallery.

    Raises:
        ValueError: too few identities, or none of which two images could find each other.
    """
    identities = sorted({entry.identity for entry in entries})
    K = len(identities)
    if K < _FEWEST:
        raise ValueError(
            f"{name}: images of {K} identities were found; {_FEWEST} are needed, to train on two and test on one"
        )
    generator = np.random.default_rng(settings.seed)
    shuffled = [entries[i] for i in generator.permutation(len(entries))]
    by_camera = len({entry.camera for entry in entries} - {UNKNOWN}) > 1
    notes = []
    if not by_camera and any(entry.camera != UNKNOWN for entry in entries):
        notes.append("all images are by one camera; it is taken as unknown, or no image could find another")
        shuffled = [entry._replace(camera=UNKNOWN) for entry in shuffled]
    of_identity: dict[str, list[ImageEntry]] = {}
    for entry in shuffled:
        of_identity.setdefault(entry.identity, []).append(entry)
    queries = {identity: _queries(of_identity[identity], by_camera) for identity in identities}
    able = [identity for identity in identities if queries[identity]]
    if not able:
        needed = "images by two cameras" if by_camera else "two images"
        raise ValueError(f"{name}: no identity has {needed}, of which one could find the other")
    count = min(max(round(settings.test * K), 1), K - 2, len(able))
    tested = {able[i] for i in generator.permutation(len(able))[:count]}
    splits: dict[str, list[ImageEntry]] = {"train": [], "query": [], "gallery": []}
    for identity, images in of_identity.items():
        for place, image in enumerate(images):
            asks = place in queries[identity]
            splits["train" if identity not in tested else "query" if asks else "gallery"].append(image)
    for images in splits.values():
        images.sort(key=lambda entry: entry.path)
    each = "camera" if by_camera else "viewpoint" if any(entry.viewpoint for entry in entries) else "identity"
    notes.insert(
        0,
        f"divided by identity: {K - count:,} to train on, {count:,} to test on (share {settings.test:g}, seed "
        f"{settings.seed}), one query for each identity{'' if each == 'identity' else f' and {each}'}",
    )
    if len(able) < K:
        reason = "were seen by one camera alone" if by_camera else "have one image"
        notes.append(f"{K - len(able):,} identities {reason}; nobody could find them, so they are trained on")
    return splits, tuple(notes)


def _queries(images: Sequence[ImageEntry], by_camera: bool) -> set[int]:
    """The places of the images of one identity that ask; the rest has an image for each of them to find."""
    groups: dict[object, list[int]] = {}
    for place, image in enumerate(images):
        if not (by_camera and image.camera == UNKNOWN):
            groups.setdefault(image.camera if by_camera else image.viewpoint, []).append(place)
    if (by_camera and len(groups) < 2) or len(images) < 2:
        return set()
    # Where a group has two images, one asks and one stays; else every second group asks.
    large = {places[0] for places in groups.values() if len(places) > 1}
    return large or {places[0] for places in list(groups.values())[::2]}
