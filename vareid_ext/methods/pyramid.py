"""Pyramid: all runs of adjacent rows, and a triplet loss that is taken while it falls (Zheng et al., CVPR 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet, part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import Backbone, ModelConfig, PartHeads, pool_rows, row_runs


@dataclass(frozen=True)
class PyramidConfig:
    """The sums of the runs' cross entropies and triplet terms."""

    name: Literal["pyramid"] = "pyramid"
    """the method"""
    rows: int = 6
    """equal rows whose runs are the parts, rows (rows + 1) / 2 of them; must divide the feature map's height"""
    dim: int = 128
    """length of a part's feature"""
    dropout: float = 0.2
    """share of a part's feature that is dropped before its head"""
    triplet_weight: float = 1.0
    """weight of the triplet terms; from random weights a large one lets all features collapse into a point"""
    triplet_margin: float = 1.4
    """margin of the triplet terms, in Euclidean distance of the parts' features"""
    threshold: float = 0.16
    """a step leaves the triplet terms out where their progress over the identity loss's is below this; 0: never"""
    viewpoint_aware: bool = False
    """add the viewpoint-aware loss of the run that is the whole map"""

    def __post_init__(self) -> None:
        check_limits("method", self, rows=(1, 128), dim=(1, 8192), dropout=(0, 0.99))
        weights = ("triplet_weight", "triplet_margin", "threshold")
        check_limits("method", self, **dict.fromkeys(weights, (0, 10_000)))


class DynamicTraining(nn.Module):
    """Whether a step takes the triplet loss beside the identity loss, from how fast the two fall.

    With k the moving average of a loss and p = min(k, k before) / k before, the progress of the loss is
    FL = -(1 - p)^2 ln p: 0 where it does not fall. Without an average from before p is 0.5.

    Source: the authors' first code.
    """

    averages: Tensor

    def __init__(self, threshold: float, share: float = 0.25) -> None:
        super().__init__()
        self.threshold, self.share = threshold, share
        self.register_buffer("averages", torch.zeros(2))

    @torch.no_grad()
    def forward(self, identity: Tensor, triplet: Tensor) -> Tensor:
        """The two losses of a step, float32 scalars -> bool scalar: whether FL_triplet >= threshold * FL_identity.

        A product, so that where the identity loss does not fall (a quotient would be x / 0) both are taken.
        """
        before = self.averages.clone()
        self.averages.lerp_(torch.stack([identity, triplet]), self.share)
        p = torch.where(before > 0, torch.minimum(self.averages, before) / before, 0.5)
        progress = -((1 - p) ** 2) * p.log()
        return progress[1] >= self.threshold * progress[0]


class Pyramid(Method):
    """The test feature is all parts' features side by side."""

    about = About(
        title="Pyramid",
        paper="Zheng et al., CVPR 2019",
        claim="reproduces",
        needs="viewpoint labels in training with viewpoint_aware",
        published={"market1501-pyramid": (88.2, 95.7), "dukemtmc-pyramid": (79.0, 89.0)},
        measured={"synthetic-pyramid": (44.8, 56.0)},
    )
    Config = PyramidConfig
    heads = ("parts.head", "aware")
    own_pooling = "sums of mean and maximum of rows"

    def __init__(self, config: PyramidConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.of(model)
        count = config.rows * (config.rows + 1) // 2
        self.parts = PartHeads(count, self.backbone.channels, config.dim, classes.identities, bias=True, head_bias=True)
        self.dropout = nn.Dropout(config.dropout)
        self.aware = ViewpointAwareTerms(config.dim, classes) if config.viewpoint_aware else None
        self.dynamic = DynamicTraining(config.threshold)

    def features(self, batch: Batch) -> list[Tensor]:
        """The parts' features, P of [N, dim]."""
        x = self.backbone(batch.image)
        with full_precision(x):
            return self.parts(pool_rows(x, row_runs(x.shape[2], self.config.rows), "sum"))

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity and the triplet loss of the parts, 0 in steps that leave the latter out; weights make sums."""
        features = self.features(batch)
        with full_precision(features[0]):
            logits = self.parts.logits(self.dropout(feature) for feature in features)
            identity = part_cross_entropy(logits, batch.identity)
            margin = self.config.triplet_margin
            triplet = torch.stack(
                [batch_hard_triplet(f, batch.identity, margin=margin, group=self.triplet_group) for f in features]
            ).mean()
            losses = torch.stack([identity, triplet]).detach()
            joint = self.dynamic(*(losses if self.share is None else self.share.mean(losses)))
            terms = {
                "identity": Term(identity, len(features)),
                "triplet": Term(torch.where(joint, triplet, 0.0), self.config.triplet_weight * len(features)),
            }
        return terms if self.aware is None else terms | self.aware(features[-1], batch)
