"""All that changes while a run trains: built from a configuration, saved to and restored from a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import random
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vareid_ext.data import Batch, ReidData
from vareid_ext.files.checkpoint import load_checkpoint, random_state, set_random_state
from vareid_ext.files.weights import forget_weights, load_method_weights
from vareid_ext.losses import ViewpointAwareLoss
from vareid_ext.methods import METHODS, Method, TrainingClasses
from vareid_ext.models import Backbone, ModelConfig
from vareid_ext.training.config import Config, OptimizerConfig
from vareid_ext.training.optimizers import belongs, build_optimizer, check_parts, train_only
from vareid_ext.training.shards import Shards


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """optimizer steps done"""
    stage: int = 0
    """the stage that the last of them belongs to"""
    seconds: float = 0.0
    """time spent by earlier starts of the program"""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """metrics of what was measured before training: the untrained network, raw pixels, colour histograms"""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """metrics of the network after some of the epochs, with "epoch" and "step\""""


@dataclass
class TrainingState:
    """The method, and what trains it."""

    config: Config
    identity_names: tuple[str, ...]
    num_viewpoints: int
    method: Method
    trainable: frozenset[str]
    """names of the parameters that a stage may train: all but those that the method itself keeps still"""
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    """the moving average of the method's weights, None where it is off"""
    progress: Progress
    shards: Shards | None = None
    """the centres that are divided among processes, None where all are here"""
    restored: Mapping[str, Any] | None = None
    """the configuration, as plain values, of the checkpoint that the state was restored from"""

    @property
    def left_out(self) -> list[str]:
        """Entries of the file of weights that the backbone has no place for, such as a classifier."""
        return [name for part in self.method.modules() if isinstance(part, Backbone) for name in part.left_out]

    @property
    def num_parameters(self) -> int:
        """Of the method, those that other processes have among them."""
        divided = {} if self.shards is None else self.shards.identities
        parameters = self.method.named_parameters()
        return sum(math.prod((divided.get(name, len(p)), *p.shape[1:])) if p.dim() else 1 for name, p in parameters)

    @property
    def has_backbone(self) -> bool:
        """Whether section `model` has a part in the method."""
        return _has_backbone(self.method)

    @property
    def evaluated(self) -> Method:
        """The method that is evaluated: the moving average where there is one."""
        return self.method if self.average is None else self.average.module  # type: ignore[return-value]

    def begin_stage(self, number: int) -> None:
        """Go on with a stage: what it trains, by an optimizer of its own."""
        stage = self.config.resolved_stages[number]
        train_only(self.method, self.trainable, stage.train)
        self.optimizer = build_optimizer(stage.optimizer, self.method)
        self.progress.stage = number

    def content(self, seconds: float) -> dict[str, Any]:
        """What a checkpoint holds, on the first of the processes that train together, all of which call this.

        Args:
            seconds: the time that this start of the program has taken so far.
        """
        progress = dataclasses.replace(self.progress, seconds=self.progress.seconds + seconds)
        generators = random_state()
        if self.method.share is not None:  # the same on the GPU of each process, of which this one knows its own
            generators["cuda"] = [torch.cuda.get_rng_state() for _ in generators["cuda"]]
        method, optimizer = self.method.state_dict(), self.optimizer.state_dict()
        average = None if self.average is None else self.average.state_dict()
        if self.shards is not None:
            method, optimizer = self.shards.whole(method), self.shards.whole_optimizer(self.optimizer)
            average = None if average is None else self.shards.whole(average, "module.")
        return {
            "config": self.config.plain(),
            "identity_names": list(self.identity_names),
            "num_viewpoints": self.num_viewpoints,
            "method": method,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "average": average,
            "random": generators,
            "progress": dataclasses.asdict(progress),
        }

    def restore(self, path: Path, *, own_device: bool = False) -> None:
        """Go back to a checkpoint.

        Args:
            path: of the checkpoint.
            own_device: leave the generators of all GPUs but this process's own alone.

        Raises:
            ValueError: it is damaged, or of another data set or network.
        """
        state = load_checkpoint(path)
        entries = ("config", "identity_names", "method", "optimizer", "scaler", "average", "random", "progress")
        missing = [entry for entry in entries if entry not in state]
        if missing:
            raise ValueError(f"resume: {str(path)!r} is not a run's checkpoint: it has no {missing[0]!r}")
        if state["identity_names"] != list(self.identity_names):
            raise ValueError(f"resume: {str(path)!r} was trained on other identities than the data set has now")
        if (state["average"] is None) != (self.average is None):
            raise ValueError("optimizer.ema_decay: cannot be switched on or off when a run is resumed")
        try:
            progress = Progress(**state["progress"])
            before = state["config"]
            changes = before["stages"][progress.stage]["optimizer"] if before["stages"] else {}
            trained_by = OptimizerConfig(**before["optimizer"] | changes).name
        except (TypeError, LookupError, ValueError) as error:
            raise ValueError(f"resume: {str(path)!r} is not a run's checkpoint: {error}") from error
        stages = self.config.resolved_stages
        if progress.stage >= len(stages):
            raise ValueError(f"stages: the run has reached stage {progress.stage + 1}, which the configuration lacks")
        name = stages[progress.stage].optimizer.name
        if trained_by != name:
            field = f"stages[{progress.stage}].optimizer.name" if self.config.stages else "optimizer.name"
            raise ValueError(
                f"{field}: {name!r} was given; the run was trained by {trained_by!r} and cannot change it when it is "
                "resumed"
            )
        self.begin_stage(progress.stage)
        # The optimizer's settings are the configuration's, which may differ from those it was saved with; the learning
        # rate is set at every step, and stays that of the last one where none follows.
        settings = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups
        ]
        try:
            if self.shards is not None:
                state["method"] = self.shards.own(state["method"])
                state["optimizer"] = self.shards.own_optimizer(self.optimizer, state["optimizer"])
                state["average"] = state["average"] and self.shards.own(state["average"], "module.")
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            states = state["random"]["cuda"]
            set_random_state({**state["random"], "cuda": [] if own_device else states})
            if own_device and states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states[0])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"resume: {str(path)!r} does not fit the configuration: {reason}") from error
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        self.progress, self.restored = progress, state["config"]


