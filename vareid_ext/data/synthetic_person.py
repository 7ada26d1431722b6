"""The people of the synthetic set: what they look like, and how one is drawn from any side.

A body is a stack of tubes with an upright axis. Every tube knows, for each pixel, which side of the body it shows, so
that a logo is seen from the front, a print or a backpack from the back and a shoulder bag from its side. Everything is
integer arithmetic: the pixels are the same on every machine.

Units: lengths in 1/256 pixel, fractions in 1/1024, angles in 1/4096 turn. `facing` 0 looks into the camera, 1024 shows
the person's left turned to the right of the picture, 2048 is seen from behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vareid_ext.data.random_stream import Stream

PIXEL = 256
ONE = 1024
TURN = 4096

Colour = tuple[int, int, int]
Texture = Callable[[np.ndarray, np.ndarray], np.ndarray | int]
"""(angle around the body [n, m], height [n, 1] from 0 top to 1024 bottom) -> index into the tube's colours."""

_SIN = [round(ONE * math.sin(2 * math.pi * step / TURN)) for step in range(TURN)]
_ASIN = np.array([round(TURN / (2 * math.pi) * math.asin(step / ONE)) for step in range(-ONE, ONE + 1)], dtype=np.int32)

CLOTHES: tuple[Colour, ...] = (
    (36, 36, 40),
    (222, 222, 218),
    (128, 130, 134),
    (40, 52, 104),
    (178, 38, 44),
    (58, 110, 186),
    (48, 116, 66),
    (222, 186, 62),
    (112, 74, 48),
    (196, 170, 132),
    (216, 128, 158),
    (112, 64, 132),
    (218, 116, 44),
    (52, 146, 148),
)
HAIR: tuple[Colour, ...] = ((28, 24, 24), (66, 44, 30), (120, 82, 48), (196, 160, 92), (148, 148, 150), (138, 62, 34))
SKIN: tuple[Colour, ...] = ((236, 196, 168), (218, 170, 138), (184, 132, 98), (132, 90, 64), (88, 58, 44))

PATTERNS = ("plain", "hoops", "pinstripes", "check", "yoke", "dots", "sash", "panel")
TOPS = ("t-shirt", "sweater", "jacket", "coat", "hoodie", "dress")
BOTTOMS = ("trousers", "shorts", "skirt", "slim")
HAIRCUTS = ("short", "bald", "bob", "long", "bun", "cap")
BAGS = ("none", "backpack", "shoulder", "handbag")
MARKS = ("none", "square", "disc", "bar", "cross", "pillar")


@dataclass(frozen=True)
class Person:
    """How one identity looks. Colours are RGB in [0, 255]; `height` and `build` in 1/1024 of the average."""

    height: int
    build: int
    skin: Colour
    haircut: str
    hair: Colour
    top: str
    pattern: str
    top_colour: Colour
    second_colour: Colour
    inner_colour: Colour
    sleeve_colour: Colour
    bottom: str
    bottom_colour: Colour
    side_stripe: Colour | None
    shoes: Colour
    chest_mark: str
    chest_side: int
    back_mark: str
    mark_colour: Colour
    bag: str
    bag_side: int
    bag_colour: Colour
    scarf: Colour | None
    beard: bool


