"""PIE: a photograph and its PoseBox, the person's parts in fixed places, are fused (Zheng et al., TIP 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision, is_trained
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, identity_head
from vareid_ext.models.joints import NUM_JOINTS
from vareid_ext.models.posebox import draw_posebox
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy


@dataclass(frozen=True)
class PieConfig:
    """Two networks, one on the photograph and one on the PoseBox, and a fusion of the two."""

    name: Literal["pie"] = "pie"
    """the method"""
    posebox: Literal[1, 2, 3] = 3
    """parts of the PoseBox: 1 the torso, 2 the legs too, 3 the arms too"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the photograph's cross entropy"""
    posebox_size: int = 224
    """height and width of the PoseBox, pixels; a multiple of 28"""
    jitter: bool = False
    """in training, move joints at random by 1 to 4 pixels of an image 368 pixels high, where the confidences of
    shoulders and hips sum up to less than 0.8"""

    def __post_init__(self) -> None:
        check_limits("method", self, posebox_size=(28, 4032))
        if self.posebox_size % 28:
            raise ValueError(f"method.posebox_size: {self.posebox_size} was given; allowed are multiples of 28")


class Pie(Method):
    """The test feature is both networks' pooled features and the confidences of the joints, side by side."""

    about = About(
        title="PIE",
        paper="Zheng et al., TIP 2019",
        claim="network as published, schedule assumed",
        needs="keypoints in training and at test; viewpoint labels in training with viewpoint_aware",
        published={"market1501-pie": (69.25, 87.33), "dukemtmc-pie": (64.09, 80.84)},
        measured={"synthetic-pie": (40.2, 54.0)},
    )
    Config = PieConfig
    heads = ("photograph_head", "posebox_head", "fused_head")
    inputs = test_inputs = ("keypoints",)

    def __init__(self, config: PieConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.photograph, self.posebox = Backbone.of(model), Backbone.of(model)
        self.pools = nn.ModuleList(POOLING[model.pooling]() for _ in range(2))
        channels = self.photograph.channels
        self.photograph_head: nn.Module = (
            ViewpointAwareTerms(channels, classes)
            if config.viewpoint_aware
            else identity_head(channels, classes.identities, bias=True, std=0.01)
        )
        self.posebox_head = identity_head(channels, classes.identities, bias=True, std=0.01)
        self.fused_head = identity_head(2 * channels + NUM_JOINTS, classes.identities, bias=True, std=0.01)

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss of each network and, in a stage that trains its head, of the fusion."""
        photograph, posebox, confidence = self.features(batch)
        with full_precision(photograph):
            terms, logits = {}, {}
            if self.config.viewpoint_aware:
                terms = self.photograph_head(photograph, batch)
            else:
                logits["photograph"] = self.photograph_head(photograph)
            logits["posebox"] = self.posebox_head(posebox)
            if is_trained(self.fused_head):
                logits["fused"] = self.fused_head(torch.cat([photograph, posebox, confidence], 1))
            return terms | {
                name: Term(identity_cross_entropy(z, batch.identity, smoothing="none")) for name, z in logits.items()
            }

    def features(self, batch: Batch) -> list[Tensor]:
        """Photograph [N, C], PoseBox [N, C], confidences [N, 14]."""
        config, keypoints = self.config, batch.extras["keypoints"]
        jitter = config.jitter and self.training
        posebox = draw_posebox(
            batch.image, keypoints, parts=config.posebox, size=config.posebox_size, jitter=jitter, share=self.share
        )
        maps = self.photograph(batch.image), self.posebox(posebox)
        return [*(pool(x) for pool, x in zip(self.pools, maps, strict=True)), keypoints[..., 2]]
