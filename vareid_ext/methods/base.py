"""What every method is: one module that owns all that is trained, and gives the losses and the features of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from vareid_ext._processes import BatchShare
from vareid_ext.data import Batch

NORMALIZATIONS = ("whole", "parts", "none")
"""How the parts of a test feature are brought to length 1: together, each by itself, or not."""

CLAIMS = ("reproduces", "network as published, schedule assumed", "in the manner of")
"""What a method may claim: network and schedule of the paper or its official code; the network alone; or a reading of
sources that leave parts of the network open."""


class Term(NamedTuple):
    """One loss of a batch. The total is the sum of weight * value, and that is also what is logged."""

    value: Tensor
    """a scalar, not weighted"""
    weight: float = 1.0


@dataclass(frozen=True)
class TrainingClasses:
    """What a method's heads are made for: the identities and viewpoints of a training split."""

    identities: int
    """K"""
    viewpoints: int
    """V"""
    subclasses: Tensor
    """bool [K, V], the (identity, viewpoint) pairs that occur"""


@dataclass(frozen=True)
class About:
    """What a method is, and what it reaches: (mAP, rank-1) in percent, not re-ranked."""

    title: str
    """what tables call it, such as "PCB + RPP\""""
    paper: str
    """authors, place and year, such as "Sun et al., ECCV 2018\""""
    claim: str
    """out of ``CLAIMS``"""
    needs: str = ""
    """what it needs beside images and identities: "... in training", "... in training and at test", or for an option
    "... in training with viewpoint_aware"; empty: nothing"""
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """recipe -> the published scores that a run of it is compared with"""
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """recipe -> the scores that a run of it reached, seed 0"""

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS:
            raise ValueError(f"claim: {self.claim!r} was given; allowed are {', '.join(map(repr, CLAIMS))}")


class Method(nn.Module):
    """A way to train and use a re-identification network: the network, its heads and centres, and its losses.

    A method is one file: a frozen dataclass of its settings, which begins with ``name``, and a subclass that implements
    :meth:`forward` and :meth:`features`. ``METHODS`` lists it. Its constructor takes its own settings, those of the
    trunk (:class:`vareid_ext.models.ModelConfig`) and the :class:`TrainingClasses`; random numbers come from torch's
    default generator.
    """

    about: ClassVar[About]
    """what it is"""
    Config: ClassVar[type]
    """its settings, section `method` of the configuration"""
    heads: ClassVar[tuple[str, ...]] = ()
    """names of the parts that belong to the training identities, which the test feature does not need"""
    inputs: ClassVar[tuple[str, ...]] = ()
    """what training reads of a batch beside the images and identities, whatever the settings: "viewpoint", and names of
    extras"""
    test_inputs: ClassVar[tuple[str, ...]] = ()
    """those of the extras in `inputs` that the test feature needs too"""

    needs_whole_identities: ClassVar[tuple[str, ...]] = ()
    """names of the parts whose training compares images of an identity, so that one process needs all of a batch"""
    share: BatchShare | None = None
    """what this process has of the batches in training, where it trains with others; None: all"""
    gather_triplets: bool = True
    """whether triplets are made of the images of all processes"""

    own_pooling: ClassVar[str] = ""
    """what it classifies where it does not use ``model.pooling``, such as "means of rows\""""

    @classmethod
    def inputs_with(cls, config: Any) -> tuple[str, ...]:
        """What training reads with these settings: `inputs`, and with ``viewpoint_aware`` the viewpoint."""
        aware = ("viewpoint",) if getattr(config, "viewpoint_aware", False) else ()
        return tuple(dict.fromkeys((*cls.inputs, *aware)))

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The losses of a batch, by name. Float32: see :func:`full_precision`."""
        raise NotImplementedError

    def features(self, batch: Batch) -> list[Tensor]:
        """The parts of the test feature of a batch of N images, each float32 [N, d], not normalised."""
        raise NotImplementedError

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that train together, for losses that look at the whole batch; None: this one alone."""
        return None if self.share is None else self.share.group

    @property
    def triplet_group(self) -> ProcessGroup | None:
        """The processes whose images triplets are made of; None: this one alone."""
        return self.group if self.gather_triplets else None

    def at_epoch(self, epoch: int) -> None:
        """Set what changes with the epoch (counted from 0), such as weights of terms."""

    def embed(self, batch: Batch, *, flip: bool = False, normalize: str = "whole") -> Tensor:
        """What retrieval compares.

        Args:
            batch: N images.
            flip: add the features of the mirrored images.
            normalize: out of ``NORMALIZATIONS``.

        Returns:
            Float32 [N, D], the parts side by side.

        Raises:
            ValueError: the batch lacks one of `test_inputs`; `flip` with extras that cannot be mirrored (see
                `Batch.mirrored`).
        """
        missing = [name for name in self.test_inputs if name not in batch.extras]
        if missing:
            raise ValueError(
                f"images: {missing[0]} are needed for the features of {self.about.title}, and these images come without"
            )
        parts = self.features(batch)
        if flip:
            mirrored = self.features(batch.mirrored())
            parts = [a + b for a, b in zip(parts, mirrored, strict=True)]
        parts = [part.float() for part in parts]
        if normalize == "parts":
            parts = [F.normalize(part, dim=1) for part in parts]
        whole = torch.cat(parts, dim=1)
        return F.normalize(whole, dim=1) if normalize == "whole" else whole


def full_precision(tensor: Tensor) -> Any:
    """A block without automatic mixed precision: what compares features and sums over identities needs float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def is_trained(module: nn.Module) -> bool:
    """Whether the stage trains any of a module, such as a head; the loss of one that it does not train is left out."""
    return any(parameter.requires_grad for parameter in module.parameters())
