"""Regions of an image or feature map, sampled through an affine map, a homography or a table of UV coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def affine_crop(x: Tensor, theta: Tensor, size: Sequence[int]) -> Tensor:
    """A region through an affine map (spatial transformer networks, Jaderberg et al., NeurIPS 2015).

    Args:
        x: float32 [N, C, H, W].
        theta: float32 [N, 2, 3], from the region's coordinates to those of `x`; both are x, y with -1 and 1 at the
            middles of the first and the last pixel. ``[[1, 0, 0], [0, 1, 0]]`` is all of `x`.
        size: h, w of the region.

    Returns:
        Float32 [N, C, h, w], bilinear, 0 outside `x`.
    """
    height, width = size
    # In place of F.affine_grid, which PyTorch 2.6 does not export for any number of images.
    down, across = (torch.linspace(-1, 1, side).to(theta) if side > 1 else theta.new_zeros(1) for side in size)
    point = torch.cartesian_prod(down, across).flip(1)
    grid = (F.pad(point, (0, 1), value=1) @ theta.transpose(1, 2)).unflatten(1, (height, width))
    return F.grid_sample(x, grid, align_corners=True)


def warp_quad(image: Tensor, quad: Tensor, size: Sequence[int]) -> Tensor:
    """A quadrilateral of an image as a rectangle, through the homography of its corners.

    Args:
        image: float32 [N, C, H, W].
        quad: floating point [N, 4, 2], x and y in pixels of the corners that become top left, top right, bottom right
            and bottom left. The first pixel's middle is (0, 0), so that all of the image is (-0.5, -0.5) to
            (W - 0.5, H - 0.5).
        size: h, w of the rectangle.

    Returns:
        Float32 [N, C, h, w], bilinear, 0 outside the image, and 0 for a quadrilateral that is not strictly convex: no
        homography takes a rectangle to it.

    Raises:
        ValueError: shapes that do not fit.
    """
    if image.ndim != 4 or quad.shape != (image.shape[0], 4, 2):
        raise ValueError(f"image [N, C, H, W] and quad [N, 4, 2] were expected, got {[*image.shape]}, {[*quad.shape]}")
    height, width = size
    corner = quad.double()
    side = corner.roll(-1, 1) - corner
    turn = _cross(side.roll(1, 1), side)
    convex = (turn > 0).all(1) | (turn < 0).all(1)
    unit = corner.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]])
    corner = torch.where(convex[:, None, None], corner, unit)
    # From the unit square to the corners, in closed form (Heckbert, Fundamentals of texture mapping, 1989, 2.2.3).
    first, second, third, fourth = corner.unbind(1)
    one, other, sum_ = second - third, fourth - third, first - second + third - fourth
    scale = _cross(one, other)
    g, h = _cross(sum_, other) / scale, _cross(one, sum_) / scale
    along = second - first + g[:, None] * second
    down = fourth - first + h[:, None] * fourth
    u = ((torch.arange(width, device=quad.device, dtype=torch.float64) + 0.5) / width)[None, None, :, None]
    v = ((torch.arange(height, device=quad.device, dtype=torch.float64) + 0.5) / height)[None, :, None, None]
    along, down, first, g, h = (value[:, None, None] for value in (along, down, first, g[:, None], h[:, None]))
    point = (along * u + down * v + first) / (g * u + h * v + 1)
    pixels = point.new_tensor([image.shape[3], image.shape[2]])
    grid = ((2 * point + 1) / pixels - 1).to(image.dtype)
    return F.grid_sample(image, grid, align_corners=False) * convex[:, None, None, None]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def uv_table(image: Tensor, iuv: Tensor, *, parts: int = 24, size: int = 32) -> Tensor:
    """The image of each body part in the part's own coordinates: mean colours, and where there are any.

    Args:
        image: float32 [N, C, H, W].
        iuv: uint8 [N, 3, H, W]: of each pixel the part, 1 to `parts` or 0 for none, and U and V, 0 to 255 (DensePose,
            Guler et al., CVPR 2018).
        parts: number of parts P.
        size: height and width s of a part's image.

    Returns:
        Float32 [N, P, C + 1, s, s]. Column ``floor(s U / 256)`` and row ``floor(s V / 256)`` hold the mean of the
        pixels that are there and 1 in the last channel, or 0 and 0 where there are none. Where s divides 256 all cells
        are as large, and U -> 255 - U mirrors the images exactly.

    Raises:
        ValueError: shapes that do not fit, a part above `parts`.
    """
    if image.ndim != 4 or iuv.shape != (len(image), 3, *image.shape[2:]):
        raise ValueError(f"image [N, C, H, W] and iuv [N, 3, H, W] were expected, got {[*image.shape]}, {[*iuv.shape]}")
    part, u, v = iuv.long().unbind(1)
    if part.numel() and part.max() > parts:
        raise ValueError(f"iuv: part {int(part.max())} was given; allowed are 0 to {parts}")
    number = torch.arange(len(image), device=image.device)[:, None, None]
    row, column = v * size // 256, u * size // 256
    place = ((number * parts + part - 1) * size + row) * size + column
    pixels = torch.cat([image, torch.ones_like(image[:, :1])], 1).movedim(1, 3)
    seen = part > 0
    total = pixels.new_zeros(len(image) * parts * size * size, pixels.shape[3])
    total = total.index_add(0, place[seen], pixels[seen])
    mean = total / total[:, -1:].clamp(min=1)
    return mean.unflatten(0, (len(image), parts, size, size)).movedim(4, 2)


class Localizer(nn.Module):
    """A small network that looks at an image and says where to sample it: the identity map at first.

    The pose transformation network of PDC (Su et al., ICCV 2017): average pooling, two 5 x 5 convolutions of 20
    channels, each with max pooling and ReLU, and two linear layers.

    Args:
        height, width: of its images.
        pool: factor of the average pooling.

    Raises:
        ValueError: nothing is left of such an image behind the convolutions.
    """

    def __init__(self, height: int, width: int, *, pool: int = 4) -> None:
        super().__init__()
        left = [((side // pool - 4) // 2 - 4) // 2 for side in (height, width)]
        if min(left) < 1:
            raise ValueError(
                f"height, width: {height}, {width} was given; allowed are at least {16 * pool} (pool is {pool})"
            )
        self.layers = nn.Sequential(
            nn.AvgPool2d(pool),
            *(nn.Conv2d(3, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(20, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(20 * left[0] * left[1], 20), nn.ReLU()),
        )
        self.map = nn.Linear(20, 6)
        nn.init.zeros_(self.map.weight)
        with torch.no_grad():
            self.map.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, image: Tensor) -> Tensor:
        """Float32 [N, 3, height, width] -> affine maps [N, 2, 3], as :func:`affine_crop` takes them."""
        return self.map(self.layers(image)).view(-1, 2, 3)
