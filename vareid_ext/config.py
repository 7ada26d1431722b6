"""What a training run is: frozen dataclasses, checked when they are built, one docstring per field.

``vareid_ext.training.command_line`` turns them into the command line and reads recipes and configuration files. Units
stand in the docstrings; fractions are in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vareid_ext.data import SyntheticSettings

DataKind = Literal[
    "synthetic", "market1501", "dukemtmc-reid", "cuhk03-np-labeled", "cuhk03-np-detected", "msmt17", "manifest"
]


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low or math.isinf(value):
        raise ValueError(f"{name}: {value!r} was given; allowed are values >= {low}")


def _above_zero(name: str, value: float) -> None:
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name}: {value!r} was given; allowed are values > 0")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value!r} was given; allowed are values in [0, 1]")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read and augmented."""

    kind: DataKind = "synthetic"
    """the data set's layout; synthetic is rendered from a seed, manifest is a CSV file of your own images"""
    root: str | None = None
    """the data set's folder, or the CSV file of kind manifest; not used by kind synthetic"""
    viewpoint_labels: Literal["hard", "soft"] = "hard"
    """hard: front, side, back; soft: the in-between names are split between their two views, noise is uniform"""
    viewpoint_file: str | None = None
    """file of viewpoint labels (the authors' .pkl, or .csv); none: those of the data set itself, or unknown"""
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
    workers: int = 0
    """processes that load images; 0 loads in the main process; the result does not depend on it"""
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    """the rendered data set, for kind synthetic"""

    def __post_init__(self) -> None:
        _at_least("data.height", self.height, 16)
        _at_least("data.width", self.width, 16)
        _fraction("data.flip", self.flip)
        _at_least("data.pad", self.pad, 0)
        _fraction("data.erasing", self.erasing)
        _at_least("data.workers", self.workers, 0)
        for value in self.std:
            _above_zero("data.std", value)
        if self.kind != "synthetic" and not self.root:
            raise ValueError(
                f"data.root: nothing was given; data.kind {self.kind} needs the data set's path (--data.root)"
            )


