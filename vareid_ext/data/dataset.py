"""From an image list to batches of tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vareid_ext.data.sampler import Draw
from vareid_ext.data.types import ImageList


@dataclass(frozen=True)
class Batch:
    """N images with their labels.

    Attributes:
        image: float32 [N, 3, H, W].
        identity: int64 [N].
        camera: int64 [N], -1 unknown.
        viewpoint: int64 [N], -1 unknown; or with soft labels float32 [N, V], rows that sum to 1.
        index: int64 [N], which images of the list these are.
    """

    image: Tensor
    identity: Tensor
    camera: Tensor
    viewpoint: Tensor
    index: Tensor

    def __len__(self) -> int:
        return self.image.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(*(getattr(self, entry.name).to(device, non_blocking=non_blocking) for entry in fields(self)))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by DataLoader with pin_memory=True)."""
        return Batch(*(getattr(self, entry.name).pin_memory() for entry in fields(self)))


class ReidDataset(Dataset[Batch]):
    """The images of a list, transformed, one at a time, as batches of one that `collate` joins.

    Indexed with an integer, random transforms draw from torch's default generator as it stands. Indexed with a
    `Draw`, they draw from one seeded with its key, so that the result is the same in any worker and in any order.
    """

    def __init__(self, images: ImageList, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | Draw) -> Batch:
        """The image at an index or of a draw. Raises IndexError outside 0..N-1, OSError if it cannot be read."""
        index, key = (item.index, item.key) if isinstance(item, Draw) else (int(item), None)
        picture = self.images.load(index)
        if key is None:
            image = self.transform(picture)
        else:
            state = torch.default_generator.get_state()
            torch.default_generator.manual_seed(key)
            try:
                image = self.transform(picture)
            finally:
                torch.default_generator.set_state(state)
        weight = self.images.viewpoint_weight
        return Batch(
            image[None],
            torch.tensor([self.images.identity[index]]),
            torch.tensor([self.images.camera[index]]),
            torch.tensor([self.images.viewpoint[index]])
            if weight is None
            else torch.from_numpy(weight[index][None].copy()),
            torch.tensor([index]),
        )


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch out of several, in order. Raises ValueError when there are none."""
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    return Batch(*(torch.cat([getattr(sample, entry.name) for sample in samples]) for entry in fields(Batch)))


def worker_init(worker: int) -> None:
    """Seed Python's and NumPy's generators of a DataLoader worker from torch's, which DataLoader has seeded."""
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
