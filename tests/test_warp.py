"""Regions sampled through affine maps, homographies and UV tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vareid_ext.losses import distillation
from vareid_ext.models import Localizer, affine_crop, uv_table, warp_quad

IDENTITY = torch.tensor([[1.0, 0, 0], [0, 1, 0]])


def whole(height, width):
    """The corners of all of an image."""
    right, bottom = width - 0.5, height - 0.5
    return torch.tensor([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])


def homography(quad):
    """From the unit square to the corners, by the 8 x 8 linear system in float64."""
    rows, values = [], []
    for (u, v), (x, y) in zip([(0, 0), (1, 0), (1, 1), (0, 1)], quad, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
        values += [x, y]
    return np.append(np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64)), 1).reshape(3, 3)


def bilinear(image, x, y):
    """A pixel between pixels, 0 outside: the definition, one at a time."""
    total, (height, width) = np.zeros(len(image)), image.shape[1:]
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def test_a_quad_against_the_linear_system():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((3, 2, 12, 9), np.float32))
    base = np.array([[1, 1], [7, 1], [7, 10], [1, 10]], np.float64)
    quads = base + rng.uniform(-1.5, 1.5, (3, 4, 2))
    quads[2] = quads[2, ::-1]  # the mirrored orientation
    found = warp_quad(image, torch.from_numpy(quads), (5, 7))
    for n, quad in enumerate(quads):
        matrix = homography(quad)
        for row, column in np.ndindex(5, 7):
            x, y, w = matrix @ [(column + 0.5) / 7, (row + 0.5) / 5, 1]
            expected = bilinear(image[n].double().numpy(), x / w, y / w)
            np.testing.assert_allclose(found[n, :, row, column], expected, atol=1e-5)


def test_the_whole_image_is_itself_and_its_corners_turn_it():
    image = torch.rand(2, 3, 6, 4)
    corners = whole(6, 4).expand(2, 4, 2)
    torch.testing.assert_close(warp_quad(image, corners, (6, 4)), image)
    torch.testing.assert_close(warp_quad(image, corners[:, [1, 0, 3, 2]], (6, 4)), image.flip(3))
    torch.testing.assert_close(warp_quad(image, corners[:, [1, 2, 3, 0]], (4, 6)), image.rot90(1, (2, 3)))
    assert warp_quad(image[:0], corners[:0], (6, 4)).shape == (0, 3, 6, 4)
    assert warp_quad(image, corners + 100, (6, 4)).abs().max() == 0


@pytest.mark.parametrize(
    "quad",
    [
        [[1, 1], [1, 1], [1, 1], [1, 1]],
        [[0, 0], [1, 0], [2, 0], [3, 0]],  # a line
        [[0, 0], [3, 0], [3, 0], [0, 3]],  # two corners in one
        [[0, 0], [3, 3], [3, 0], [0, 3]],  # its sides cross
        [[0, 0], [4, 0], [1, 1], [0, 4]],  # a dent
    ],
)
def test_a_degenerate_quad_is_black_and_has_a_finite_gradient(quad):
    image = torch.ones(1, 1, 5, 5, requires_grad=True)
    corners = torch.tensor([quad], dtype=torch.float32, requires_grad=True)
    found = warp_quad(image, corners, (3, 3))
    found.sum().backward()
    assert found.abs().max() == 0
    assert torch.isfinite(corners.grad).all()


def test_the_gradient_of_a_quad():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    corners = torch.tensor([[[0.7, 0.6], [4.1, 1.2], [4.4, 4.3], [0.9, 4.2]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, q: warp_quad(x, q, (2, 2)), (image, corners))


def test_an_affine_crop_takes_what_its_corners_name():
    image = torch.rand(2, 3, 9, 5)
    theta = IDENTITY.expand(2, 2, 3)
    torch.testing.assert_close(affine_crop(image, theta, (9, 5)), image)
    # Half the height from the top: rows 0 to 4 of 9, at their own size.
    upper = torch.tensor([[1.0, 0, 0], [0, 0.5, -0.5]]).expand(2, 2, 3)
    torch.testing.assert_close(affine_crop(image, upper, (5, 5)), image[:, :, :5])
    outside = torch.tensor([[1.0, 0, 3], [0, 1, 0]]).expand(2, 2, 3)
    assert affine_crop(image, outside, (9, 5)).abs().max() == 0


def test_a_uv_table_against_a_loop():
    rng = np.random.default_rng(0)
    image = rng.random((2, 3, 20, 10), np.float32)
    iuv = rng.integers(0, 256, (2, 3, 20, 10), dtype=np.uint8)
    iuv[:, 0] = rng.integers(0, 5, (2, 20, 10))
    expected, count = np.zeros((2, 4, 3, 4, 4)), np.zeros((2, 4, 4, 4))
    for n, row, column in np.ndindex(2, 20, 10):
        part, u, v = (int(value) for value in iuv[n, :, row, column])
        if part:
            place = n, part - 1, v // 64, u // 64
            expected[place[0], place[1], :, place[2], place[3]] += image[n, :, row, column]
            count[place] += 1
    found = uv_table(torch.from_numpy(image), torch.from_numpy(iuv), parts=4, size=4)
    assert found.shape == (2, 4, 4, 4, 4)
    assert 0 < (count == 0).sum() < count.size
    assert np.array_equal(found[:, :, 3], count > 0)
    np.testing.assert_allclose(found[:, :, :3], expected / np.maximum(count, 1)[:, :, None], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 256])
def test_a_uv_table_counted_from_the_other_side_is_mirrored(size):
    image = torch.arange(256.0).view(1, 1, 16, 16)
    u = torch.arange(256, dtype=torch.uint8).view(16, 16)
    iuv = torch.stack([torch.ones_like(u), u, 77 * u])[None]  # 77 is odd: each V occurs once, too
    other = iuv.clone()
    other[:, 1] = 255 - other[:, 1]
    table = uv_table(image, iuv, parts=1, size=size)
    assert torch.equal(uv_table(image, other, parts=1, size=size), table.flip(-1))
    assert table[0, 0, 1].any(0).all(), "each column is hit"


def test_a_uv_table_of_nothing_is_empty():
    table = uv_table(torch.rand(2, 3, 8, 4), torch.zeros(2, 3, 8, 4, dtype=torch.uint8))
    assert table.shape == (2, 24, 4, 32, 32)
    assert table.abs().max() == 0
    assert uv_table(torch.rand(0, 3, 8, 4), torch.zeros(0, 3, 8, 4, dtype=torch.uint8)).shape == (0, 24, 4, 32, 32)


@pytest.mark.parametrize(("size", "parameters"), [((256, 64), 16_886), ((256, 128), 37_686)])
def test_the_localizer_has_the_published_parameters_and_begins_with_the_identity(size, parameters):
    torch.manual_seed(0)
    localizer = Localizer(*size)
    assert sum(p.numel() for p in localizer.parameters()) == parameters
    image = torch.rand(2, 3, *size)
    theta = localizer(image)
    assert torch.equal(theta, IDENTITY.expand(2, 2, 3))
    torch.testing.assert_close(affine_crop(image, theta, size), image, atol=1e-4, rtol=0)
    affine_crop(image, theta, size).square().sum().backward()
    assert localizer.map.weight.grad.abs().max() > 0


def test_what_does_not_fit_is_named():
    image = torch.rand(2, 3, 8, 4)
    with pytest.raises(ValueError, match=r"quad \[N, 4, 2\] were expected, got \[2, 3, 8, 4\], \[1, 4, 2\]"):
        warp_quad(image, torch.zeros(1, 4, 2), (3, 3))
    with pytest.raises(ValueError, match=r"iuv \[N, 3, H, W\] were expected"):
        uv_table(image, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="iuv: part 25 was given; allowed are 0 to 24"):
        uv_table(image, torch.full((2, 3, 8, 4), 25, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"height, width: 63, 200 was given; allowed are at least 64 \(pool is 4\)"):
        Localizer(63, 200)
    assert Localizer(64, 200)(torch.rand(1, 3, 64, 200)).shape == (1, 2, 3)


def test_distillation_is_twice_one_minus_the_cosine():
    torch.manual_seed(0)
    student = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    loss = distillation(student, teacher)
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(loss, (2 - 2 * cosine).mean())
    torch.testing.assert_close(distillation(student, -3 * student).item(), 4.0)
    torch.testing.assert_close(distillation(student, 5 * student).item(), 0.0)
    assert torch.autograd.gradcheck(lambda x: distillation(x, teacher.detach()), student)
    loss.backward()
    assert teacher.grad is None
    assert distillation(student[:0], teacher[:0]) == 0
    assert distillation(torch.zeros(1, 3), torch.ones(1, 3)) == pytest.approx(1)
    assert distillation(torch.randn(2, 8).half(), torch.randn(2, 8).half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"student and teacher \[..., D\] were expected, got \[4, 3, 6\], \[4, 6\]"):
        distillation(student, teacher[:, 0])
