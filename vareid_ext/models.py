"""The network: image -> feature. A timm backbone, pooling, the neck, and the optional stripe branch.

The classifiers of the global feature (the identity and viewpoint centres) belong to the loss, not to the network.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext.checkpoint import FORMAT, read_tensors

STRIPES = (1, 2, 3)
"""The stripe branch cuts the feature map into this many horizontal stripes, one cut after the other: 6 in all."""

_WRAPPERS = re.compile(r"((module|_orig_mod)\.)*")
_PREFIXES = re.compile(r"((module|_orig_mod|base|model|backbone)\.)*")


class ModelOutput(NamedTuple):
    """What the network computes for a batch of N images."""

    pooled: Tensor
    """float32 [N, D], before the neck: for losses that compare distances (the triplet term)"""
    feature: Tensor
    """float32 [N, D], after the neck: for losses that compare with centres"""
    stripe_features: Tensor | None
    """float32 [N, S, d], the stripes' features; None without the stripe branch"""
    stripe_logits: Tensor | None
    """float32 [N, S, K], each stripe's identity logits; None without the stripe branch"""


class GeneralizedMeanPooling(nn.Module):
    """``(mean over space of max(x, 1e-6)^p)^(1/p)`` with a learned p, 3 at first (Radenovic et al., TPAMI 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C], in float32 (a power in half precision overflows)."""
        return x.float().clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class _GlobalAveragePooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


class StripeBranch(nn.Module):
    """Horizontal stripes of the feature map, each with its own reduction (linear + batch norm) and identity head."""

    def __init__(self, channels: int, dim: int, num_identities: int) -> None:
        super().__init__()
        count = sum(STRIPES)
        self.reduce = nn.ModuleList(nn.Linear(channels, dim, bias=False) for _ in range(count))
        self.norm = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(count))
        heads = [nn.Linear(dim, num_identities, bias=False) for _ in range(count)]
        for head in heads:
            nn.init.normal_(head.weight, std=0.001)
        self.head = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> features [N, S, d] and logits [N, S, K]."""
        stripes = torch.cat([F.adaptive_avg_pool2d(x.float(), (count, 1)).flatten(2) for count in STRIPES], dim=2)
        features, logits = [], []
        for i, (reduce, norm, head) in enumerate(zip(self.reduce, self.norm, self.head, strict=True)):
            features.append(norm(reduce(stripes[:, :, i])))
            logits.append(head(features[-1]))
        return torch.stack(features, dim=1), torch.stack(logits, dim=1)


class ReidModel(nn.Module):
    """Backbone, pooling and neck: images [N, 3, H, W] -> features [N, D].

    The neck is a batch normalisation whose shift stays 0 (Luo et al., CVPRW 2019). In evaluation mode
    :meth:`test_feature` gives what is compared: the feature after the neck, with the stripes' features appended where
    there is a stripe branch, L2-normalised.

    Args:
        backbone: name of a timm model whose feature map is [N, C, H, W].
        backbone_options: further arguments of ``timm.create_model``.
        pretrained: start from timm's weights, downloaded on first use.
        weights: local file of weights instead (.pth, .pt, .safetensors), see :func:`load_weights`.
        last_stride: 1 sets the strides of the last stage to 1, so that the feature map has twice the resolution; no
            dilation is added. 2 leaves the backbone alone.
        pooling: "avg", or "gem" for generalised mean pooling.
        input_norm: standardise every colour channel of every image by itself before the backbone, which takes a
            camera's colour cast and exposure away (and the absolute colours with them).
        num_identities: number of training identities K, needed with `local` only.
        local: add the stripe branch.
        stripe_dim: length of a stripe's feature.

    Raises:
        ValueError: an unknown backbone or one without a feature map, an argument outside what is allowed, a weights
            file that does not fit.
        OSError: pretrained weights that cannot be downloaded, a weights file that cannot be read.
    """

    def __init__(
        self,
        backbone: str,
        *,
        backbone_options: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        last_stride: int = 1,
        pooling: str = "avg",
        input_norm: bool = False,
        num_identities: int | None = None,
        local: bool = False,
        stripe_dim: int = 256,
    ) -> None:
        super().__init__()
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride: {last_stride!r} was given; allowed are 1 and 2")
        if pooling not in ("avg", "gem"):
            raise ValueError(f"pooling: {pooling!r} was given; allowed are 'avg' and 'gem'")
        options = dict(backbone_options or {})
        self.backbone = _create_backbone(backbone, options, pretrained and weights is None)
        channels, stages = _probe(self.backbone, backbone)
        if last_stride == 1:
            _keep_resolution(backbone, stages)
        self.input_norm: nn.Module = nn.InstanceNorm2d(3, eps=1e-3) if input_norm else nn.Identity()
        self.pool = GeneralizedMeanPooling() if pooling == "gem" else _GlobalAveragePooling()
        self.neck = nn.BatchNorm1d(channels)
        self.neck.bias.requires_grad_(False)
        self.stripes: StripeBranch | None = None
        if local:
            if num_identities is None or num_identities < 1:
                raise ValueError(f"num_identities: {num_identities!r} was given; the stripe branch needs a number >= 1")
            self.stripes = StripeBranch(channels, stripe_dim, num_identities)
        self.feature_dim = channels
        """length D of the global feature"""
        self.settings = {
            "backbone": backbone, "backbone_options": options, "last_stride": last_stride, "input_norm": input_norm,
        }  # fmt: skip
        """what the network computes from its weights, as far as these do not tell"""
        self.left_out: tuple[str, ...] = () if weights is None else load_weights(self, weights)
        """entries of the file of weights that the backbone has no place for, such as a classifier"""

    def forward(self, images: Tensor) -> ModelOutput:
        """Images [N, 3, H, W], normalised as the backbone expects -> :class:`ModelOutput`."""
        feature_map = self.backbone(self.input_norm(images))
        pooled = self.pool(feature_map)
        # Half precision stops here: the neck's statistics and everything behind it are float32.
        with torch.autocast(images.device.type, enabled=False):
            feature = self.neck(pooled)
            stripe_features, stripe_logits = (None, None) if self.stripes is None else self.stripes(feature_map)
        return ModelOutput(pooled, feature, stripe_features, stripe_logits)

    def test_feature(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> float32 [N, D'], rows of length 1: what retrieval compares."""
        return test_feature(self(images))


