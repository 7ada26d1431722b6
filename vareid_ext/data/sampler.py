"""Batches of images, drawn as P identities x K images or at random, and the keys that make augmentation repeatable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

from vareid_ext._processes import share
from vareid_ext.data.random_stream import Stream
from vareid_ext.data.text_files import shown
from vareid_ext.data.types import ImageList

SPREADABLE = ("viewpoint", "camera")
_MAX_BATCH = 1 << 20
_MAX_BATCHES = 10**9


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of a batch: its index in the image list, and the key of its augmentation."""

    index: int
    key: int


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name}: {shown(value)} was given; allowed are integers from {low:,} to {high:,}")
    return int(value)


def _own(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The share of one of several processes of a batch of so many things, at least one."""
    _whole("world_size", world_size, 1, total)
    return share(total, _whole("rank", rank, 0, world_size - 1), world_size)


class BatchSampler(Sampler[list[Draw]]):
    """What the samplers share: epochs that can be repeated and resumed, a share for each process, keys.

    The batches are a pure function of the arguments and the epoch (`set_epoch`), whatever ran before.

    Attributes:
        batch_size: images in each batch, those of all processes together.
        batches_per_epoch: batches in a whole epoch.
        own: begin and end of what this process has of every batch, in the batch's order.
        description: what a batch is, in words.
    """

    description: str

    def __init__(
        self, num_images: int, batch_size: int, seed: int, batches_per_epoch: int | None, own: tuple[int, int]
    ) -> None:
        if batches_per_epoch is None:
            batches_per_epoch = max(1, num_images // batch_size)
        self.batch_size = batch_size
        self.batches_per_epoch = _whole("batches_per_epoch", batches_per_epoch, 1, _MAX_BATCHES)
        self.seed = _whole("seed", seed, 0, (1 << 63) - 1)
        self.own = own
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration gives, from its batch `start_batch` on (to resume within it)."""
        self.epoch, self.start_batch = epoch, _whole("start_batch", start_batch, 0, self.batches_per_epoch)

    def __len__(self) -> int:
        """Batches that the next iteration gives."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, start = self.epoch, self.start_batch
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        # Every process draws the whole of every batch, used or not, to keep the processes' random numbers together.
        for batch, everyone in enumerate(islice(self._whole_batches(generator), self.batches_per_epoch)):
            if batch >= start:
                keys = Stream(self.seed, epoch, batch, 0)
                draws = [Draw(index, keys.bits() >> 1) for index in everyone]
                yield draws[slice(*self.own)]

    def _whole_batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        """Batches without end, each of batch_size image indices."""
        raise NotImplementedError


class ShuffledSampler(BatchSampler):
    """A batch sampler that goes through all images in random order, each once in an epoch.

    What is left over at the end of a round and fills no batch is dropped. Fewer images than one batch are one batch,
    smaller than asked for.

    Args:
        images: the training images, N of them.
        batch_size: images per batch, at least 1.
        seed: an integer in [0, 2^63).
        batches_per_epoch: at least 1; beyond one round of all images another round begins. None takes one round.
        rank, world_size: this process out of so many, each of which gets its share of the images of every batch, as
            even as can be; at most as many as images.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        batch_size: int,
        seed: int = 0,
        batches_per_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._num_images = len(images)
        batch_size = min(_whole("batch_size", batch_size, 1, _MAX_BATCH), len(images))
        super().__init__(len(images), batch_size, seed, batches_per_epoch, _own(batch_size, rank, world_size))
        self.description = f"{batch_size} images"

    def _whole_batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        size = self.batch_size
        while True:
            order = generator.permutation(self._num_images).tolist()
            for begin in range(0, len(order) - size + 1, size):
                yield order[begin : begin + size]


class PKSampler(BatchSampler):
    """A batch sampler: `identities_per_batch` identities, `instances` images of each, next to one another.

    In an epoch the identities are gone through in random order again and again, none twice in a batch. An identity's
    images are used up before any is used again; one with fewer than `instances` images is repeated within its group.

    Args:
        images: the training images, N of them; its identities, viewpoints and cameras count.
        identities_per_batch: P, at least 1 and at most the number of identities.
        instances: K, images per identity, at least 1; P * K is at most 2^20.
        spread: which of "viewpoint", "camera" an identity's images in a batch should differ in, the more important
            first; empty for none. Unknown ones (-1) count as one more value.
        seed: an integer in [0, 2^63).
        batches_per_epoch: at least 1; None takes N / (P * instances), rounded down, but at least 1.
        rank, world_size: this process out of so many, each of which gets all images of its share of the identities of
            every batch, as even as can be; at most P.
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
        numbers = np.unique(images.identity)
        identities_per_batch = _whole("identities_per_batch", identities_per_batch, 1, numbers.size)
        instances = _whole("instances", instances, 1, _MAX_BATCH // identities_per_batch)
        unknown = [name for name in spread if name not in SPREADABLE]
        if unknown:
            raise ValueError(f"spread: {unknown[0]!r} was given; allowed are {', '.join(SPREADABLE)}")
        begin, end = _own(identities_per_batch, rank, world_size)
        own = begin * instances, end * instances
        super().__init__(len(images), identities_per_batch * instances, seed, batches_per_epoch, own)
        self.description = f"{identities_per_batch} identities x {instances} images"
        self.identities_per_batch = identities_per_batch
        self.instances = instances
        order = np.argsort(images.identity, kind="stable")
        starts = np.searchsorted(images.identity[order], numbers)
        self._images_of = np.split(order, starts[1:])
        self._spread = [np.asarray(getattr(images, name)) for name in spread]

    def _whole_batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        left: list[list[int]] = [[] for _ in self._images_of]
        size = self.identities_per_batch
        while True:
            # A batch never straddles two rounds, so that no identity is in it twice.
            order = generator.permutation(len(self._images_of)).tolist()
            for begin in range(0, len(order) - size + 1, size):
                groups = [self._group(identity, left[identity], generator) for identity in order[begin : begin + size]]
                yield [index for group in groups for index in group]

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
