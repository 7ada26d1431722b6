"""What a training run is: frozen dataclasses, checked when they are built, one docstring per field.

``vareid_ext.training.command_line`` turns them into the command line and reads recipes and configuration files. Units
stand in the docstrings; fractions are in [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vareid_ext._limits import check_limits
from vareid_ext.data import (
    EXTRAS,
    DivisionSettings,
    ExtraFiles,
    SyntheticSettings,
    ViewpointClasses,
    check_kind,
    check_normalisation,
    declared_classes,
)
from vareid_ext.methods import VaReid
from vareid_ext.metrics.exclusion import USUAL, parse_exclusion
from vareid_ext.models import ModelConfig

_MOST_EPOCHS = 100_000
_MOST_STEPS = 10**9
_MOST_PIXELS = 2**30  # of a batch's images: 12 GiB as float32
DEFAULT_IDENTITIES = 16
"""Identities per batch where none are given and the data set has as many."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read and augmented."""

    kind: str = "synthetic"
    """the data set's layout; synthetic is rendered from a seed, auto finds out how the images at root lie"""
    root: str | None = None
    """the data set's folder, or a table of images; none for kind synthetic"""
    division: DivisionSettings = field(default_factory=DivisionSettings)
    """who is tested on, where the data set does not say"""
    viewpoint_labels: Literal["hard", "soft"] = "hard"
    """hard: one viewpoint an image; soft: a label between viewpoints is shared by them"""
    viewpoint_file: str | None = None
    """file of viewpoint labels (the authors' .pkl, or .csv); none: those of the data set itself, or unknown"""
    viewpoints: tuple[str, ...] = ()
    """the viewpoints' names, such as front,rear,left,right; empty: the data set's own, or those that its labels name"""
    viewpoints_between: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """labels between viewpoints, such as {front_left: [front, left]}; where labels are hard, the first is meant"""
    viewpoint_bins: int | None = None
    """number of viewpoints of equal width, where labels are angles in degrees; none: labels are names"""
    skip_bad_images: bool = False
    """go on without unreadable images; otherwise they stop the run before training starts"""
    height: int = 128
    """image height, pixels"""
    width: int = 64
    """image width, pixels"""
    flip: float = 0.5
    """chance of a horizontal flip in training"""
    pad: int = 10
    """border added before the random crop back to height x width, pixels"""
    erasing: float = 0.5
    """chance of erasing a random rectangle in training"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of the red, green, blue values in [0, 1] that is subtracted"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """standard deviation of the red, green, blue values in [0, 1] to divide by"""
    workers: int | None = None
    """processes that load images; 0 loads in the main process; none: one less than there are CPU cores (for each
    process of torchrun), at most 8; the result does not depend on it"""
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    """the rendered data set, for kind synthetic"""
    extras: ExtraFiles = field(default_factory=ExtraFiles)
    """inputs beside the images, which only some methods read; kind synthetic renders those that are not given"""

    def __post_init__(self) -> None:
        check_limits("data", self, height=(16, 4096), width=(16, 4096), pad=(0, 1024), flip=(0, 1), erasing=(0, 1))
        check_limits("data", self, workers=(0, 256))
        check_normalisation(self.mean, self.std, "data.")
        check_kind(self.kind, self.root, "data.")
        self.declared_viewpoints()

    def declared_viewpoints(self) -> ViewpointClasses | None:
        """The viewpoints that this section declares, if any."""
        return declared_classes(self.viewpoints, self.viewpoints_between, self.viewpoint_bins, "data.")

    @property
    def processes(self) -> int:
        """How many processes load images: `workers`, or what suits the cores this process may use."""
        trainers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(8, max(len(os.sched_getaffinity(0)) // trainers - 1, 0)) if self.workers is None else self.workers


@dataclass(frozen=True)
class SamplerConfig:
    """How a batch is put together."""

    kind: Literal["identities", "shuffled"] = "identities"
    """identities: P identities x K images of each; shuffled: batch_size images at random, each once an epoch"""
    batch_size: int = 64
    """images of a batch, with kind shuffled only"""
    identities: int | None = None
    """identities per batch; none: 16, or all where the training split has fewer"""
    instances: int = 4
    """images of each identity in a batch"""
    spread: tuple[Literal["viewpoint", "camera"], ...] = ()
    """what an identity's images in a batch are spread over, in this order; empty: drawn at random"""
    batches_per_epoch: int | None = None
    """batches in an epoch; none: as many as it takes to show every identity's images once"""

    def __post_init__(self) -> None:
        check_limits("sampler", self, identities=(1, 65_536), instances=(1, 1024), batches_per_epoch=(1, 1_000_000))
        check_limits("sampler", self, batch_size=(2, 65_536))
        if self.identities == self.instances == 1:
            raise ValueError("sampler.identities x sampler.instances: 1 was given; a batch needs at least 2 images")

    @property
    def images_per_batch(self) -> int:
        """Images of a training batch, at most."""
        if self.kind == "shuffled":
            return self.batch_size
        return (self.identities or DEFAULT_IDENTITIES) * self.instances


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning rate over time."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """adam adds the weight decay to the gradient, adamw decays the weights directly, sgd uses momentum"""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """factors of the learning rate of parts of the method, such as {backbone: 0.1}; the longest name counts"""
    epochs: int = 60
    """number of epochs"""
    lr: float = 3.5e-4
    """base learning rate"""
    weight_decay: float = 5e-4
    """weight decay"""
    momentum: float = 0.9
    """momentum of sgd"""
    nesterov: bool = True
    """sgd looks one step of momentum ahead (Nesterov)"""
    amsgrad: bool = False
    """adam and adamw keep the largest second moment (AMSGrad)"""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """multistep: lr is multiplied by gamma at each milestone; cosine: lr falls to cosine_floor x lr at the last step"""
    milestones: tuple[int, ...] = ()
    """epochs at which multistep lowers the learning rate, ascending"""
    gamma: float = 0.1
    """factor of multistep"""
    cosine_floor: float = 0.01
    """final learning rate of cosine, as a fraction of lr"""
    warmup_epochs: float = 5.0
    """epochs over which the learning rate rises linearly; 0: none"""
    warmup_start: float = 0.1
    """learning rate at the first step of the warm-up, as a fraction of lr"""
    clip_norm: float | None = None
    """largest norm of the gradient of all parameters together; none: not clipped"""
    ema_decay: float | None = None
    """decay per step of an exponential moving average of the weights, which is then what is evaluated; none: off"""

    def __post_init__(self) -> None:
        check_limits("optimizer", self, epochs=(0, _MOST_EPOCHS), warmup_epochs=(0, _MOST_EPOCHS), lr=(1e-12, 1000))
        check_limits(
            "optimizer", self, weight_decay=(0, 100), momentum=(0, 1), gamma=(1e-12, 1), clip_norm=(1e-12, 1e6)
        )
        check_limits("optimizer", self, cosine_floor=(0, 1), warmup_start=(0, 1))
        for part, factor in self.lr_factors.items():
            if not (isinstance(factor, (int, float)) and 0 <= factor <= 1000):
                raise ValueError(
                    f"optimizer.lr_factors: {part!r}: {factor!r} was given; allowed are values from 0 to 1,000"
                )
        if list(self.milestones) != sorted({m for m in self.milestones if 1 <= m <= _MOST_EPOCHS}):
            raise ValueError(
                f"optimizer.milestones: {self.milestones!r} was given; allowed are ascending epochs from 1 to "
                f"{_MOST_EPOCHS:,}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"optimizer.ema_decay: {self.ema_decay!r} was given; allowed are values in (0, 1), or none"
            )


@dataclass(frozen=True)
class StageConfig:
    """A stage of training, as what differs from the configuration's sections."""

    epochs: int
    """number of epochs"""
    train: tuple[str, ...] | None = None
    """the parts of the method that are trained, such as [neck, loss]; the others stay, with their batch norms in
    evaluation mode; none: all"""
    optimizer: dict = field(default_factory=dict)
    """fields of section optimizer"""
    sampler: dict = field(default_factory=dict)
    """fields of section sampler"""


