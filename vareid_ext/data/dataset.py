"""From an image list to batches of tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from vareid_ext.data.extras import EXTRAS, mirrored
from vareid_ext.data.sampler import Draw
from vareid_ext.data.types import UNKNOWN, ImageList
from vareid_ext.data.viewpoint_classes import mirrored_viewpoints


@dataclass(frozen=True)
class Batch:
    """N images with their labels.

    Attributes:
        image: float32 [N, 3, H, W].
        identity: int64 [N].
        camera: int64 [N], -1 unknown.
        viewpoint: int64 [N], -1 unknown; or with soft labels float32 [N, V], rows that sum to 1.
        index: int64 [N], which images of the list these are.
        extras: further inputs by name (see `Extra`): keypoints float32 [N, P, 3], in pixels of `image`; masks and
            maps [N, C, H, W], uint8 or float32; views float32 [N, V, 3, H, W] or [N, 3, H, W].
    """

    image: Tensor
    identity: Tensor
    camera: Tensor
    viewpoint: Tensor
    index: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.image.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by DataLoader with pin_memory=True)."""
        return self._map(Tensor.pin_memory)

    def mirrored(self) -> Batch:
        """The batch of the mirrored images. Raises ValueError where an extra is not one of `EXTRAS`."""
        unknown = [name for name in self.extras if name not in EXTRAS]
        if unknown:
            raise ValueError(
                f"flip: {', '.join(unknown)} cannot be mirrored; allowed beside images: {', '.join(EXTRAS)}"
            )
        extras = {
            name: mirrored(value, EXTRAS[name].kind, EXTRAS[name].pairs, self.image.shape[3])
            for name, value in self.extras.items()
        }
        return replace(self, image=self.image.flip(3), extras=extras)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        extras = {name: function(value) for name, value in values.pop("extras").items()}
        return Batch(**{name: function(value) for name, value in values.items()}, extras=extras)


class Seen(tv_tensors.TVTensor):
    """The viewpoint of an image, int64 [1] or weights [1, V], that changes where the image is mirrored."""

    mirror: tuple[int, ...]

    @classmethod
    def wrap(cls, tensor: Tensor, mirror: tuple[int, ...]) -> Seen:
        """`tensor` as a viewpoint; `mirror` as :func:`mirrored_viewpoints` gives it."""
        seen = tensor.as_subclass(cls)
        seen.mirror = mirror
        return seen


@TF.register_kernel(TF.horizontal_flip, Seen)
def _flip_seen(seen: Seen) -> Seen:
    plain, mirror = seen.as_subclass(Tensor), list(seen.mirror)
    if plain.is_floating_point():
        return Seen.wrap(plain[:, mirror], seen.mirror)
    return Seen.wrap(torch.tensor([*mirror, UNKNOWN])[plain], seen.mirror)


class ReidDataset(Dataset[Batch]):
    """The images of a list, transformed, one at a time, as batches of one that `collate` joins.

    `transform` makes a float32 tensor [3, H, W] of a PIL image; where the list has extras, of (image, extras) a pair.

    Indexed with an integer, random transforms draw from torch's default generator as it stands. Indexed with a
    `Draw`, they draw from one seeded with its key, so that the result is the same in any worker and in any order.

    A transform that mirrors an image also exchanges its viewpoint (see `mirrored_viewpoints`).
    """

    def __init__(self, images: ImageList, transform: Callable[..., Any]) -> None:
        self.images = images
        self.transform = transform
        mirror = mirrored_viewpoints(images.viewpoints)
        self._mirror = mirror if mirror != tuple(range(len(mirror))) else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | Draw) -> Batch:
        """The image at an index or of a draw. Raises IndexError outside 0..N-1, OSError if it cannot be read."""
        index, key = (item.index, item.key) if isinstance(item, Draw) else (int(item), None)
        picture = self.images.load(index)
        weight = self.images.viewpoint_weight
        of_image = self.images.viewpoint[index : index + 1] if weight is None else weight[index : index + 1]
        viewpoint = torch.from_numpy(of_image.copy())
        extras = self.images.load_extras(index, picture.height, picture.width) if self.images.extras else {}
        if self._mirror is not None:
            extras["viewpoint"] = Seen.wrap(viewpoint, self._mirror)
        inputs: tuple[Any, ...] = (picture, extras) if extras else (picture,)
        if key is None:
            result = self.transform(*inputs)
        else:
            state = torch.default_generator.get_state()
            torch.default_generator.manual_seed(key)
            try:
                result = self.transform(*inputs)
            finally:
                torch.default_generator.set_state(state)
        image, extras = result if extras else (result, {})
        return Batch(
            image[None],
            torch.tensor([self.images.identity[index]]),
            torch.tensor([self.images.camera[index]]),
            extras.pop("viewpoint", viewpoint),
            torch.tensor([index]),
            {name: value[None] for name, value in extras.items()},
        )


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch out of several, in order. Raises ValueError when there are none."""
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    extras = {}
    for name in samples[0].extras:
        values = [sample.extras[name] for sample in samples]
        shapes = sorted({tuple(value.shape[1:]) for value in values})
        if len(shapes) > 1:
            raise ValueError(f"extras: {name} of shapes {shapes[0]} and {shapes[-1]} was given; allowed is one shape")
        extras[name] = torch.cat(values)
    names = [entry.name for entry in fields(Batch) if entry.name != "extras"]
    tensors = {name: torch.cat([getattr(sample, name) for sample in samples]) for name in names}
    return Batch(**tensors, extras=extras)


def worker_init(worker: int) -> None:
    """Seed Python's and NumPy's generators of a DataLoader worker from torch's, which DataLoader has seeded."""
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
