"""The network on aligned images of the body's parts that guides another one (after Zhang et al., CVPR 2019)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from vareid_ext.models.warp import uv_table

# Head, front, back, upper arms, forearms and hands, thighs, shins, feet: DensePose's parts that are seen alike.
GROUPS = ((23, 24), (1,), (2,), (15, 16, 17, 18), (3, 4, 19, 20, 21, 22), (7, 8, 9, 10), (11, 12, 13, 14), (5, 6))


class Guide(nn.Module):
    """From the images of the body's parts to a feature of each of `GROUPS`."""

    members: Tensor

    def __init__(self, dim: int, part_size: int) -> None:
        super().__init__()
        self.part_size = part_size
        widths = (4, dim // 8, dim // 4, dim // 2, dim)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        self.layers = nn.Sequential(*layers)  # shared by the parts
        members = torch.tensor([[part in group for part in range(1, 25)] for group in GROUPS])
        self.register_buffer("members", members.float(), persistent=False)

    def forward(self, images: Tensor, iuv: Tensor) -> Tensor:
        """Images [N, 3, H, W], DensePose's maps [N, 3, H, W] -> [N, 8, d]: of the parts of each group a mean, weighted
        by how much of them is seen; 0 where nothing is."""
        parts = uv_table(images, iuv, size=self.part_size)
        features = self.layers(parts.flatten(0, 1)).float().mean((2, 3)).unflatten(0, parts.shape[:2])
        seen = parts[:, :, 3].mean((2, 3))
        weights = self.members * seen[:, None]
        return weights @ features / weights.sum(2, keepdim=True).clamp(min=1e-6)