def build_method(config: Config, classes: TrainingClasses) -> Method:
    """The method of a configuration, with the weights that it begins with but those of a file."""
    return METHODS[config.method.name](config.method, config.model, classes)


def begin_method(config: Config, classes: TrainingClasses, *, load_weights_file: bool = True) -> Method:
    """The method of a configuration as training begins with it.

    Raises:
        ValueError, OSError: as the method's constructor and :func:`vareid_ext.files.weights.load_method_weights`; a
            part that the configuration names and the method does not have; a pooling that the method does not use.
    """
    if not load_weights_file:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False, weights=None))
    own = METHODS[config.method.name].own_pooling
    if own and config.model.pooling != ModelConfig.pooling:
        raise ValueError(
            f"model.pooling: {config.model.pooling!r} was given; method {config.method.name!r} does not use it but "
            f"classifies {own}: {ModelConfig.pooling!r} is allowed"
        )
    method = build_method(config, classes)
    for number, stage in enumerate(config.resolved_stages):
        if stage.train is not None:
            check_parts(method, f"stages[{number}].train", stage.train)
            if not any(belongs(n, stage.train) for n, p in method.named_parameters() if p.requires_grad):
                raise ValueError(
                    f"stages[{number}].train: {', '.join(stage.train)} was given; a part with parameters is needed"
                )
        check_parts(method, "optimizer.lr_factors", stage.optimizer.lr_factors)
    check_shards(config, method)
    if config.model.weights is not None:
        settings = config.plain()["model"]
        loaded = load_method_weights(method, config.model.weights, heads=method.heads, settings=settings)
        if not loaded and not _has_backbone(method):
            raise ValueError(
                f"model.weights: {config.model.weights!r} was given; method {config.method.name!r} has a network of "
                "its own, for which the checkpoint of another run is allowed"
            )
    return method


def check_shards(config: Config, method: Method) -> None:
    """ValueError where a configuration divides centres that its method does not have."""
    if config.loss.shard_identities and not any(isinstance(part, ViewpointAwareLoss) for part in method.modules()):
        raise ValueError(
            f"loss.shard_identities: true was given; method {config.method.name!r} as it is configured has no "
            "viewpoint-aware loss, whose centres could be divided among processes"
        )


