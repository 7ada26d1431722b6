"""PIE: a photograph and its PoseBox, the person's parts in fixed places, are fused (Zheng et al., TIP 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Method, Term, TrainingClasses, full_precision, is_trained
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms
from vareid_ext.models import POOLING, Backbone, ModelConfig, identity_head, warp_quad
from vareid_ext.models.joints import (
    LEFT_ARM,
    LEFT_LEG,
    NUM_JOINTS,
    RIGHT_ARM,
    RIGHT_LEG,
    box_along,
    check_joints,
    to_canvas,
)
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy

_CANVAS = (368, 184)  # height and width of the pixels that the PoseBox's margins are counted in
_TORSO = (RIGHT_ARM[0], LEFT_ARM[0], LEFT_LEG[0], RIGHT_LEG[0])


@dataclass(frozen=True)
class PieConfig:
    """Two networks, one on the photograph and one on the PoseBox, and a fusion of the two."""

    name: Literal["pie"] = "pie"
    """the method"""
    posebox: Literal[1, 2, 3] = 3
    """parts of the PoseBox: 1 the torso, 2 the legs too, 3 the arms too"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the photograph's cross entropy"""
    posebox_size: int = 224
    """height and width of the PoseBox, pixels; a multiple of 28"""
    jitter: bool = False
    """in training, move joints at random by 1 to 4 pixels of an image 368 pixels high, where the confidences of
    shoulders and hips sum up to less than 0.8"""

    def __post_init__(self) -> None:
        check_limits("method", self, posebox_size=(28, 4032))
        if self.posebox_size % 28:
            raise ValueError(f"method.posebox_size: {self.posebox_size} was given; allowed are multiples of 28")


def draw_posebox(images: Tensor, keypoints: Tensor, *, parts: int = 3, size: int = 224, jitter: bool = False) -> Tensor:
    """The PoseBox: torso, upright arms beside it, upright legs below it. Left and right are those of the image.

    Args:
        images: float32 [N, C, H, W].
        keypoints: float32 [N, 14, 3], as in :mod:`vareid_ext.models.joints`.
        parts, size, jitter: as in :class:`PieConfig`; jitter draws from torch's default generator.

    Returns:
        Float32 [N, C, size, size], 0 where there is no part, and in a part with a missing joint.

    Raises:
        ValueError: `keypoints` of another shape.
    """
    check_joints(keypoints, images)
    image_size = images.shape[2], images.shape[3]
    point, confidence = to_canvas(keypoints, image_size, _CANVAS), keypoints[..., 2:]
    if jitter:
        unsure = confidence[:, _TORSO].sum(1, keepdim=True) < 0.8
        sign = 2 * torch.randint(2, point.shape, device=point.device) - 1
        point = point + unsure * sign * torch.randint(1, 5, point.shape, device=point.device)
    joints, unit = torch.cat([point, confidence], 2), size // 28

    def by_side(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Two limbs [N, 3, 3], first the one whose upper end is farther left in the image."""
        a, b = joints[:, one], joints[:, other]
        exchange = a[:, :1, :1] > b[:, :1, :1]
        return torch.where(exchange, b, a), torch.where(exchange, a, b)

    def cut(corners: Tensor, confidence: Tensor, rows: int, columns: int) -> Tensor:
        back = to_canvas(corners.clamp(min=0), _CANVAS, image_size)
        part = warp_quad(images, back, (rows * unit, columns * unit))
        return part * (confidence > 0).all(1)[:, None, None, None]

    def limb(joint: Tensor, half: float, rows: int, columns: int) -> Tensor:
        """Its two segments, one below the other."""
        segments = [joint[:, :2], joint[:, 1:]]
        boxes = [box_along(ends[:, 0, :2], ends[:, 1, :2], half, 0) for ends in segments]
        return torch.cat([cut(box, s[..., 2], rows, columns) for box, s in zip(boxes, segments, strict=True)], 2)

    arms, legs = by_side(RIGHT_ARM, LEFT_ARM), by_side(RIGHT_LEG, LEFT_LEG)
    ends = torch.stack([arms[0][:, 0], arms[1][:, 0], legs[1][:, 0], legs[0][:, 0]], 1)
    margin = point.new_tensor([[-5, -5], [5, -5], [10, 0], [-10, 10]])
    torso = cut(ends[..., :2] + margin, ends[..., 2], 14, 18)
    left_arm, right_arm = (limb(arm, 10, 7, 5) * (parts >= 3) for arm in arms)
    left_leg, right_leg = (limb(leg, 15, 7, 14) * (parts >= 2) for leg in legs)
    return torch.cat([torch.cat([left_arm, torso, right_arm], 3), torch.cat([left_leg, right_leg], 3)], 2)


class Pie(Method):
    """The test feature is both networks' pooled features and the confidences of the joints, side by side."""

    about = About(
        title="PIE",
        paper="Zheng et al., TIP 2019",
        claim="network as published, schedule assumed",
        needs="keypoints in training and at test; viewpoint labels in training with viewpoint_aware",
        published={"market1501-pie": (69.25, 87.33), "dukemtmc-pie": (64.09, 80.84)},
        measured={"synthetic-pie": (40.2, 54.0)},
    )
    Config = PieConfig
    heads = ("photograph_head", "posebox_head", "fused_head")
    inputs = test_inputs = ("keypoints",)

    def __init__(self, config: PieConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__()
        self.config = config
        self.photograph, self.posebox = Backbone.of(model), Backbone.of(model)
        self.pools = nn.ModuleList(POOLING[model.pooling]() for _ in range(2))
        channels = self.photograph.channels
        self.photograph_head: nn.Module = (
            ViewpointAwareTerms(channels, classes)
            if config.viewpoint_aware
            else identity_head(channels, classes.identities, bias=True, std=0.01)
        )
        self.posebox_head = identity_head(channels, classes.identities, bias=True, std=0.01)
        self.fused_head = identity_head(2 * channels + NUM_JOINTS, classes.identities, bias=True, std=0.01)

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The identity loss of each network and, in a stage that trains its head, of the fusion."""
        photograph, posebox, confidence = self.features(batch)
        with full_precision(photograph):
            terms, logits = {}, {}
            if self.config.viewpoint_aware:
                terms = self.photograph_head(photograph, batch)
            else:
                logits["photograph"] = self.photograph_head(photograph)
            logits["posebox"] = self.posebox_head(posebox)
            if is_trained(self.fused_head):
                logits["fused"] = self.fused_head(torch.cat([photograph, posebox, confidence], 1))
            return terms | {
                name: Term(identity_cross_entropy(z, batch.identity, smoothing="none")) for name, z in logits.items()
            }

    def features(self, batch: Batch) -> list[Tensor]:
        """Photograph [N, C], PoseBox [N, C], confidences [N, 14]."""
        config, keypoints = self.config, batch.extras["keypoints"]
        jitter = config.jitter and self.training
        posebox = draw_posebox(batch.image, keypoints, parts=config.posebox, size=config.posebox_size, jitter=jitter)
        maps = self.photograph(batch.image), self.posebox(posebox)
        return [*(pool(x) for pool, x in zip(self.pools, maps, strict=True)), keypoints[..., 2]]