def draw_person(stream: Stream) -> Person:
    """A random person."""

    def clothes() -> Colour:
        base = stream.choice(CLOTHES)
        return tuple(min(255, max(0, channel + stream.integer(-16, 16))) for channel in base)  # type: ignore[return-value]

    def clothes_unlike(other: Colour) -> Colour:
        while True:
            colour = clothes()
            if sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 150:
                return colour

    top_colour = clothes()
    second_colour = clothes_unlike(top_colour)
    top = TOPS[stream.weighted((26, 22, 18, 12, 14, 8))]
    return Person(
        height=stream.integer(920, 1100),
        build=stream.integer(920, 1300),
        skin=SKIN[stream.weighted((26, 26, 20, 16, 12))],
        haircut=HAIRCUTS[stream.weighted((32, 8, 16, 20, 10, 14))],
        hair=HAIR[stream.weighted((28, 24, 18, 14, 10, 6))],
        top=top,
        pattern=PATTERNS[stream.weighted((26, 14, 10, 10, 12, 9, 9, 10))],
        top_colour=top_colour,
        second_colour=second_colour,
        inner_colour=clothes_unlike(top_colour),
        sleeve_colour=second_colour if stream.chance(22) else top_colour,
        bottom=BOTTOMS[stream.weighted((44, 20, 14, 22))],
        bottom_colour=clothes(),
        side_stripe=clothes() if stream.chance(22) else None,
        shoes=clothes(),
        chest_mark=MARKS[stream.weighted((46, 13, 13, 12, 8, 8))],
        chest_side=stream.choice((-230, 0, 230)),
        back_mark=MARKS[stream.weighted((46, 12, 14, 12, 8, 8))],
        mark_colour=clothes_unlike(top_colour),
        bag=BAGS[stream.weighted((44, 24, 18, 14))],
        bag_side=stream.choice((-1, 1)),
        bag_colour=clothes_unlike(top_colour),
        scarf=clothes_unlike(top_colour) if stream.chance(14) else None,
        beard=stream.chance(18),
    )


def sine(angle: int) -> int:
    """1024 times the sine of `angle`."""
    return _SIN[angle % TURN]


