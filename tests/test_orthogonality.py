"""The gap of eigenvalues against closed forms and a decomposition in float64."""

from __future__ import annotations

import pytest
import torch

from vareid_ext.losses.orthogonality import exact_spectral_gap, spectral_gap


def exact(matrix):
    values = torch.linalg.eigvalsh(matrix.double() @ matrix.double().mT)
    return values[..., -1] - values[..., 0]


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (5, 3, 8), (2, 3, 5, 5)])
def test_many_steps_give_the_gap(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(spectral_gap(matrix, steps=2000), exact(matrix), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(exact_spectral_gap(matrix), exact(matrix), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(exact_spectral_gap(matrix.float()).double(), exact(matrix), rtol=1e-5, atol=1e-5)


def test_one_step_never_exceeds_the_gap_and_comes_close_for_what_a_relu_leaves():
    torch.manual_seed(0)
    matrix = torch.randn(50, 64, 40).relu()
    ratio = spectral_gap(matrix).double() / exact(matrix)
    assert ratio.max() <= 1 + 1e-5
    assert ratio.min() > 0.5


def test_closed_forms():
    column = torch.arange(1.0, 6.0)[:, None]
    torch.testing.assert_close(spectral_gap(column), torch.tensor(55.0), rtol=1e-5, atol=0)  # |column|^2
    orthogonal = 3 * torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert spectral_gap(orthogonal).abs() < 1e-4
    assert spectral_gap(torch.tensor([[2.0, 1.0]])).abs() < 1e-5  # one row is orthogonal by itself


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_comes_out_squared(scale):
    matrix = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    wanted = spectral_gap(matrix, steps=300)
    torch.testing.assert_close(spectral_gap(matrix * scale, steps=300) / scale**2, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_the_gradient_is_that_of_the_gap(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gaps = spectral_gap(matrix, steps=2000), exact_spectral_gap(matrix), exact(matrix)
    found, other, wanted = (torch.autograd.grad(gap, matrix)[0] for gap in gaps)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other, wanted)


def test_a_matrix_of_zeros_has_no_gap_and_no_gradient():
    matrix = torch.zeros(2, 3, 4, requires_grad=True)
    gap = spectral_gap(matrix)
    assert gap.tolist() == [0, 0]
    gap.sum().backward()
    assert torch.equal(matrix.grad, torch.zeros_like(matrix))


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    matrix = torch.rand(8, 5).bfloat16()
    gaps = []
    for same in (matrix, matrix.float()):
        torch.manual_seed(1)
        gaps.append(spectral_gap(same))
    assert gaps[0].dtype == torch.float32
    assert torch.equal(*gaps)


def test_what_is_not_allowed_is_named():
    for shape in ((3,), (0, 2), (2, 3, 0)):
        with pytest.raises(ValueError, match=r"matrix: \[.*\] was given; allowed is \[\.\.\., R, C\]"):
            spectral_gap(torch.zeros(shape))
    with pytest.raises(ValueError, match="steps: 0 was given"):
        spectral_gap(torch.ones(2, 2), steps=0)
