"""A trained model that can be used: the method of a run with its preprocessing, from images to features."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vareid_ext._version import __version__
from vareid_ext.data import EXTRAS, FORMATS, UNKNOWN, Batch, Extra, ImageList, ReidDataset, build_transform
from vareid_ext.data.types import open_image
from vareid_ext.files import pretrained
from vareid_ext.files.checkpoint import load_checkpoint
from vareid_ext.files.features import Features
from vareid_ext.methods import Method, TrainingClasses
from vareid_ext.model_card import model_card
from vareid_ext.ops._checks import check_count
from vareid_ext.training.command_line import pairs, to_config
from vareid_ext.training.config import Config
from vareid_ext.training.device import AUTOCAST, device_named
from vareid_ext.training.evaluation import inference_batches
from vareid_ext.training.state import Progress, build_method

COLOURS = ("rgb", "bgr")


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network, and to the feature behind it.

    Attributes:
        height, width: to which an image is resized (bicubic, antialiased), pixels.
        mean, std: of the red, green, blue values in [0, 1], subtracted and divided by.
        flip: the feature of the mirrored image is added.
        normalize: the feature is brought to length 1 as a "whole", each of its "parts" by itself, or not: "none".
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    normalize: str

    @classmethod
    def of(cls, config: Config) -> Preprocessing:
        """The preprocessing of a configuration."""
        data, evaluation = config.data, config.evaluation
        return cls(data.height, data.width, data.mean, data.std, evaluation.flip, evaluation.normalize)


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        identity_names: of the training identities, in the order of the classes.
        num_viewpoints: of the training data.
        progress: how far it was trained, in steps, stages and evaluations.
        metrics: what metrics.json of the run says of these weights; of those of an earlier epoch "trained" alone; empty
            where they were not measured.
        data_license, license: of the training data and of the weights; None where nobody has said.
    """

    identity_names: tuple[str, ...]
    num_viewpoints: int
    progress: Progress
    metrics: Mapping[str, Any]
    data_license: str | None = None
    license: str | None = None