def _around(angle: np.ndarray, centre: int = 0) -> np.ndarray:
    """Distance around the body, in [0, 2048], from the direction `centre`."""
    return np.abs((angle - centre + TURN // 2) % TURN - TURN // 2)


def _profile(points: Sequence[tuple[int, int, int]], top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width, [n, 1] each, on the rows top..bottom-1, linear between (y, centre, half width) points."""
    rows = np.arange(top, bottom, dtype=np.int64) * PIXEL + PIXEL // 2
    centre = np.full(rows.shape, points[-1][1], dtype=np.int64)
    width = np.full(rows.shape, points[-1][2], dtype=np.int64)
    for (y0, c0, w0), (y1, c1, w1) in zip(reversed(points[:-1]), reversed(points[1:]), strict=True):
        above = rows < y1
        part = rows[above] - y0
        centre[above] = c0 + (c1 - c0) * part // max(y1 - y0, 1)
        width[above] = w0 + (w1 - w0) * part // max(y1 - y0, 1)
    return centre[:, None], width[:, None]


def tube(
    canvas: np.ndarray,
    points: Sequence[tuple[int, int, int]],
    colours: Sequence[Colour],
    *,
    facing: int = 0,
    texture: Texture | None = None,
    light: int = 0,
    rounded: bool = False,
) -> None:
    """Paint an upright tube through (y, centre, half width) points onto `canvas` int16 [H, W, 3], in place.

    `texture` picks the colour per pixel (the first one without it), `light` in [-1024, 1024] says from which side it is
    lit, `rounded` makes an ellipsoid of it (half widths are then those of its bounding box).
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
    u = ((columns - centre) * ONE // np.maximum(half, 1)).astype(np.int32)
    inside = np.abs(u) < ONE
    u = np.clip(u, -ONE, ONE)
    palette = np.array(colours, dtype=np.int32)
    if texture is None:
        colour = palette[0][None, None, :]
    else:
        angle = _ASIN[u + ONE] - facing
        span = max(points[-1][0] - points[0][0], 1)
        v = ((np.arange(top, bottom, dtype=np.int64) * PIXEL + PIXEL // 2 - points[0][0]) * ONE // span)[:, None]
        colour = palette[np.broadcast_to(texture(angle, v), u.shape)]
    shade = 1064 - (u * u >> 2) // ONE - (u * light >> 12)
    colour = colour * shade[:, :, None] >> 10
    np.copyto(canvas[top:bottom, left:right], np.clip(colour, 0, 255), where=inside[:, :, None], casting="unsafe")


def _mark(kind: str, angle: np.ndarray, v: np.ndarray, centre: int, middle: int, size: int) -> np.ndarray:
    """Where a mark of that kind covers the body: `centre` around it, `middle` down it, `size` its half extent in v."""
    # One v unit is about 0.37 of the body's height over 1024, one turn about 0.62 of it over 4096.
    across = np.abs((angle - centre + TURN // 2) % TURN - TURN // 2) * 2 // 5
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


def _pattern(kind: str, angle: np.ndarray, v: np.ndarray) -> np.ndarray:
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
        return np.abs((angle + TURN // 2) % TURN - TURN // 2 + (v - 512) * 3 // 2) < 230
    if kind == "panel":
        return np.broadcast_to((v > 420) & (v < 700), angle.shape)
    return np.zeros(angle.shape, dtype=bool)


@dataclass(frozen=True)
class Pose:
    """Where and how a person stands: `size` is the height in pixels of an average one, `stride` in [-1024, 1024]."""

    facing: int
    centre_x: int
    foot_y: int
    size: int
    stride: int
    light: int


def paint_person(canvas: np.ndarray, person: Person, pose: Pose) -> None:
    """Draw `person` in `pose` onto `canvas` int16 [H, W, 3], in place."""
    size = pose.size * person.height // ONE
    facing, light = pose.facing % TURN, pose.light
    sin, cos = sine(facing), sine(facing + TURN // 4)
    front = cos > 0
    base = pose.foot_y * PIXEL - size * PIXEL

    def row(part: int) -> int:
        return base + size * PIXEL * part // 1000

    def length(part: int) -> int:
        return size * PIXEL * part // 1000

    def across(x: int, z: int) -> int:
        """Screen x of the point x to the person's side and z in front of them."""
        return pose.centre_x * PIXEL + (length(x) * cos + length(z) * sin) // ONE

    def girth(side: int, depth: int) -> int:
        side, depth = side * person.build // ONE, depth * person.build // ONE
        return length(1) * math.isqrt((side * cos) ** 2 + (depth * sin) ** 2) // ONE

    shoulder = 104 * person.build // ONE

    def paint_leg(side: int) -> None:
        swing = pose.stride * side * 70 // ONE
        hip, knee, ankle = across(side * 44, 0), across(side * 46, swing // 2), across(side * 46, swing)
        slim = person.bottom == "slim" or person.top == "dress" or person.bottom in ("shorts", "skirt")
        widths = (50, 34, 22) if slim else (54, 45, 36)
        stripe, bare = person.side_stripe is not None, person.top == "dress" or person.bottom == "skirt"

        def cloth(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
            index = np.zeros(angle.shape, dtype=np.int64)
            if stripe:
                index[np.abs(_around(angle) - TURN // 4) < 190] = 1
            if bare:
                index[:] = 2
            elif person.bottom == "shorts":
                index[np.broadcast_to(v > 480, angle.shape)] = 2
            return index

        tube(
            canvas,
            [
                (row(480), hip, length(widths[0] * person.build // ONE)),
                (row(720), knee, length(widths[1] * person.build // ONE)),
                (row(965), ankle, length(widths[2] * person.build // ONE)),
            ],
            [person.bottom_colour, person.side_stripe or person.bottom_colour, person.skin],
            facing=facing,
            texture=cloth,
            light=light,
        )
        foot = across(side * 46, swing + 28)
        reach = length(30) * abs(cos) // ONE + length(56) * abs(sin) // ONE
        tube(canvas, [(row(945), foot, reach * 3 // 4), (row(1000), foot, reach)], [person.shoes], light=light)

    def paint_arm(side: int) -> None:
        swing = -pose.stride * side * 75 // ONE
        top_x, elbow, hand = across(side * (shoulder - 4), 0), across(side * (shoulder + 14), swing // 3), 0
        hand = across(side * (shoulder + 10), swing + 18)
        thick = 31 if person.top in ("jacket", "coat", "hoodie") else 26
        bare_from = 380 if person.top in ("t-shirt", "dress") else 900

        def sleeve(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
            index = np.zeros(angle.shape, dtype=np.int64)
            if person.pattern == "hoops" and person.sleeve_colour == person.top_colour:
                index[np.broadcast_to(v % 256 < 112, angle.shape)] = 1
            index[np.broadcast_to(v > bare_from, angle.shape)] = 2
            return index

        tube(
            canvas,
            [
                (row(166), top_x, length(thick * 2 // 3)),
                (row(200), top_x, length(thick)),
                (row(335), elbow, length(thick * 7 // 8)),
                (row(500), hand, length(thick * 5 // 8)),
            ],
            [person.sleeve_colour, person.second_colour, person.skin],
            facing=facing,
            texture=sleeve,
            light=light,
        )
        if person.bag == "handbag" and side == person.bag_side:
            tube(
                canvas,
                [(row(505), hand, length(20)), (row(530), hand, length(48)), (row(640), hand, length(52))],
                [person.bag_colour],
                light=light,
            )

    def torso_cloth(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
        index = np.where(_pattern(person.pattern, angle, v), 1, 0)
        ahead, behind = _around(angle), _around(angle, TURN // 2)
        index[_mark(person.back_mark, angle, v, TURN // 2, 360, 200)] = 3
        if person.top == "jacket":
            index[ahead < 330] = 2
        else:
            index[_mark(person.chest_mark, angle, v, person.chest_side, 300, 120)] = 3
        if person.top == "coat":
            index[(ahead < 40) | ((ahead < 300) & (v < 90))] = 2
        if person.top == "hoodie":
            index[(behind < 560) & (v < 230)] = 2
            index[(ahead < 420) & (v > 640) & (v < 860)] = 2
        if person.bag == "backpack":
            index[(np.abs(ahead - 430) < 110) & (v < 620)] = 4
        if person.bag == "shoulder":
            turned = (angle + TURN // 2) % TURN - TURN // 2
            # Over the far shoulder down to the bag, on the front and mirrored on the back.
            lean = np.where(ahead < TURN // 4, turned, np.sign(turned) * (TURN // 2) - turned)
            index[np.abs(lean * person.bag_side - (v - 420) * 2) < 130] = 4
        return index

    def paint_torso() -> None:
        hem = {"coat": 700, "dress": 690, "t-shirt": 525, "jacket": 535, "hoodie": 530, "sweater": 525}[person.top]
        wide = 12 if person.top in ("coat", "jacket", "hoodie") else 0
        points = [
            (row(148), across(0, 0), girth(58, 52)),
            (row(176), across(0, 0), girth(104 + wide, 68 + wide)),
            (row(340), across(0, 0), girth(88 + wide, 66 + wide)),
            (row(hem), across(0, 0), girth((128 if person.top == "dress" else 98) + wide, 74 + wide)),
        ]
        colours = [
            person.top_colour,
            person.second_colour,
            person.inner_colour,
            person.mark_colour,
            person.bag_colour,
        ]
        # Garments end at different heights; v counts the same fraction of the body whatever the hem.
        stretch = (hem - 148) * ONE // 380

        def cloth(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
            return torso_cloth(angle, v * stretch // ONE)

        tube(canvas, points, colours, facing=facing, texture=cloth, light=light)

    def paint_skirt() -> None:
        if person.bottom == "skirt" and person.top != "dress":
            points = [(row(480), across(0, 0), girth(96, 70)), (row(690), across(0, 0), girth(124, 100))]
            tube(canvas, points, [person.bottom_colour], light=light)

    def paint_long_hair() -> None:
        if person.haircut == "long":
            x = across(0, -22)
            tube(canvas, [(row(60), x, girth(50, 40)), (row(270), x, girth(56, 34))], [person.hair], light=light)
        elif person.haircut == "bob":
            x = across(0, -16)
            tube(canvas, [(row(40), x, girth(54, 44)), (row(150), x, girth(60, 42))], [person.hair], light=light)

    def paint_head() -> None:
        tube(canvas, [(row(100), across(0, 0), length(25)), (row(165), across(0, 0), length(30))], [person.skin])
        if person.scarf is not None:
            tube(canvas, [(row(128), across(0, 0), length(46)), (row(176), across(0, 4), length(50))], [person.scarf])

        def face(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
            ahead = _around(angle)
            index = np.zeros(np.broadcast_shapes(angle.shape, v.shape), dtype=np.int64)
            line = 250 if person.haircut != "bald" else -1
            brow = np.where(ahead < 640, line, 620 if ahead.size and person.haircut != "cap" else 760)
            if person.haircut != "bald":
                index[np.broadcast_to(v, index.shape) < brow] = 1
            if person.haircut == "cap":
                index[np.broadcast_to(v < 330, index.shape)] = 3
            index[(np.abs(ahead - 300) < 85) & (np.abs(v - 470) < 45)] = 2
            index[(ahead < 170) & (np.abs(v - 770) < 25)] = 4
            if person.beard:
                index[(ahead < 760) & (v > 690) & ~((ahead < 170) & (np.abs(v - 770) < 25))] = 1
            return index

        dark = tuple(channel // 3 for channel in person.skin)
        lips = (person.skin[0] * 7 // 8, person.skin[1] * 5 // 8, person.skin[2] * 5 // 8)
        x = across(0, 6)
        tube(
            canvas,
            [(row(0), x, girth(50, 60)), (row(134), x, girth(50, 60))],
            [person.skin, person.hair, (dark[0], dark[1], dark[2]), person.bag_colour, lips],
            facing=facing,
            texture=face,
            light=light,
            rounded=True,
        )
        if person.haircut == "cap":
            brim = across(0, 66)
            wide = length(34) + length(14) * abs(cos) // ONE
            tube(canvas, [(row(36), brim, wide), (row(50), brim, wide)], [person.bag_colour], light=light)
        if person.haircut == "bun":
            x = across(0, -58)
            tube(canvas, [(row(6), x, length(30)), (row(66), x, length(30))], [person.hair], light=light, rounded=True)

    def paint_backpack() -> None:
        if person.bag == "backpack":
            x = across(0, -100 * person.build // ONE)

            def pocket(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
                return np.where((v > 560) & (v < 860) & (_around(angle, TURN // 2) < 420), 1, 0)

            points = [(row(175), x, girth(64, 30)), (row(205), x, girth(80, 44)), (row(430), x, girth(86, 52))]
            darker = tuple(channel * 3 // 4 for channel in person.bag_colour)
            tube(canvas, points, [person.bag_colour, darker], facing=facing, texture=pocket, light=light)  # type: ignore[list-item]

    def paint_shoulder_bag() -> None:
        if person.bag == "shoulder":
            x = across(person.bag_side * (shoulder + 20), -12)
            points = [(row(470), x, girth(28, 62)), (row(590), x, girth(32, 68))]
            tube(canvas, points, [person.bag_colour], light=light)

    near = -1 if sin > 0 else 1
    bag_is_near = person.bag_side == near or abs(sin) < 350
    if front:
        paint_backpack()
        paint_long_hair()
    if not bag_is_near:
        paint_shoulder_bag()
    paint_arm(-near)
    paint_leg(-near)
    paint_leg(near)
    paint_skirt()
    paint_torso()
    if front:
        paint_head()
    else:
        paint_head()
        paint_long_hair()
        paint_backpack()
    paint_arm(near)
    if bag_is_near:
        paint_shoulder_bag()
