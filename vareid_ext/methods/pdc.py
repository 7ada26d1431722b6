"""PDC: a stream on the photograph and one on its parts, which are cut out upright (Su et al., ICCV 2017)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, Localizer, ModelConfig, affine_crop, identity_head
from vareid_ext.models.joints import compose, part_images
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy


@dataclass(frozen=True)
class PdcConfig:
    """Photograph and part image through the same convolutions, and features of parts that are weighted."""

    name: Literal["pdc"] = "pdc"
    """the method"""
    stage: str = "layer4"
    """the stage of the backbone that each stream has its own copy of, with all that follows"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the photograph's cross entropy"""
    part_height: int = 512
    """height of the part image, pixels; a multiple of 4"""
    part_width: int = 256
    """width of the part image, pixels; a multiple of 4"""
    localizer_pool: int = 4
    """factor by which a part is made smaller before the network that moves it looks at it; a quarter of part_width
    must be at least 16 times as much"""

    def __post_init__(self) -> None:
        check_limits("method", self, part_height=(32, 4096), part_width=(64, 4096), localizer_pool=(1, 64))
        for name in ("part_height", "part_width"):
            if getattr(self, name) % 4:
                raise ValueError(f"method.{name}: {getattr(self, name)} was given; allowed are multiples of 4")
        if min(2 * self.part_height, self.part_width) // 4 < 16 * self.localizer_pool:
            raise ValueError(
                f"method.localizer_pool: {self.localizer_pool} was given; parts of an image of {self.part_height} x "
                f"{self.part_width} pixels allow at most {min(2 * self.part_height, self.part_width) // 64}"
            )


def with_own_norms(network: nn.Module) -> nn.Module:
    """A copy of a network that has the same parameters, not equal ones, but for its batch norms."""
    twin = copy.deepcopy(network)
    for module, original in zip(twin.modules(), network.modules(), strict=True):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, parameter in original.named_parameters(recurse=False):
                setattr(module, name, parameter)
    return twin


class Pdc(Method):
    """The test feature is that of the photograph and the weighted one of the parts, side by side."""

    about = About(
        title="PDC",
        paper="Su et al., ICCV 2017",
        claim="network as published, schedule assumed",
        needs="keypoints in training and at test; viewpoint labels in training with viewpoint_aware",
        published={"market1501-pdc": (63.41, 84.14)},
        measured={"synthetic-pdc": (42.6, 50.6)},
    )
    Config = PdcConfig
    heads = ("photograph_head", "parts_head", "fused_head")
    inputs = test_inputs = ("keypoints",)

    def __init__(self, config: PdcConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.of(model)
        self.tails = self.backbone.split_off(config.stage, copies=2, field="method.stage")
        self.part_backbone = with_own_norms(self.backbone)
        limb = Localizer(config.part_height // 2, config.part_width // 4, pool=config.localizer_pool)
        body = Localizer(config.part_height // 2, config.part_width // 2, pool=config.localizer_pool)
        self.localizers = nn.ModuleList([body, limb, *(copy.deepcopy(limb) for _ in range(3))])
        self.pools = nn.ModuleList(POOLING[model.pooling]() for _ in self.tails)
        channels = self.backbone.channels
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.zeros(channels))
        nn.init.xavier_uniform_(self.weight[None])
        self.photograph_head: nn.Module = (
            ViewpointAwareTerms(channels, classes)
            if config.viewpoint_aware
            else identity_head(channels, classes.identities, bias=True)
        )
        self.parts_head = identity_head(channels, classes.identities, bias=True)
        self.fused_head = identity_head(2 * channels, classes.identities, bias=True)

    def part_image(self, batch: Batch) -> Tensor:
        """The parts, all but the head moved by their own networks: [N, 3, part_height, part_width]."""
        size = self.config.part_height, self.config.part_width
        head, *parts = part_images(batch.image, batch.extras["keypoints"], size)
        moved = [affine_crop(x, net(x).float(), x.shape[2:]) for net, x in zip(self.localizers, parts, strict=True)]
        return compose([head, *moved])

    def _photograph(self, batch: Batch) -> Tensor:
        return self.pools[0](self.tails[0](self.backbone(batch.image)))

    def _parts(self, batch: Batch) -> Tensor:
        return self.pools[1](self.tails[1](self.part_backbone(self.part_image(batch))))

    def _weighted(self, parts: Tensor) -> Tensor:
        return torch.tanh(self.weight * parts + self.bias)

    def _trains_parts(self) -> bool:
        """Whether the stage trains any of what the loss of the photograph does not reach."""
        stream = self.backbone, self.tails[0], self.pools[0], self.photograph_head
        reached = {id(parameter) for module in stream for parameter in module.parameters()}
        return any(parameter.requires_grad and id(parameter) not in reached for parameter in self.parameters())

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss of the photograph and, in a stage that trains more than that, of the parts and both."""
        photograph = self._photograph(batch)
        parts = self._parts(batch) if self._trains_parts() else None
        with full_precision(photograph):
            terms, logits = {}, {}
            if self.config.viewpoint_aware:
                terms = self.photograph_head(photograph, batch)
            else:
                logits["photograph"] = self.photograph_head(photograph)
            if parts is not None:
                logits["parts"] = self.parts_head(parts)
                logits["fused"] = self.fused_head(torch.cat([photograph, self._weighted(parts)], 1))
            return terms | {
                name: Term(identity_cross_entropy(z, batch.identity, smoothing="none")) for name, z in logits.items()
            }

    def features(self, batch: Batch) -> list[Tensor]:
        """Photograph [N, C], parts [N, C] in [-1, 1]."""
        photograph, parts = self._photograph(batch), self._parts(batch)
        with full_precision(photograph):
            return [photograph, self._weighted(parts)]
