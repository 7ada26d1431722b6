"""PN-GAN: a photograph and generated pictures of the person in eight poses (Qian et al., ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext._limits import check_below, check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision, is_trained
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, embedding, identity_head
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy


@dataclass(frozen=True)
class PnganConfig:
    """One network for photographs, one for generated pictures, and how their features become one."""

    name: Literal["pngan"] = "pngan"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the photograph's cross entropy"""
    embed_dim: int = 1024
    """length of a feature"""
    dropout: float = 0.5
    """share of a feature that is left out in training, in [0, 1)"""
    fusion: Literal["max", "mean", "concat"] = "max"
    """the photograph's feature and the pictures': the maximum or mean of each entry, or all side by side"""

    def __post_init__(self) -> None:
        check_networks(self)


def check_networks(config: Any) -> None:
    """ValueError for settings of the two networks outside what is allowed."""
    check_limits("method", config, embed_dim=(1, 8192))
    check_below("method", config, dropout=1)


class _Network(nn.Module):
    """Images -> features [N, d]."""

    def __init__(self, config: Any, model: ModelConfig, classes: TrainingClasses, *, aware: bool = False) -> None:
        super().__init__()
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        self.embed = embedding(self.backbone.channels, config.embed_dim, bias=True)
        self.dropout = nn.Dropout(config.dropout)
        self.head: nn.Module = (
            ViewpointAwareTerms(config.embed_dim, classes)
            if aware
            else identity_head(config.embed_dim, classes.identities, bias=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.backbone(images))
        with full_precision(pooled):
            return self.dropout(self.embed(pooled))


class Pngan(Method):
    """The test feature is what the fusion makes of the features, each brought to length 1, of all pictures."""

    about = About(
        title="PN-GAN",
        paper="Qian et al., ECCV 2018",
        claim="network as published, schedule assumed",
        needs="generated views in training and at test; viewpoint labels in training with viewpoint_aware",
        published={"market1501-pngan": (72.58, 89.43), "dukemtmc-pngan": (53.20, 73.58)},
        measured={"synthetic-pngan": (38.9, 48.5)},
    )
    Config: ClassVar[type] = PnganConfig
    heads = ("photograph.head", "generated.head")
    inputs: ClassVar[tuple[str, ...]] = ("views",)
    test_inputs: ClassVar[tuple[str, ...]] = ("views",)

    def __init__(self, config: Any, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.photograph = _Network(config, model, classes, aware=config.viewpoint_aware)
        self.generated = _Network(config, model, classes)

    def pictures(self, batch: Batch) -> Tensor:
        """The generated pictures [N, V, 3, H, W], normalised as the images are."""
        views = batch.extras["views"]
        if views.ndim != 5 or views.shape[0] != batch.image.shape[0]:
            raise ValueError(f"views: {[*views.shape]} was given; [{len(batch)}, V, 3, H, W] is needed")
        return views

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss of each network that the stage trains."""
        terms: dict[str, Term] = {}
        if is_trained(self.photograph):
            if self.config.viewpoint_aware:
                terms = self.photograph.head(self.photograph(batch.image), batch)
            else:
                terms["photograph"] = Term(self._identity_loss(self.photograph, batch.image, batch.identity))
        if is_trained(self.generated):
            pictures = self.pictures(batch)
            identity = batch.identity.repeat_interleave(pictures.shape[1])
            terms["generated"] = Term(self._identity_loss(self.generated, pictures.flatten(0, 1), identity))
        return terms

    @staticmethod
    def _identity_loss(network: _Network, images: Tensor, identity: Tensor) -> Tensor:
        feature = network(images)
        with full_precision(feature):
            return identity_cross_entropy(network.head(feature), identity, smoothing="none")

    def features(self, batch: Batch) -> list[Tensor]:
        """The fused feature [N, d], or with concat [N, (1 + V) d]."""
        pictures = self.pictures(batch)
        generated = self.generated(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        vectors = F.normalize(torch.cat([self.photograph(batch.image)[:, None], generated], 1), dim=2)
        if self.config.fusion == "concat":
            return [vectors.flatten(1)]
        return [vectors.amax(1) if self.config.fusion == "max" else vectors.mean(1)]
