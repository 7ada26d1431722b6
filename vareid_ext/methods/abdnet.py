"""ABD-Net: a global and an attentive branch, kept diverse by orthogonality (Chen et al., ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_below, check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.losses.orthogonality import exact_spectral_gap, spectral_gap
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig
from vareid_ext.models.attention import ChannelAttention, ConvNormAct, PositionAttention, attended, initialise
from vareid_ext.models.parts import embedding
from vareid_ext.models.rows import equal_rows
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy

HALVES = 2


@dataclass(frozen=True)
class AbdNetConfig:
    """Identity and triplet losses of three features, and two orthogonality terms."""

    name: Literal["abdnet"] = "abdnet"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the global feature's cross entropy"""
    stage: str = "layer4"
    """the stage of the backbone that each branch has a copy of"""
    shallow_stage: str = "layer2"
    """the stage of the backbone before which a channel attention stands"""
    dim: int = 1024
    """length of each of the three features"""
    epsilon: float = 0.1
    """label smoothing: the share of the target that goes to all identities alike, in [0, 1)"""
    triplet_weight: float = 0.1
    """weight of the mean of the batch-hard triplet terms"""
    triplet_margin: float = 1.2
    """margin of the triplet terms, in Euclidean distance"""
    feature_weight: float = 1e-6
    """weight of the orthogonality of feature maps (OF) from feature_from on"""
    feature_from: int = 33
    """epoch, counted from 0, from which OF counts: 23 epochs after the ten of the published first stage"""
    kernel_weight: float = 0.01
    """weight of the orthogonality of convolutions (OW)"""
    kernels: Literal["stem", "all"] = "stem"
    """whose orthogonality: the backbone's first convolution (the published code), or all of them (the paper)"""

    def __post_init__(self) -> None:
        check_below("method", self, epsilon=1)
        weights = ("triplet_weight", "triplet_margin", "feature_weight", "kernel_weight")
        check_limits("method", self, dim=(2, 8192), feature_from=(0, 100_000), **dict.fromkeys(weights, (0, 10_000)))


class AbdNet(Method):
    """The test feature is the global one and those of the upper and the lower half of the attentive branch."""

    about = About(
        title="ABD-Net",
        paper="Chen et al., ICCV 2019",
        claim="reproduces",
        needs="viewpoint labels in training with viewpoint_aware",
        published={"market1501-abdnet": (88.28, 95.60), "dukemtmc-abdnet": (78.59, 89.00)},
        measured={"synthetic-abdnet": (55.9, 68.5)},
    )
    Config = AbdNetConfig
    heads = ("head", "half_heads")

    def __init__(self, config: AbdNetConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config, self.feature_weight = config, 0.0
        self.epsilon = config.epsilon * (1 - 1 / classes.identities)
        dim, aware = config.dim, config.viewpoint_aware
        self.backbone = Backbone.of(model)
        self.global_tail, self.attentive_tail = self.backbone.split_off(config.stage, copies=2, field="method.stage")
        (self.middle,) = self.backbone.split_off(config.shallow_stage, copies=1, field="method.shallow_stage")
        self.shallow = ChannelAttention()
        self.pool = POOLING[model.pooling]()
        self.shorten = nn.Sequential(embedding(self.backbone.channels, dim, bias=True), nn.Dropout(0.5))
        self.reduce = ConvNormAct(self.backbone.channels, dim, 1)
        attentions = nn.Identity(), ChannelAttention(), PositionAttention(dim // 2)
        self.attended = nn.ModuleList(attended(dim, attention) for attention in attentions)
        self.mix = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, dim, 1))
        self.head: nn.Module = ViewpointAwareTerms(dim, classes) if aware else nn.Linear(dim, classes.identities)
        self.half_heads = nn.ModuleList(nn.Linear(dim, classes.identities) for _ in range(HALVES))
        for part in (self.shorten, self.reduce, self.attended, self.mix, self.head, self.half_heads):
            part.apply(initialise)

    def at_epoch(self, epoch: int) -> None:
        """OF counts from an epoch on."""
        self.feature_weight = self.config.feature_weight if epoch >= self.config.feature_from else 0.0

    def _maps(self, batch: Batch) -> tuple[list[Tensor], Tensor, list[list[Tensor]]]:
        """The three features, the map behind the shallow attention, and the maps of each half, the last one mixed."""
        shallow = self.shallow(self.backbone(batch.image))
        shared = self.middle(shallow)
        pooled = self.pool(self.global_tail(shared))
        with full_precision(pooled):
            features = [self.shorten(pooled)]
        reduced = self.reduce(self.attentive_tail(shared))
        halves = []
        for begin, end in equal_rows(reduced.shape[2], HALVES):
            maps = [block(reduced[:, :, begin:end]) for block in self.attended]
            maps.append(self.mix(torch.stack(maps).sum(0)))
            features.append(maps[-1].float().mean((2, 3)))
            halves.append(maps)
        return features, shallow, halves

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The mean identity and triplet losses of the three features, and OF and OW where they have a weight."""
        config = self.config
        features, shallow, halves = self._maps(batch)
        with full_precision(shallow):
            terms, heads = {}, [*zip(self.half_heads, features[1:], strict=True)]
            if config.viewpoint_aware:
                terms = self.head(features[0], batch)
            else:
                heads.append((self.head, features[0]))
            identity = [self._cross_entropy(head(feature), batch.identity) for head, feature in heads]
            triplet = [
                batch_hard_triplet(f, batch.identity, margin=config.triplet_margin, group=self.triplet_group)
                for f in features
            ]
            terms |= {
                "identity": Term(torch.stack(identity).mean()),
                "triplet": Term(torch.stack(triplet).mean(), config.triplet_weight),
            }
            if self.feature_weight > 0:
                gaps = [spectral_gap(x.flatten(2), share=self.share) / HALVES for maps in halves for x in maps]
                gaps.append(0.01 * spectral_gap(shallow.flatten(2), share=self.share))
                of = torch.stack(gaps).sum(0)
                terms["OF"] = Term(32 * of.mean(), self.feature_weight)  # published as the sum over a batch of 32
            if config.kernel_weight > 0:
                ow = [exact_spectral_gap(weight.flatten(1)).square() for weight in self._kernels()]
                terms["OW"] = Term(torch.stack(ow).sum(), config.kernel_weight)
            return terms

    def _cross_entropy(self, logits: Tensor, identity: Tensor) -> Tensor:
        return identity_cross_entropy(logits, identity, smoothing="uniform", epsilon=self.epsilon)

    def _kernels(self) -> list[Tensor]:
        parts = (self.backbone, self.middle, self.global_tail, self.attentive_tail)
        kernels = [m.weight for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]
        return kernels if self.config.kernels == "all" else kernels[:1]

    def features(self, batch: Batch) -> list[Tensor]:
        """The global feature and those of the halves, each [N, dim]."""
        return self._maps(batch)[0]
