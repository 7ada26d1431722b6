"""Further inputs of an image, such as keypoints and masks, that are moved, cut and erased exactly as the image is.

torchvision's transforms (v2) apply one geometry to an image and everything beside it that is a `TVTensor`. The two
classes here are such tensors, with the kernels of the operations that `build_transform` uses: resize, horizontal_flip,
pad, crop and erase. An operation without a kernel leaves them as they are, so a new one needs a kernel for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vareid_ext.data.types import MAX_PIXELS, ReidData
from vareid_ext.files.features import open_arrays

BODY_PAIRS = ((2, 5), (3, 6), (4, 7), (8, 11), (9, 12), (10, 13))
"""Right and left of the 14 joints head, neck, shoulder, elbow, wrist (right, then left), hip, knee, ankle (likewise),
the order of convolutional pose machines."""

SURFACE_PAIRS = tuple((part, part + 1) for part in range(3, 25, 2))
"""Right and left, or left and right, of DensePose's 24 parts; 1 and 2, the back and the front, are their own."""

Kind = Literal["keypoints", "mask", "labels", "map", "iuv", "view"]
_SHAPES = {
    "keypoints": "[P, 3] (x, y, confidence)",
    "mask": "[H, W] or [C, H, W]",
    "labels": "whole numbers [H, W] or [C, H, W]",
    "map": "[H, W] or [C, H, W]",
    "iuv": "whole numbers [3, H, W]",
    "view": "unsigned [3, H, W] or [V, 3, H, W]",
}
_PARTS = 24
_SUFFIXES = (".npy", ".npz", ".png")


class Form(NamedTuple):
    """What an extra input of a known name is."""

    kind: Kind
    neutral: np.ndarray
    """the entry of an image of which nothing is known"""
    pairs: tuple[tuple[int, int], ...] = ()


EXTRAS: dict[str, Form] = {
    "keypoints": Form("keypoints", np.zeros((14, 3), np.float32), BODY_PAIRS),
    "parsing": Form("map", np.array([1, 0, 0, 0, 0], np.float32).reshape(5, 1, 1)),
    "iuv": Form("iuv", np.zeros((3, 1, 1), np.uint8), SURFACE_PAIRS),
    "views": Form("view", np.zeros((8, 3, 1, 1), np.uint8)),
}
"""The extra inputs that methods read, by name, each always in the same form:

- keypoints: [14, 3], the joints of `BODY_PAIRS`; neutral: none is seen.
- parsing: float32 [5, H, W], the shares of foreground, head, upper body, lower body and shoes in [0, 1]; neutral: all
  is foreground.
- iuv: uint8 [3, H, W], DensePose's part, U and V; neutral: no part.
- views: uint8 [8, 3, H, W], generated pictures of the same person from eight sides; neutral: black.
"""


