"""A small method and batches for it."""

from __future__ import annotations

from dataclasses import fields

import torch

from vareid_ext.data import Batch
from vareid_ext.methods import METHODS, Method, TrainingClasses, VaReid
from vareid_ext.models import ModelConfig
from vareid_ext.training.optimizers import belongs, set_training_mode, train_only

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


def method_of(name, identities=5, model=None, **settings) -> Method:
    """A method with these settings, on a small trunk where no other is given."""
    torch.manual_seed(0)
    model = ModelConfig("resnet10t", BACKBONE, pretrained=False) if model is None else model
    classes = TrainingClasses(identities, 3, torch.ones(identities, 3, dtype=torch.bool))
    return METHODS[name](METHODS[name].Config(**settings), model, classes)


def without_heads(method) -> int:
    """The number of parameters of what gives the test feature."""
    return sum(
        parameter.numel()
        for name, parameter in method.named_parameters()
        if not any(name == head or name.startswith(f"{head}.") for head in method.heads)
    )


def without_gradient(method, batch, parts=None) -> set[str]:
    """The names of parameters in these parts, or in all, that the losses of a batch give no gradient other than 0.

    Parameters that are 0, as scales at the end of residual blocks are at first, would hide others and are changed.
    AssertionError where a parameter outside the parts has a gradient.
    """
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    train_only(method, trainable, parts)
    set_training_mode(method, parts)
    method.zero_grad()
    sum(term.weight * term.value for term in method(batch).values()).backward()
    named = dict(method.named_parameters())
    touched = {name for name, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}
    wanted = {name for name in trainable if parts is None or belongs(name, parts)}
    train_only(method, trainable, None)
    assert touched <= wanted, sorted(touched - wanted)
    return wanted - touched


def batch_of(images, identities=5) -> Batch:
    index = torch.arange(len(images))
    return Batch(images, index % identities, index, index % 3, index)
