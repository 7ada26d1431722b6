"""Drawing upright tubes whose surface differs from side to side: what the synthetic people are made of.

Everything is integer arithmetic, so that the pixels are the same on every machine. Units: lengths in 1/256 pixel,
fractions in 1/1024, angles in 1/4096 turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

PIXEL = 256
ONE = 1024
TURN = 4096

Colour = tuple[int, int, int]
Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(int32 angle around the body [n, m], height [n, 1] from 0 top to 1024 bottom) -> index [n, m] into the colours."""


class Band(NamedTuple):
    """Rows of a tube that are one or two of DensePose's parts of the body's surface."""

    end: int
    """the height at which the band ends, from 0 top to 1024 bottom of the tube"""
    centre: int
    """the direction of the first part's middle; a second one has the opposite half"""
    parts: tuple[int, ...]


class Cover(NamedTuple):
    """What a tube shows."""

    classes: tuple[int, ...]
    """the class of LIP of each of its colours"""
    bands: tuple[Band, ...] = ()
    """from top to bottom; none where it is not the body itself, which it hides then"""


NO_COVER = Cover((0,))


_SIN = [round(ONE * math.sin(2 * math.pi * step / TURN)) for step in range(TURN)]
_ASIN = np.array([round(TURN / (2 * math.pi) * math.asin(step / ONE)) for step in range(-ONE, ONE + 1)], dtype=np.int32)


def sine(angle: int) -> int:
    """1024 times the sine of `angle`."""
    return _SIN[angle % TURN]


def around(angle: np.ndarray, centre: int = 0) -> np.ndarray:
    """Distance around the body, in [0, 2048], from the direction `centre`."""
    return np.abs(turned(angle - centre))


