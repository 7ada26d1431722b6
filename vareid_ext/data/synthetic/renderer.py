"""Rendered pedestrians seen from all sides by cameras that disagree about colour.

Every pixel is a pure function of `SyntheticSettings` and of the picture's name, to the last bit, on every machine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from vareid_ext.data.body_maps import group_classes
from vareid_ext.data.random_stream import Stream
from vareid_ext.data.synthetic.drawing import ONE, PIXEL, TURN
from vareid_ext.data.synthetic.figure import Pose, paint_person
from vareid_ext.data.synthetic.person import Person, draw_details, draw_person
from vareid_ext.data.synthetic.scene import (
    SUPERSAMPLE,
    Camera,
    background,
    draw_camera,
    expose,
    occlude,
    shade_ground,
)
from vareid_ext.data.text_files import shown

_PERSON, _CAMERA, _SHOT, _OUTFIT = 1, 2, 3, 5  # keys of the streams; 4 is the reader's
_CACHE_BYTES = 2 << 30
_MOST = 1_000_000


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
        outfits: 0, people are told apart by clothes of their own; above 0, they share this many outfits, with the
            build that belongs to each, and are told apart by details that belong to one side each.

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
    outfits: int = 0

    def __post_init__(self) -> None:
        limits = {
            "distractors": (0, _MOST),
            "outfits": (0, _MOST),
            "cameras": (1, 1000),
            "height": (32, 2048),
            "width": (16, 2048),
        }
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
class Shot:
    """One picture: of whom, by which camera, and its number among those of the person by that camera."""

    person: int
    camera: int
    number: int


class _Drawing(NamedTuple):
    """A picture before the camera, at `SUPERSAMPLE` times its size."""

    canvas: np.ndarray
    joints: list[tuple[int, int]]
    covered: np.ndarray
    """bool [H, W], where something stands in front of the person"""
    stream: Stream
    """goes on in the camera"""


class SyntheticRenderer:
    """Turns the names of synthetic pictures into pictures, and keeps those it was asked to render ahead of time."""

    def __init__(self, settings: SyntheticSettings, shots: dict[str, Shot]) -> None:
        self.settings = settings
        self._shots = shots
        self._rendered: dict[str, np.ndarray] = {}
        self._extras: dict[tuple[str, str], np.ndarray] = {}

    def __call__(self, path: str) -> Image.Image:
        """The RGB picture named `path`. Raises KeyError for a name that is not in the set."""
        return Image.fromarray(self.pixels(path))

    def pixels(self, path: str) -> np.ndarray:
        """uint8 [height, width, 3]: the picture named `path`."""
        found = self._rendered.get(path)
        return self._render(self._shots[path]) if found is None else found

    def render_all(self, extras: Sequence[str] = (), *, progress: bool = False) -> None:
        """Render every picture now, and the extras named.

        Nothing is rendered now if all together would take more than 2 GiB, but as it is used.
        """
        each = 3 + 24 * ("views" in extras) + 8 * bool(set(extras) - {"views"})  # bytes of a pixel
        if len(self._shots) * self.settings.height * self.settings.width * each > _CACHE_BYTES:
            return
        for path, shot in tqdm(self._shots.items(), desc="rendering", unit="image", disable=not progress, leave=False):
            if path not in self._rendered:
                self._rendered[path] = self._render(shot)
            for name in extras:
                if (name, path) not in self._extras:
                    made = self._make(name, shot)
                    self._extras.update({(key, path): value for key, value in made.items()})

    def extra(self, name: str, path: str) -> np.ndarray:
        """An extra input of the picture named `path`, exactly, in the form that `EXTRAS` says.

        A joint has confidence 1 unless something stands in front of the person there or it is outside the picture; one
        that the person's own body hides is as good as any. The views show the person from eight sides, also from those
        that the picture does not show, before the same background: more than any generator could know.
        """
        found = self._extras.get((name, path))
        value = self._make(name, self._shots[path])[name] if found is None else found
        return group_classes(value) if name == "parsing" else value

    def facing(self, shot: Shot) -> int:
        """The direction, in 1/4096 turn, in which the person of a picture looks."""
        camera = _camera(self.settings, shot.camera)
        # One walk past a camera is a track: pictures of it show about the same side.
        track = Stream(self.settings.seed, _SHOT, shot.person, shot.camera, shot.number // 2)
        middle = (0, TURN // 4, TURN // 2)[track.weighted(camera.directions)]
        turn = middle + track.integer(-TURN // 9, TURN // 9)
        if track.chance(50):
            turn = -turn
        return turn + Stream(self.settings.seed, _SHOT, shot.person, shot.camera, shot.number, 1).integer(-170, 170)

    def _make(self, name: str, shot: Shot) -> dict[str, np.ndarray]:
        """The extra called `name`, and those that come with it."""
        if name == "views":
            camera = _camera(self.settings, shot.camera)
            turned = [self._draw(shot, facing=TURN * side // 8) for side in range(8)]
            views = [expose(drawing.canvas, camera, drawing.stream) for drawing in turned]
            return {"views": np.stack(views).transpose(0, 3, 1, 2)}
        settings = self.settings
        labels = np.zeros((settings.height * SUPERSAMPLE, settings.width * SUPERSAMPLE, 4), dtype=np.uint8)
        drawing = self._draw(shot, labels)
        labels[drawing.covered] = 0
        labels = labels[::SUPERSAMPLE, ::SUPERSAMPLE]
        places = np.array(drawing.joints) // PIXEL
        height, width = drawing.covered.shape
        seen = np.all((places >= 0) & (places < (width, height)), axis=1)
        seen[seen] = ~drawing.covered[places[seen, 1], places[seen, 0]]
        joints = np.array(drawing.joints) / (PIXEL * SUPERSAMPLE) - 0.5
        return {
            "keypoints": np.column_stack([joints, seen]).astype(np.float32),
            "parsing": labels[:, :, 0].copy(),
            "iuv": labels[:, :, 1:].transpose(2, 0, 1).copy(),
        }

    def _render(self, shot: Shot) -> np.ndarray:
        drawing = self._draw(shot)
        return expose(drawing.canvas, _camera(self.settings, shot.camera), drawing.stream)

    def _draw(self, shot: Shot, labels: np.ndarray | None = None, *, facing: int | None = None) -> _Drawing:
        """The picture of a shot; or of the person alone, standing and looking into the direction `facing`.

        `labels` are as for `paint_person`.
        """
        settings, camera = self.settings, _camera(self.settings, shot.camera)
        stream = Stream(settings.seed, _SHOT, shot.person, shot.camera, shot.number, 2)
        height, width = settings.height * SUPERSAMPLE, settings.width * SUPERSAMPLE
        canvas = background(camera, stream, height, width)
        if stream.chance(18):
            passer = Stream(stream.bits())
            side = passer.choice((width // 10, width * 9 // 10))
            pose = Pose(passer.integer(0, TURN - 1), side, height * 88 // 100, height * 70 // 100, 0, camera.light)
            if facing is None:
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
        if facing is not None:
            pose = replace(pose, facing=facing, stride=0)
        shade_ground(canvas, pose.centre_x, pose.foot_y, width * 3 // 8)
        joints = paint_person(canvas, _person(settings.seed, settings.outfits, shot.person), pose, labels)
        covered = np.zeros((height, width), dtype=bool)
        if stream.chance(14) and facing is None:
            untouched = np.full_like(canvas, -1)
            occlude(untouched, copy.copy(stream))
            covered = untouched[:, :, 0] >= 0
            occlude(canvas, stream)
        return _Drawing(canvas, joints, covered, stream)


@lru_cache(maxsize=4096)
def _person(seed: int, outfits: int, number: int) -> Person:
    stream = Stream(seed, _PERSON, number)
    if outfits == 0:
        return draw_person(stream)
    outfit = draw_person(Stream(seed, _OUTFIT, stream.integer(0, outfits - 1)))
    return draw_details(stream, outfit)


@lru_cache(maxsize=64)
def _camera(settings: SyntheticSettings, number: int) -> Camera:
    return draw_camera(Stream(settings.seed, _CAMERA, number), settings.height, settings.width)
