"""Regions of a feature map that masks give, pooled: the parts of PCB + RPP, SPReID and DSA-reID."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pool_masks(x: Tensor, masks: Tensor, eps: float = 1e-6) -> Tensor:
    """The mean of a feature map under each of several masks, ``sum m x / max(sum m, eps)``.

    Args:
        x: floating point [N, C, H, W]; resized to the masks' size (bilinear) where that is another.
        masks: floating point [N, P, h, w], at least 0, given or predicted.
        eps: the least sum of a mask; an empty one gives 0.

    Returns:
        Float32 [N, P, C].

    Raises:
        ValueError: other shapes.
    """
    if x.ndim != 4 or masks.ndim != 4 or x.shape[0] != masks.shape[0]:
        raise ValueError(f"x [N, C, H, W] and masks [N, P, h, w] were expected, got {[*x.shape]}, {[*masks.shape]}")
    x, masks = x.float(), masks.float()
    if x.shape[2:] != masks.shape[2:]:
        x = F.interpolate(x, masks.shape[2:], mode="bilinear", align_corners=False)
    total = torch.einsum("nchw,nphw->npc", x, masks)
    return total / masks.sum((2, 3)).clamp(min=eps)[:, :, None]
