"""The embedded synthetic data set: rendered pedestrians seen from all sides by cameras that disagree about colour.

Everything is a pure function of `SyntheticSettings`, down to the last bit of every pixel, on every machine. Nothing is
downloaded or written to disk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from PIL import Image
from tqdm import tqdm

from vareid_ext.data.random_stream import Stream
from vareid_ext.data.synthetic_drawing import ONE, TURN
from vareid_ext.data.synthetic_figure import Pose, paint_person
from vareid_ext.data.synthetic_person import Person, draw_person
from vareid_ext.data.synthetic_scene import (
    SUPERSAMPLE,
    Camera,
    background,
    draw_camera,
    expose,
    occlude,
    shade_ground,
)
from vareid_ext.data.text_files import shown
from vareid_ext.data.types import ImageList, ReidData

_PERSON, _CAMERA, _SHOT, _SPLIT = 1, 2, 3, 4
_FIRST_TEST, _FIRST_DISTRACTOR = 1_000_000, 2_000_000
_CACHE_BYTES = 2 << 30
_MOST = 1_000_000

# (largest turn away from the front in degrees, name, label): the bounds of the views, the in-between ones ambiguous.
_VIEWS = ((28, "front", 0), (62, "front_side", 0), (118, "side", 1), (152, "back_side", 2), (180, "back", 2))


@dataclass(frozen=True)
class SyntheticSettings:
    """Size and seed of the synthetic set.

    Attributes:
        identities_train: people in the training split, at least 1.
        identities_test: other people, in query and gallery, at least 1.
        images_per_identity: pictures of each of them, spread evenly over the cameras, at least 1.
        distractors: people of whom the gallery has one picture each (identity 0), at least 0.
        cameras: at least 1; two or more are needed for anything to be found under the same-camera rule.
        height: of the pictures in pixels, 32 to 2048.
        width: of the pictures in pixels, 16 to 2048.
        seed: an integer in [0, 2^63); another seed gives other people and other cameras.

    All numbers are bounded, and the pictures are at most 1,000,000 in all.
    """

    identities_train: int = 200
    identities_test: int = 80
    images_per_identity: int = 12
    distractors: int = 60
    cameras: int = 6
    height: int = 128
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"distractors": (0, _MOST), "cameras": (1, 1000), "height": (32, 2048), "width": (16, 2048)}
        limits["seed"] = (0, (1 << 63) - 1)
        for entry in fields(self):
            value, (low, high) = getattr(self, entry.name), limits.get(entry.name, (1, _MOST))
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f"synthetic.{entry.name}: {shown(value)} was given; allowed are integers from {low:,} to {high:,}"
                )
        people = self.identities_train + self.identities_test
        if people * self.images_per_identity + self.distractors > _MOST:
            raise ValueError(
                f"synthetic.images_per_identity: {self.images_per_identity} of {people:,} people and "
                f"{self.distractors:,} distractors were given; allowed are {_MOST:,} pictures in all"
            )


@dataclass(frozen=True)
class _Shot:
    """One picture: of whom, by which camera, and its number among those of the person by that camera."""

    person: int
    camera: int
    number: int


def _view(facing: int) -> tuple[str, int]:
    degrees = facing % TURN * 360 // TURN
    turned = min(degrees, 360 - degrees)
    for bound, name, label in _VIEWS:
        if turned <= bound:
            return name, label
    raise AssertionError(f"{turned} degrees is more than half a turn")


class SyntheticRenderer:
    """Turns the names of synthetic pictures into pictures, and keeps those it was asked to render ahead of time."""

    def __init__(self, settings: SyntheticSettings, shots: dict[str, _Shot]) -> None:
        self.settings = settings
        self._shots = shots
        self._rendered: dict[str, np.ndarray] = {}

    def __call__(self, path: str) -> Image.Image:
        """The RGB picture named `path`. Raises KeyError for a name that is not in the set."""
        return Image.fromarray(self.pixels(path))

    def pixels(self, path: str) -> np.ndarray:
        """uint8 [height, width, 3]: the picture named `path`."""
        found = self._rendered.get(path)
        return self._render(self._shots[path]) if found is None else found

    def render_all(self, *, progress: bool = False) -> None:
        """Render every picture now, unless all together take more than 2 GiB: those are rendered as they are used."""
        if len(self._shots) * self.settings.height * self.settings.width * 3 > _CACHE_BYTES:
            return
        for path in tqdm(self._shots, desc="rendering", unit="image", disable=not progress, leave=False):
            if path not in self._rendered:
                self._rendered[path] = self._render(self._shots[path])

    def facing(self, shot: _Shot) -> int:
        """The direction, in 1/4096 turn, in which the person of a picture looks."""
        camera = _camera(self.settings, shot.camera)
        # One walk past a camera is a track: pictures of it show about the same side.
        track = Stream(self.settings.seed, _SHOT, shot.person, shot.camera, shot.number // 2)
        middle = (0, TURN // 4, TURN // 2)[track.weighted(camera.directions)]
        turn = middle + track.integer(-TURN // 9, TURN // 9)
        if track.chance(50):
            turn = -turn
        return turn + Stream(self.settings.seed, _SHOT, shot.person, shot.camera, shot.number, 1).integer(-170, 170)

    def _render(self, shot: _Shot) -> np.ndarray:
        settings, camera = self.settings, _camera(self.settings, shot.camera)
        stream = Stream(settings.seed, _SHOT, shot.person, shot.camera, shot.number, 2)
        height, width = settings.height * SUPERSAMPLE, settings.width * SUPERSAMPLE
        canvas = background(camera, stream, height, width)
        if stream.chance(18):
            passer = Stream(stream.bits())
            side = passer.choice((width // 10, width * 9 // 10))
            pose = Pose(passer.integer(0, TURN - 1), side, height * 88 // 100, height * 70 // 100, 0, camera.light)
            paint_person(canvas, draw_person(passer), pose)
        size = height * camera.size // ONE * stream.integer(960, 1070) // ONE
        pose = Pose(
            facing=self.facing(shot),
            centre_x=width // 2 + stream.integer(-width // 11, width // 11),
            foot_y=height * 97 // 100 + stream.integer(-height // 32, height // 24),
            size=size,
            stride=stream.integer(-ONE, ONE),
            light=camera.light,
        )
        shade_ground(canvas, pose.centre_x, pose.foot_y, width * 3 // 8)
        paint_person(canvas, _person(settings.seed, shot.person), pose)
        if stream.chance(14):
            occlude(canvas, stream)
        return expose(canvas, camera, stream)


@lru_cache(maxsize=4096)
def _person(seed: int, number: int) -> Person:
    return draw_person(Stream(seed, _PERSON, number))


@lru_cache(maxsize=64)
def _camera(settings: SyntheticSettings, number: int) -> Camera:
    return draw_camera(Stream(settings.seed, _CAMERA, number), settings.height, settings.width)


def synthetic_data(settings: SyntheticSettings | None = None, *, progress: bool = False) -> ReidData:
    """The synthetic data set of these settings (the default ones when None), rendered in memory.

    As in Market-1501 the test people are not among the training ones, each of them has one query per camera (when there
    are more pictures than cameras), the rest is gallery, and the gallery holds distractors of identity 0. `progress`
    shows a bar while rendering.
    """
    settings = SyntheticSettings() if settings is None else settings
    shots: dict[str, _Shot] = {}
    renderer = SyntheticRenderer(settings, shots)
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "query": [], "gallery": []}

    def add(split: str, folder: str, identity: int, shot: _Shot) -> None:
        path = f"synthetic/{folder}/{identity:04d}_c{shot.camera}_{shot.person:07d}_{shot.number:03d}"
        shots[path] = shot
        lists[split].append((path, identity))

    def cameras_of(person: int, count: int) -> list[tuple[int, int]]:
        """(camera, number) of each of a person's pictures."""
        order = Stream(settings.seed, _SPLIT, person).shuffled(range(1, settings.cameras + 1))
        return [(order[index % settings.cameras], index // settings.cameras) for index in range(count)]

    for identity in range(settings.identities_train):
        for camera, number in cameras_of(identity, settings.images_per_identity):
            add("train", "train", identity, _Shot(identity, camera, number))
    for index in range(settings.identities_test):
        person = _FIRST_TEST + index
        for place, (camera, number) in enumerate(cameras_of(person, settings.images_per_identity)):
            # The first picture by each camera asks; with no more than one by each, every other picture does.
            few = settings.images_per_identity <= settings.cameras
            asks = place % 2 == 0 if few else number == 0
            add("query" if asks else "gallery", "test", index + 1, _Shot(person, camera, number))
    for index in range(settings.distractors):
        person = _FIRST_DISTRACTOR + index
        camera, number = cameras_of(person, 1)[0]
        add("gallery", "test", 0, _Shot(person, camera, number))

    renderer.render_all(progress=progress)
    splits = {}
    for split, entries in lists.items():
        views = [_view(renderer.facing(shots[path])) for path, _ in entries]
        splits[split] = ImageList(
            paths=tuple(path for path, _ in entries),
            identity=np.array([identity for _, identity in entries], dtype=np.int64),
            camera=np.array([shots[path].camera for path, _ in entries], dtype=np.int64),
            viewpoint=np.array([label for _, label in views], dtype=np.int64),
            viewpoint_name=tuple(name for name, _ in views),
            loader=renderer,
        )
    names = tuple(f"{identity:04d}" for identity in range(settings.identities_train))
    return ReidData("synthetic", splits["train"], splits["query"], splits["gallery"], names)
