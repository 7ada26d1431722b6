"""k-reciprocal re-ranking from three distance matrices, as the public tools take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops._checks import check_dtype, check_floating, check_same_device, check_values
from vareid_ext.reference import k_reciprocal as reference
from vareid_ext.retrieval.rerank.k_reciprocal import K1, K2, LAMBDA_VALUE, check_parameters, encode

_ROUNDING = 1e-3  # share of the largest distance up to which asymmetry and negative distances are rounding errors


def _check_matrix(name: str, value: Tensor, shape: tuple[int, int]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape {list(value.shape)} was given; {list(shape)} is needed")
    finite = value.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name}: row {int((~finite).nonzero()[0])} holds NaN or Inf")


def re_ranking(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = K1, k2: int = K2, lambda_value: float = LAMBDA_VALUE
) -> Any:
    """Re-rank with k-reciprocal encoding, from three matrices of rooted Euclidean distances (fast-reid's signature).

    Args:
        q_g_dist: [Q, G], distances between queries and gallery, float32, float16, bfloat16 or float64. In all three,
            negative entries of up to 1e-3 of the largest are rounding errors and taken as 0.
        q_q_dist: [Q, Q], between queries; symmetric; of q_g_dist's dtype and device.
        g_g_dist: [G, G], within the gallery; likewise.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; NumPy, PyTorch or CuPy as q_g_dist was.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty matrix; shapes or parameters do not fit; NaN or Inf; negative entries or asymmetry beyond
            1e-3 of the largest entry; similarities in place of distances (the diagonals of q_q_dist and g_g_dist are
            then larger than the other entries).
    """
    back = returner(q_g_dist)
    names = ("q_g_dist", "q_q_dist", "g_g_dist")
    q_g, q_q, g_g = (to_tensor(value, name) for name, value in zip(names, (q_g_dist, q_q_dist, g_g_dist), strict=True))
    for name, value in zip(names, (q_g, q_q, g_g), strict=True):
        check_values(name, value)
    check_floating("q_g_dist", q_g)
    for name, value in (("q_q_dist", q_q), ("g_g_dist", g_g)):
        check_dtype(name, value, q_g.dtype)
        check_same_device(name, value, "q_g_dist", q_g)
    k1, k2, lambda_value = check_parameters(k1, k2, lambda_value)
    if q_g.dim() != 2 or 0 in q_g.shape:
        raise ValueError(f"q_g_dist: shape {list(q_g.shape)} was given; [Q, G], both at least 1, is needed")
    Q, G = q_g.shape
    for name, value, shape in zip(names, (q_g, q_q, g_g), ((Q, G), (Q, Q), (G, G)), strict=True):
        _check_matrix(name, value, shape)
    # A sum over pairs of s_ii + s_jj - 2 s_ij is a sum of |x_i - x_j|^2 where s are products of features, above 0;
    # where s are distances, it is below 0.
    trace = sum(float(value.diagonal().sum(dtype=torch.float64)) for value in (q_q, g_g))
    total = sum(times * float(value.sum(dtype=torch.float64)) for value, times in ((q_g, 2), (q_q, 1), (g_g, 1)))
    if (Q + G) * trace > total:
        raise ValueError(
            "q_q_dist: this looks like a similarity matrix (the diagonals of q_q_dist and g_g_dist are larger than the "
            "other entries); distances are needed"
        )
    allowed = _ROUNDING * max(float(value.max()) for value in (q_g, q_q, g_g))
    for name, value in zip(names, (q_g, q_q, g_g), strict=True):
        negative = (value < -allowed).any(1)
        if bool(negative.any()):
            raise ValueError(
                f"{name}: row {int(negative.nonzero()[0])} holds a negative distance (beyond 1e-3 of the largest)"
            )
    for name, value in (("q_q_dist", q_q), ("g_g_dist", g_g)):
        if float((value - value.T).abs().max()) > allowed:
            raise ValueError(f"{name}: is not symmetric (beyond 1e-3 of the largest distance)")
    q_g, q_q, g_g = (value.clamp(min=0) if bool((value < 0).any()) else value for value in (q_g, q_q, g_g))
    neighbor, row_max = stages.matrix_neighbors(q_g, q_q, g_g, min(Q + G, max(k1 + 1, k2)))
    row_max.masked_fill_(row_max == 0, 1)  # such rows stay 0
    maximum = torch.ones_like(row_max, dtype=torch.float32)  # divided before squares can leave float32's range
    encodings = encode(
        neighbor, maximum, lambda *pattern: reference.matrix_distance(q_g, q_q, g_g, row_max, *pattern), k1, k2
    )
    inverted = stages.k_reciprocal_invert(*encodings, Q, Q + G)
    wide = torch.promote_types(q_g.dtype, torch.float32)
    result = q_g.to(wide, copy=True).div_(row_max[:Q, None].to(wide)).square_().to(torch.float32)
    stages.k_reciprocal_blend(result, maximum, *encodings, *inverted, lambda_value)
    return back(result)
