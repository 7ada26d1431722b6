"""Images inside a page: small JPEGs as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

HEIGHT = 128
"""Pixels that a picture is high, at most."""


class Pictures:
    """Reads images and counts those that cannot be read.

    Args:
        load: the image of an index; raises OSError where it cannot be read.
    """

    def __init__(self, load: Callable[[int], Image.Image] | None) -> None:
        self.load = load
        self.missing: dict[int, str] = {}
        self._uris: dict[int, str] = {}

    def image(self, index: int) -> Image.Image | None:
        """The image, None if it cannot be read or there are none."""
        if self.load is None or index in self.missing:
            return None
        try:
            return self.load(index)
        except OSError as error:
            self.missing[index] = str(error)
            return None

    def uri(self, index: int) -> str:
        """The image as a data URI, "" if it cannot be read."""
        if index not in self._uris:
            image = self.image(index)
            self._uris[index] = "" if image is None else data_uri(image)
        return self._uris[index]


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG of up to ``HEIGHT`` pixels, in a data URI."""
    image = image.copy()
    image.thumbnail((2 * HEIGHT, HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def overlay(image: Image.Image, activation: np.ndarray) -> Image.Image:
    """An image with an activation map [h, w] over it, the map's own maximum the brightest."""
    from matplotlib import colormaps

    top = float(activation.max())
    heat = Image.fromarray((255 * activation / top if top > 0 else 0 * activation).astype(np.uint8))
    heat = heat.resize(image.size, Image.Resampling.BILINEAR)
    coloured = Image.fromarray((255 * colormaps["inferno"](np.asarray(heat))[..., :3]).astype(np.uint8))
    return Image.blend(image.convert("RGB"), coloured, 0.55)