class TrainedModel:
    """The method of a run in evaluation mode, with its preprocessing.

    Attributes:
        method: on `device`.
        config: the run's.
        preprocessing: what it does to images and features.
        checkpoint: the file it was read from.
        origin: what it was trained on and what it reaches.
        step: optimizer steps that it was trained for.
        progress: how far it was trained, in stages and evaluations.
        device: where it computes.
    """

    def __init__(self, method: Method, config: Config, checkpoint: Path, origin: Origin, device: torch.device) -> None:
        if config.run.channels_last:
            method.to(memory_format=torch.channels_last)
        self.method = method.to(device).eval()
        self.config, self.checkpoint, self.origin, self.device = config, checkpoint, origin, device
        self.progress, self.step = origin.progress, origin.progress.step
        self.preprocessing = Preprocessing.of(config)

    @property
    def is_shared(self) -> bool:
        """Whether it was read from a folder of :meth:`save_pretrained`, not from a run."""
        return self.checkpoint.name == pretrained.WEIGHTS

    @cached_property
    def feature_dim(self) -> int:
        """D, the length of a feature."""
        size = self.preprocessing
        black = _image_list([Image.new("RGB", (size.width, size.height))])
        black = _with_arrays(black, {name: [EXTRAS[name].neutral] for name in self.method.test_inputs})
        batch = ReidDataset(black, build_transform(size.height, size.width, train=False))[0]
        with torch.inference_mode():
            return self.method.embed(batch.to(self.device)).shape[1]

    def embed(
        self,
        images: Any,
        *,
        colour: str = "rgb",
        batch_size: int = 64,
        precision: str = "fp32",
        flip: bool | None = None,
        workers: int = 0,
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """The features of images: resized, normalised and compared as in the run's own evaluation.

        Args:
            images: a path, a PIL image or an array [H, W, 3] uint8; several of them, mixed as you like; an array
                [N, H, W, 3] uint8; or a pair (frame, boxes): an image, and boxes [N, 4] of left, top, right, bottom in
                its pixels, which are cut to the frame.
            colour: order of an array's colours: "rgb", or "bgr" as OpenCV has them.
            batch_size: images that go through the network at once.
            precision: "fp32", or "bf16" or "fp16" for automatic mixed precision.
            flip: add the feature of the mirrored image; None as in the run.
            workers: processes that load images.
            extras: what the method's `test_inputs` name, of each image an array in the form that
                `vareid_ext.data.EXTRAS` says, in pixels of the image or box.

        Returns:
            Float32 [N, D] on `device`; [0, D] for no images.

        Raises:
            ValueError, TypeError: an argument is not allowed; a box lies outside the frame.
            OSError: an image cannot be read.
        """
        if colour not in COLOURS:
            raise ValueError(f"colour: {colour!r} was given; allowed are {', '.join(COLOURS)}")
        listed = _with_arrays(_image_list(_pictures(images, colour)), extras or {})
        parts = list(self.batches(listed, batch_size=batch_size, precision=precision, flip=flip, workers=workers))
        return torch.cat(parts) if parts else torch.empty(0, self.feature_dim, device=self.device)

    def batches(
        self,
        images: ImageList,
        *,
        batch_size: int = 64,
        precision: str = "fp32",
        flip: bool | None = None,
        workers: int = 0,
        compute: Callable[[Batch], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The features [n, D] of one batch of a list after the other, or what else is computed of a batch; the other
        arguments as of :meth:`embed`."""
        if precision not in AUTOCAST:
            raise ValueError(f"precision: {precision!r} was given; allowed are {', '.join(AUTOCAST)}")
        if precision == "fp16" and self.device.type != "cuda":
            raise ValueError(f"precision: 'fp16' was given, which needs a CUDA device, not {self.device}")
        missing = [name for name in self.method.test_inputs if name not in images.extras]
        if missing and len(images):
            raise ValueError(
                f"extras: {missing[0]!r} is missing; method {self.config.method.name!r} needs it of each image: "
                f"{FORMATS[missing[0]]}, or extras={{{missing[0]!r}: ...}}"
            )
        images = replace(images, extras={name: images.extras[name] for name in self.method.test_inputs if len(images)})
        batch_size, workers = check_count("batch_size", batch_size, 1), check_count("workers", workers, 0, 256)
        how = self.preprocessing if flip is None else replace(self.preprocessing, flip=flip)
        embed = partial(self.method.embed, flip=how.flip, normalize=how.normalize)
        return inference_batches(
            self.method,
            images,
            build_transform(how.height, how.width, train=False, mean=how.mean, std=how.std),
            batch_size=batch_size,
            device=self.device,
            workers=workers,
            autocast=AUTOCAST[precision],
            compute=compute or embed,
        )

    def features(self, images: ImageList, *, progress: bool = False, **options: Any) -> Features:
        """The features and labels of a list; options as of :meth:`batches`, and `progress` shows a bar."""
        parts = []
        with tqdm(total=len(images), desc="features", unit="image", disable=not progress, leave=False) as bar:
            for feature in self.batches(images, **options):
                parts.append(feature)
                bar.update(len(feature))
        return Features.of(torch.cat(parts), images, images.paths)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        license: str | None = None,
        data_license: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a folder that can be given to others: :func:`vareid_ext.load` reads it, as it does a run.

        It holds the weights (model.safetensors), everything needed to use them (config.json) and a model card
        (README.md). The names of the training identities are in it, the paths of files on this machine are not.

        Args:
            folder: appears as a whole or, where something fails, not at all.
            license: of the weights, an identifier of the Hugging Face Hub such as "apache-2.0"; None: as it was loaded,
                else unknown.
            data_license: of the training data, in words; None likewise.
            overwrite: replace a model that the folder holds.

        Raises:
            FileExistsError: the folder holds a model and `overwrite` is off, or it holds other files.
            OSError: it cannot be written.
        """
        path = pretrained.check_target(folder, overwrite)
        origin, config = self.origin, self.config.without_folders()
        description = {
            "version": __version__,
            "license": license or origin.license,
            "preprocessing": asdict(self.preprocessing),
            "feature_dim": self.feature_dim,
            "identity_names": list(origin.identity_names),
            "num_viewpoints": origin.num_viewpoints,
            "progress": asdict(origin.progress),
            "training_data": {"name": config.data.kind, "license": data_license or origin.data_license},
            "metrics": origin.metrics,
            "config": config.plain(),
        }
        size = sum(parameter.numel() for parameter in self.method.parameters())
        card = model_card(description, name=path.absolute().name, parameters=size)
        pretrained.write_pretrained(path, self.method, description, card)


def load_trained(run: str | os.PathLike[str], device: str | torch.device = "auto") -> TrainedModel:
    """See :func:`vareid_ext.load`."""
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"run: {type(run).__name__} was given; a run's folder or its checkpoint is needed")
    place = device_named(str(device), "device")
    path = pretrained.download(run) if isinstance(run, str) and run.startswith(pretrained.HUB) else Path(run)
    if not path.is_dir():
        return _load_checkpoint(path, place)
    if (path / "last.pt").is_file():
        return _load_checkpoint(path / "last.pt", place)
    if pretrained.is_pretrained(path):
        return _load_pretrained(path, place)
    raise FileNotFoundError(
        f"run: {str(run)!r} holds no checkpoint (there is no last.pt) and no model ({pretrained.DESCRIPTION}, "
        f"{pretrained.WEIGHTS})"
    )


_DAMAGED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


def _load_checkpoint(path: Path, device: torch.device) -> TrainedModel:
    state = load_checkpoint(path)
    wrong = f"checkpoint: {str(path)!r} is not a run's checkpoint: "
    missing = [key for key in ("config", "identity_names", "num_viewpoints", "method", "average") if key not in state]
    if missing:
        raise ValueError(f"{wrong}it has no {missing[0]!r}")
    try:
        config, method = _build(state["config"], state["identity_names"], state["num_viewpoints"])
        weights = state["method"]
        if state["average"] is not None:
            weights = {
                key.removeprefix("module."): value for key, value in state["average"].items() if key != "n_averaged"
            }
        method.load_state_dict(weights)
        progress = Progress(**state["progress"] | {"step": int(state["progress"]["step"])})
        metrics = _metrics(path, [e for e in progress.evaluations if e.get("step") == progress.step])
        origin = Origin(tuple(state["identity_names"]), state["num_viewpoints"], progress, metrics)
    except _DAMAGED as error:
        raise ValueError(f"{wrong}{str(error).strip().partition(chr(10))[0]}") from error
    return TrainedModel(method, config, path, origin, device)


def _load_pretrained(folder: Path, device: torch.device) -> TrainedModel:
    found = pretrained.read_description(folder)
    try:
        how, plain = dict(found["preprocessing"]), found["config"]
        evaluation = {name: how.pop(name) for name in ("flip", "normalize")}
        changed = plain | {"data": plain["data"] | how, "evaluation": plain["evaluation"] | evaluation}
        config, method = _build(changed, found["identity_names"], found["num_viewpoints"])
        given = dict(pairs(plain))
        missing = [(name, value) for name, value in pairs(config.plain()) if name not in given]
        if missing and found["version"] == __version__:  # fields that are newer than the file have their defaults
            raise ValueError(f"{missing[0][0]}: nothing was given; a value is needed, such as {missing[0][1]!r}")
        origin = Origin(
            tuple(found["identity_names"]), found["num_viewpoints"], Progress(**found["progress"]), found["metrics"],
            found["training_data"]["license"], found["license"],
        )  # fmt: skip
    except _DAMAGED as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"model: {str(folder / pretrained.DESCRIPTION)!r}: config: {reason}") from error
    pretrained.load_weights(folder, method)
    return TrainedModel(method, config, folder / pretrained.WEIGHTS, origin, device)


def _build(plain: Mapping[str, Any], identity_names: Sequence[str], viewpoints: int) -> tuple[Config, Method]:
    """The configuration of plain values, and its method without its weights."""
    config = to_config(plain)
    config = replace(config, model=replace(config.model, pretrained=False, weights=None))
    identities = len(identity_names)
    classes = TrainingClasses(identities, viewpoints, torch.ones(identities, viewpoints, dtype=torch.bool))
    return config, build_method(config, classes)


def _metrics(checkpoint: Path, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of a checkpoint's weights: metrics.json beside it if it is about them, else of its own evaluation."""
    if not evaluations:
        return {}
    trained = {name: value for name, value in evaluations[-1].items() if name not in ("step", "epoch")}
    try:
        found = json.loads((checkpoint.parent / "metrics.json").read_text())
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) and found.get("trained") == trained else {"trained": trained}


def _pictures(images: Any, colour: str) -> list[str | Image.Image]:
    """Paths and PIL images of what :meth:`TrainedModel.embed` takes."""
    if _is_one(images):
        return [_picture(images, colour, "images")]
    if isinstance(images, tuple) and len(images) == 2 and not _is_one(images[1]):
        frame, boxes = images
        return [_picture(crop, colour, "frame") for crop in _crops(frame, boxes)]
    if not isinstance(images, Sequence | np.ndarray | Tensor):
        raise TypeError(f"images: {type(images).__name__} was given; allowed are images and sequences of them")
    return [_picture(image, colour, f"images[{i}]") for i, image in enumerate(images)]


def _is_one(images: Any) -> bool:
    """Whether this is one image and not several."""
    return isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 0) == 3


