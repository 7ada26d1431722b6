"""SRB: a strong baseline, one global feature before and behind a batch-norm neck (Luo et al., CVPRW 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vareid_ext._limits import check_below, check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.losses.center import CenterLoss
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, batch_norm_neck
from vareid_ext.models.parts import identity_head
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy


@dataclass(frozen=True)
class SrbConfig:
    """Smoothed cross entropy behind the neck, triplet and center loss before it."""

    name: Literal["srb"] = "srb"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the smoothed cross entropy"""
    epsilon: float = 0.1
    """label smoothing: the share of the target that goes to all identities alike, in [0, 1)"""
    triplet_weight: float = 1.0
    """weight of the batch-hard triplet term"""
    triplet_margin: float = 0.3
    """margin of the triplet term, in Euclidean distance"""
    center_weight: float = 0.0005
    """weight of the center loss; 0: none"""
    center_rate: float = 0.5
    """learning rate of the centres of the center loss, which the weight does not change"""

    def __post_init__(self) -> None:
        check_below("method", self, epsilon=1)
        limits = dict.fromkeys(("triplet_weight", "triplet_margin", "center_weight"), (0, 10_000))
        check_limits("method", self, center_rate=(0, 1), **limits)


class Srb(Method):
    """The test feature is the one behind the neck."""

    about = About(
        title="SRB",
        paper="Luo et al., CVPRW 2019",
        claim="reproduces",
        needs="viewpoint labels in training with viewpoint_aware",
        published={
            "market1501-srb": (85.9, 94.5),
            "dukemtmc-srb": (76.4, 86.4),
            "market1501-srb-seresnext101": (88.0, 95.0),
            "dukemtmc-srb-seresnext101": (79.0, 88.4),
        },
        measured={"synthetic-srb": (61.5, 73.5)},
    )
    Config = SrbConfig
    heads = ("head", "center")

    def __init__(self, config: SrbConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config, self.aware = config, config.viewpoint_aware
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        channels = self.backbone.channels
        self.neck = batch_norm_neck(channels)
        # The package's smoothing gives epsilon to the other identities alone.
        self.epsilon = config.epsilon * (1 - 1 / classes.identities)
        self.head: nn.Module = (
            ViewpointAwareTerms(channels, classes) if self.aware else identity_head(channels, classes.identities)
        )
        self.center = (
            CenterLoss(classes.identities, channels, rate=config.center_rate) if config.center_weight > 0 else None
        )

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss behind the neck (or what stands in its place), the triplet and the center loss before."""
        config, pooled = self.config, self.pool(self.backbone(batch.image))
        with full_precision(pooled):
            feature = self.neck(pooled)
            if self.aware:
                terms = self.head(feature, batch)
            else:
                identity = identity_cross_entropy(
                    self.head(feature), batch.identity, smoothing="uniform", epsilon=self.epsilon
                )
                terms = {"identity": Term(identity)}
            triplet = batch_hard_triplet(pooled, batch.identity, margin=config.triplet_margin, group=self.triplet_group)
            terms["triplet"] = Term(triplet, config.triplet_weight)
            if self.center is not None:
                terms["center"] = Term(self.center(pooled, batch.identity, group=self.group), config.center_weight)
        return terms

    def features(self, batch: Batch) -> list[Tensor]:
        """The feature behind the neck, [N, C]."""
        pooled = self.pool(self.backbone(batch.image))
        with full_precision(pooled):
            return [self.neck(pooled)]
