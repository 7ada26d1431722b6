"""The 14 joints of a person that pose-guided methods read, and the part images that are cut out along them.

Joints are float32 [N, 14, 3]: x and y in pixels of the image, whose first pixel's middle is (0, 0), and a confidence,
0 where the joint is missing. Their order is that of convolutional pose machines: head, neck, right shoulder, elbow and
wrist, left ones, right hip, knee and ankle, left ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vareid_ext.models.warp import warp_quad

NUM_JOINTS = 14
HEAD, NECK = 0, 1
RIGHT_ARM, LEFT_ARM = (2, 3, 4), (5, 6, 7)
RIGHT_LEG, LEFT_LEG = (8, 9, 10), (11, 12, 13)
HEAD_LINES = ((0, 1),)
UPPER_LINES = ((1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (1, 11))
LOWER_LINES = ((8, 9), (9, 10), (11, 12), (12, 13))
"""The lines between joints: of the head, of arms and torso, of the legs."""
REGIONS = (HEAD_LINES, UPPER_LINES, LOWER_LINES)

_CANVAS = (256, 128)  # height and width of the pixels that the margins below are counted in


def check_joints(keypoints: Tensor, images: Tensor) -> None:
    """ValueError unless these are the 14 joints of each of the images [N, 3, H, W]."""
    if keypoints.shape != (images.shape[0], NUM_JOINTS, 3):
        raise ValueError(f"keypoints: {[*keypoints.shape]} was given; {[len(images), NUM_JOINTS, 3]} is needed")


def to_canvas(keypoints: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """The x and y [N, P, 2] of joints in an image of `size` (height, width), in the pixels it has at size `canvas`."""
    scale = keypoints.new_tensor([canvas[1] / size[1], canvas[0] / size[0]])
    return (keypoints[..., :2] + 0.5) * scale - 0.5


def box_along(top: Tensor, bottom: Tensor, across: float, along: float) -> Tensor:
    """The corners [N, 4, 2] of the box around a line: top left, top right, bottom right, bottom left.

    Args:
        top, bottom: floating point [N, 2], the ends of the line, which is upright in the box. Where both are one point
            the box is that point too.
        across: how far the box reaches to either side.
        along: how far it reaches beyond the ends.
    """
    down = F.normalize(bottom - top, dim=1)
    right = torch.stack([down[:, 1], -down[:, 0]], 1) * across
    top, bottom = top - along * down, bottom + along * down
    return torch.stack([top - right, top + right, bottom + right, bottom - right], 1)


def part_images(images: Tensor, keypoints: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Head, body, and upright arms and legs of people (Su et al., ICCV 2017, with the margins of its official code).

    Args:
        images: float32 [N, C, H, W]; they go on sideways for half their width with the colours of their sides.
        keypoints: float32 [N, 14, 3].
        size: h and w of the parts together as :func:`compose` places them, multiples of 4.

    Returns:
        Head [N, C, h / 4, w / 2], body [N, C, h / 2, w / 2], right arm, left arm, right leg and left leg
        [N, C, h / 2, w / 4]. A part with a missing joint is 0.

    Raises:
        ValueError: sizes that do not fit.
    """
    check_joints(keypoints, images)
    if size[0] % 4 or size[1] % 4:
        raise ValueError(f"size: {size} was given; both must be multiples of 4")
    height, width = images.shape[2:]
    point, seen = to_canvas(keypoints, (height, width), _CANVAS), keypoints[..., 2] > 0
    wide = F.pad(images, (width // 2, width // 2, 0, 0), mode="replicate")

    def cut(joints: tuple[int, ...], corners: Tensor, rows: int, columns: int) -> Tensor:
        scale = corners.new_tensor([width / _CANVAS[1], height / _CANVAS[0]])
        corners = (corners + 0.5) * scale - 0.5 + corners.new_tensor([width // 2, 0])
        part = warp_quad(wide, corners, (size[0] * rows // 4, size[1] * columns // 4))
        return part * seen[:, joints].all(1)[:, None, None, None]

    centre = point.new_tensor([0, 30])
    head, hips = point[:, HEAD], (point[:, RIGHT_LEG[0]] + point[:, LEFT_LEG[0]]) / 2
    limbs = [
        cut((first, last), box_along(point[:, first], point[:, last], 20, 15), 2, 1)
        for first, _, last in (RIGHT_ARM, LEFT_ARM, RIGHT_LEG, LEFT_LEG)
    ]
    return [
        cut((HEAD,), box_along(head - centre, head + centre, 30, 0), 1, 2),
        cut((NECK, RIGHT_LEG[0], LEFT_LEG[0]), box_along(point[:, NECK], hips, 40, 34), 2, 2),
        *limbs,
    ]


def compose(parts: list[Tensor]) -> Tensor:
    """One image [N, C, h, w] of the parts of :func:`part_images`.

    The head over the body stands in the middle, an arm over a leg at either side, the person's right at the left.
    """
    head, body, right_arm, left_arm, right_leg, left_leg = parts
    middle = torch.cat([head, body, torch.zeros_like(head)], 2)
    right, left = torch.cat([right_arm, right_leg], 2), torch.cat([left_arm, left_leg], 2)
    return torch.cat([right, middle, left], 3)


def bones(
    keypoints: Tensor,
    lines: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    size: tuple[int, int],
    width: float,
) -> Tensor:
    """Soft lines between joints: ``exp(-d^2 / (2 width^2))`` at a distance of d.

    Args:
        keypoints: float32 [N, 14, 3] in images of `image_size` (height, width) pixels.
        lines: L pairs of joints.
        image_size, size: (height, width) of the images, and of the maps that cover them.
        width: in pixels of an image of 256 x 128.

    Returns:
        Float32 [N, L, *size] in [0, 1], 0 for a line one of whose ends is missing.
    """
    point, seen = to_canvas(keypoints, image_size, _CANVAS), keypoints[..., 2] > 0
    axes = (
        (torch.arange(cells, device=point.device) + 0.5) * (pixels / cells) - 0.5
        for pixels, cells in zip(_CANVAS, size, strict=True)
    )
    y, x = torch.meshgrid(*axes, indexing="ij")
    cell = torch.stack([x, y], 2).to(point)
    first, second = ([line[end] for line in lines] for end in (0, 1))
    begin, along = point[:, first, None, None], (point[:, second] - point[:, first])[:, :, None, None]
    share = ((cell - begin) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    distance = (cell - begin - share.clamp(0, 1)[..., None] * along).square().sum(-1)
    present = (seen[:, first] & seen[:, second])[:, :, None, None]
    return (-distance / (2 * width**2)).exp() * present


def body_regions(keypoints: Tensor, image_size: tuple[int, int], size: tuple[int, int], width: float) -> Tensor:
    """Head, upper and lower body as soft regions around their lines: float32 [N, 3, *size] in [0, 1].

    Args:
        keypoints, image_size, size, width: as of :func:`bones`.
    """
    return torch.stack([bones(keypoints, lines, image_size, size, width).amax(1) for lines in REGIONS], 1)
