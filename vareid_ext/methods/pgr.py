"""PGR: joints teach a network that does without them at test, in the manner of Li et al. (TPAMI 2019).

Two teachers see the joints: one the upright parts of a person, one the regions of head, upper and lower body. The
student learns to give both their features from the photograph alone. The paper was not to be had: networks, regions and
distillation are our reading. The latter is 2 - 2 cos, summed over entries, so that its weight is that of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.losses import distillation, part_cross_entropy
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision, is_trained
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, PartHeads, identity_head, pool_masks
from vareid_ext.models.joints import REGIONS, body_regions, check_joints, compose, part_images


@dataclass(frozen=True)
class PgrConfig:
    """Identity losses of teachers and student, and the distances of the student's features to the teachers'."""

    name: Literal["pgr"] = "pgr"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the cross entropy of the student's whole feature"""
    stage: str = "layer4"
    """the stage of the student's backbone that its two features have a copy of each, with all that follows"""
    region_dim: int = 512
    """length of a region's feature"""
    region_width: float = 16.0
    """standard deviation of the regions around the lines between joints, in pixels of an image of 256 x 128"""
    distance_weight: float = 1.0
    """weight of each distance of the student to a teacher"""

    def __post_init__(self) -> None:
        check_limits("method", self, region_dim=(1, 8192), region_width=(0.1, 1000), distance_weight=(0, 10_000))


class _PartTeacher(nn.Module):
    """The upright parts as one image -> its feature [N, C]."""

    def __init__(self, model: ModelConfig, identities: int) -> None:
        super().__init__()
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        self.head = identity_head(self.backbone.channels, identities)

    def forward(self, images: Tensor, keypoints: Tensor) -> Tensor:
        parts = part_images(images, keypoints, (images.shape[2], images.shape[3]))
        return self.pool(self.backbone(compose(parts)))


class _RegionTeacher(nn.Module):
    """The photograph and regions of it -> their features, 3 of [N, d]."""

    def __init__(self, model: ModelConfig, identities: int, dim: int, width: float) -> None:
        super().__init__()
        self.backbone, self.width = Backbone.of(model), width
        self.parts = PartHeads(len(REGIONS), self.backbone.channels, dim, identities)

    def forward(self, images: Tensor, keypoints: Tensor) -> list[Tensor]:
        x = self.backbone(images)
        regions = body_regions(keypoints, (images.shape[2], images.shape[3]), (x.shape[2], x.shape[3]), self.width)
        with full_precision(x):
            return self.parts(pool_masks(x, regions))


class _Student(nn.Module):
    """The photograph -> a feature [N, C], and those of three regions it finds itself, 3 of [N, d]."""

    def __init__(self, config: PgrConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.backbone, self.pool = Backbone.of(model), POOLING[model.pooling]()
        self.tails = self.backbone.split_off(config.stage, copies=2, field="method.stage")
        channels, identities = self.backbone.channels, classes.identities
        self.regions = nn.Conv2d(channels, len(REGIONS), 1)
        self.head: nn.Module = (
            ViewpointAwareTerms(channels, classes) if config.viewpoint_aware else identity_head(channels, identities)
        )
        self.parts = PartHeads(len(REGIONS), channels, config.region_dim, identities)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        shared = self.backbone(images)
        invariant, local = (tail(shared) for tail in self.tails)
        with full_precision(local):
            regions = self.regions(local.float()).softmax(1)
            return self.pool(invariant), self.parts(pool_masks(local, regions))


class Pgr(Method):
    """The test feature is the student's, of the whole and of the three regions side by side."""

    about = About(
        title="PGR",
        paper="Li et al., TPAMI 2019",
        claim="in the manner of",
        needs="keypoints in training; viewpoint labels in training with viewpoint_aware",
        published={"market1501-pgr": (77.21, 93.87), "dukemtmc-pgr": (65.98, 83.63)},
        measured={"synthetic-pgr": (26.0, 32.5)},
    )
    Config = PgrConfig
    heads = ("part_teacher.head", "region_teacher.parts.head", "student.head", "student.parts.head")
    inputs = ("keypoints",)

    def __init__(self, config: PgrConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.part_teacher = _PartTeacher(model, classes.identities)
        self.region_teacher = _RegionTeacher(model, classes.identities, config.region_dim, config.region_width)
        self.student = _Student(config, model, classes)

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity losses of what the stage trains, and for a student the distances to its teachers."""
        keypoints, identity, features = batch.extras["keypoints"], batch.identity, []
        check_joints(keypoints, batch.image)
        for teacher in (self.part_teacher, self.region_teacher):
            with torch.set_grad_enabled(is_trained(teacher)):
                features.append(teacher(batch.image, keypoints))
        upright, regions = features
        terms: dict[str, Term] = {}
        with full_precision(upright):
            if is_trained(self.part_teacher):
                logits = self.part_teacher.head(upright)[:, None]
                terms["part teacher"] = Term(part_cross_entropy(logits, identity))
            if is_trained(self.region_teacher):
                logits = self.region_teacher.parts.logits(regions)
                terms["region teacher"] = Term(part_cross_entropy(logits, identity))
        if is_trained(self.student):
            invariant, local = self.student(batch.image)
            with full_precision(invariant):
                if self.config.viewpoint_aware:
                    terms |= self.student.head(invariant, batch)
                else:
                    terms["invariant"] = Term(part_cross_entropy(self.student.head(invariant)[:, None], identity))
                terms["local"] = Term(part_cross_entropy(self.student.parts.logits(local), identity))
                weight = self.config.distance_weight
                terms["invariant distance"] = Term(distillation(invariant, upright), weight)
                terms["local distance"] = Term(distillation(torch.stack(local, 1), torch.stack(regions, 1)), weight)
        return terms

    def features(self, batch: Batch) -> list[Tensor]:
        """The whole [N, C], and head, upper and lower body [N, d] each."""
        invariant, local = self.student(batch.image)
        return [invariant, *local]
