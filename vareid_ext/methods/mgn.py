"""MGN: a global branch, one of halves and one of thirds, from a shared trunk (Wang et al., ACM MM 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import batch_hard_triplet, part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import Backbone, ModelConfig, embedding, equal_rows, identity_head, pool_rows

ROWS = ((1,), (1, 2), (1, 3))
"""The rows that the map of each branch is cut into: the whole, and two or three equal ones."""


@dataclass(frozen=True)
class MgnConfig:
    """The mean cross entropy of eight heads and the mean triplet term of the three global features."""

    name: Literal["mgn"] = "mgn"
    """the method"""
    stage: str = "layer3.1"
    """the block of the backbone that each branch has a copy of, with all that follows"""
    dim: int = 256
    """length of a part's reduced feature"""
    global_heads: Literal["pooled", "reduced"] = "pooled"
    """what the global parts are classified by: pooled vectors (the paper) or reduced features (most code)"""
    identity_weight: float = 1.0
    """weight of the identity losses' mean"""
    triplet_weight: float = 2.0
    """weight of the triplet terms' mean"""
    triplet_margin: float = 1.2
    """margin of the triplet terms, in Euclidean distance of the reduced features"""
    viewpoint_aware: bool = False
    """add the viewpoint-aware loss of the reduced feature of the global branch"""

    def __post_init__(self) -> None:
        weights = ("identity_weight", "triplet_weight", "triplet_margin")
        check_limits("method", self, dim=(1, 8192), **dict.fromkeys(weights, (0, 10_000)))


class Mgn(Method):
    """The test feature is eight reduced features side by side: those of the three maps, of two halves and three thirds.

    ``model.last_stride`` is that of the branches with rows; the global branch always keeps its stride.
    """

    about = About(
        title="MGN",
        paper="Wang et al., ACM MM 2018",
        claim="network as published, schedule assumed",
        needs="viewpoint labels in training with viewpoint_aware",
        published={"market1501-mgn": (86.9, 95.7), "dukemtmc-mgn": (78.4, 88.7)},
        measured={"synthetic-mgn": (43.5, 53.3)},
    )
    Config = MgnConfig
    heads = ("head", "aware")
    own_pooling = "maxima of rows"

    def __init__(self, config: MgnConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.of(replace(model, last_stride=2))
        high = Backbone.of(replace(model, pretrained=False, weights=None))
        high.load_state_dict(self.backbone.state_dict())
        tails = [
            backbone.split_off(config.stage, copies=copies, field="method.stage")
            for backbone, copies in ((self.backbone, 1), (high, 2))
        ]
        self.branches = nn.ModuleList(branch for branches in tails for branch in branches)
        channels, parts = self.backbone.channels, sum(map(sum, ROWS))
        self.embed_part = nn.ModuleList(embedding(channels, config.dim, init="fan_in") for _ in range(parts))
        for embed in self.embed_part:
            nn.init.normal_(embed[1].weight, mean=1, std=0.02)  # type: ignore[index]
        of_global = channels if config.global_heads == "pooled" else config.dim
        inputs = [of_global if part < len(ROWS) else config.dim for part in range(parts)]
        self.head = nn.ModuleList(identity_head(n, classes.identities) for n in inputs)
        self.aware = ViewpointAwareTerms(config.dim, classes) if config.viewpoint_aware else None

    def _parts(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The parts' pooled vectors, 8 of [N, C], and their reduced features, 8 of [N, dim]; the global ones first."""
        shared = self.backbone(batch.image)
        maps = [branch(shared) for branch in self.branches]
        with full_precision(shared):
            rows = [equal_rows(x.shape[2], *counts) for x, counts in zip(maps, ROWS, strict=True)]
            whole = [pool_rows(x, r[:1], "max") for x, r in zip(maps, rows, strict=True)]
            others = [pool_rows(x, r[1:], "max") for x, r in zip(maps[1:], rows[1:], strict=True)]
            pooled = list(torch.cat([*whole, *others], dim=1).unbind(1))
            return pooled, [embed(x) for embed, x in zip(self.embed_part, pooled, strict=True)]

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss of all parts, and the triplet term of the global ones."""
        config, count = self.config, len(ROWS)
        pooled, reduced = self._parts(batch)
        with full_precision(pooled[0]):
            classified = pooled[:count] + reduced[count:] if config.global_heads == "pooled" else reduced
            logits = torch.stack([head(x) for head, x in zip(self.head, classified, strict=True)], dim=1)
            triplets = [
                batch_hard_triplet(x, batch.identity, margin=config.triplet_margin, group=self.triplet_group)
                for x in reduced[:count]
            ]
            terms = {
                "identity": Term(part_cross_entropy(logits, batch.identity), config.identity_weight),
                "triplet": Term(torch.stack(triplets).mean(), config.triplet_weight),
            }
        return terms if self.aware is None else terms | self.aware(reduced[0], batch)

    def features(self, batch: Batch) -> list[Tensor]:
        """The eight reduced features, [N, dim] each."""
        return self._parts(batch)[1]
