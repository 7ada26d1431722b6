"""HPM: a pyramid of rows of the feature map, each with its own feature and identity head (Fu et al., AAAI 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import Backbone, ModelConfig, PartHeads, equal_rows, pool_rows


@dataclass(frozen=True)
class HpmConfig:
    """The sum of the rows' cross entropies."""

    name: Literal["hpm"] = "hpm"
    """the method"""
    rows: tuple[int, ...] = (1, 2, 4, 8)
    """the feature map is cut into this many equal rows, one cut after the other; all must divide its height"""
    row_pooling: Literal["avg", "max", "sum"] = "sum"
    """what is taken of a row: mean, maximum (the published model file), or the two added (the paper)"""
    dim: int = 256
    """length of a row's feature"""
    viewpoint_aware: bool = False
    """add the viewpoint-aware loss of the first row, which must be the whole map"""

    def __post_init__(self) -> None:
        if not self.rows or not all(1 <= count <= 1024 for count in self.rows):
            raise ValueError(f"method.rows: {self.rows!r} was given; allowed are numbers from 1 to 1,024, at least one")
        if self.viewpoint_aware and self.rows[0] != 1:
            raise ValueError(f"method.rows: {self.rows!r} was given; with viewpoint_aware the first must be 1")
        check_limits("method", self, dim=(1, 8192))


class Hpm(Method):
    """The test feature is all rows' features side by side."""

    about = About(
        title="HPM",
        paper="Fu et al., AAAI 2019",
        claim="network as published, schedule assumed",
        needs="viewpoint labels in training with viewpoint_aware",
        published={"market1501-hpm": (82.7, 94.2), "dukemtmc-hpm": (74.3, 86.6)},
        measured={"synthetic-hpm": (48.7, 61.3)},
    )
    Config = HpmConfig
    heads = ("parts.head", "aware")
    own_pooling = "rows, pooled by method.row_pooling"

    def __init__(self, config: HpmConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.of(model)
        self.parts = PartHeads(sum(config.rows), self.backbone.channels, config.dim, classes.identities, init="fan_out")
        self.aware = ViewpointAwareTerms(config.dim, classes) if config.viewpoint_aware else None

    def features(self, batch: Batch) -> list[Tensor]:
        """The rows' features, P of [N, dim]."""
        x = self.backbone(batch.image)
        with full_precision(x):
            return self.parts(pool_rows(x, equal_rows(x.shape[2], *self.config.rows), self.config.row_pooling))

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The cross entropies of the heads; the term's weight makes their sum of their mean."""
        features = self.features(batch)
        with full_precision(features[0]):
            logits = self.parts.logits(features)
            terms = {"identity": Term(part_cross_entropy(logits, batch.identity), len(features))}
        return terms if self.aware is None else terms | self.aware(features[0], batch)