@dataclass(frozen=True, eq=False)
class Extra:
    """One further input of each of N images, read when it is needed.

    ========= ================================ ====================== ==========================================
    kind      an entry                         resized                flipped
    ========= ================================ ====================== ==========================================
    keypoints [P, 3]: x and y in pixels of the exactly                mirrored, and paired rows exchanged
              image file, whose first pixel
              has its middle at (0, 0);
              confidence, 0 where missing
    mask      [H, W] or [C, H, W]              to the nearest         mirrored, and paired channels exchanged
    labels    [H, W] or [C, H, W], whole       to the nearest         mirrored, and paired values of the first
              numbers from 0 to 255                                   channel exchanged
    map       [H, W] or [C, H, W]              bilinear, antialiased  mirrored, and paired channels exchanged
    iuv       [3, H, W], DensePose's part I    to the nearest         mirrored, paired parts exchanged, and U
              from 0 to 24, U and V to 255                            counted from the other side
    view      uint8 [3, H, W] or               as the image           mirrored
              [V, 3, H, W], RGB pictures
    ========= ================================ ====================== ==========================================

    Maps of any size cover the whole image. Where the image is padded or erased they are 0 (views: what the image is
    there), and keypoints that lie there or outside the image get confidence 0. Views are normalised as the image is.

    Attributes:
        kind: as above.
        entries: N arrays, or paths of .npy and .npz files of one array and of .png files (palettes keep their indices,
            colours come as channels), in any mixture; or what `loader` takes.
        pairs: rows, channels or values that a mirror exchanges, such as left and right.
        loader: makes an array of an entry; it is given the image's height and width too.
    """

    kind: Kind
    entries: Sequence[Any]
    pairs: tuple[tuple[int, int], ...] = ()
    loader: Callable[[Any, int, int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r} was given; allowed are {', '.join(get_args(Kind))}")

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, indices: Iterable[int]) -> Extra:
        """Those of the images at `indices`, in that order."""
        return replace(self, entries=[self.entries[i] for i in indices])

    def load(self, index: int, height: int, width: int) -> Tensor:
        """The entry of an image that is `height` x `width` pixels, ready to be transformed with it.

        Raises OSError, naming the file, where it cannot be read, and ValueError for another shape or kind of values.
        """
        entry = self.entries[index]
        is_path = isinstance(entry, str | os.PathLike)
        if self.loader is not None:
            value = self.loader(entry, height, width)
        else:
            value = np.array(read_array(Path(entry)) if is_path else entry)  # a copy: files may be read-only maps
        if self.kind != "keypoints" and value.ndim == 2:
            value = value[None]
        fits = value.ndim == 3
        if self.kind == "keypoints":
            fits = value.ndim == 2 and value.shape[1] == 3
        elif self.kind == "iuv":
            fits = value.ndim == 3 and len(value) == 3
        elif self.kind == "view":
            fits = value.ndim in (3, 4) and value.shape[-3] == 3
        kinds = {"view": "u", "labels": "bui", "iuv": "ui"}.get(self.kind, "bufi")
        where = f"{self.kind} of {entry if is_path else f'image {index}'}"
        if value.dtype.kind not in kinds or not value.size or not fits:
            raise ValueError(f"{where}: {value.dtype} {list(value.shape)} was given; {_SHAPES[self.kind]} is needed")
        if self.kind in ("labels", "iuv", "view") and not 0 <= value.min() <= value.max() <= 255:
            raise ValueError(f"{where}: values from {value.min()} to {value.max()} were given; allowed are 0 to 255")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{where}: infinite or undefined values were given; allowed are finite ones")
        if self.kind == "iuv" and value[0].max() > _PARTS:
            raise ValueError(f"{where}: part {value[0].max()} was given; allowed are parts from 0 to {_PARTS}")
        rows = {"labels": 256, "iuv": _PARTS + 1, "view": 0}.get(self.kind, len(value))
        if any(not 0 <= row < rows for pair in self.pairs for row in pair):
            raise ValueError(f"{where}: pairs {self.pairs} were given; allowed are integers from 0 to {rows - 1}")
        if self.kind == "view":
            return tv_tensors.Image(torch.from_numpy(value.astype(np.uint8)))
        if self.kind == "keypoints":
            return Keypoints.wrap(torch.from_numpy(value.astype(np.float32)), (height, width), self.pairs)
        kept = np.uint8 if self.kind in ("labels", "iuv") or value.dtype in (np.bool_, np.uint8) else np.float32
        return DenseMap.wrap(torch.from_numpy(value.astype(kept)), self.kind, self.pairs)


def read_array(path: Path) -> np.ndarray:
    """The array in a .npy or .npz file of one array or in a .png file. Raises OSError, naming the file."""
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            (found,) = open_arrays(path).values()
            return np.asarray(found.read())
        if path.suffix.lower() != ".png":
            raise ValueError(f"suffix {path.suffix!r} was given; allowed are {', '.join(_SUFFIXES)}")
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} in all are allowed")
            array = np.asarray(image)
        return array if array.ndim == 2 else array.transpose(2, 0, 1)
    except Exception as error:  # the decoders fail on damaged files with whatever they happen to run into
        raise OSError(f"cannot read {path}: {str(error) or type(error).__name__}") from error


def with_extra(
    data: ReidData,
    name: str,
    folder: str | os.PathLike[str],
    kind: Kind,
    *,
    root: str | os.PathLike[str],
    pairs: tuple[tuple[int, int], ...] = (),
) -> ReidData:
    """`data` with the extra input `name`, whose files mirror the images'.

    The entry of the image `<root>/a/b.jpg` is `<folder>/a/b.npy`, `.npz` or `.png`.

    Raises:
        FileNotFoundError: an image has no such file; the message counts them and names the first.
    """
    missing: list[Path] = []

    def find(path: str) -> str:
        stem = Path(folder, os.path.relpath(path, root)).with_suffix("")
        found = next((f"{stem}{suffix}" for suffix in _SUFFIXES if os.path.isfile(f"{stem}{suffix}")), "")
        if not found:
            missing.append(stem)
        return found

    extras = {split: Extra(kind, [find(path) for path in images.paths], pairs) for split, images in data.splits.items()}
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing):,} of {sum(map(len, extras.values())):,} images have no file in {folder}, as "
            f"{missing[0]} with {', '.join(_SUFFIXES)}"
        )
    lists: dict[str, Any] = {
        split: replace(images, extras={**images.extras, name: extras[split]}) for split, images in data.splits.items()
    }
    return replace(data, **lists)


