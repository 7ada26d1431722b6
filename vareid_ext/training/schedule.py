"""The learning rate as a pure function of the epoch: a resumed run has nothing to restore."""

from __future__ import annotations

import math

from vareid_ext.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, epoch: float) -> float:
    """The learning rate at a moment of a stage of training.

    Args:
        config: base rate, warm-up and schedule.
        epoch: epochs of the stage done so far, with their fraction: 1.5 is the middle of the second epoch.
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
