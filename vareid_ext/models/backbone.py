"""The trunk of a network, image -> feature map: any convolutional network of timm, with the last stage's stride."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import huggingface_hub
import timm
import torch
from torch import Tensor, nn

from vareid_ext.files.weights import HEADS, load_backbone_weights
from vareid_ext.models.inception import PdcInception

NETWORKS: dict[str, type[nn.Module]] = {"pdc-inception": PdcInception}
"""Trunks beside timm's, by name; they begin with random weights."""


@dataclass(frozen=True)
class ModelConfig:
    """The trunk, from image to feature map, and what makes one feature of the map."""

    backbone: str = "resnet50"
    """name of a timm model, or pdc-inception"""
    backbone_options: dict = field(default_factory=dict)
    """further arguments of timm.create_model, such as {channels: [32, 64, 128, 256]}"""
    pretrained: bool = True
    """start from timm's pretrained weights (downloaded on first use)"""
    weights: str | None = None
    """file to start from instead: backbone weights (.pth, .pt, .safetensors), also of fast-reid, torchreid and
    reid-strong-baseline; or another run, its checkpoint, or the folder of a shared model"""
    last_stride: Literal[1, 2] = 1
    """1: the last stage keeps the resolution (its strides are set to 1); 2: the backbone as it is"""
    pooling: Literal["avg", "gem"] = "avg"
    """global average pooling, or generalised mean pooling with a learned exponent"""
    input_norm: bool = False
    """standardise every colour channel of every image by itself first, against colour casts and exposure"""


class Backbone(nn.Module):
    """A network without its head: images [N, 3, H, W] -> feature map [N, C, h, w].

    Args:
        name: of a timm model whose feature map is [N, C, h, w], or out of ``NETWORKS``.
        options: further arguments of ``timm.create_model``, or of the network.
        pretrained: start from timm's weights, downloaded on first use.
        last_stride: 1 sets the strides of the last stage to 1, so that the feature map has twice the resolution; no
            dilation is added. 2 leaves the network alone.
        input_norm: standardise every colour channel of every image by itself first, which takes a camera's colour cast
            and exposure away (and the absolute colours with them).

    Attributes:
        channels: C.
        left_out: entries of the file of weights that the network has no place for, such as a classifier.

    Raises:
        ValueError: an unknown model or one without a feature map, an argument outside what is allowed.
        OSError: pretrained weights that cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        *,
        options: dict[str, Any] | None = None,
        pretrained: bool = False,
        last_stride: int = 1,
        input_norm: bool = False,
    ) -> None:
        super().__init__()
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride: {last_stride!r} was given; allowed are 1 and 2")
        self.trunk = _create(name, dict(options or {}), pretrained)
        self.channels, stages = _probe(self.trunk, name)
        if last_stride == 1:
            _keep_resolution(name, stages)
        self.input_norm: nn.Module = nn.InstanceNorm2d(3, eps=1e-3) if input_norm else nn.Identity()
        self.left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig) -> Backbone:
        """The backbone of a configuration, with the weights of its file (:func:`load_backbone_weights`)."""
        backbone = cls(
            config.backbone,
            options=config.backbone_options,
            pretrained=config.pretrained and config.weights is None,
            last_stride=config.last_stride,
            input_norm=config.input_norm,
        )
        if config.weights is not None:
            backbone.left_out = load_backbone_weights(backbone.trunk, config.weights)
        return backbone

    def split_off(self, stage: str, copies: int, *, field: str = "stage") -> nn.ModuleList:
        """Cut the network before a stage, or before a block of one; it ends there then.

        Args:
            stage: name of a child of the network, such as "layer4", or of a block within, such as "layer3.1".
            copies: how often what follows is wanted.
            field: what errors call `stage`.

        Returns:
            What followed, `copies` times, with weights of their own that are the same at first.

        Raises:
            ValueError: there is no such stage, or the stages in their order are not the network.
        """
        children = {name: child for name, child in self.trunk.named_children() if name not in HEADS}
        names, training = list(children), self.trunk.training
        blocks = {name: [*child._modules] for name, child in children.items() if isinstance(child, nn.Sequential)}
        cuts = [*names[1:], *(f"{name}.{block}" for name in blocks for block in blocks[name][1:])]
        if stage not in cuts:
            raise ValueError(f"{field}: {stage!r} was given; allowed are {', '.join(cuts)}")
        name, _, block = stage.partition(".")
        before, after = names[: names.index(name)], names[names.index(name) :]
        first, last = ({name: children[name] for name in part} for part in (before, after))
        if block:
            at = blocks[name].index(block)
            first[name], last[name] = children[name][:at], children[name][at:]  # type: ignore[index]
        shared, tail = nn.Sequential(OrderedDict(first)), nn.Sequential(OrderedDict(last))
        with torch.no_grad():
            image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
            same = torch.equal(tail.eval()(shared.eval()(image)), self.trunk.eval()(image))
        if not same:
            raise ValueError(f"{field}: {type(self.trunk).__name__} is not its stages one after the other")
        self.trunk = shared.train(training)
        tail.train(training)
        return nn.ModuleList([tail, *(copy.deepcopy(tail) for _ in range(copies - 1))])

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised as the network expects -> feature map [N, C, h, w]."""
        return self.trunk(self.input_norm(images))


