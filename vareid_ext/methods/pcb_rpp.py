"""PCB with refined part pooling: a classifier says which part each position belongs to (Sun et al., ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, TrainingClasses, full_precision
from vareid_ext.methods.pcb import Pcb, PcbConfig
from vareid_ext.models import ModelConfig, equal_rows


@dataclass(frozen=True)
class PcbRppConfig(PcbConfig):
    """Settings of PCB, and of the classifier of parts."""

    name: Literal["pcb-rpp"] = "pcb-rpp"  # type: ignore[assignment]
    """the method"""
    group: int = 8
    """adjacent channels of the feature map that are averaged for the classifier; must divide their number"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits("method", self, group=(1, 8192))


class PartClassifier(nn.Module):
    """Feature map [N, C, H, W] -> how much each position belongs to each part, [N, P, H, W], a sum of 1 over P."""

    def __init__(self, channels: int, parts: int, *, group: int, dropout: float) -> None:
        super().__init__()
        if channels % group:
            raise ValueError(f"method.group: {group} was given; allowed are divisors of the {channels} channels")
        self.group = group
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(channels // group, parts, 1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """As the class says; float32."""
        x = self.dropout(x).unflatten(1, (-1, self.group)).mean(2)
        return self.conv(x - x.mean((2, 3), keepdim=True)).softmax(1)


class PcbRpp(Pcb):
    """PCB until a stage trains the part classifier; from then on its predicted parts take the place of the equal rows.

    The paper's three stages are stages of training: [backbone, parts], then [classifier] alone, then everything.
    """

    about = About(
        title="PCB + RPP",
        paper="Sun et al., ECCV 2018",
        claim="reproduces",
        published={"market1501-pcb-rpp": (81.6, 93.8), "dukemtmc-pcb-rpp": (69.2, 83.3)},
        measured={"synthetic-pcb-rpp": (47.7, 60.8)},
    )
    Config = PcbRppConfig
    refined: Tensor

    def __init__(self, config: PcbRppConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__(config, model, classes)
        self.classifier = PartClassifier(
            self.backbone.channels, config.rows, group=config.group, dropout=config.dropout
        )
        self.register_buffer("refined", torch.tensor(False))

    def at_epoch(self, epoch: int) -> None:
        """Refine the parts from the first stage on that trains the classifier."""
        self.refined |= self.classifier.conv.weight.requires_grad

    def pooled(self, batch: Batch) -> Tensor:
        """The mean over all positions of P m_i x, float32 [N, P, C]; a row has m_i = 1 within and 0 elsewhere."""
        x = self.backbone(batch.image)
        with full_precision(x):
            x = x.float()
            lines = torch.zeros(self.config.rows, x.shape[2], 1, device=x.device)
            for part, (begin, end) in enumerate(equal_rows(x.shape[2], self.config.rows)):
                lines[part, begin:end] = 1
            shares = torch.where(self.refined, self.classifier(x), lines)
            return torch.einsum("nphw,nchw->npc", shares, x) * (self.config.rows / (x.shape[2] * x.shape[3]))
