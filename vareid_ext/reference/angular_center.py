"""Angular center regularizer L_R (VA-reID, AAAI 2020, section "Angular regularization"; sign and indices corrected).

With identity centres ``W [K, D]`` and viewpoint centres ``U [K, V, D]``::

    L_R = sum over existing (j, k) of (1 - cos(W_j, U_jk)),   cos(a, b) = a . b / (|a| |b|)

Its gradients, with g the upstream gradient, are::

    d L_R / d U_jk = g (cos_jk U_jk / |U_jk| - W_j / |W_j|) / |U_jk|
    d L_R / d W_j  = g sum_k (cos_jk W_j / |W_j| - U_jk / |U_jk|) / |W_j|

A zero vector has cosine 0, and the gradients of its pairs are 0. Half types are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.reference import accumulator_dtype


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, torch.zeros_like(norm), 1 / norm)


def unit_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x / |x|`` and ``1 / |x|`` over the last dimension; 0 for zero vectors."""
    norm = x.norm(dim=-1, keepdim=True)
    zero = norm == 0
    inverse = torch.where(zero, 0, 1 / torch.where(zero, 1, norm))  # 1 / 0 would have a NaN for gradient
    return x * inverse, inverse


def angular_center(W: Tensor, U: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_R (sum form) as differentiable plain PyTorch.

    Args:
        W: identity centres [K, D], floating point.
        U: viewpoint centres [K, V, D], of W's dtype.
        mask: bool [K, V], the pairs that exist; None for all.

    Returns:
        The loss, a scalar in W's dtype (float32 for half types).
    """
    wide = accumulator_dtype(W.dtype)
    W, U = W.to(wide), U.to(wide)
    if mask is not None:  # what does not exist may be NaN, which a product with 0 would keep
        W, U = torch.where(mask.any(1, keepdim=True), W, 0), torch.where(mask[:, :, None], U, 0)
    # No matrix product: autocast, TF32 and the matmul precision would round its inputs.
    cosine = (unit_vectors(U)[0] * unit_vectors(W)[0][:, None]).sum(2)
    return (1 - cosine if mask is None else torch.where(mask, 1 - cosine, 0)).sum()


def angular_center_forward(W: Tensor, U: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_R (sum form) and what its closed-form backward needs.

    Returns:
        loss [], cosine [K, V], identity_norm [K], viewpoint_norm [K, V]; float64 for float64 inputs, else float32.
        Pairs that do not exist have cosine and norm 0.
    """
    wide = accumulator_dtype(W.dtype)
    W, U = W.to(wide), U.to(wide)
    exists = torch.ones(U.shape[:2], dtype=torch.bool, device=U.device) if mask is None else mask
    identity_norm, viewpoint_norm = W.norm(dim=1), torch.where(exists, U.norm(dim=2), 0)
    dot = (U * W[:, None]).sum(2)  # no matrix product, as above
    pair_norm = identity_norm[:, None] * viewpoint_norm
    cosine = torch.where(pair_norm == 0, 0, dot / pair_norm)
    loss = torch.where(exists, 1 - cosine.to(torch.float64), 0).sum().to(wide)
    return loss, cosine, identity_norm, viewpoint_norm


def angular_center_backward(
    upstream: Tensor,
    W: Tensor,
    U: Tensor,
    mask: Tensor | None,
    cosine: Tensor,
    identity_norm: Tensor,
    viewpoint_norm: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of L_R with respect to W and U (closed form), times ``upstream []``; in W's dtype."""
    wide = cosine.dtype
    w_inverse, u_inverse = _inverse(identity_norm)[:, None], _inverse(viewpoint_norm)
    if mask is not None:
        U = torch.where(mask[:, :, None], U, 0)
    W_wide, U_wide = W.to(wide), U.to(wide)
    across = (-upstream * w_inverse * u_inverse)[:, :, None]
    nonzero = (w_inverse != 0) & (u_inverse != 0)
    along_u = torch.where(nonzero, upstream * cosine * u_inverse.square(), 0)[:, :, None]
    along_w = torch.where(nonzero, upstream * cosine * w_inverse.square(), 0).sum(1, keepdim=True)
    grad_U = across * W_wide[:, None] + along_u * U_wide
    if mask is not None:
        grad_U = torch.where(mask[:, :, None], grad_U, 0)
    grad_W = along_w * W_wide + (across * U_wide).sum(1)
    return grad_W.to(W.dtype), grad_U.to(U.dtype)
