"""Two-branch VA-reID: what the training logs with the published VA-reID rows ran (they are not the paper's figure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_below, check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet, smoothed_viewpoint_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import view_weight_at
from vareid_ext.models import POOLING, Backbone, ModelConfig, batch_norm_neck
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy


@dataclass(frozen=True)
class TwoBranchConfig:
    """An identity branch and a viewpoint branch from one trunk, with fixed label smoothing."""

    name: Literal["two-branch"] = "two-branch"
    """the method"""
    stage: str = "layer4"
    """the stage of the backbone that each branch has a copy of, with all that follows"""
    epsilon: float = 0.1
    """label smoothing of the identity loss, in [0, 1)"""
    other_views: float = 0.3
    """share of the viewpoint target for the identity's other views, in [0, 0.5)"""
    all_pairs: float = 0.1
    """share of the viewpoint target for all (identity, viewpoint) pairs alike, in [0, 0.5)"""
    view_weight: float = 1.0
    """weight of the viewpoint loss"""
    view_weight_late: float = 0.3
    """weight of the viewpoint loss from epoch view_weight_drop on"""
    view_weight_drop: int | None = None
    """epoch at which the weight of the viewpoint loss changes to view_weight_late; none: never"""
    triplet_weight: float = 0.0
    """weight of a batch-hard triplet term on each branch; 0: none"""
    triplet_margin: float = 0.3
    """margin of the triplet terms, in Euclidean distance of features before the neck"""

    def __post_init__(self) -> None:
        check_below("method", self, epsilon=1, other_views=0.5, all_pairs=0.5)
        weights = ("view_weight", "view_weight_late", "triplet_weight", "triplet_margin")
        check_limits("method", self, view_weight_drop=(0, 100_000), **dict.fromkeys(weights, (0, 10_000)))


class TwoBranch(Method):
    """The test feature is both branches' features behind their necks, side by side."""

    about = About(
        title="VA-reID, two branches",
        paper="training logs of Zhu et al., AAAI 2020",
        claim="in the manner of",
        needs="viewpoint labels in training",
        published={"market1501-two-branch": (89.97, 95.87), "dukemtmc-two-branch": (81.48, 91.11)},
        measured={"synthetic-two-branch": (59.4, 73.3)},
    )
    Config = TwoBranchConfig
    heads = ("identity_centers", "viewpoint_centers", "mask")
    inputs = ("viewpoint",)
    mask: Tensor

    def __init__(self, config: TwoBranchConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config, self.view_weight = config, config.view_weight
        self.backbone = Backbone.of(model)
        channels = self.backbone.channels
        self.branches = self.backbone.split_off(config.stage, copies=2, field="method.stage")
        self.pools = nn.ModuleList(POOLING[model.pooling]() for _ in self.branches)
        self.necks = nn.ModuleList(batch_norm_neck(channels) for _ in self.branches)
        self.identity_centers = nn.Parameter(torch.empty(classes.identities, channels))
        self.viewpoint_centers = nn.Parameter(torch.empty(classes.identities, classes.viewpoints, channels))
        for centers in (self.identity_centers, self.viewpoint_centers):
            nn.init.normal_(centers, std=0.001)
        self.register_buffer("mask", classes.subclasses.clone())

    def at_epoch(self, epoch: int) -> None:
        """The weight of the viewpoint loss falls once."""
        self.view_weight = view_weight_at(self.config, epoch)

    def _pooled(self, batch: Batch) -> list[Tensor]:
        shared = self.backbone(batch.image)
        return [pool(branch(shared)) for branch, pool in zip(self.branches, self.pools, strict=True)]

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss of one branch, the viewpoint loss of the other; with a weight a triplet term of each."""
        config, pooled = self.config, self._pooled(batch)
        with full_precision(pooled[0]):
            for_identity, for_viewpoint = (neck(x) for neck, x in zip(self.necks, pooled, strict=True))
            identity_logits = for_identity @ self.identity_centers.T
            viewpoint_logits = for_viewpoint @ self.viewpoint_centers.flatten(0, 1).T
            terms = {
                "identity": Term(
                    identity_cross_entropy(identity_logits, batch.identity, smoothing="uniform", epsilon=config.epsilon)
                ),
                "viewpoint": Term(
                    smoothed_viewpoint_cross_entropy(
                        viewpoint_logits.unflatten(1, self.mask.shape),
                        batch.identity,
                        batch.viewpoint,
                        mask=self.mask,
                        other_views=config.other_views,
                        all_pairs=config.all_pairs,
                    ),
                    self.view_weight,
                ),
            }
            if config.triplet_weight > 0:
                for branch, x in zip(("identity", "viewpoint"), pooled, strict=True):
                    triplet = batch_hard_triplet(
                        x, batch.identity, margin=config.triplet_margin, group=self.triplet_group
                    )
                    terms[f"{branch} triplet"] = Term(triplet, config.triplet_weight)
        return terms

    def features(self, batch: Batch) -> list[Tensor]:
        """The two features behind the necks, [N, C] each."""
        pooled = self._pooled(batch)
        with full_precision(pooled[0]):
            return [neck(x) for neck, x in zip(self.necks, pooled, strict=True)]
