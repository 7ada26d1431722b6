"""Grad-CAM of a retrieval: where in an image lies what makes its feature like another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext.data import Batch, build_transform
from vareid_ext.models import Backbone

if TYPE_CHECKING:
    from vareid_ext.trained import TrainedModel

_BATCH = 16


def grad_cam(embed: Callable[[Tensor], Tensor], trunk: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
    """Activation maps of the similarity between features and reference features.

    Args:
        embed: images -> features [N, D], by way of `trunk`.
        trunk: a module whose output is a feature map [N, C, h, w].
        images: [N, 3, H, W].
        reference: [N, D], what each image's feature is compared with, by the inner product.

    Returns:
        [N, h, w], at least 0: ``relu(sum_c a_c A_c)``, A the map and a_c the mean over its places of the derivative of
        the similarity by ``A_c``.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2.
    """
    maps: list[Tensor] = []
    handle = trunk.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    try:
        with torch.enable_grad():
            similarity = (embed(images.requires_grad_()) * reference).sum()
            (gradient,) = torch.autograd.grad(similarity, maps[-1])
    finally:
        handle.remove()
    weight = gradient.mean(dim=(2, 3), keepdim=True)
    return F.relu((weight * maps[-1].detach()).sum(1))


def why_no_activation(model: TrainedModel) -> str:
    """Why a model has no activation maps here; "" if it has."""
    method = model.method
    trunks = [part for part in method.modules() if isinstance(part, Backbone)]
    if len(trunks) != 1 or method.test_inputs:
        return f"method {model.config.method.name} is not one trunk that reads the image alone"
    size, label = model.preprocessing, torch.zeros(1, dtype=torch.long, device=model.device)
    image = torch.zeros(1, 3, size.height, size.width, device=model.device)
    with torch.no_grad():
        parts = method.features(Batch(image, label, label, label, label))
    return "" if len(parts) == 1 else f"the feature of method {model.config.method.name} has {len(parts)} parts"


def activation_maps(model: TrainedModel, pictures: Sequence[Image.Image], reference: Tensor) -> np.ndarray:
    """:func:`grad_cam` of pictures for a model with one global feature: [N, h, w]."""
    how, method = model.preprocessing, model.method
    transform = build_transform(how.height, how.width, train=False, mean=how.mean, std=how.std)
    (trunk,) = (part for part in method.modules() if isinstance(part, Backbone))

    def embed(images: Tensor) -> Tensor:
        label = torch.zeros(len(images), dtype=torch.long, device=images.device)
        return method.embed(Batch(images, label, label, label, label), normalize=how.normalize)

    found = []
    for begin in range(0, len(pictures), _BATCH):
        images = torch.stack([transform(picture) for picture in pictures[begin : begin + _BATCH]]).to(model.device)
        some = reference[begin : begin + _BATCH].to(model.device).clone()  # not an inference tensor
        found.append(grad_cam(embed, trunk, images, some).cpu())
    return torch.cat(found).numpy()
