"""What is trained, and by which optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vareid_ext.training.config import OptimizerConfig

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def belongs(name: str, parts: Collection[str]) -> str | None:
    """The longest of the parts that a parameter or module is, or lies within; None: it is in none."""
    return max((part for part in parts if name == part or name.startswith(f"{part}.")), key=len, default=None)


def check_parts(method: nn.Module, field: str, parts: Iterable[str]) -> None:
    """ValueError if the method has no part of one of the names."""
    known = {name for name, _ in (*method.named_modules(), *method.named_parameters()) if name}
    for part in parts:
        if part not in known:
            children = ", ".join(name for name, _ in method.named_children())
            raise ValueError(f"{field}: {part!r} was given; the method has the parts {children}, and their own")


def train_only(method: nn.Module, trainable: Collection[str], parts: Collection[str] | None) -> None:
    """Train the parameters of these parts, out of the trainable ones; None: all of them."""
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trainable and (parts is None or belongs(name, parts) is not None))


def set_training_mode(method: nn.Module, parts: Collection[str] | None) -> None:
    """Training mode, in which the batch norms of parts that are not trained stay as in evaluation; None: all train."""
    method.train()
    if parts is not None:
        for name, module in method.named_modules():
            if isinstance(module, _BATCH_NORMS) and belongs(name, parts) is None:
                module.eval()


def build_optimizer(config: OptimizerConfig, method: nn.Module) -> Optimizer:
    """The optimizer of what is trained of a method, one parameter group for each learning-rate factor."""
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            factor = _factor(config.lr_factors, name)
            groups.setdefault(factor, {"params": [], "lr_factor": factor})["params"].append(parameter)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(list(groups.values()), momentum=config.momentum, nesterov=nesterov, **common)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(list(groups.values()), amsgrad=config.amsgrad, **common)


def _factor(factors: Mapping[str, float], name: str) -> float:
    part = belongs(name, factors)
    return 1.0 if part is None else factors[part]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The learning rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