@dataclass(frozen=True)
class Stage:
    """A stage of training, complete."""

    optimizer: OptimizerConfig
    """with the stage's own number of epochs"""
    sampler: SamplerConfig
    train: tuple[str, ...] | None = None
    """the parts that are trained; None: all"""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and when."""

    every: int = 10
    """epochs between evaluations (the last epoch is always evaluated); 0: the last epoch only"""
    batch_size: int = 128
    """images per batch when features are extracted"""
    flip: bool = False
    """add the features of the mirrored image"""
    normalize: Literal["whole", "parts", "none"] = "whole"
    """bring the feature to length 1 as a whole, each of its parts by itself, or not at all"""
    exclude: str = USUAL
    """the gallery images that are left out for a query, as `vareid_ext.evaluate_ranking` takes them"""
    k1: int = 20
    """neighbours of the k-reciprocal sets in re-ranking"""
    k2: int = 6
    """neighbours of the query expansion in re-ranking"""
    lambda_value: float = 0.3
    """weight of the original distance in re-ranking"""
    baselines: bool = False
    """also measure raw pixels and colour histograms as features"""
    ranking_queries: int = 6
    """queries shown in ranking.png"""
    save_features: bool = False
    """also write the final features to query.npz and gallery.npz, for vareid_ext.evaluate and vareid_ext.rerank"""

    def __post_init__(self) -> None:
        check_limits("evaluation", self, every=(0, _MOST_EPOCHS), batch_size=(1, 65_536), ranking_queries=(1, 50))
        check_limits("evaluation", self, k1=(1, 1000), k2=(1, 1000), lambda_value=(0, 1))
        parse_exclusion(self.exclude, "evaluation.exclude")


@dataclass(frozen=True)
class RunConfig:
    """Where and how the program runs."""

    seed: int = 0
    """seed of the weights, the batches and the augmentation"""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:N"""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the backbone; bf16 and fp16 are automatic mixed precision, fp16 with a gradient scaler and on cuda only"""
    channels_last: bool = True
    """store images with the channels innermost (faster convolutions)"""
    compile: bool = False
    """compile the network with torch.compile"""
    sync_batch_norm: bool = True
    """where several processes share the batches, batch norms take mean and variance of the whole batch; false: of the
    images of their process"""
    gather_triplets: bool = True
    """where several processes share the batches, triplets are made of the images of all; false: of those of one"""
    log_every: int = 20
    """steps between lines of log.jsonl and points of TensorBoard and the loggers"""
    save_every: int = 1
    """epochs between saves of last.pt (the last epoch is always saved)"""
    tensorboard: bool = True
    """write TensorBoard event files to the run folder"""
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """where values are written besides, such as [wandb, mlflow]: Weights & Biases, MLflow; each is an extra of the
    package"""

    def __post_init__(self) -> None:
        check_limits("run", self, seed=(0, 2**63 - 1), threads=(0, 1024))
        check_limits("run", self, log_every=(1, _MOST_STEPS), save_every=(1, _MOST_STEPS))


@dataclass(frozen=True)
class LossConfig:
    """The losses of all methods."""

    shard_identities: bool = False
    """where several processes train together, each has the viewpoint-aware loss's centres of some of the identities;
    false: of all"""


@dataclass(frozen=True)
class Config:
    """A complete training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """the images"""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """the batches"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the network's trunk"""
    method: Any = field(default_factory=VaReid.Config)
    """the method and its settings"""
    loss: LossConfig = field(default_factory=LossConfig)
    """the losses"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer"""
    stages: tuple[StageConfig, ...] = ()
    """stages of training, one after the other, each a mapping with what differs from the sections: {epochs: 20, train:
    [head], optimizer: {lr: 0.01}, sampler: {kind: shuffled}}; none: one stage, with everything trained"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """the evaluation"""
    run: RunConfig = field(default_factory=RunConfig)
    """the program"""

    def __post_init__(self) -> None:
        batches = {
            "evaluation.batch_size": self.evaluation.batch_size,
        }
        for stage in self.resolved_stages:
            shuffled = stage.sampler.kind == "shuffled"
            name = "sampler.batch_size" if shuffled else "sampler.identities x sampler.instances"
            batches[name] = max(batches.get(name, 0), stage.sampler.images_per_batch)
        samplers = [self.sampler, *(stage.sampler for stage in self.resolved_stages)]
        unused = [sampler.batch_size for sampler in samplers if sampler.batch_size != SamplerConfig.batch_size]
        if unused and all(stage.sampler.kind == "identities" for stage in self.resolved_stages):
            raise ValueError(
                f"sampler.batch_size: {unused[0]} was given; it is for sampler.kind shuffled; a batch is "
                f"sampler.identities x sampler.instances images"
            )
        for name, images in batches.items():
            if images * self.data.height * self.data.width > _MOST_PIXELS:
                raise ValueError(
                    f"{name} x data.height x data.width: {images} x {self.data.height} x {self.data.width} was given; "
                    f"allowed are at most {_MOST_PIXELS:,} pixels in a batch"
                )

    @property
    def resolved_stages(self) -> tuple[Stage, ...]:
        """The stages with all their settings; one, where none are given."""
        if not self.stages:
            return (Stage(self.optimizer, self.sampler),)
        stages = []
        for number, stage in enumerate(self.stages):
            sections = {}
            if stage.epochs < 1:
                raise ValueError(f"stages[{number}].epochs: {stage.epochs} was given; allowed are values from 1 on")
            if stage.train is not None and not stage.train:
                raise ValueError(
                    f"stages[{number}].train: [] was given, which trains nothing; allowed are parts of the method, or "
                    "null for all of it"
                )
            for key, owner in (("epochs", "the stage's own field"), ("ema_decay", "the same in all stages")):
                if key in stage.optimizer:
                    raise ValueError(f"stages[{number}].optimizer: {key!r} was given, which is {owner}")
            for name, changes in (
                ("optimizer", {"epochs": stage.epochs, **stage.optimizer}),
                ("sampler", stage.sampler),
            ):
                section = getattr(self, name)
                changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
                try:
                    sections[name] = replace(section, **changes)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"stages[{number}]: {error}") from error
            stages.append(Stage(**sections, train=stage.train))
        return tuple(stages)

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.optimizer.epochs for stage in self.resolved_stages)

    def plain(self) -> dict[str, Any]:
        """The sections as dictionaries of what YAML and a checkpoint hold: lists in place of tuples."""
        return _plain(asdict(self))

    def with_absolute_paths(self) -> Config:
        """The same run, also from another working directory."""
        return self._with_paths(lambda path: str(Path(path).absolute()))

    def without_folders(self) -> Config:
        """The same run without the folders that its files lie in, which are one machine's."""
        return self._with_paths(lambda path: Path(path).name)

    def _with_paths(self, change: Callable[[str], str]) -> Config:
        def changed(path: str | None) -> str | None:
            return change(path) if path else path

        paths: dict[str, Any] = {name: changed(getattr(self.data.extras, name)) for name in EXTRAS}
        data = replace(
            self.data,
            root=changed(self.data.root),
            viewpoint_file=changed(self.data.viewpoint_file),
            extras=replace(self.data.extras, **paths),
        )
        return replace(self, data=data, model=replace(self.model, weights=changed(self.model.weights)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
