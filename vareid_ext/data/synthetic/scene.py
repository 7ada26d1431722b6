"""The cameras of the synthetic set: what stands behind a person, and what the camera does to the picture.

Integer arithmetic throughout, as in `drawing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vareid_ext.data.random_stream import Stream
from vareid_ext.data.synthetic.drawing import ONE

SUPERSAMPLE = 2
"""The canvas has this many pixels per picture pixel and side; averaging them smooths the edges."""


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera: its surroundings and its look.

    Attributes:
        panorama: int16 [h, w, 3], what it can see; a picture is a window of it.
        matrix: int64 [3, 3] in 1/1024, the colour cast and saturation.
        bend: [-400, 400] in 1/1024, brightens (above 0) or darkens the mid-tones.
        lift: the darkest value it gives, [0, 40].
        blur: passes of a 1-2-1 filter.
        coarse: whether it records at half the resolution.
        grain: noise amplitude in [0, 20].
        size: height in 1/1024 of the picture of an average person.
        light: from which side it is lit, [-1024, 1024].
        directions: weights of people seen from the front, a side, the back.
    """

    panorama: np.ndarray
    matrix: np.ndarray
    bend: int
    lift: int
    blur: int
    coarse: bool
    grain: int
    size: int
    light: int
    directions: tuple[int, int, int]


