"""The network of PDC (Su et al., ICCV 2017): Inception with batch normalisation, as its official definition has it."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Columns(NamedTuple):
    """Channels of an inception block's columns."""

    single: int
    """1 x 1; 0: the block has no such column, halves the resolution and passes its input on through a max pooling"""
    reduce: int
    """1 x 1 before the 3 x 3"""
    triple: int
    """3 x 3"""
    double_reduce: int
    """1 x 1 before the two 3 x 3"""
    double: int
    """two 3 x 3, each"""
    projection: int = 0
    """1 x 1 behind the pooling"""
    pool: str = "avg"
    """avg or max"""


COLUMNS = {
    "inception3a": Columns(64, 64, 64, 64, 96, 32),
    "inception3b": Columns(64, 64, 96, 64, 96, 64),
    "inception3c": Columns(0, 128, 160, 64, 96),
    "inception4a": Columns(224, 64, 96, 96, 128, 128),
    "inception4b": Columns(192, 96, 128, 96, 128, 128),
    "inception4c": Columns(160, 128, 160, 128, 160, 96),
    "inception4d": Columns(96, 128, 192, 160, 192, 96),
    "inception4e": Columns(0, 128, 192, 192, 256),
    "inception5a": Columns(352, 192, 320, 160, 224, 128),
    "inception5b": Columns(352, 192, 320, 192, 224, 128, "max"),
}


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class InceptionBlock(nn.Module):
    """Columns of convolutions side by side: [N, C, H, W] -> [N, `out_channels`, H, W], or half of H and W."""

    def __init__(self, channels: int, columns: Columns) -> None:
        super().__init__()
        stride = 1 if columns.single else 2
        kind = nn.AvgPool2d if columns.single and columns.pool == "avg" else nn.MaxPool2d
        pool: nn.Module = kind(3, stride, 1)
        self.columns = nn.ModuleList()
        if columns.single:
            self.columns.append(_convolution(channels, columns.single, 1))
        self.columns.append(
            nn.Sequential(
                _convolution(channels, columns.reduce, 1), _convolution(columns.reduce, columns.triple, 3, stride)
            )
        )
        self.columns.append(
            nn.Sequential(
                _convolution(channels, columns.double_reduce, 1),
                _convolution(columns.double_reduce, columns.double, 3),
                _convolution(columns.double, columns.double, 3, stride),
            )
        )
        projected = columns.projection or channels
        project = (_convolution(channels, projected, 1),) if columns.projection else ()
        self.columns.append(nn.Sequential(pool, *project))
        self.out_channels = columns.single + columns.triple + columns.double + projected

    def forward(self, x: Tensor) -> Tensor:
        """The columns' outputs, one after the other."""
        return torch.cat([column(x) for column in self.columns], 1)


class PdcInception(nn.Sequential):
    """Images [N, 3, H, W] -> [N, 1024, H / 32, W / 32] from random weights; the stages are the children.

    Args:
        width: factor of all channels, in (0, 16]; 1 is the published network.

    Raises:
        ValueError: a width outside what is allowed.
    """

    def __init__(self, *, width: float = 1.0) -> None:
        if not 0 < width <= 16:
            raise ValueError(f"width: {width!r} was given; allowed are values in (0, 16]")

        def scaled(channels: int) -> int:
            return max(1, round(channels * width)) if channels else 0

        stages: OrderedDict[str, nn.Module] = OrderedDict(
            convolution1=_convolution(3, scaled(64), 7, 2),
            pool1=nn.MaxPool2d(3, 2, 1),
            convolution2=nn.Sequential(
                _convolution(scaled(64), scaled(64), 1), _convolution(scaled(64), scaled(192), 3)
            ),
            pool2=nn.MaxPool2d(3, 2, 1),
        )
        channels = scaled(192)
        for name, columns in COLUMNS.items():
            block = InceptionBlock(channels, Columns._make([*map(scaled, columns[:6]), columns.pool]))
            stages[name], channels = block, block.out_channels
        super().__init__(stages)
