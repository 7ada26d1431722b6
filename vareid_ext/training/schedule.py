"""What changes over a run, as pure functions of the epoch: a resumed run has nothing to restore."""

from __future__ import annotations

import math

from vareid_ext.config import LossConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, epoch: float) -> float:
    """The learning rate at a moment of a run.

    Args:
        config: base rate, warm-up and schedule.
        epoch: epochs done so far, with their fraction: 1.5 is the middle of the second epoch.
    """
    factor = 1.0
    if epoch < config.warmup_epochs:
        factor = config.warmup_start + (1 - config.warmup_start) * epoch / config.warmup_epochs
    if config.schedule == "cosine":
        done = min(epoch / max(config.epochs, 1), 1.0)
        factor *= config.cosine_floor + (1 - config.cosine_floor) * (1 + math.cos(math.pi * done)) / 2
    else:
        factor *= config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return config.lr * factor


def view_weight(config: LossConfig, epoch: float) -> float:
    """The weight of the viewpoint loss at a moment of a run."""
    dropped = config.view_weight_drop is not None and epoch >= config.view_weight_drop
    return config.view_weight_late if dropped else config.view_weight
