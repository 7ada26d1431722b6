"""HA-CNN: a small network that looks at the whole map and at four regions that it finds (Li et al., CVPR 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import ModelConfig
from vareid_ext.models.attention import ConvNormAct, HarmoniousAttention
from vareid_ext.models.parts import embedding
from vareid_ext.models.warp import affine_crop

REGIONS = 4
REGION_HEIGHT = 0.25  # of the map; a region is as wide as the map
REGION_SIZES = ((24, 28), (12, 14), (6, 7))  # to which a level's regions are resized
STEM = 32  # channels


@dataclass(frozen=True)
class HaCnnConfig:
    """One cross entropy of the whole and one of the regions."""

    name: Literal["hacnn"] = "hacnn"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the cross entropy of the whole"""
    widths: tuple[int, int, int] = (128, 256, 384)
    """channels of the three levels, multiples of 16"""
    dim: int = 512
    """length of the feature of the whole, and of that of the regions together"""

    def __post_init__(self) -> None:
        if not all(width % 16 == 0 and 16 <= width <= 4096 for width in self.widths):
            raise ValueError(f"method.widths: {self.widths!r} was given; allowed are multiples of 16 up to 4,096")
        if not 1 <= self.dim <= 8192:
            raise ValueError(f"method.dim: {self.dim!r} was given; allowed are values from 1 to 8,192")


def convolution(channels: int, out: int, kernel: int, stride: int = 1) -> ConvNormAct:
    """All convolutions of this network have a bias."""
    return ConvNormAct(channels, out, kernel, stride=stride, bias=True)


class Streams(nn.ModuleList):
    """Streams over one input, their outputs side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, the streams' channels together, H', W']."""
        return torch.cat([stream(x) for stream in self], dim=1)


def inception_a(channels: int, out: int) -> Streams:
    """Four streams of out / 4 channels at the input's resolution."""
    part = out // 4
    streams = [nn.Sequential(convolution(channels, part, 1), convolution(part, part, 3)) for _ in range(3)]
    pooled = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), convolution(channels, part, 1))
    return Streams([*streams, pooled])


def inception_b(channels: int, out: int) -> Streams:
    """Streams of out / 4, out / 4 and out / 2 channels at half the resolution."""
    part = out // 4
    once = nn.Sequential(convolution(channels, part, 1), convolution(part, part, 3, 2))
    twice = nn.Sequential(convolution(channels, part, 1), convolution(part, part, 3), convolution(part, part, 3, 2))
    pooled = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), convolution(channels, 2 * part, 1))
    return Streams([once, twice, pooled])


class HaCnn(Method):
    """The test feature is that of the whole and that of the regions. Section `model` has no part in it."""

    about = About(
        title="HA-CNN",
        paper="Li et al., CVPR 2018",
        claim="network as published, schedule assumed",
        needs="viewpoint labels in training with viewpoint_aware",
        published={"market1501-hacnn": (75.7, 91.2), "dukemtmc-hacnn": (63.8, 80.5)},
        measured={"synthetic-hacnn": (66.8, 78.1)},
    )
    Config = HaCnnConfig
    heads = ("head", "region_head")
    own_pooling = "means of maps of its own network"

    def __init__(self, config: HaCnnConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.aware = config.viewpoint_aware
        steps = list(zip((STEM, *config.widths), config.widths, strict=False))
        self.stem = convolution(3, STEM, 3, 2)
        self.levels = nn.ModuleList(nn.Sequential(inception_a(c, d), inception_b(d, d)) for c, d in steps)
        self.attention = nn.ModuleList(HarmoniousAttention(d, regions=REGIONS) for d in config.widths)
        self.local = nn.ModuleList(inception_b(c, d) for c, d in steps)
        self.embed_whole = embedding(config.widths[-1], config.dim, bias=True)
        self.embed_regions = embedding(REGIONS * config.widths[-1], config.dim, bias=True)
        self.head: nn.Module = (
            ViewpointAwareTerms(config.dim, classes) if self.aware else nn.Linear(config.dim, classes.identities)
        )
        self.region_head = nn.Linear(config.dim, classes.identities)

    def features(self, batch: Batch) -> list[Tensor]:
        """The feature of the whole and that of the regions, each [N, dim]."""
        x = self.stem(batch.image)
        regions: list[Any] = [0.0] * REGIONS
        for level, attention, local, size in zip(self.levels, self.attention, self.local, REGION_SIZES, strict=True):
            attended, centers = attention(level(x))
            for i, center in enumerate(centers.unbind(1)):
                region = F.interpolate(look_at(x, center), size, mode="bilinear", align_corners=True)
                # The regions share their weights; batch norms see them one by one.
                regions[i] = local(region + regions[i])
            x = attended
        whole = x.float().mean((2, 3))
        together = torch.cat([region.float().mean((2, 3)) for region in regions], dim=1)
        with full_precision(whole):
            return [self.embed_whole(whole), self.embed_regions(together)]

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity losses of both features."""
        whole, regions = self.features(batch)
        with full_precision(whole):
            if self.aware:
                terms = self.head(whole, batch)
            else:
                terms = {"identity": Term(F.cross_entropy(self.head(whole), batch.identity))}
            terms["regions"] = Term(F.cross_entropy(self.region_head(regions), batch.identity))
        return terms


def look_at(x: Tensor, center: Tensor) -> Tensor:
    """The region of a map [N, C, H, W] around a centre (x, y) [N, 2], at the map's own size."""
    scale = torch.tensor([1.0, REGION_HEIGHT], device=x.device).diag().expand(x.shape[0], 2, 2)
    with full_precision(x):
        return affine_crop(x.float(), torch.cat([scale, center.float()[:, :, None]], dim=2), x.shape[2:])
