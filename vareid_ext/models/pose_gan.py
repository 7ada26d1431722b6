"""The networks that put a photographed person into another pose (Qian et al., ECCV 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _block(convolution: nn.Module, channels: int, activation: nn.Module | None = None) -> list[nn.Module]:
    return [convolution, nn.InstanceNorm2d(channels), activation or nn.ReLU(inplace=True)]


class _Residual(nn.Module):
    """Two convolutions beside the identity, and a ReLU behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(*_block(first, channels), second, nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.layers(x))


class PoseGenerator(nn.Module):
    """A photograph and the picture of a pose -> the person in that pose.

    Args:
        width: channels of the first convolution; 64 is the published network.
        blocks: number of residual blocks; 9 are published.
    """

    def __init__(self, *, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        wide, wider = 2 * width, 4 * width
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3),
            *_block(nn.Conv2d(6, width, 7), width),
            *_block(nn.Conv2d(width, wide, 3, 2, 1), wide),
            *_block(nn.Conv2d(wide, wider, 3, 2, 1), wider),
            *(_Residual(wider) for _ in range(blocks)),
            *_block(nn.ConvTranspose2d(wider, wide, 3, 2, 1, 1), wide),
            *_block(nn.ConvTranspose2d(wide, width, 3, 2, 1, 1), width),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7, bias=False),
            nn.Tanh(),
        )

    def forward(self, photograph: Tensor, pose: Tensor) -> Tensor:
        """Two of [N, 3, H, W] in [-1, 1], H and W multiples of 4 -> [N, 3, H, W] in [-1, 1]."""
        return self.layers(torch.cat([photograph, pose], 1))


class PatchDiscriminator(nn.Module):
    """How real the patches of an image are: 1 real, 0 generated.

    Args:
        width: channels of the first convolution; 64 is the published network.
    """

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for factor, stride, padding in ((2, 2, 1), (4, 2, 1), (8, 1, 0)):
            convolution = nn.Conv2d(width * factor // 2, width * factor, 4, stride, padding)
            layers += _block(convolution, width * factor, nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4))

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1], H and W at least 56 -> [N, 1, H // 8 - 6, W // 8 - 6]."""
        return self.layers(image)