def _picture(image: Any, colour: str, name: str) -> str | Image.Image:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = _array(image, name)
    return Image.fromarray(np.ascontiguousarray(array[:, :, ::-1] if colour == "bgr" else array))


def _array(image: Any, name: str) -> np.ndarray:
    array = image.cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: {type(image).__name__} was given; allowed are paths, PIL images and arrays")
    if array.ndim != 3 or array.shape[2] != 3 or not array.size or array.dtype != np.uint8:
        raise ValueError(f"{name}: {array.dtype} {list(array.shape)} was given; allowed is uint8 [H, W, 3]")
    return array


def _crops(frame: Any, boxes: Any) -> list[Image.Image] | list[np.ndarray]:
    """The boxes cut out of a frame, at whole pixels that hold all of each; of the kind of the frame."""
    try:
        boxes = np.asarray(boxes.cpu() if isinstance(boxes, Tensor) else boxes, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"boxes: {error}; allowed are numbers [N, 4]") from error
    if boxes.size == 0:
        return []
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"boxes: {list(boxes.shape)} was given; allowed are finite numbers [N, 4]")
    image = open_image(os.fspath(frame)) if isinstance(frame, str | os.PathLike) else frame
    array = None if isinstance(image, Image.Image) else _array(image, "frame")
    width, height = image.size if array is None else (array.shape[1], array.shape[0])
    begin = np.floor(boxes[:, :2]).clip(0, (width, height)).astype(int)
    end = np.ceil(boxes[:, 2:]).clip(0, (width, height)).astype(int)
    empty = np.flatnonzero((begin >= end).any(axis=1))
    if len(empty):
        row = empty[0]
        raise ValueError(
            f"boxes: row {row} is {boxes[row].tolist()}, of which nothing lies in the frame of {width} x {height} "
            "pixels; left, top, right, bottom are needed"
        )
    corners = np.concatenate([begin, end], axis=1).tolist()
    if array is None:
        return [image.crop((left, top, right, bottom)) for left, top, right, bottom in corners]
    return [array[top:bottom, left:right] for left, top, right, bottom in corners]