def _exchanged(length: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    order = list(range(length))
    for one, other in pairs:
        order[one], order[other] = other, one
    return order


def mirrored(value: Tensor, kind: Kind, pairs: Sequence[tuple[int, int]], width: int) -> Tensor:
    """What belongs to the mirrored image, `width` pixels wide: of one image, or of any number of them [..., *]."""
    if kind == "keypoints":
        x = width - 1 - value[..., :1]
        return torch.cat([x, value[..., 1:]], dim=-1)[..., _exchanged(value.shape[-2], pairs), :]
    flat = value.flip(-1)
    if kind in ("labels", "iuv"):
        table = torch.tensor(_exchanged(256, pairs), dtype=flat.dtype, device=flat.device)
        first, *others = flat.split(1, dim=-3)
        if kind == "iuv":
            others[0] = torch.where(first > 0, 255 - others[0], others[0])
        return torch.cat([table[first.long()], *others], dim=-3)
    return flat[..., _exchanged(flat.shape[-3], pairs), :, :] if pairs else flat


class Keypoints(tv_tensors.TVTensor):
    """float32 [P, 3]: x, y, confidence, in an image of `canvas` (height, width) pixels."""

    canvas: tuple[int, int]
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def wrap(cls, tensor: Tensor, canvas: tuple[int, int], pairs: tuple[tuple[int, int], ...]) -> Keypoints:
        """`tensor` as keypoints."""
        points = tensor.as_subclass(cls)
        points.canvas, points.pairs = canvas, pairs
        return points

    def moved(self, scale: Sequence[float], shift: Sequence[float], canvas: tuple[int, int]) -> Keypoints:
        """x and y times `scale` plus `shift`, measured from the image's corner; outside `canvas` none is seen."""
        points = self.as_subclass(Tensor).clone()
        corner = (points[:, :2] + 0.5) * torch.tensor(scale) + torch.tensor(shift)
        points[:, :2] = corner - 0.5
        height, width = canvas
        outside = (corner < 0).any(dim=1) | (corner >= torch.tensor([width, height])).any(dim=1)
        points[outside, 2] = 0
        return Keypoints.wrap(points, canvas, self.pairs)


class DenseMap(tv_tensors.TVTensor):
    """uint8 or float32 [C, H, W] of the kind mask, labels, map or iuv."""

    kind: Kind
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def wrap(cls, tensor: Tensor, kind: Kind, pairs: tuple[tuple[int, int], ...]) -> DenseMap:
        """`tensor` as a map."""
        dense = tensor.as_subclass(cls)
        dense.kind, dense.pairs = kind, pairs
        return dense

    def with_values(self, tensor: Tensor) -> DenseMap:
        """A map of the same kind."""
        return DenseMap.wrap(tensor, self.kind, self.pairs)


@F.register_kernel(F.resize, Keypoints)
def _resize_keypoints(points: Keypoints, size: Sequence[int], **_: Any) -> Keypoints:
    height, width = size
    scale = (width / points.canvas[1], height / points.canvas[0])
    return points.moved(scale, (0.0, 0.0), (height, width))


@F.register_kernel(F.horizontal_flip, Keypoints)
def _flip_keypoints(points: Keypoints) -> Keypoints:
    flipped = mirrored(points.as_subclass(Tensor), "keypoints", points.pairs, points.canvas[1])
    return Keypoints.wrap(flipped, points.canvas, points.pairs)


@F.register_kernel(F.pad, Keypoints)
def _pad_keypoints(points: Keypoints, padding: int, **_: Any) -> Keypoints:
    height, width = points.canvas
    shift = (float(padding), float(padding))
    return points.moved((1.0, 1.0), shift, (height + 2 * padding, width + 2 * padding))


@F.register_kernel(F.crop, Keypoints)
def _crop_keypoints(points: Keypoints, top: int, left: int, height: int, width: int) -> Keypoints:
    return points.moved((1.0, 1.0), (-float(left), -float(top)), (height, width))


@F.register_kernel(F.erase, Keypoints)
def _erase_keypoints(points: Keypoints, i: int, j: int, h: int, w: int, **_: Any) -> Keypoints:
    seen = points.as_subclass(Tensor).clone()
    x, y = (seen[:, :2] + 0.5).unbind(dim=1)
    seen[(j <= x) & (x < j + w) & (i <= y) & (y < i + h), 2] = 0
    return Keypoints.wrap(seen, points.canvas, points.pairs)


@F.register_kernel(F.resize, DenseMap)
def _resize_map(dense: DenseMap, size: Sequence[int], **_: Any) -> DenseMap:
    nearest = dense.kind != "map"
    interpolation = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
    return dense.with_values(
        F.resize(dense.as_subclass(Tensor), list(size), interpolation=interpolation, antialias=not nearest)
    )


@F.register_kernel(F.horizontal_flip, DenseMap)
def _flip_map(dense: DenseMap) -> DenseMap:
    return dense.with_values(mirrored(dense.as_subclass(Tensor), dense.kind, dense.pairs, dense.shape[-1]))


@F.register_kernel(F.pad, DenseMap)
def _pad_map(dense: DenseMap, padding: int, **_: Any) -> DenseMap:
    return dense.with_values(F.pad(dense.as_subclass(Tensor), [padding]))


@F.register_kernel(F.crop, DenseMap)
def _crop_map(dense: DenseMap, top: int, left: int, height: int, width: int) -> DenseMap:
    return dense.with_values(F.crop(dense.as_subclass(Tensor), top, left, height, width))


@F.register_kernel(F.erase, DenseMap)
def _erase_map(dense: DenseMap, i: int, j: int, h: int, w: int, **_: Any) -> DenseMap:
    plain = dense.as_subclass(Tensor).clone()
    plain[:, i : i + h, j : j + w] = 0
    return dense.with_values(plain)
