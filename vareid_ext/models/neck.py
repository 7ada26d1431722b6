"""What stands between the pooled feature and the losses."""

from __future__ import annotations

from torch import nn


def batch_norm_neck(channels: int) -> nn.BatchNorm1d:
    """A batch normalisation whose shift stays 0 (Luo et al., CVPRW 2019): [N, C] -> [N, C]."""
    neck = nn.BatchNorm1d(channels)
    neck.bias.requires_grad_(False)
    return neck
