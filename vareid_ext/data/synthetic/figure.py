"""How one of the synthetic people is drawn, from any side.

A body is a stack of tubes. Every tube knows, for each pixel, which side of the body it shows, so that a logo is seen
from the front, a print or a backpack from the back and a shoulder bag from its side. Units as in `drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vareid_ext.data.synthetic.drawing import (
    NO_COVER,
    ONE,
    PIXEL,
    TURN,
    Band,
    Colour,
    Cover,
    Texture,
    around,
    mark,
    pattern,
    sine,
    tube,
    turned,
)
from vareid_ext.data.synthetic.person import Person


@dataclass(frozen=True)
class Pose:
    """Where and how a person stands.

    Attributes:
        facing: 0 looks into the camera, 1024 turns the person's left side to the picture's right, 2048 shows the back.
        centre_x, foot_y: where the feet are, in pixels.
        size: height in pixels of an average person.
        stride: how far the legs are apart and in which order, [-1024, 1024].
        light: from which side the light comes, [-1024, 1024].
    """

    facing: int
    centre_x: int
    foot_y: int
    size: int
    stride: int
    light: int


_END = ONE + 1
_RIGHT, _LEFT = -1, 1
_TORSO = (Band(_END, 0, (2, 1)),)
_HEAD = Cover((13, 2, 13, 1, 13), (Band(_END, TURN // 4, (24, 23)),))
_NECK, _HAIR, _HAT, _SCARF, _SKIRT = (Cover((label,)) for label in (13, 2, 1, 11, 12))
_BARE_ARM = {_RIGHT: 15, _LEFT: 14}
_ARM = {
    _RIGHT: (Band(518, -TURN // 4, (18, 16)), Band(900, -TURN // 4, (22, 20)), Band(_END, -TURN // 4, (3,))),
    _LEFT: (Band(518, TURN // 4, (17, 15)), Band(900, TURN // 4, (21, 19)), Band(_END, TURN // 4, (4,))),
}
_LEG = {
    _RIGHT: Cover((9, 9, 17), (Band(507, 0, (9, 7)), Band(_END, 0, (13, 11)))),
    _LEFT: Cover((9, 9, 16), (Band(507, 0, (10, 8)), Band(_END, 0, (14, 12)))),
}
_FOOT = {_RIGHT: Cover((19,), (Band(_END, 0, (6,)),)), _LEFT: Cover((18,), (Band(_END, 0, (5,)),))}


class _Figure:
    """A person being painted. Lengths on the body are in 1/1000 of its height, rows from the top of the head."""

    def __init__(self, canvas: np.ndarray, person: Person, pose: Pose, labels: np.ndarray | None = None) -> None:
        self.canvas, self.person, self.pose, self.labels = canvas, person, pose, labels
        self.size = pose.size * person.height // ONE
        self.facing = pose.facing % TURN
        self.sin, self.cos = sine(self.facing), sine(self.facing + TURN // 4)
        self.shoulder = 104 * person.build // ONE
        self.top_class = {"dress": 6, "coat": 7, "jacket": 7}.get(person.top, 5)

    def row(self, part: int) -> int:
        """Screen y."""
        return (self.pose.foot_y - self.size) * PIXEL + self.length(part)

    def length(self, part: int) -> int:
        """Screen length."""
        return self.size * PIXEL * part // 1000

    def across(self, x: int, z: int) -> int:
        """Screen x of the point x to the person's side and z in front of them."""
        return self.pose.centre_x * PIXEL + (self.length(x) * self.cos + self.length(z) * self.sin) // ONE

    def girth(self, side: int, depth: int) -> int:
        """Screen half width of an upright ellipse of these half axes, made as wide as the person is."""
        side, depth = side * self.person.build // ONE, depth * self.person.build // ONE
        return self.length(1) * math.isqrt((side * self.cos) ** 2 + (depth * self.sin) ** 2) // ONE

    def tube(
        self,
        points: Sequence[tuple[int, int, int]],
        *colours: Colour,
        texture: Texture | None = None,
        rounded: bool = False,
        cover: Cover = NO_COVER,
    ) -> None:
        """Paint a tube through (row, screen x, screen half width) points."""
        placed = [(self.row(part), x, width) for part, x, width in points]
        tube(
            self.canvas,
            placed,
            colours,
            facing=self.facing,
            texture=texture,
            light=self.pose.light,
            rounded=rounded,
            labels=self.labels,
            cover=cover,
        )

    def leg_points(self, side: int) -> tuple[int, int, int]:
        """Screen x of hip, knee and ankle."""
        swing = self.pose.stride * side * 70 // ONE
        return self.across(side * 44, 0), self.across(side * 46, swing // 2), self.across(side * 46, swing)

    def arm_points(self, side: int) -> tuple[int, int, int]:
        """Screen x of shoulder, elbow and hand."""
        swing = -self.pose.stride * side * 75 // ONE
        shoulder = self.across(side * (self.shoulder - 4), 0)
        elbow = self.across(side * (self.shoulder + 14), swing // 3)
        return shoulder, elbow, self.across(side * (self.shoulder + 10), swing + 18)

    def joints(self) -> list[tuple[int, int]]:
        """Screen x and y of the 14 joints of `BODY_PAIRS`."""
        points = [(self.across(0, 6), self.row(67)), (self.across(0, 0), self.row(148))]
        for side in (-1, 1):
            points += zip(self.arm_points(side), map(self.row, (180, 335, 470)), strict=True)
        for side in (-1, 1):
            points += zip(self.leg_points(side), map(self.row, (490, 720, 950)), strict=True)
        return points

    def leg(self, side: int) -> None:
        person = self.person
        hip, knee, ankle = self.leg_points(side)
        swing = self.pose.stride * side * 70 // ONE
        bare = person.top == "dress" or person.bottom == "skirt"
        widths = (50, 34, 22) if bare or person.bottom in ("slim", "shorts") else (54, 45, 36)

        def cloth(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
            index = np.zeros(angle.shape, dtype=np.int32)
            if person.side_stripe is not None:
                index[np.abs(around(angle) - TURN // 4) < 190] = 1
            if bare:
                index[:] = 2
            elif person.bottom == "shorts":
                index[np.broadcast_to(v > 480, angle.shape)] = 2
            return index

        self.tube(
            [
                (480, hip, self.length(widths[0] * person.build // ONE)),
                (720, knee, self.length(widths[1] * person.build // ONE)),
                (965, ankle, self.length(widths[2] * person.build // ONE)),
            ],
            person.bottom_colour,
            person.side_stripe or person.bottom_colour,
            person.skin,
            texture=cloth,
            cover=_LEG[side],
        )
        foot = self.across(side * 46, swing + 28)
        reach = self.length(30) * abs(self.cos) // ONE + self.length(56) * abs(self.sin) // ONE
        self.tube([(945, foot, reach * 3 // 4), (1000, foot, reach)], person.shoes, cover=_FOOT[side])

    def arm(self, side: int) -> None:
        person = self.person
        top, elbow, hand = self.arm_points(side)
        thick = 31 if person.top in ("jacket", "coat", "hoodie") else 26
        bare_from = 380 if person.top in ("t-shirt", "dress") else 900

        def sleeve(angle: np.ndarray, v: np.ndarray) -> np.ndarray:
            index = np.zeros(angle.shape, dtype=np.int32)
            if person.pattern == "hoops" and person.sleeve_colour == person.top_colour:
                index[np.broadcast_to(v % 256 < 112, angle.shape)] = 1
            if person.sleeve_stripe is not None:
                index[np.abs(around(angle) - TURN // 4) < 300] = 3
            index[np.broadcast_to(v > bare_from, angle.shape)] = 2
            return index

        self.tube(
            [
                (166, top, self.length(thick * 2 // 3)),
                (200, top, self.length(thick)),
                (335, elbow, self.length(thick * 7 // 8)),
                (500, hand, self.length(thick * 5 // 8)),
            ],
            person.sleeve_colour,
            person.second_colour,
            person.skin,
            person.sleeve_stripe or person.sleeve_colour,
            texture=sleeve,
            cover=Cover((self.top_class, self.top_class, _BARE_ARM[side], self.top_class), _ARM[side]),
        )
        if person.bag == "handbag" and side == person.bag_side:
            bag = [(505, hand, self.length(20)), (530, hand, self.length(48)), (640, hand, self.length(52))]
            self.tube(bag, person.bag_colour)

    def _torso_cloth(self, angle: np.ndarray, v: np.ndarray) -> np.ndarray:
        person = self.person
        index = np.where(pattern(person.pattern, angle, v), 1, 0)
        ahead, behind = around(angle), around(angle, TURN // 2)
        if person.chest_panel is not None:
            index[np.broadcast_to(ahead < 600, index.shape)] = 6
        if person.back_panel is not None:
            index[np.broadcast_to(behind < 600, index.shape)] = 7
        index[mark(person.back_mark, angle, v, TURN // 2, 360, 200)] = 5
        if person.top == "jacket":
            index[ahead < 330] = 2
        else:
            index[mark(person.chest_mark, angle, v, person.chest_side, 300, person.chest_size)] = 3
        if person.top == "coat":
            index[(ahead < 40) | ((ahead < 300) & (v < 90))] = 2
        if person.top == "hoodie":
            index[(behind < 560) & (v < 230)] = 2
            index[(ahead < 420) & (v > 640) & (v < 860)] = 2
        if person.bag == "backpack":
            index[(np.abs(ahead - 430) < 110) & (v < 620)] = 4
        if person.bag == "shoulder":
            # The strap runs from the other shoulder down to the bag, on the chest and mirrored on the back.
            way = turned(angle)
            lean = np.where(ahead < TURN // 4, way, np.sign(way) * (TURN // 2) - way)
            index[np.abs(lean * person.bag_side - (v - 420) * 2) < 130] = 4
        return index

    def torso(self) -> None:
        person, x = self.person, self.across(0, 0)
        hems = {"coat": 700, "dress": 690, "t-shirt": 525, "jacket": 535, "hoodie": 530, "sweater": 525}
        hem = hems[person.top]
        wide = 12 if person.top in ("coat", "jacket", "hoodie") else 0
        # Garments end at different heights; the texture's v is the same height on the body whatever the hem.
        stretch = (hem - 148) * ONE // 380
        self.tube(
            [
                (148, x, self.girth(58, 52)),
                (176, x, self.girth(104 + wide, 68 + wide)),
                (340, x, self.girth(88 + wide, 66 + wide)),
                (hem, x, self.girth((128 if person.top == "dress" else 98) + wide, 74 + wide)),
            ],
            person.top_colour,
            person.second_colour,
            person.inner_colour,
            person.chest_colour,
            person.bag_colour,
            person.back_colour,
            person.chest_panel or person.top_colour,
            person.back_panel or person.top_colour,
            texture=lambda angle, v: self._torso_cloth(angle, v * stretch // ONE),
            cover=Cover((self.top_class,) * 8, _TORSO),
        )

    def skirt(self) -> None:
        if self.person.bottom == "skirt" and self.person.top != "dress":
            x = self.across(0, 0)
            self.tube(
                [(480, x, self.girth(96, 70)), (690, x, self.girth(124, 100))],
                self.person.bottom_colour,
                cover=_SKIRT,
            )

    def long_hair(self) -> None:
        if self.person.haircut == "long":
            x = self.across(0, -22)
            self.tube([(60, x, self.girth(50, 40)), (270, x, self.girth(56, 34))], self.person.hair, cover=_HAIR)
        elif self.person.haircut == "bob":
            x = self.across(0, -16)
            self.tube([(40, x, self.girth(54, 44)), (150, x, self.girth(60, 42))], self.person.hair, cover=_HAIR)

    def _face(self, angle: np.ndarray, v: np.ndarray) -> np.ndarray:
        haircut, ahead = self.person.haircut, around(angle)
        v = np.broadcast_to(v, angle.shape)
        index = np.zeros(angle.shape, dtype=np.int32)
        if haircut != "bald":
            index[v < np.where(ahead < 640, 250, 760 if haircut == "cap" else 620)] = 1
        if haircut == "cap":
            index[v < 330] = 3
        index[(np.abs(ahead - 300) < 85) & (np.abs(v - 470) < 45)] = 2
        if self.person.beard:
            index[(ahead < 760) & (v > 690)] = 1
        index[(ahead < 170) & (np.abs(v - 770) < 25)] = 4
        return index

    def head(self) -> None:
        person, skin = self.person, self.person.skin
        neck = [(100, self.across(0, 0), self.length(25)), (165, self.across(0, 0), self.length(30))]
        self.tube(neck, skin, cover=_NECK)
        if person.scarf is not None:
            scarf = [(128, self.across(0, 0), self.length(46)), (176, self.across(0, 4), self.length(50))]
            self.tube(scarf, person.scarf, cover=_SCARF)
        x, width = self.across(0, 6), self.girth(50, 60)
        eyes = (skin[0] // 3, skin[1] // 3, skin[2] // 3)
        lips = (skin[0] * 7 // 8, skin[1] * 5 // 8, skin[2] * 5 // 8)
        self.tube(
            [(0, x, width), (134, x, width)],
            skin,
            person.hair,
            eyes,
            person.bag_colour,
            lips,
            texture=self._face,
            rounded=True,
            cover=_HEAD,
        )
        if person.haircut == "cap":
            brim, width = self.across(0, 66), self.length(34) + self.length(14) * abs(self.cos) // ONE
            self.tube([(36, brim, width), (50, brim, width)], person.bag_colour, cover=_HAT)
        if person.haircut == "bun":
            x = self.across(0, -58)
            self.tube([(6, x, self.length(30)), (66, x, self.length(30))], person.hair, rounded=True, cover=_HAIR)

    def backpack(self) -> None:
        if self.person.bag == "backpack":
            x, bag = self.across(0, -100 * self.person.build // ONE), self.person.bag_colour
            self.tube(
                [(175, x, self.girth(64, 30)), (205, x, self.girth(80, 44)), (430, x, self.girth(86, 52))],
                bag,
                (bag[0] * 3 // 4, bag[1] * 3 // 4, bag[2] * 3 // 4),
                texture=lambda angle, v: np.where((v > 560) & (v < 860) & (around(angle, TURN // 2) < 420), 1, 0),
                cover=Cover((0, 0)),
            )

    def shoulder_bag(self) -> None:
        if self.person.bag == "shoulder":
            x = self.across(self.person.bag_side * (self.shoulder + 20), -12)
            self.tube([(470, x, self.girth(28, 62)), (590, x, self.girth(32, 68))], self.person.bag_colour)

    def paint(self) -> None:
        """What is farther from the camera first."""
        near = -1 if self.sin > 0 else 1
        bag_is_near = self.person.bag_side == near or abs(self.sin) < 350
        seen_from_front = self.cos > 0
        if seen_from_front:
            self.backpack()
            self.long_hair()
        if not bag_is_near:
            self.shoulder_bag()
        self.arm(-near)
        self.leg(-near)
        self.leg(near)
        self.skirt()
        self.torso()
        self.head()
        if not seen_from_front:
            self.long_hair()
            self.backpack()
        self.arm(near)
        if bag_is_near:
            self.shoulder_bag()


def paint_person(
    canvas: np.ndarray, person: Person, pose: Pose, labels: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Draw `person` in `pose` onto `canvas` int16 [H, W, 3], in place; what does not fit is cut off.

    What is seen goes to `labels` uint8 [H, W, 4] too: LIP's class and DensePose's I, U and V. Bags are background, and
    I is 0 where clothing hangs away from the body: scarf, skirt, brim, and hair that hangs down. Returns x and y of the
    14 joints of `BODY_PAIRS` on the canvas, seen or not.
    """
    figure = _Figure(canvas, person, pose, labels)
    figure.paint()
    return figure.joints()