def _smooth_noise(stream: Stream, height: int, width: int, cell: int) -> np.ndarray:
    """int64 [height, width] in about [-128, 127], smooth over `cell` pixels."""
    rows, columns = height // cell + 2, width // cell + 2
    grid = stream.array(rows, columns) - 128
    y, x = np.arange(height), np.arange(width)
    top, part_y = (y // cell)[:, None], (y % cell)[:, None]
    left, part_x = (x // cell)[None, :], (x % cell)[None, :]
    upper = grid[top, left] * (cell - part_x) + grid[top, left + 1] * part_x
    lower = grid[top + 1, left] * (cell - part_x) + grid[top + 1, left + 1] * part_x
    return (upper * (cell - part_y) + lower * part_y) // (cell * cell)


def _paint_panorama(stream: Stream, height: int, width: int) -> np.ndarray:
    """A wall or a street with a ground, windows, doors, poles and signs."""

    def colour(low: int, high: int, tint: int) -> np.ndarray:
        grey = stream.integer(low, high)
        return np.array([grey + stream.integer(-tint, tint) for _ in range(3)], dtype=np.int64)

    horizon = height * stream.integer(45, 58) // 100
    picture = np.empty((height, width, 3), dtype=np.int64)
    picture[:horizon] = colour(90, 190, 40)
    picture[horizon:] = colour(80, 170, 26)
    for _ in range(stream.integer(7, 12)):
        wide, tall = stream.integer(width // 30, width // 7), stream.integer(height // 8, horizon)
        left, top = stream.integer(0, width - wide), stream.integer(0, max(horizon - tall, 0))
        block = picture[top : min(top + tall, horizon), left : left + wide]
        block[:] = colour(30, 230, 60)
        if stream.chance(45):
            panes = stream.integer(10, 26)
            block[(np.arange(block.shape[0]) % panes < 3)] = colour(30, 230, 20)
            block[:, (np.arange(wide) % panes < 3)] = colour(30, 230, 20)
    tile = stream.integer(18, 44)
    if stream.chance(60):
        rows = np.arange(horizon, height)
        picture[rows[(rows - horizon) % tile < 2]] -= 22
    if stream.chance(50):
        picture[horizon:, (np.arange(width) % (2 * tile) < 3)] += 24
    for _ in range(stream.integer(2, 5)):
        wide, left = stream.integer(4, 14), stream.integer(0, width - 20)
        picture[: horizon + stream.integer(10, height - horizon - 1), left : left + wide] = colour(20, 200, 30)
    picture += (_smooth_noise(stream, height, width, 40) // 3)[:, :, None]
    picture += (_smooth_noise(stream, height, width, 8) // 6)[:, :, None]
    return np.clip(picture, 0, 255).astype(np.int16)


def draw_camera(stream: Stream, height: int, width: int) -> Camera:
    """A random camera for pictures of `height` x `width`."""
    gains = [stream.integer(840, 1200) for _ in range(3)]
    saturation = stream.integer(720, 1120)
    matrix = np.empty((3, 3), dtype=np.int64)
    for channel in range(3):
        for source, luma in enumerate((306, 601, 117)):
            mixed = (ONE - saturation) * luma // ONE + (saturation if source == channel else 0)
            matrix[channel, source] = mixed * gains[channel] // ONE
    directions = stream.choice(((5, 2, 3), (3, 2, 5), (3, 5, 2), (4, 3, 3), (2, 5, 3)))
    return Camera(
        panorama=_paint_panorama(stream, height * SUPERSAMPLE * 3 // 2, width * SUPERSAMPLE * 6),
        matrix=matrix,
        bend=stream.integer(-260, 300),
        lift=stream.integer(0, 36),
        blur=stream.integer(0, 2),
        coarse=stream.chance(30),
        grain=stream.integer(2, 14),
        size=stream.integer(885, 965),
        light=stream.integer(-900, 900),
        directions=directions,
    )


def background(camera: Camera, stream: Stream, height: int, width: int) -> np.ndarray:
    """int16 [height, width, 3] canvas: a random window of what the camera sees."""
    rows, columns = camera.panorama.shape[:2]
    top, left = stream.integer(0, rows - height), stream.integer(0, columns - width)
    return camera.panorama[top : top + height, left : left + width].copy()


def shade_ground(canvas: np.ndarray, centre_x: int, foot_y: int, reach: int) -> None:
    """The soft shadow under the feet, in place."""
    height, width = canvas.shape[:2]
    top, bottom = max(0, foot_y - reach // 3), min(height, foot_y + reach // 3)
    left, right = max(0, centre_x - reach), min(width, centre_x + reach)
    if top < bottom and left < right:
        y = (np.arange(top, bottom, dtype=np.int64)[:, None] - foot_y) * 3
        x = np.arange(left, right, dtype=np.int64)[None, :] - centre_x
        far = np.minimum((x * x + y * y) * ONE // (reach * reach), ONE)
        area = canvas[top:bottom, left:right]
        area[:] = area * (ONE * 5 // 8 + far * 3 // 8)[:, :, None] >> 10


def occlude(canvas: np.ndarray, stream: Stream) -> None:
    """Something in front of the person, in place: a pole, a parked car or a hedge."""
    height, width = canvas.shape[:2]
    shade = [stream.integer(30, 200) for _ in range(3)]
    kind = stream.integer(0, 2)
    if kind == 0:
        wide, left = stream.integer(width // 12, width // 6), stream.integer(width // 8, width * 3 // 4)
        canvas[:, left : left + wide] = shade
    elif kind == 1:
        top = stream.integer(height * 62 // 100, height * 80 // 100)
        canvas[top:] = shade
        canvas[top : top + height // 40] = [min(255, channel + 50) for channel in shade]
    else:
        side, wide = stream.choice((0, 1)), stream.integer(width // 5, width * 2 // 5)
        tall = stream.integer(height * 3 // 10, height * 6 // 10)
        area = canvas[height - tall :, :wide] if side == 0 else canvas[height - tall :, width - wide :]
        speckle = stream.array(-(-tall // 4), -(-wide // 4)).repeat(4, axis=0).repeat(4, axis=1)[:tall, :wide]
        area[:] = np.clip(np.array((50, 92, 44)) + speckle[:, :, None] // 4 - 32, 0, 255)


def _blurred(planes: np.ndarray) -> np.ndarray:
    """int32 [3, h, w] filtered with 1-2-1 down and across, edges repeated."""
    down = planes * 2
    down[:, 1:] += planes[:, :-1]
    down[:, 0] += planes[:, 0]
    down[:, :-1] += planes[:, 1:]
    down[:, -1] += planes[:, -1]
    down >>= 2
    across = down * 2
    across[:, :, 1:] += down[:, :, :-1]
    across[:, :, 0] += down[:, :, 0]
    across[:, :, :-1] += down[:, :, 1:]
    across[:, :, -1] += down[:, :, -1]
    across >>= 2
    return across


def expose(canvas: np.ndarray, camera: Camera, stream: Stream) -> np.ndarray:
    """uint8 [H, W, 3]: the picture that the camera makes of a canvas int16 [2H, 2W, 3]."""
    rows, columns = canvas.shape[0] // SUPERSAMPLE, canvas.shape[1] // SUPERSAMPLE
    wide = canvas[0::2] + canvas[1::2]
    mean = wide[:, 0::2] + wide[:, 1::2]
    planes = np.ascontiguousarray(mean.transpose(2, 0, 1), dtype=np.int32) * 4  # 16 times the value from here on
    if camera.coarse and rows % 2 == 0 and columns % 2 == 0:
        half = planes[:, 0::2, 0::2] + planes[:, 1::2, 0::2] + planes[:, 0::2, 1::2] + planes[:, 1::2, 1::2]
        planes = (half >> 2).repeat(2, axis=1).repeat(2, axis=2)
    for _ in range(camera.blur + camera.coarse):
        planes = _blurred(planes)
    matrix = camera.matrix * stream.integer(860, 1190) // ONE
    for channel in range(3):
        matrix[channel] = matrix[channel] * stream.integer(975, 1050) // ONE
    red, green, blue = planes
    mixed = np.stack([(red * r + green * g + blue * b) >> 10 for r, g, b in matrix.astype(np.int32)])
    mixed = np.minimum(np.maximum(mixed, 0), 4080)
    # A parabola through black and white: no powers, whose last digit differs between machines.
    mixed += mixed * (4080 - mixed) // 4080 * camera.bend // ONE
    # Light falls off to one side.
    slope = stream.integer(-200, 200)
    fall = ONE + slope * (2 * np.arange(columns, dtype=np.int32) - columns) // columns
    mixed = mixed * fall >> 10
    mixed = camera.lift + mixed * (255 - camera.lift) // 4080
    if camera.grain:
        mixed = mixed + ((stream.array(rows, columns) - 128) * camera.grain >> 7)
    return np.ascontiguousarray(np.minimum(np.maximum(mixed, 0), 255).astype(np.uint8).transpose(1, 2, 0))