def _image_list(pictures: Sequence[str | Image.Image]) -> ImageList:
    """Unlabelled images; the path of one that is a PIL image is images[i]."""
    held = {f"images[{i}]": picture for i, picture in enumerate(pictures) if not isinstance(picture, str)}

    def load(path: str) -> Image.Image:
        picture = held.get(path)
        return open_image(path) if picture is None else picture

    paths = tuple(picture if isinstance(picture, str) else f"images[{i}]" for i, picture in enumerate(pictures))
    return unlabelled(paths, load)


def _with_arrays(images: ImageList, extras: Mapping[str, Sequence[Any]]) -> ImageList:
    """The images with extras of known names, an array of each image."""
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise ValueError(f"extras: {unknown[0]!r} was given; allowed are {', '.join(EXTRAS)}")
    return replace(
        images,
        extras={name: Extra(EXTRAS[name].kind, arrays, EXTRAS[name].pairs) for name, arrays in extras.items()},
    )


def unlabelled(paths: Sequence[str], loader: Any = open_image) -> ImageList:
    """A list of images of which nothing is known."""
    unknown = np.full(len(paths), UNKNOWN)
    return ImageList(
        identity=unknown, camera=unknown, viewpoint=unknown, paths=tuple(paths), viewpoint_name=("",) * len(paths),
        loader=loader,
    )  # fmt: skip
