"""From a feature map to one vector per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AveragePooling(nn.Module):
    """The mean over space."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C], in float32."""
        return x.float().mean((2, 3))


class GeneralizedMeanPooling(nn.Module):
    """``(mean over space of max(x, 1e-6)^p)^(1/p)`` with a learned p, 3 at first (Radenovic et al., TPAMI 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C], in float32 (a power in half precision overflows)."""
        return x.float().clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


POOLING: dict[str, type[nn.Module]] = {"avg": AveragePooling, "gem": GeneralizedMeanPooling}
"""The poolings by the names of the configuration."""
