"""Horizontal stripes of the feature map as parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIPES = (1, 2, 3)
"""The feature map is cut into this many horizontal stripes, one cut after the other: 6 in all."""


class StripeBranch(nn.Module):
    """Horizontal stripes of the feature map, each with its own reduction (linear + batch norm) and identity head."""

    def __init__(self, channels: int, dim: int, num_identities: int) -> None:
        super().__init__()
        count = sum(STRIPES)
        self.reduce = nn.ModuleList(nn.Linear(channels, dim, bias=False) for _ in range(count))
        self.norm = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(count))
        heads = [nn.Linear(dim, num_identities, bias=False) for _ in range(count)]
        for head in heads:
            nn.init.normal_(head.weight, std=0.001)
        self.head = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> the stripes' features, S of [N, d]."""
        stripes = torch.cat([F.adaptive_avg_pool2d(x.float(), (count, 1)).flatten(2) for count in STRIPES], dim=2)
        parts = enumerate(zip(self.reduce, self.norm, strict=True))
        return [norm(reduce(stripes[:, :, i])) for i, (reduce, norm) in parts]

    def logits(self, features: list[Tensor]) -> Tensor:
        """The stripes' features, S of [N, d] -> their identity logits [N, S, K]."""
        return torch.stack([head(feature) for head, feature in zip(self.head, features, strict=True)], dim=1)
