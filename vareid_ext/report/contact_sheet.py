"""A picture of many small pictures in titled rows, to look at what images were labelled as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

_HEIGHT, _WIDTH, _GAP, _LINE = 128, 64, 6, 14
_WRONG = (200, 30, 30)


class Shown(NamedTuple):
    """A picture of a sheet."""

    picture: Image.Image
    caption: str
    """a word or number below it"""
    wrong: bool = False
    """gets a red frame"""


def contact_sheet(rows: Sequence[tuple[str, Sequence[Shown]]]) -> Image.Image:
    """An RGB picture of the rows (title, pictures), one below the other; pictures are shrunk or grown to 128 x 64."""
    columns = max(1, *(len(pictures) for _, pictures in rows))
    row_height = _LINE + _HEIGHT + _LINE + _GAP
    size = (_GAP + columns * (_WIDTH + _GAP), _GAP + len(rows) * row_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(rows):
        top = _GAP + number * row_height
        draw.text((_GAP, top), title, fill="black")
        for column, shown in enumerate(pictures):
            left, upper = _GAP + column * (_WIDTH + _GAP), top + _LINE
            sheet.paste(shown.picture.convert("RGB").resize((_WIDTH, _HEIGHT)), (left, upper))
            if shown.wrong:
                box = (left - 2, upper - 2, left + _WIDTH + 1, upper + _HEIGHT + 1)
                draw.rectangle(box, outline=_WRONG, width=2)
            draw.text((left, upper + _HEIGHT + 1), shown.caption, fill=_WRONG if shown.wrong else "black")
    return sheet