@dataclass(frozen=True)
class SamplerConfig:
    """How a batch is put together: P identities x K images."""

    identities: int = 24
    """identities per batch"""
    instances: int = 4
    """images of each identity in a batch"""
    spread: tuple[Literal["viewpoint", "camera"], ...] = ()
    """what an identity's images in a batch are spread over, in this order; empty: drawn at random"""
    batches_per_epoch: int | None = None
    """batches in an epoch; none: as many as it takes to show every identity's images once"""

    def __post_init__(self) -> None:
        _at_least("sampler.identities", self.identities, 1)
        _at_least("sampler.instances", self.instances, 1)
        if self.identities * self.instances < 2:
            raise ValueError("sampler.identities x sampler.instances: 1 was given; a batch needs at least 2 images")
        if self.batches_per_epoch is not None:
            _at_least("sampler.batches_per_epoch", self.batches_per_epoch, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The network from image to feature."""

    backbone: str = "resnet50"
    """name of a timm model"""
    backbone_options: dict = field(default_factory=dict)
    """further arguments of timm.create_model, such as {channels: [32, 64, 128, 256]}"""
    pretrained: bool = True
    """start from timm's pretrained weights (downloaded on first use)"""
    weights: str | None = None
    """local file of backbone weights (.pth, .pt, .safetensors), used instead of a download"""
    last_stride: Literal[1, 2] = 1
    """1: the last stage keeps the resolution (its strides are set to 1); 2: the backbone as it is"""
    pooling: Literal["avg", "gem"] = "avg"
    """global average pooling, or generalised mean pooling with a learned exponent"""
    input_norm: bool = False
    """standardise every colour channel of every image by itself first, against colour casts and exposure"""
    local: bool = False
    """add the stripe branch: 1 + 2 + 3 horizontal stripes with an identity head each, and the triplet term"""
    stripe_dim: int = 256
    """length of each stripe's feature"""

    def __post_init__(self) -> None:
        _at_least("model.stripe_dim", self.stripe_dim, 1)


@dataclass(frozen=True)
class LossConfig:
    """The viewpoint-aware loss L_va = L_y + view_weight * L_v + beta * L_R, and the local branch's terms."""

    smoothing: Literal["adaptive", "uniform", "none"] = "adaptive"
    """label smoothing of the identity loss: adaptive is L_y, uniform is LSR, none is plain cross entropy"""
    alpha: float = 0.2
    """coefficient of the adaptive smoothing, in [0, 0.5)"""
    epsilon: float = 0.1
    """constant of the uniform smoothing, in [0, 1)"""
    use_viewpoint: bool = True
    """add the viewpoint loss L_v"""
    view_weight: float = 1.0
    """weight of L_v"""
    view_weight_late: float = 0.3
    """weight of L_v from epoch view_weight_drop on"""
    view_weight_drop: int | None = None
    """epoch at which the weight of L_v changes to view_weight_late; none: never"""
    use_regularizer: bool = True
    """add the angular regularizer L_R of the centres"""
    beta: float = 0.1
    """weight of L_R (a sum over all existing identity and viewpoint pairs)"""
    mask_missing: bool = True
    """leave (identity, viewpoint) pairs that do not occur in the training set out of L_v and L_R"""
    triplet_weight: float = 1.0
    """weight of the batch-hard triplet term, with model.local only"""
    triplet_margin: float = 0.3
    """margin of the triplet term, in Euclidean distance of features before the neck"""
    stripe_weight: float = 1.0
    """weight of the stripes' identity losses (their mean over the stripes), with model.local only"""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 0.5:
            raise ValueError(f"loss.alpha: {self.alpha!r} was given; allowed are values in [0, 0.5)")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"loss.epsilon: {self.epsilon!r} was given; allowed are values in [0, 1)")
        for name in ("view_weight", "view_weight_late", "beta", "triplet_weight", "triplet_margin", "stripe_weight"):
            _at_least(f"loss.{name}", getattr(self, name), 0)
        if self.view_weight_drop is not None:
            _at_least("loss.view_weight_drop", self.view_weight_drop, 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning rate over time."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """adam adds the weight decay to the gradient, adamw decays the weights directly, sgd uses momentum"""
    epochs: int = 60
    """number of epochs"""
    lr: float = 3.5e-4
    """base learning rate"""
    weight_decay: float = 5e-4
    """weight decay"""
    momentum: float = 0.9
    """momentum of sgd"""
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
        _at_least("optimizer.epochs", self.epochs, 0)
        _above_zero("optimizer.lr", self.lr)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _fraction("optimizer.momentum", self.momentum)
        _above_zero("optimizer.gamma", self.gamma)
        _fraction("optimizer.cosine_floor", self.cosine_floor)
        _at_least("optimizer.warmup_epochs", self.warmup_epochs, 0)
        _fraction("optimizer.warmup_start", self.warmup_start)
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"optimizer.milestones: {self.milestones!r} was given; allowed are ascending epochs >= 1")
        if self.clip_norm is not None:
            _above_zero("optimizer.clip_norm", self.clip_norm)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"optimizer.ema_decay: {self.ema_decay!r} was given; allowed are values in (0, 1), or none"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and when."""

    every: int = 10
    """epochs between evaluations (the last epoch is always evaluated); 0: the last epoch only"""
    batch_size: int = 128
    """images per batch when features are extracted"""
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
        _at_least("evaluation.every", self.every, 0)
        for name in ("batch_size", "k1", "k2", "ranking_queries"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)
        _fraction("evaluation.lambda_value", self.lambda_value)


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
    log_every: int = 20
    """steps between lines of log.jsonl and points of TensorBoard"""
    save_every: int = 1
    """epochs between saves of last.pt (the last epoch is always saved)"""
    tensorboard: bool = True
    """write TensorBoard event files to the run folder"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed: {self.seed!r} was given; allowed are values in [0, 2^63)")
        _at_least("run.threads", self.threads, 0)
        _at_least("run.log_every", self.log_every, 1)
        _at_least("run.save_every", self.save_every, 1)


@dataclass(frozen=True)
class Config:
    """A complete training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """the images"""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """the batches"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the network"""
    loss: LossConfig = field(default_factory=LossConfig)
    """the loss"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """the evaluation"""
    run: RunConfig = field(default_factory=RunConfig)
    """the program"""
