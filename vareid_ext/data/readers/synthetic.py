"""The embedded synthetic data set: rendered pedestrians, a pure function of its settings, in memory alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vareid_ext.data.extras import EXTRAS, Extra
from vareid_ext.data.random_stream import Stream
from vareid_ext.data.synthetic.drawing import TURN
from vareid_ext.data.synthetic.renderer import Shot, SyntheticRenderer, SyntheticSettings
from vareid_ext.data.types import ImageList, ReidData
from vareid_ext.data.viewpoint_classes import PERSON, ViewpointClasses

_SPLIT = 4
_FIRST_TEST, _FIRST_DISTRACTOR = 1_000_000, 2_000_000

# (largest turn away from the front in degrees, name): the bounds of the views.
_VIEWS = ((28, "front"), (62, "front_side"), (118, "side"), (152, "back_side"), (180, "back"))


def _degrees(facing: int) -> str:
    return f"{facing % TURN * 360 / TURN:.2f}"


def _view(facing: int) -> str:
    degrees = facing % TURN * 360 // TURN
    turned = min(degrees, 360 - degrees)
    return next(name for bound, name in _VIEWS if turned <= bound)


@dataclass(frozen=True)
class _ExtraLoader:
    """The loader of an extra, whose entries are names of pictures."""

    renderer: SyntheticRenderer
    name: str

    def __call__(self, entry: str, *_: int) -> np.ndarray:
        return self.renderer.extra(self.name, entry)


def synthetic_data(
    settings: SyntheticSettings | None = None,
    *,
    extras: Sequence[str] = (),
    viewpoints: ViewpointClasses | None = None,
    progress: bool = False,
) -> ReidData:
    """The synthetic data set of these settings (the default ones when None), rendered in memory.

    As in Market-1501 the test people are not among the training ones, each of them has one query per camera (when there
    are more pictures than cameras), the rest is gallery, and the gallery holds distractors of identity 0. The images
    come with the `extras` named, out of `EXTRAS`, which are exact (see `SyntheticRenderer.extra`). Where `viewpoints`
    are angles, the labels are the exact ones; else they are the paper's. `progress` shows a bar while rendering.
    """
    classes = viewpoints if viewpoints is not None and viewpoints.angles else PERSON
    settings = SyntheticSettings() if settings is None else settings
    shots: dict[str, Shot] = {}
    renderer = SyntheticRenderer(settings, shots)
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "query": [], "gallery": []}

    def add(split: str, folder: str, identity: int, shot: Shot) -> None:
        path = f"synthetic/{folder}/{identity:04d}_c{shot.camera}_{shot.person:07d}_{shot.number:03d}"
        shots[path] = shot
        lists[split].append((path, identity))

    def cameras_of(person: int, count: int) -> list[tuple[int, int]]:
        """(camera, number) of each of a person's pictures."""
        order = Stream(settings.seed, _SPLIT, person).shuffled(range(1, settings.cameras + 1))
        return [(order[index % settings.cameras], index // settings.cameras) for index in range(count)]

    for identity in range(settings.identities_train):
        for camera, number in cameras_of(identity, settings.images_per_identity):
            add("train", "train", identity, Shot(identity, camera, number))
    for index in range(settings.identities_test):
        person = _FIRST_TEST + index
        for place, (camera, number) in enumerate(cameras_of(person, settings.images_per_identity)):
            # The first picture by each camera asks; with no more than one by each, every other picture does.
            few = settings.images_per_identity <= settings.cameras
            asks = place % 2 == 0 if few else number == 0
            add("query" if asks else "gallery", "test", index + 1, Shot(person, camera, number))
    for index in range(settings.distractors):
        person = _FIRST_DISTRACTOR + index
        camera, number = cameras_of(person, 1)[0]
        add("gallery", "test", 0, Shot(person, camera, number))

    renderer.render_all(extras, progress=progress)
    splits = {}
    for split, entries in lists.items():
        view = _degrees if classes.angles else _view
        views = tuple(view(renderer.facing(shots[path])) for path, _ in entries)
        paths = tuple(path for path, _ in entries)
        splits[split] = ImageList(
            paths=paths,
            identity=np.array([identity for _, identity in entries], dtype=np.int64),
            camera=np.array([shots[path].camera for path, _ in entries], dtype=np.int64),
            viewpoint_name=views,
            **classes.columns(views),
            loader=renderer,
            extras={
                name: Extra(EXTRAS[name].kind, paths, EXTRAS[name].pairs, _ExtraLoader(renderer, name))
                for name in extras
            },
        )
    names = tuple(f"{identity:04d}" for identity in range(settings.identities_train))
    return ReidData("synthetic", splits["train"], splits["query"], splits["gallery"], names, classes)
