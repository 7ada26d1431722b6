"""A small method and batches for it."""

from __future__ import annotations

from dataclasses import fields

import torch

from vareid_ext.data import Batch
from vareid_ext.methods import TrainingClasses, VaReid
from vareid_ext.models import ModelConfig

BACKBONE = {"channels": (8, 8, 16, 16), "stem_width": 8}


def tiny(identities=5, **arguments) -> VaReid:
    """A VA-reID network; the arguments are fields of its configuration and of the trunk's."""
    torch.manual_seed(0)
    own = {field.name for field in fields(VaReid.Config)}
    settings = {"stripe_dim": 4, **{name: value for name, value in arguments.items() if name in own}}
    model = {name: value for name, value in arguments.items() if name not in own}
    config = ModelConfig("resnet10t", BACKBONE, pretrained=False, **model)
    classes = TrainingClasses(identities, 3, torch.ones(identities, 3, dtype=torch.bool))
    return VaReid(VaReid.Config(**settings), config, classes)


def batch_of(images, identities=5) -> Batch:
    index = torch.arange(len(images))
    return Batch(images, index % identities, index, index % 3, index)
