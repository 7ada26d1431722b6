"""The PoseBox: a person's parts, cut out along the joints and put into fixed places (Zheng et al., TIP 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext._processes import BatchShare, drawn
from vareid_ext.models.joints import LEFT_ARM, LEFT_LEG, RIGHT_ARM, RIGHT_LEG, box_along, check_joints, to_canvas
from vareid_ext.models.warp import warp_quad

_CANVAS = (368, 184)  # height and width of the pixels that the PoseBox's margins are counted in
_TORSO = (RIGHT_ARM[0], LEFT_ARM[0], LEFT_LEG[0], RIGHT_LEG[0])


def draw_posebox(
    images: Tensor,
    keypoints: Tensor,
    *,
    parts: int = 3,
    size: int = 224,
    jitter: bool = False,
    share: BatchShare | None = None,
) -> Tensor:
    """The PoseBox: torso, upright arms beside it, upright legs below it. Left and right are those of the image.

    Args:
        images: float32 [N, C, H, W].
        keypoints: float32 [N, 14, 3], as in :mod:`vareid_ext.models.joints`.
        parts: 1 the torso, 2 the legs too, 3 the arms too.
        size: height and width of the PoseBox, pixels; a multiple of 28.
        jitter: move joints at random by 1 to 4 pixels of an image 368 pixels high, where the confidences of shoulders
            and hips sum up to less than 0.8; drawn from torch's default generator.
        share: what this process has of a batch, as a method's `share`; the jitter is drawn for the whole batch. None:
            the batch is all here.

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

        def integers(low: int, high: int) -> Tensor:
            of_one, device = point.shape[1:], point.device
            return drawn(share, len(point), lambda rows: torch.randint(low, high, (rows, *of_one), device=device))

        sign = 2 * integers(0, 2) - 1
        point = point + unsure * sign * integers(1, 5)
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