def test_feature(output: ModelOutput) -> Tensor:
    """The retrieval feature of a model's output: global and stripe features side by side, rows L2-normalised."""
    parts = [output.feature]
    if output.stripe_features is not None:
        parts.append(output.stripe_features.flatten(1))
    return F.normalize(torch.cat(parts, dim=1), dim=1)


_WRONG_ARGUMENTS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError)


def _create_backbone(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
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


def load_weights(model: ReidModel, path: str) -> tuple[str, ...]:
    """Load a file of weights into a network.

    A checkpoint of this program, or the weights of a whole :class:`ReidModel`, fill the network completely: of a run
    with a moving average, the average. Any other file fills the backbone.

    Args:
        model: the network.
        path: .safetensors, or a file that ``torch.load(weights_only=True)`` reads: the weights, or a dictionary with
            them under "state_dict" or "model". Prefixes "module.", "_orig_mod.", "base.", "model." and "backbone." are
            removed; batch norms may come without "num_batches_tracked".

    Returns:
        The file's entries that the backbone has no place for, such as its classifier.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged or holds other than tensors; weights are missing, have another shape or are not
            finite numbers, and the first ones are named beside what the file holds; the checkpoint is of another
            network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    found = _read_weights(path)
    if isinstance(found, Mapping) and found.get("format") == FORMAT and isinstance(found.get("config"), Mapping):
        _check_settings(model, found["config"].get("model"), path)
        found = found.get("average") or found
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"weights: {path!r} holds {type(found).__name__}, not a dictionary of weights")
    whole = {_WRAPPERS.sub("", str(key), count=1): value for key, value in found.items()}
    if "neck.running_mean" in whole and any(key.startswith("backbone.") for key in whole):
        whole.pop("n_averaged", None)
        left_out = _fill(model, whole, path, found)
        if left_out:
            raise ValueError(f"weights: {path!r} is of another network, with {left_out[0]!r}")
        return ()
    weights = {_PREFIXES.sub("", str(key), count=1): value for key, value in found.items()}
    if len(weights) < len(found):
        raise ValueError(f"weights: {path!r} holds several networks: {_describe(found)}")
    return _fill(model.backbone, weights, path, found)


def _check_settings(model: ReidModel, trained: Any, path: str) -> None:
    """ValueError if a checkpoint's network computes something else from its weights than `model` would."""
    for name, value in model.settings.items() if isinstance(trained, Mapping) else ():
        if json.dumps(trained.get(name), default=str) != json.dumps(value, default=str):
            raise ValueError(
                f"weights: {path!r} was trained with model.{name} {trained.get(name)!r}; {value!r} was given, and a "
                "checkpoint is loaded as a whole"
            )


def _fill(module: nn.Module, weights: Mapping[str, Any], path: str, held: Mapping[Any, Any]) -> tuple[str, ...]:
    """Load weights into a module, all of whose entries must be there; returns those it has no place for.

    Args:
        module, weights: both with the module's own names.
        path, held: the file and what is in it, for the error.
    """
    fitting = {}
    expected = module.state_dict()
    for key, value in expected.items():
        given = weights.get(key)
        if given is None and key.endswith("num_batches_tracked"):  # which batch norms once did not have
            given = value
        if isinstance(given, Tensor) and given.numel() == value.numel() == 1:
            given = given.reshape(value.shape)
        if isinstance(given, Tensor) and given.shape == value.shape and _is_finite(given):
            fitting[key] = given
    wrong = [key for key in expected if key not in fitting]
    if wrong:
        raise ValueError(
            f"weights: {path!r} does not fit the network: {len(wrong)} of {len(expected)} entries are missing, have "
            f"another shape or are not finite numbers, the first are {', '.join(wrong[:3])}; the file holds "
            f"{_describe(held)}"
        )
    module.load_state_dict(fitting)
    return tuple(sorted(weights.keys() - expected.keys()))


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds a finite value at each place: a sparse one does not, one on the meta device has none."""
    return tensor.layout == torch.strided and not tensor.is_meta and bool(torch.isfinite(tensor).all())


def _describe(weights: Mapping[Any, Any]) -> str:
    """The first entries of a dictionary with their shapes."""

    def kind(value: Any) -> str:
        return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    first = [f"{str(key)[:80]} {kind(value)}" for key, value in list(weights.items())[:5]]
    return ", ".join(first + [f"and {len(weights) - 5:,} more"] * (len(weights) > 5)) or "nothing"


def _read_weights(path: str) -> Any:
    """What a file of weights holds; ValueError where it cannot be read."""
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights: {path!r} cannot be read: {error}") from error
    return read_tensors(Path(path), "weights")


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
