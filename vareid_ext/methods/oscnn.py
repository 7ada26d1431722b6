"""OSCNN: one layer for each orientation, mixed by the orientation that the network sees (Chen et al., ACIVS 2018).

The paper was not at hand in full: that the feature is a linear combination of orientation-specific ones, weighted by
the estimated orientation, is known; sizes, losses and stages are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext._limits import check_limits
from vareid_ext._processes import whole_batch
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, batch_norm_neck
from vareid_ext.models.parts import embedding, identity_head


@dataclass(frozen=True)
class OscnnConfig:
    """Identity, triplet and orientation losses."""

    name: Literal["oscnn"] = "oscnn"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the cross entropy of identities"""
    dim: int = 512
    """length of the feature"""
    label_epochs: int = 10
    """epochs in which the layers are mixed by the labels, where there are any; afterwards by what the network sees"""
    orientation_weight: float = 0.1
    """weight of the cross entropy of orientations"""
    triplet_weight: float = 1.0
    """weight of the batch-hard triplet term"""
    triplet_margin: float = 0.3
    """margin of the triplet term, in Euclidean distance of features before the neck"""

    def __post_init__(self) -> None:
        weights = ("orientation_weight", "triplet_weight", "triplet_margin")
        check_limits("method", self, dim=(1, 8192), label_epochs=(0, 100_000), **dict.fromkeys(weights, (0, 10_000)))


class Oscnn(Method):
    """The orientations are the viewpoints of the training set; the test feature needs no labels."""

    about = About(
        title="OSCNN",
        paper="Chen et al., ACIVS 2018",
        claim="in the manner of",
        needs="viewpoint labels in training",
        measured={"synthetic-oscnn": (49.8, 58.8)},
    )
    Config = OscnnConfig
    heads = ("head",)
    inputs = ("viewpoint",)

    def __init__(self, config: OscnnConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config, self.by_labels = config, config.label_epochs > 0
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        channels, dim = self.backbone.channels, config.dim
        self.gate = nn.Linear(channels, classes.viewpoints)
        self.oriented = nn.ModuleList(embedding(channels, dim) for _ in range(classes.viewpoints))
        self.neck = batch_norm_neck(dim)
        self.head: nn.Module = (
            ViewpointAwareTerms(dim, classes) if config.viewpoint_aware else identity_head(dim, classes.identities)
        )

    def at_epoch(self, epoch: int) -> None:
        """The layers are mixed by labels at first."""
        self.by_labels = epoch < self.config.label_epochs

    def mixed(self, pooled: Tensor, gate: Tensor) -> Tensor:
        """Pooled [N, C] -> the oriented features [N, dim], weighted by the gate [N, V] and added."""
        oriented = torch.stack([layer(pooled) for layer in self.oriented], dim=1)
        return (gate[:, :, None] * oriented).sum(1)

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss behind the neck, the triplet loss before it, and the loss of orientations."""
        config, pooled = self.config, self.pool(self.backbone(batch.image))
        with full_precision(pooled):
            logits = self.gate(pooled)
            label, known = orientations(batch.viewpoint, logits.shape[1])
            seen = logits.softmax(1)
            gate = torch.where(known[:, None], label, seen.detach()) if self.by_labels else seen
            feature = self.mixed(pooled, gate)
            behind = self.neck(feature)
            if config.viewpoint_aware:
                terms = self.head(behind, batch)
            else:
                terms = {"identity": Term(F.cross_entropy(self.head(behind), batch.identity))}
            triplet = batch_hard_triplet(
                feature, batch.identity, margin=config.triplet_margin, group=self.triplet_group
            )
            # A mean over the known ones of the whole batch.
            logits, label, known = (whole_batch(x, self.group) for x in (logits, label, known))
            orientation = F.cross_entropy(logits, label, reduction="none")[known].sum() / known.sum().clamp(min=1)
            return terms | {
                "triplet": Term(triplet, config.triplet_weight),
                "orientation": Term(orientation, config.orientation_weight),
            }

    def features(self, batch: Batch) -> list[Tensor]:
        """The feature behind the neck, [N, dim]."""
        pooled = self.pool(self.backbone(batch.image))
        with full_precision(pooled):
            return [self.neck(self.mixed(pooled, self.gate(pooled).softmax(1)))]


def orientations(viewpoint: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Labels [N], -1 for unknown, or distributions [N, V] -> distributions [N, V], and bool [N] which are known."""
    if viewpoint.ndim == 2:
        return viewpoint.float(), torch.ones(len(viewpoint), dtype=torch.bool, device=viewpoint.device)
    return F.one_hot(viewpoint.clamp(min=0), views).float(), viewpoint >= 0
