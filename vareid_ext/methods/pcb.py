"""PCB: equal rows of the feature map, each with an identity head of its own (Sun et al., ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.models import Backbone, ModelConfig, PartHeads, equal_rows, pool_rows


@dataclass(frozen=True)
class PcbConfig:
    """The sum of the rows' cross entropies."""

    name: Literal["pcb"] = "pcb"
    """the method"""
    rows: int = 6
    """equal rows that the feature map is cut into; must divide its height"""
    dim: int = 256
    """length of a row's reduced feature"""
    dropout: float = 0.5
    """share of a row's pooled vector that is dropped in training, before it is reduced"""
    test_feature: Literal["pooled", "reduced"] = "pooled"
    """the pooled vectors of the rows, as the official code takes them; or the reduced features"""

    def __post_init__(self) -> None:
        check_limits("method", self, rows=(1, 1024), dim=(1, 8192), dropout=(0, 0.99))


class Pcb(Method):
    """One reduction for all rows, as in the official code; the paper draws one for each."""

    about = About(
        title="PCB",
        paper="Sun et al., ECCV 2018",
        claim="reproduces",
        published={"market1501-pcb": (77.4, 92.3), "dukemtmc-pcb": (66.1, 81.7)},
        measured={"synthetic-pcb": (59.0, 70.2)},
    )
    Config: ClassVar[type[PcbConfig]] = PcbConfig
    heads = ("parts.head",)
    own_pooling = "means of rows"

    def __init__(self, config: PcbConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.of(model)
        self.dropout = nn.Dropout(config.dropout)
        self.parts = PartHeads(
            config.rows,
            self.backbone.channels,
            config.dim,
            classes.identities,
            shared=True,
            init="fan_out",
            head_bias=True,
        )

    def pooled(self, batch: Batch) -> Tensor:
        """The mean vectors of the rows, float32 [N, P, C]."""
        x = self.backbone(batch.image)
        return pool_rows(x, equal_rows(x.shape[2], self.config.rows))

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The cross entropies of the heads; the term's weight makes their sum of their mean."""
        pooled = self.pooled(batch)
        with full_precision(pooled):
            logits = self.parts.logits(self.parts(self.dropout(pooled)))
            return {"identity": Term(part_cross_entropy(logits, batch.identity), self.config.rows)}

    def features(self, batch: Batch) -> list[Tensor]:
        """The rows' pooled vectors, P of [N, C], or their reduced features, P of [N, dim]."""
        pooled = self.pooled(batch)
        with full_precision(pooled):
            return list(pooled.unbind(1)) if self.config.test_feature == "pooled" else self.parts(pooled)
