"""The people of the synthetic set: what they look like."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vareid_ext.data.random_stream import Stream
from vareid_ext.data.synthetic.drawing import Colour

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
    chest_colour: Colour
    back_mark: str
    back_colour: Colour
    bag: str
    bag_side: int
    bag_colour: Colour
    scarf: Colour | None
    beard: bool
    chest_size: int = 120
    chest_panel: Colour | None = None
    back_panel: Colour | None = None
    sleeve_stripe: Colour | None = None


def _clothes(stream: Stream) -> Colour:
    base = stream.choice(CLOTHES)
    return tuple(min(255, max(0, channel + stream.integer(-16, 16))) for channel in base)  # type: ignore[return-value]


def _clothes_unlike(stream: Stream, other: Colour) -> Colour:
    while True:
        colour = _clothes(stream)
        if sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 150:
            return colour


def draw_person(stream: Stream) -> Person:
    """A random person."""
    top_colour = _clothes(stream)
    second_colour = _clothes_unlike(stream, top_colour)
    top = TOPS[stream.weighted((26, 22, 18, 12, 14, 8))]
    return Person(
        height=stream.integer(930, 1070),
        build=stream.integer(920, 1300),
        skin=SKIN[stream.weighted((26, 26, 20, 16, 12))],
        haircut=HAIRCUTS[stream.weighted((32, 8, 16, 20, 10, 14))],
        hair=HAIR[stream.weighted((28, 24, 18, 14, 10, 6))],
        top=top,
        pattern=PATTERNS[stream.weighted((26, 14, 10, 10, 12, 9, 9, 10))],
        top_colour=top_colour,
        second_colour=second_colour,
        inner_colour=_clothes_unlike(stream, top_colour),
        sleeve_colour=second_colour if stream.chance(22) else top_colour,
        bottom=BOTTOMS[stream.weighted((44, 20, 14, 22))],
        bottom_colour=_clothes(stream),
        side_stripe=_clothes(stream) if stream.chance(22) else None,
        shoes=_clothes(stream),
        chest_mark=MARKS[stream.weighted((46, 13, 13, 12, 8, 8))],
        chest_side=stream.choice((-230, 0, 230)),
        back_mark=MARKS[stream.weighted((46, 12, 14, 12, 8, 8))],
        chest_colour=(mark_colour := _clothes_unlike(stream, top_colour)),
        back_colour=mark_colour,
        bag=BAGS[stream.weighted((44, 24, 18, 14))],
        bag_side=stream.choice((-1, 1)),
        bag_colour=_clothes_unlike(stream, top_colour),
        scarf=_clothes_unlike(stream, top_colour) if stream.chance(14) else None,
        beard=stream.chance(18),
    )


def draw_details(stream: Stream, outfit: Person) -> Person:
    """Who looks like `outfit` but for details that belong to one side each and are drawn independently.

    They are colour and print of the chest, those of the back, and stripes down both sleeves and both trouser legs, of
    which front and back show the edges only.
    """
    return replace(
        outfit,
        top="sweater",
        pattern="plain",
        bottom="trousers",
        haircut="short",
        bag="none",
        scarf=None,
        beard=False,
        chest_mark=stream.choice(MARKS[1:]),
        chest_side=0,
        chest_size=200,
        chest_panel=(chest := _clothes_unlike(stream, outfit.top_colour)),
        chest_colour=_clothes_unlike(stream, chest),
        back_mark=stream.choice(MARKS[1:]),
        back_panel=(back := _clothes_unlike(stream, outfit.top_colour)),
        back_colour=_clothes_unlike(stream, back),
        sleeve_stripe=_clothes_unlike(stream, outfit.sleeve_colour),
        side_stripe=_clothes_unlike(stream, outfit.bottom_colour),
    )
