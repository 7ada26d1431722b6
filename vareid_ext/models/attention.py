"""Attention over channels, over positions, and of HA-CNN's kind: feature map [N, C, H, W] -> feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelAttention(nn.Module):
    """``x + gamma * softmax(rowmax(A) - A) x`` with A = x x^T over positions, gamma 0 at first.

    Every channel is given what the channels unlike it hold (Chen et al., ICCV 2019, CAM).
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same, in float32: A grows with the number of positions."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float().flatten(2)
            energy = rows @ rows.mT
            attention = (energy.amax(2, keepdim=True) - energy).softmax(2)
            return (rows + self.gamma * (attention @ rows)).view_as(x)


class PositionAttention(nn.Module):
    """``x + gamma * values`` of the positions with similar keys, gamma 0 at first (Chen et al., ICCV 2019, PAM).

    Args:
        channels: C; queries and keys have C // reduction channels, at least 1.
        reduction: 8 as published.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same. The products of queries and keys are not scaled."""
        query, key, value = (part(x).flatten(2).mT for part in (self.query, self.key, self.value))
        found = (query @ key.mT).softmax(2) @ value
        return x + self.gamma * found.mT.reshape(x.shape)


class ConvNormAct(nn.Sequential):
    """Convolution, batch normalisation, ReLU: [N, C, H, W] -> [N, C', H', W'], padded to keep the size at stride 1."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, bias: bool = False) -> None:
        convolution = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=bias)
        super().__init__(convolution, nn.BatchNorm2d(out), nn.ReLU())


def attended(dim: int, attention: nn.Module) -> nn.Sequential:
    """An attention between two convolutions that halve the channels, [N, dim, H, W] -> the same."""
    inner = dim // 2
    around = ConvNormAct(dim, inner, 3), attention, ConvNormAct(inner, inner, 3)
    return nn.Sequential(*around, nn.Dropout2d(0.1), nn.Conv2d(inner, dim, 1))


class HarmoniousAttention(nn.Module):
    """Soft attention over space and channels together, and where to look for parts (Li et al., CVPR 2018).

    Args:
        channels: C of the map.
        regions: parts that are looked for, one above the other at first.
        reduction: of the channels in the channel attention.
    """

    def __init__(self, channels: int, *, regions: int = 4, reduction: int = 16) -> None:
        super().__init__()
        self.space = nn.ModuleList([ConvNormAct(1, 1, 3, stride=2, bias=True), ConvNormAct(1, 1, 1, bias=True)])
        inner = max(channels // reduction, 1)
        self.channel = nn.Sequential(
            ConvNormAct(channels, inner, 1, bias=True), ConvNormAct(inner, channels, 1, bias=True)
        )
        self.both = ConvNormAct(channels, channels, 1, bias=True)
        self.where = nn.Linear(channels, 2 * regions)
        nn.init.zeros_(self.where.weight)
        with torch.no_grad():  # (x, y) of each region: in the middle, their centres evenly from top to bottom
            heights = (torch.arange(regions) * 2 + 1) / regions - 1
            self.where.bias.copy_(torch.stack([torch.zeros(regions), heights], dim=1).flatten())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> the attended map [N, C, H, W] and the regions' centres (x, y) [N, regions, 2] in [-1, 1]."""
        narrow, mix = self.space
        space = F.interpolate(narrow(x.mean(1, keepdim=True)), x.shape[2:], mode="bilinear", align_corners=True)
        pooled = x.mean((2, 3), keepdim=True)
        soft = self.both(mix(space) * self.channel(pooled)).sigmoid()
        return soft * x, self.where(pooled.flatten(1)).tanh().unflatten(1, (-1, 2))


def initialise(module: nn.Module) -> None:
    """The weights that ABD-Net's code begins with, of a layer (Chen et al., ICCV 2019)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
