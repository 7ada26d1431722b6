"""The networks that put a photographed person into another pose, and pictures of poses (Qian et al., ECCV 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vareid_ext.models.joints import REGIONS, bones

_LINES = sum(REGIONS, ())
_POSES = 8


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


def standing_poses() -> Tensor:
    """Joints float32 [8, 14, 3] of a person in an image of 256 x 128, seen from eight sides, the front first."""
    # To the person's left, ahead, and down from the top of the image, in pixels.
    middle = [(0, 0, 24), (0, 0, 48)]
    limbs = [[(side * 22, 0, 56), (side * 28, side * 4, 92), (side * 28, side * 12, 124)] for side in (-1, 1)] + [
        [(side * 13, 0, 128), (side * 13, side * -6, 180), (side * 13, side * -12, 236)] for side in (-1, 1)
    ]
    left, ahead, down = torch.tensor([*middle, *(joint for limb in limbs for joint in limb)]).float().unbind(1)
    turn = torch.arange(_POSES)[:, None] * (2 * math.pi / _POSES)
    x = 63.5 + left * turn.cos() + ahead * turn.sin()
    return torch.stack([x, down.expand_as(x), torch.ones_like(x)], 2)


def draw_pose(keypoints: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The picture of a pose, each line between joints in a colour of its own: float32 [N, 3, *size] in [-1, 1].

    Args:
        keypoints: float32 [N, 14, 3] in images of `image_size` (height, width) pixels.
        image_size, size: (height, width) of the images, and of the pictures.
    """
    phase = (
        torch.arange(len(_LINES), device=keypoints.device)[:, None] / len(_LINES) + keypoints.new_tensor([0, 1, 2]) / 3
    )
    colour = (1 + (2 * math.pi * phase).cos()) / 2
    drawn = bones(keypoints, _LINES, image_size, size, width=3.0)
    return 2 * (drawn[:, :, None] * colour[:, :, None, None]).amax(1) - 1
