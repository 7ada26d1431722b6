"""All that changes while a run trains: built from a configuration, saved to and restored from a checkpoint."""

from __future__ import annotations

import dataclasses
import random
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vareid_ext.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from vareid_ext.config import Config, OptimizerConfig
from vareid_ext.data import ReidData
from vareid_ext.losses import ViewpointAwareLoss
from vareid_ext.models import ReidModel


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """optimizer steps done"""
    seconds: float = 0.0
    """time spent by earlier starts of the program"""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """metrics of what was measured before training: the untrained network, raw pixels, colour histograms"""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """metrics of the network after some of the epochs, with "epoch" and "step\""""


@dataclass
class TrainingState:
    """The network, the loss with its centres, and what trains them."""

    config: Config
    identity_names: tuple[str, ...]
    model: ReidModel
    loss: ViewpointAwareLoss
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    """the moving average of the model's weights, None where it is off"""
    progress: Progress
    restored: Mapping[str, Any] | None = None
    """the configuration, as plain values, of the checkpoint that the state was restored from"""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained: the network's parameters and the centres."""
        return [p for p in (*self.model.parameters(), *self.loss.parameters()) if p.requires_grad]

    @property
    def evaluated_model(self) -> ReidModel:
        """The network that is evaluated: the moving average where there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def save(self, path: Path, seconds: float) -> None:
        """Write a checkpoint; `seconds` is the time that this start of the program has taken so far."""
        progress = dataclasses.replace(self.progress, seconds=self.progress.seconds + seconds)
        state = {
            "config": self.config.plain(),
            "identity_names": list(self.identity_names),
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "random": random_state(),
            "progress": dataclasses.asdict(progress),
        }
        save_checkpoint(path, state)

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint.

        Raises:
            ValueError: it is damaged, or of another data set or network.
        """
        state = load_checkpoint(path)
        entries = ("config", "identity_names", "model", "loss", "optimizer", "scaler", "average", "random", "progress")
        missing = [entry for entry in entries if entry not in state]
        if missing:
            raise ValueError(f"resume: {str(path)!r} is not a run's checkpoint: it has no {missing[0]!r}")
        if state["identity_names"] != list(self.identity_names):
            raise ValueError(f"resume: {str(path)!r} was trained on other identities than the data set has now")
        if (state["average"] is None) != (self.average is None):
            raise ValueError("optimizer.ema_decay: cannot be switched on or off when a run is resumed")
        try:
            trained_by = OptimizerConfig(**state["config"]["optimizer"]).name
            progress = Progress(**state["progress"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"resume: {str(path)!r} is not a run's checkpoint: {error}") from error
        if trained_by != self.config.optimizer.name:
            raise ValueError(
                f"optimizer.name: {self.config.optimizer.name!r} was given; the run was trained by {trained_by!r} and "
                "cannot change it when it is resumed"
            )
        # The optimizer's settings are the configuration's, which may differ from those it was saved with; the learning
        # rate is set at every step, and stays that of the last one where none follows.
        settings = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups
        ]
        try:
            self.model.load_state_dict(state["model"])
            self.loss.load_state_dict(state["loss"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            set_random_state(state["random"])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"resume: {str(path)!r} does not fit the configuration: {reason}") from error
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        self.progress, self.restored = progress, state["config"]


def build(config: Config, data: ReidData, device: torch.device, *, load_weights: bool = True) -> TrainingState:
    """The state at the start of a run, the generators' too: a pure function of the configuration and the data set.

    Args:
        config: the run.
        data: its identities and the viewpoints each of them is seen from.
        device: where everything lives.
        load_weights: whether the backbone's pretrained weights are wanted; a checkpoint that is about to be restored
            brings its own.

    Raises:
        ValueError, OSError: as :class:`vareid_ext.models.ReidModel`.
    """
    torch.manual_seed(config.run.seed)
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % (1 << 32))
    model = ReidModel(
        config.model.backbone,
        backbone_options=config.model.backbone_options,
        pretrained=config.model.pretrained and load_weights,
        weights=config.model.weights if load_weights else None,
        last_stride=config.model.last_stride,
        pooling=config.model.pooling,
        input_norm=config.model.input_norm,
        num_identities=data.num_identities,
        local=config.model.local,
        stripe_dim=config.model.stripe_dim,
    )
    model.to(device)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)
    loss = ViewpointAwareLoss(
        data.num_identities,
        model.feature_dim,
        num_viewpoints=data.num_viewpoints,
        alpha=config.loss.alpha,
        beta=config.loss.beta,
        view_weight=config.loss.view_weight,
        mask=torch.from_numpy(data.subclass_mask()) if config.loss.mask_missing else None,
        smoothing=config.loss.smoothing,
        epsilon=config.loss.epsilon,
        use_viewpoint=config.loss.use_viewpoint,
        use_regularizer=config.loss.use_regularizer,
    ).to(device)
    average = None
    if config.optimizer.ema_decay is not None:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema_decay), use_buffers=True
        ).eval()
    parameters = [p for p in (*model.parameters(), *loss.parameters()) if p.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=config.run.precision == "fp16")
    optimizer = build_optimizer(config.optimizer, parameters)
    return TrainingState(config, data.identity_names, model, loss, optimizer, scaler, average, Progress())


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer of a configuration."""
    lr, weight_decay, momentum = config.lr, config.weight_decay, config.momentum
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=momentum > 0)