def turned(angle: np.ndarray) -> np.ndarray:
    """The same directions in [-2048, 2048)."""
    return ((angle + TURN // 2) & (TURN - 1)) - TURN // 2


def _profile(points: Sequence[tuple[int, int, int]], top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width, [n, 1] each, on the rows top..bottom-1, linear between (y, centre, half width) points."""
    centre = np.full((bottom - top, 1), points[-1][1], dtype=np.int64)
    width = np.full((bottom - top, 1), points[-1][2], dtype=np.int64)
    first = 0
    for (y0, c0, w0), (y1, c1, w1) in pairwise(points):
        last = min(max(y1 // PIXEL - top, first), bottom - top)
        part = np.arange(top + first, top + last, dtype=np.int64)[:, None] * PIXEL + (PIXEL // 2 - y0)
        centre[first:last] = c0 + (c1 - c0) * part // max(y1 - y0, 1)
        width[first:last] = w0 + (w1 - w0) * part // max(y1 - y0, 1)
        first = last
    return centre, width


def tube(
    canvas: np.ndarray,
    points: Sequence[tuple[int, int, int]],
    colours: Sequence[Colour],
    *,
    facing: int = 0,
    texture: Texture | None = None,
    light: int = 0,
    rounded: bool = False,
    labels: np.ndarray | None = None,
    cover: Cover = NO_COVER,
) -> None:
    """Paint an upright tube through (y, centre, half width) points onto `canvas` int16 [H, W, 3], in place.

    `texture` picks the colour per pixel (the first one without it), `light` in [-1024, 1024] says from which side it is
    lit, `rounded` makes an ellipsoid of it (half widths are then those of its bounding box). What `cover` says of the
    same pixels goes to `labels` uint8 [H, W, 4]: LIP's class and DensePose's I, U and V.
    """
    height, width = canvas.shape[:2]
    top = max(0, points[0][0] // PIXEL)
    bottom = min(height, -(-points[-1][0] // PIXEL))
    if top >= bottom:
        return
    centre, half = _profile(points, top, bottom)
    if rounded:
        # The ellipse's half width on each row, from integer square roots of 1 - t^2.
        span = max(points[-1][0] - points[0][0], 1)
        t = [(2 * ((row * PIXEL + PIXEL // 2) - points[0][0]) - span) * ONE // span for row in range(top, bottom)]
        half = half * np.array([math.isqrt(max(ONE * ONE - v * v, 0)) for v in t], dtype=np.int64)[:, None] // ONE
    left = max(0, int((centre - half).min()) // PIXEL)
    right = min(width, int((centre + half).max()) // PIXEL + 1)
    if left >= right:
        return
    columns = np.arange(left, right, dtype=np.int64)[None, :] * PIXEL + PIXEL // 2
    # (columns - centre) / half; dividing once per row and multiplying per pixel is several times faster.
    u = (columns - centre) * ((ONE << 20) // np.maximum(half, 1)) >> 20
    inside = np.abs(u) < ONE
    u = np.minimum(np.maximum(u, -ONE), ONE).astype(np.int32)
    index = np.zeros((1, 1), dtype=np.int32)
    if texture is not None or labels is not None:
        angle = _ASIN[u + ONE] - facing
        span = max(points[-1][0] - points[0][0], 1)
        v = (np.arange(top, bottom, dtype=np.int64) * PIXEL + PIXEL // 2 - points[0][0]) * ONE // span
        v = v[:, None].astype(np.int32)
        if texture is not None:
            index = texture(angle, v)
        if labels is not None:
            shown = _labels(cover, np.broadcast_to(index, inside.shape), angle, v)
            np.copyto(labels[top:bottom, left:right], shown, where=inside[:, :, None])
    colour = np.array(colours, dtype=np.int32)[index]
    shade = 1064 - (u * u >> 12) - (u * light >> 12)
    colour = np.minimum(colour * shade[:, :, None] >> 10, 255)
    np.copyto(canvas[top:bottom, left:right], colour, where=inside[:, :, None], casting="unsafe")


def _labels(cover: Cover, index: np.ndarray, angle: np.ndarray, v: np.ndarray) -> np.ndarray:
    """uint8 [n, m, 4]: class, I, U, V of each pixel of a tube. U runs across a part, V down a band."""
    shown = np.zeros((*index.shape, 4), dtype=np.uint8)
    shown[:, :, 0] = np.array(cover.classes, dtype=np.uint8)[index]
    begin, v = 0, v.clip(0, ONE)
    for band in cover.bands:
        rows = ((v >= begin) & (v < band.end))[:, 0]
        width = TURN // len(band.parts)
        offset = (angle[rows] - band.centre + width // 2) & (TURN - 1)
        shown[rows, :, 1] = np.array(band.parts)[offset // width]
        shown[rows, :, 2] = (offset % width * 255 + width // 2) // width
        shown[rows, :, 3] = (v[rows] - begin) * 255 // (band.end - begin)
        begin = band.end
    return shown


def mark(kind: str, angle: np.ndarray, v: np.ndarray, centre: int, middle: int, size: int) -> np.ndarray:
    """Where a mark of that kind covers the body: `centre` around it, `middle` down it, `size` its half extent in v."""
    # One v unit is about 0.37 of the body's height over 1024, one turn about 0.62 of it over 4096.
    across = around(angle, centre) * 2 // 5
    down = np.abs(v - middle)
    if kind == "square":
        return (across < size) & (down < size)
    if kind == "disc":
        return across * across + down * down < size * size * 5 // 4
    if kind == "bar":
        return (across < size * 7 // 4) & (down < size * 2 // 5)
    if kind == "cross":
        return ((across < size * 3 // 2) & (down < size // 3)) | ((across < size // 3) & (down < size * 3 // 2))
    if kind == "pillar":
        return (across < size * 2 // 5) & (down < size * 7 // 4)
    return np.zeros(np.broadcast_shapes(angle.shape, v.shape), dtype=bool)


def pattern(kind: str, angle: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second colour of a garment's pattern is."""
    if kind == "hoops":
        return np.broadcast_to(v % 256 < 112, angle.shape)
    if kind == "pinstripes":
        return angle % 512 < 150
    if kind == "check":
        return (angle // 340 + v // 128) % 2 == 0
    if kind == "yoke":
        return np.broadcast_to(v < 370, angle.shape)
    if kind == "dots":
        across, down = angle % 400 - 200, (v % 170 - 85) * 5 // 2
        return across * across + down * down < 120 * 120
    if kind == "sash":
        return np.abs(turned(angle) + (v - 512) * 3 // 2) < 230
    if kind == "panel":
        return np.broadcast_to((v > 420) & (v < 700), angle.shape)
    return np.zeros(angle.shape, dtype=bool)
