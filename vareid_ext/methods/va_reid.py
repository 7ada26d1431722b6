"""VA-reID: viewpoint-aware losses with an angular regularizer of their centres (Zhu et al., AAAI 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vareid_ext._limits import check_below, check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import ViewpointAwareLoss, batch_hard_triplet, part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import view_weight_at
from vareid_ext.models import POOLING, Backbone, ModelConfig, PartHeads, batch_norm_neck, equal_rows, pool_rows

STRIPES = (1, 2, 3)
"""The stripe branch cuts the feature map into this many rows, one cut after the other: 6 in all."""


@dataclass(frozen=True)
class VaReidConfig:
    """L_va = L_y + view_weight * L_v + beta * L_R, and the terms of the stripe branch."""

    name: Literal["va-reid"] = "va-reid"
    """the method"""
    smoothing: Literal["adaptive", "uniform", "none"] = "adaptive"
    """label smoothing of the identity loss: adaptive is L_y, uniform is LSR, none is plain cross entropy"""
    alpha: float = 0.2
    """coefficient of the adaptive smoothing, in [0, 0.5)"""
    epsilon: float = 0.1
    """constant of the uniform smoothing, in [0, 1)"""
    use_viewpoint: bool = True
    """add the viewpoint loss L_v"""
    view_weight: float = 1.0
    """weight of L_v"""
    view_weight_late: float = 0.3
    """weight of L_v from epoch view_weight_drop on"""
    view_weight_drop: int | None = None
    """epoch at which the weight of L_v changes to view_weight_late; none: never"""
    use_regularizer: bool = True
    """add the angular regularizer L_R of the centres"""
    beta: float = 0.1
    """weight of L_R (a sum over all existing identity and viewpoint pairs)"""
    mask_missing: bool = True
    """leave (identity, viewpoint) pairs that do not occur in the training set out of L_v and L_R"""
    local: bool = False
    """add the stripe branch: 1 + 2 + 3 horizontal stripes with an identity head each, and the triplet term"""
    stripe_dim: int = 256
    """length of each stripe's feature"""
    stripe_weight: float = 1.0
    """weight of the stripes' identity losses (their mean over the stripes), with local only"""
    triplet_weight: float = 1.0
    """weight of the batch-hard triplet term, with local only"""
    triplet_margin: float = 0.3
    """margin of the triplet term, in Euclidean distance of features before the neck"""

    def __post_init__(self) -> None:
        check_below("method", self, alpha=0.5, epsilon=1)
        weights = ("view_weight", "view_weight_late", "beta", "triplet_weight", "triplet_margin", "stripe_weight")
        limits = dict.fromkeys(weights, (0, 10_000))
        check_limits("method", self, view_weight_drop=(0, 100_000), stripe_dim=(1, 8192), **limits)


class VaReid(Method):
    """Backbone, pooling and neck; the centres of identities and viewpoints are the classifiers of the feature."""

    about = About(
        title="VA-reID",
        paper="Zhu et al., AAAI 2020",
        claim="network as published, schedule assumed",
        needs="viewpoint labels in training",
        published={
            "market1501-va-reid": (89.97, 95.87),
            "market1501-va-reid-local": (91.70, 96.23),
            "dukemtmc-va-reid": (81.48, 91.11),
            "dukemtmc-va-reid-local": (84.51, 91.61),
        },
        measured={"synthetic": (64.1, 77.5)},
    )
    Config = VaReidConfig
    heads = ("loss", "stripes.head")

    @classmethod
    def inputs_with(cls, config: VaReidConfig) -> tuple[str, ...]:
        """L_v and L_R are about viewpoints."""
        aware = ("viewpoint",) if config.use_viewpoint or config.use_regularizer else ()
        return tuple(dict.fromkeys((*super().inputs_with(config), *aware)))

    def __init__(self, config: VaReidConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        self.neck = batch_norm_neck(self.backbone.channels)
        self.stripes = (
            PartHeads(sum(STRIPES), self.backbone.channels, config.stripe_dim, classes.identities, relu=False)
            if config.local
            else None
        )
        self.loss = ViewpointAwareLoss(
            classes.identities,
            self.backbone.channels,
            num_viewpoints=classes.viewpoints,
            alpha=config.alpha,
            beta=config.beta,
            view_weight=config.view_weight,
            mask=classes.subclasses if config.mask_missing else None,
            smoothing=config.smoothing,
            epsilon=config.epsilon,
            use_viewpoint=config.use_viewpoint,
            use_regularizer=config.use_regularizer,
        )

    def at_epoch(self, epoch: int) -> None:
        """The weight of L_v falls once."""
        self.loss.view_weight = view_weight_at(self.config, epoch)

    def _stripe_features(self, feature_map: Tensor) -> list[Tensor]:
        if self.stripes is None:
            return []
        return self.stripes(pool_rows(feature_map, equal_rows(feature_map.shape[2], *STRIPES, overlap=True)))

    def forward(self, batch: Batch) -> dict[str, Term]:
        """L_y, L_v and L_R of the feature behind the neck, and the terms of the stripes."""
        config, feature_map = self.config, self.backbone(batch.image)
        pooled = self.pool(feature_map)
        with full_precision(pooled):
            feature = self.neck(pooled)
            losses = self.loss(feature, batch.identity, batch.viewpoint)
            terms = {"identity": Term(losses.identity)}
            if config.use_viewpoint:
                terms["viewpoint"] = Term(losses.viewpoint, self.loss.view_weight)
            if config.use_regularizer:
                terms["regularizer"] = Term(losses.regularizer, config.beta)
            if self.stripes is not None:
                logits = self.stripes.logits(self._stripe_features(feature_map))
                stripes = part_cross_entropy(
                    logits, batch.identity, smoothing=config.smoothing, alpha=config.alpha, epsilon=config.epsilon
                )
                triplet = batch_hard_triplet(
                    pooled, batch.identity, margin=config.triplet_margin, group=self.triplet_group
                )
                terms["stripes"] = Term(stripes, config.stripe_weight)
                terms["triplet"] = Term(triplet, config.triplet_weight)
        return terms

    def features(self, batch: Batch) -> list[Tensor]:
        """The feature behind the neck [N, C], and with the stripe branch each stripe's."""
        feature_map = self.backbone(batch.image)
        pooled = self.pool(feature_map)
        with full_precision(pooled):
            return [self.neck(pooled), *self._stripe_features(feature_map)]