def _has_backbone(method: Method) -> bool:
    return any(isinstance(part, Backbone) for part in method.modules())


def check_method(config: Config, *, load_weights_file: bool = True) -> None:
    """Errors that are the same for every data set, which takes its time to read.

    Raises:
        ValueError, OSError: as :func:`begin_method`; images of a size that the method does not take.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False))
    any_classes = TrainingClasses(2, 3, torch.ones(2, 3, dtype=torch.bool))
    method = begin_method(config, any_classes, load_weights_file=load_weights_file)
    if not method.test_inputs:
        size, label = (config.data.height, config.data.width), torch.zeros(1, dtype=torch.long)
        try:
            with torch.no_grad():
                method.eval().features(Batch(torch.zeros(1, 3, *size), label, label, label, label))
        except ValueError as error:
            raise ValueError(f"data.height, data.width: {size[0]}, {size[1]} were given; {error}") from error


def check_inputs(config: Config, data: ReidData) -> None:
    """ValueError where the training images do not come with what the method reads."""
    kind, name = METHODS[config.method.name], config.method.name
    inputs = kind.inputs_with(config.method)
    missing = [extra for extra in inputs if extra != "viewpoint" and extra not in data.train.extras]
    if missing:
        raise ValueError(f"method.name: {name!r} reads {missing[0]!r}, which the images do not come with")
    if "viewpoint" in inputs and not data.num_train_viewpoints_known:
        given = config.data.viewpoint_file
        switches = [] if "viewpoint" in kind.inputs else ["viewpoint_aware", "use_viewpoint", "use_regularizer"]
        off = [f"--{switch}=false" for switch in switches if getattr(config.method, switch, False)]
        raise ValueError(
            f"data.viewpoint_file: {'nothing' if given is None else given} was given, and no training image has a "
            f"viewpoint, which method {name!r} reads; --viewpoint-file takes the authors' .pkl or a .csv with the "
            f"columns path and viewpoint, a manifest may have a column viewpoint"
            + (f"; {' '.join(off)} does without" if off else "")
        )


def build(
    config: Config,
    data: ReidData,
    device: torch.device,
    *,
    load_weights_file: bool = True,
    group: ProcessGroup | None = None,
) -> TrainingState:
    """The state at the start of a run, the generators' too: a pure function of the configuration and the data set.

    Args:
        config: the run.
        data: its identities and the viewpoints each of them is seen from.
        device: where everything lives.
        load_weights_file: whether weights to begin with are wanted, pretrained or of a file; a checkpoint that is about
            to be restored brings its own.
        group: the processes that train together; None for this one alone.

    Raises:
        ValueError, OSError: as :func:`begin_method`; the images do not come with what the method reads; there are more
            processes than identities to divide among them.
    """
    torch.manual_seed(config.run.seed)
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % (1 << 32))
    classes = TrainingClasses(data.num_identities, data.num_viewpoints, torch.from_numpy(data.subclass_mask()))
    check_inputs(config, data)
    method = begin_method(config, classes, load_weights_file=load_weights_file)
    forget_weights()
    trainable = frozenset(name for name, p in method.named_parameters() if p.requires_grad)
    average = None
    if config.optimizer.ema_decay is not None:
        average = AveragedModel(
            method, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema_decay), use_buffers=True
        ).eval()
    modules: list[nn.Module] = [method] if average is None else [method, average]
    # Before anything takes memory on the device.
    shards = Shards(modules, group) if config.loss.shard_identities and group is not None else None
    for module in modules:
        module.to(device)
        if config.run.channels_last:
            module.to(memory_format=torch.channels_last)
    first = config.resolved_stages[0]
    train_only(method, trainable, first.train)
    return TrainingState(
        config,
        data.identity_names,
        data.num_viewpoints,
        method,
        trainable,
        build_optimizer(first.optimizer, method),
        torch.amp.GradScaler(device.type, enabled=config.run.precision == "fp16"),
        average,
        Progress(),
        shards,
    )