_WRONG_ARGUMENTS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError)


def _create(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    if name in NETWORKS:
        if pretrained:
            raise ValueError(f"pretrained: True was given; {name!r} has no pretrained weights")
        try:
            return NETWORKS[name](**options)
        except _WRONG_ARGUMENTS as error:
            raise ValueError(f"backbone_options: {options!r} was given; {name!r}: {_first_line(error)}") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise ValueError(
            f"backbone: timm has no model {name!r}" + (f"; the nearest are {', '.join(close)}" if close else "")
        )
    unreachable = _why_unreachable() if pretrained else ""
    try:
        with _cached_weights_only(bool(unreachable)):
            return timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **options)
    except Exception as error:  # timm passes the options on to constructors of all kinds
        if not pretrained or (isinstance(error, _WRONG_ARGUMENTS) and not isinstance(error, OSError)):
            raise ValueError(
                f"backbone, backbone_options: {name!r}, {options!r} were given; timm cannot build that: "
                f"{_first_line(error)}"
            ) from error
        raise OSError(
            f"the pretrained weights of {name!r} could not be downloaded ({unreachable or _first_line(error)}). Give a "
            "local file with --weights FILE, or start from random weights with --model.pretrained=false"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _why_unreachable() -> str:
    """Why the server of the pretrained weights does not answer; "" if it does."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whatever HTTP client the hub's library is built on
        return _first_line(error)
    return ""


@contextlib.contextmanager
def _cached_weights_only(switched_on: bool) -> Iterator[None]:
    """A block in which the hub's library looks at its cache only; it would try to reach its server for a minute."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or switched_on
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


_StridedModule = tuple[nn.Module, str, nn.Module, int]


def _probe(backbone: nn.Module, name: str) -> tuple[int, list[_StridedModule]]:
    """The number of channels, and the modules that halve the resolution (parent, attribute, module, input height)."""
    parents = {id(child): (parent, key) for parent in backbone.modules() for key, child in parent.named_children()}
    found: list[_StridedModule] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4 and isinstance(output, Tensor):
            height = inputs[0].shape[2]
            if output.ndim == 4 and output.shape[2] * 2 in (height, height + 1) and id(module) in parents:
                found.append((*parents[id(module)], module, height))

    # Only modules that have a stride of their own: not the blocks and stages that contain them.
    strided = [m for m in backbone.modules() if _stride(m) == 2 and not list(m.children())]
    handles = [module.register_forward_hook(note) for module in strided]
    was_training = backbone.training
    try:
        with torch.no_grad():
            feature_map = backbone.eval()(torch.zeros(1, 3, 256, 256))
    except Exception as error:  # a network meant for something else fails with whatever it runs into
        raise ValueError(
            f"backbone: {name!r} does not take images of any size ({_first_line(error)}); choose another"
        ) from error
    finally:
        backbone.train(was_training)
        for handle in handles:
            handle.remove()
    if not isinstance(feature_map, Tensor) or feature_map.ndim != 4 or feature_map.shape[2] != feature_map.shape[3]:
        raise ValueError(f"backbone: {name!r} has no feature map [N, C, H, W]; choose a convolutional network")
    return feature_map.shape[1], found


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else stride if isinstance(stride, int) else 1


def _keep_resolution(name: str, strided: list[_StridedModule]) -> None:
    """Set the last stage's strides to 1 (``output_stride`` of timm adds dilation, which is another network)."""
    if not strided:
        raise ValueError(f"last_stride: {name!r} has no strides that can be set to 1; use last_stride 2")
    last = min(height for *_, height in strided)
    for parent, key, module, height in strided:
        if height != last:
            continue
        if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            # The pooling of a shortcut only matches the halved resolution; there is nothing left for it to do.
            setattr(parent, key, nn.Identity())
        else:
            module.stride = (1, 1) if isinstance(module.stride, tuple) else 1  # type: ignore[assignment]
