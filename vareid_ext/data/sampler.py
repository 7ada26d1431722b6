"""Batches of P identities with K images each, and the keys that make augmentation repeatable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from vareid_ext.data.random_stream import Stream
from vareid_ext.data.text_files import shown
from vareid_ext.data.types import ImageList

SPREADABLE = ("viewpoint", "camera")


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of a batch: its index in the image list, and the key of its augmentation."""

    index: int
    key: int


class PKSampler(Sampler[list[Draw]]):
    """A batch sampler: `identities_per_batch` identities, `instances` images of each, next to one another.

    The batches are a pure function of the arguments and the epoch (`set_epoch`), whatever ran before. In an epoch the
    identities are gone through in random order again and again, none twice in a batch. An identity's images are used up
    before any is used again; one with fewer than `instances` images is repeated within its group.

    Args:
        images: the training images, N of them; its identities, viewpoints and cameras count.
        identities_per_batch: P, at least 1 and at most the number of identities over `world_size`.
        instances: images per identity, at least 1.
        spread: which of "viewpoint", "camera" an identity's images in a batch should differ in, the more important
            first; empty for none. Unknown ones (-1) count as one more value.
        seed: an integer in [0, 2^63).
        batches_per_epoch: at least 1; None takes N / (P * instances * world_size), rounded down, but at least 1.
        rank, world_size: which share of each global batch of world_size * P identities this process gets.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        identities_per_batch: int,
        instances: int,
        spread: Sequence[str] = (),
        seed: int = 0,
        batches_per_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("identities_per_batch", identities_per_batch), ("instances", instances)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise ValueError(f"seed: {shown(seed)} was given; allowed are integers in [0, 2^63)")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), the world size, got {rank}")
        unknown = [name for name in spread if name not in SPREADABLE]
        if unknown:
            raise ValueError(f"spread must be out of {', '.join(SPREADABLE)}, got {unknown[0]!r}")
        numbers = np.unique(images.identity)
        if identities_per_batch * world_size > numbers.size:
            raise ValueError(
                f"identities_per_batch must be at most {numbers.size // world_size}, for {numbers.size} identities "
                f"shared by {world_size} processes, got {identities_per_batch}"
            )
        if batches_per_epoch is None:
            batches_per_epoch = max(1, len(images) // (identities_per_batch * instances * world_size))
        if batches_per_epoch < 1:
            raise ValueError(f"batches_per_epoch must be at least 1, got {batches_per_epoch}")
        self.identities_per_batch = identities_per_batch
        self.instances = instances
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0
        order = np.argsort(images.identity, kind="stable")
        starts = np.searchsorted(images.identity[order], numbers)
        self._images_of = np.split(order, starts[1:])
        self._spread = [np.asarray(getattr(images, name)) for name in spread]

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration gives, from its batch `start_batch` on (to resume within it)."""
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch must be in [0, {self.batches_per_epoch}], got {start_batch}")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches that the next iteration gives."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, start = self.epoch, self.start_batch
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        left: list[list[int]] = [[] for _ in self._images_of]
        waiting: list[int] = []
        share = self.identities_per_batch
        for batch in range(self.batches_per_epoch):
            if len(waiting) < share * self.world_size:
                # What is left of the last round waits for the next epoch: a batch never straddles two rounds, so that
                # no identity is in it twice.
                waiting = generator.permutation(len(self._images_of)).tolist()
            everyone, waiting = waiting[: share * self.world_size], waiting[share * self.world_size :]
            # All groups are drawn in every process, whoever uses them, to keep the processes' random numbers together.
            groups = [self._group(identity, left[identity], generator) for identity in everyone]
            if batch < start:
                continue
            mine = [index for group in groups[self.rank * share : (self.rank + 1) * share] for index in group]
            keys = Stream(self.seed, epoch, batch, self.rank)
            yield [Draw(index, keys.bits() >> 1) for index in mine]

    def _group(self, identity: int, left: list[int], generator: np.random.Generator) -> list[int]:
        """`instances` images of an identity, taken out of those `left`, as different as the spread asks for."""
        group: list[int] = []
        for _ in range(self.instances):
            if not left:
                left.extend(generator.permutation(self._images_of[identity]).tolist())
            # `left` is in random order, so that the first of several equally good ones is a random one.
            best = min(range(len(left)), key=lambda place: self._likeness(left[place], group)) if self._spread else 0
            group.append(left.pop(best))
        return group

    def _likeness(self, index: int, group: list[int]) -> list[int]:
        return [sum(int(values[index] == values[other]) for other in group) for values in self._spread]
