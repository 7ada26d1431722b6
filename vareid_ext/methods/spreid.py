"""SPReID: the feature map pooled over the regions of a semantic parsing (Kalayeh et al., CVPR 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, identity_head
from vareid_ext.models.masks import pool_masks


@dataclass(frozen=True)
class SpreidConfig:
    """Cross entropy of one feature: foreground, the largest of four regions, and the whole image."""

    name: Literal["spreid"] = "spreid"
    """the method"""
    foreground: bool = True
    """keep the mean over the foreground in the feature ("w/fg"); false is the paper's "wo/fg\""""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the cross entropy"""
    map_height: int = 30
    """height to which parsing and feature map are brought"""
    map_width: int = 30
    """width to which parsing and feature map are brought"""

    def __post_init__(self) -> None:
        check_limits("method", self, map_height=(1, 1024), map_width=(1, 1024))


class Spreid(Method):
    """The test feature is what is classified; the parsing is given, in training and at test."""

    about = About(
        title="SPReID",
        paper="Kalayeh et al., CVPR 2018",
        claim="network as published, schedule assumed",
        needs="parsing in training and at test; viewpoint labels in training with viewpoint_aware",
        published={"market1501-spreid": (77.62, 90.88), "dukemtmc-spreid": (65.66, 81.73)},
        measured={"synthetic-spreid": (56.6, 69.8)},
    )
    Config = SpreidConfig
    heads = ("head",)
    inputs = ("parsing",)
    test_inputs = ("parsing",)

    def __init__(self, config: SpreidConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        dim = self.backbone.channels * (3 if config.foreground else 2)
        self.head: nn.Module = (
            ViewpointAwareTerms(dim, classes)
            if config.viewpoint_aware
            else identity_head(dim, classes.identities, bias=True)
        )

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The cross entropy of the identity, or what stands in its place."""
        parts = self.features(batch)
        with full_precision(parts[0]):
            feature = torch.cat(parts, dim=1)
            if self.config.viewpoint_aware:
                return self.head(feature, batch)
            return {"identity": Term(F.cross_entropy(self.head(feature), batch.identity))}

    def features(self, batch: Batch) -> list[Tensor]:
        """Means over the foreground (if wanted), the largest of head, upper body, lower body and shoes, and all of the
        image, [N, C] each."""
        x = self.backbone(batch.image)
        with full_precision(x):
            size = (self.config.map_height, self.config.map_width)
            regions = pool_masks(x, F.interpolate(batch.extras["parsing"].float(), size, mode="area"))
            whole = [regions[:, 1:].amax(1), self.pool(x)]
            return [regions[:, 0], *whole] if self.config.foreground else whole
