"""DSA-reID: a network guided by densely aligned images of the body's parts (after Zhang et al., CVPR 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.losses.part_cross_entropy import part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, embedding, identity_head
from vareid_ext.models.guide import GROUPS, Guide
from vareid_ext.models.masks import pool_masks

STREAMS = ("image", "guide", "fused")


@dataclass(frozen=True)
class DsaConfig:
    """Cross entropy and triplet terms of the image's features, the guide's, and their sums."""

    name: Literal["dsa"] = "dsa"
    """the method"""
    viewpoint_aware: bool = False
    """add the viewpoint-aware loss of the whole image's feature"""
    stage: str = "layer4"
    """the stage of the backbone that the whole image and its regions have a copy of each, with all that follows"""
    dim: int = 256
    """length of a region's feature, a multiple of 8"""
    part_size: int = 32
    """height and width of the images of the body's parts"""
    triplet_margin: float = 0.3
    """margin of the triplet terms, in Euclidean distance"""

    def __post_init__(self) -> None:
        check_limits("method", self, dim=(8, 8192), part_size=(8, 256), triplet_margin=(0, 10_000))
        if self.dim % 8:
            raise ValueError(f"method.dim: {self.dim} was given; allowed are multiples of 8")


class StreamHeads(nn.Module):
    """The classifiers of one stream: of the whole and of each region."""

    def __init__(self, channels: int, dim: int, identities: int) -> None:
        super().__init__()
        self.whole = identity_head(channels, identities)
        self.regions = nn.ModuleList(identity_head(dim, identities) for _ in GROUPS)

    def forward(self, whole: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C], [N, 8, d] -> logits [N, K], [N, 8, K]."""
        heads = zip(self.regions, regions.unbind(1), strict=True)
        return self.whole(whole), torch.stack([head(region) for head, region in heads], dim=1)


class Dsa(Method):
    """The test feature is that of the image and of its regions; the guide is for training only."""

    about = About(
        title="DSA-reID",
        paper="Zhang et al., CVPR 2019",
        claim="in the manner of",
        needs="DensePose maps in training; viewpoint labels in training with viewpoint_aware",
        published={"market1501-dsa": (87.6, 95.7), "dukemtmc-dsa": (74.3, 86.2)},
        measured={"synthetic-dsa": (35.3, 40.4)},
    )
    Config = DsaConfig
    heads = ("guide", "guide_whole", "stream_heads", "aware")
    inputs = ("iuv",)

    def __init__(self, config: DsaConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config, self.pool = config, POOLING[model.pooling]()
        self.backbone = Backbone.of(model)
        channels, regions = self.backbone.channels, len(GROUPS)
        self.branches = self.backbone.split_off(config.stage, copies=2, field="method.stage")
        self.masks = nn.Conv2d(channels, regions, 1)
        self.regions = nn.ModuleList(embedding(channels, config.dim) for _ in GROUPS)
        self.guide = Guide(config.dim, config.part_size)
        self.guide_whole = nn.Linear(regions * config.dim, channels)
        self.stream_heads = nn.ModuleDict(
            {name: StreamHeads(channels, config.dim, classes.identities) for name in STREAMS}
        )
        self.aware = ViewpointAwareTerms(channels, classes) if config.viewpoint_aware else None

    def _image_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the whole image [N, C], and of its regions [N, 8, d], whose masks the network predicts."""
        shared = self.backbone(batch.image)
        whole, local = (branch(shared) for branch in self.branches)
        masks = self.masks(local).softmax(1)
        with full_precision(whole):
            pooled = pool_masks(local, masks).unbind(1)
            regions = [embed(region) for embed, region in zip(self.regions, pooled, strict=True)]
            return self.pool(whole), torch.stack(regions, dim=1)

    def forward(self, batch: Batch) -> dict[str, Term]:
        """Of image, guide and their sum: the identity and the triplet loss of the whole, the identity loss of the
        regions (their mean)."""
        whole, regions = self._image_features(batch)
        guide_regions = self.guide(batch.image, batch.extras["iuv"])
        terms = {}
        with full_precision(whole):
            guide_whole = self.guide_whole(guide_regions.flatten(1))
            wholes = (whole, guide_whole, whole + guide_whole)
            parts = (regions, guide_regions, regions + guide_regions)
            for name, feature, region in zip(STREAMS, wholes, parts, strict=True):
                logits, region_logits = self.stream_heads[name](feature, region)
                identity = nn.functional.cross_entropy(logits, batch.identity)
                triplet = batch_hard_triplet(
                    feature, batch.identity, margin=self.config.triplet_margin, group=self.triplet_group
                )
                terms[f"{name} identity"] = Term(identity)
                terms[f"{name} triplet"] = Term(triplet)
                terms[f"{name} regions"] = Term(part_cross_entropy(region_logits, batch.identity))
        return terms if self.aware is None else terms | self.aware(whole, batch)

    def features(self, batch: Batch) -> list[Tensor]:
        """Of the whole image [N, C] and of each region [N, d], from the image alone."""
        whole, regions = self._image_features(batch)
        return [whole, *regions.unbind(1)]
