"""How far the rows of a matrix are from orthogonal and equally long: a gap between eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext._processes import BatchShare, drawn


def spectral_gap(matrix: Tensor, *, steps: int = 1, share: BatchShare | None = None) -> Tensor:
    """An estimate of ``lambda_max - lambda_min`` of A = matrix matrix^T, 0 where the rows are orthogonal and as long.

    Both eigenvalues are Rayleigh quotients after a few power iterations from a random vector (Chen et al., ICCV 2019):
    first lambda_max of A, then lambda_min - lambda_max of A - lambda_max I. Both quotients lie between the true
    eigenvalues, so the estimate never exceeds the gap; after few steps it may be much below, even negative. A itself is
    never formed.

    Args:
        matrix: floating point [..., R, C]; computed in float32 or wider.
        steps: power iterations, at least 1; many give the gap itself.
        share: what this process has of a batch whose images the first dimension counts, as a method's `share`; the
            random vectors are drawn for the whole batch. None: the batch is all here.

    Returns:
        [...]. The random vectors come from torch's default generator.

    Raises:
        ValueError: an argument that is not allowed.
    """
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"matrix: {list(matrix.shape)} was given; allowed is [..., R, C] with R and C at least 1")
    if steps < 1:
        raise ValueError(f"steps: {steps!r} was given; allowed are values from 1")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    # A common scale keeps the products of large matrices finite, and those of small ones from vanishing.
    scale = matrix.detach().abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix = matrix / scale

    def times(vector: Tensor, shift: Tensor) -> Tensor:
        return matrix @ (matrix.mT @ vector) - shift * vector

    def random_columns(rows: int) -> Tensor:
        return torch.rand(rows, *matrix.shape[1:-1], 1, dtype=matrix.dtype, device=matrix.device)

    def eigenvalue(shift: Tensor) -> Tensor:
        vector = drawn(share, len(matrix), random_columns)
        for _ in range(steps):
            vector = times(vector, shift)
            vector = vector / _norm(vector)
        return (vector * times(vector, shift)).sum(-2, keepdim=True)

    largest = eigenvalue(torch.zeros_like(scale))
    # eigenvalue(largest) is lambda_min - lambda_max.
    return (-eigenvalue(largest) * scale.square())[..., 0, 0]


def exact_spectral_gap(matrix: Tensor) -> Tensor:
    """The gap that :func:`spectral_gap` estimates, by a decomposition of the smaller of its two Gram matrices.

    For few matrices: GPUs decompose one after the other.

    Args:
        matrix: floating point [..., R, C]; computed in float32 or wider.

    Returns:
        [...].
    """
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    tall = matrix.shape[-2] > matrix.shape[-1]  # lambda_min is 0 then
    values = torch.linalg.eigvalsh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    return values[..., -1] if tall else values[..., -1] - values[..., 0]


def _norm(vector: Tensor) -> Tensor:
    """The length of a column, one that is 0 taken for 1."""
    squared = vector.square().sum(-2, keepdim=True)
    return torch.where(squared > 0, squared, 1.0).sqrt()
