"""Average precision, inverse negative penalty and first hit of every query: the definition, in plain PyTorch.

For query ``q`` the gallery images with its identity and one of its codes are left out, and so are those whose identity
is ``junk_identity``. The rest is ordered by distance, ties by gallery index (a stable sort). With the hits (images of
the query's identity) at the ranks ``r_1 < ... < r_n``, counted from 1:

    AP  = 1/n sum_i i / r_i          INP = n / r_n          first hit = r_1

Every image has ``C`` codes, of which the ``c``-th of a query is compared with the ``c``-th of a gallery image; code -1
is unknown and equals none. The usual code is the camera; those of an exclusion rule are its terms with the identity.

Sources: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (AP, CMC, the camera rule); Ye et
al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2022, equation 8 (INP).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.reference.pairwise_distance import exact_distance

_BLOCK_ELEMENTS = 1 << 22


def share_a_code(query_codes: Tensor, gallery_codes: Tensor) -> Tensor:
    """Whether queries and gallery images have a code in common, bool ``[...]``, of codes ``[..., C]``; -1 is none."""
    return ((query_codes == gallery_codes) & (query_codes != -1)).any(-1)


def ranking_forward(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-query ranking results.

    Args:
        distances: ``[Q, G]``, float32, float64, float16 or bfloat16, smaller is nearer.
        query_identity: ``[Q]`` int64.
        gallery_identity: ``[G]`` int64.
        query_codes: ``[Q, C]`` int64 or None; -1 is unknown.
        gallery_codes: ``[G, C]`` int64, None if and only if ``query_codes`` is.
        junk_identity: gallery images of this identity are left out; None leaves none out.

    Returns:
        ``(average_precision [Q] float64, inverse_negative_penalty [Q] float64, first_match_rank [Q] int64,
        num_matches [Q] int64)``. A query without a match has 0 everywhere; a row of ``distances`` with NaN or Inf has
        ``num_matches`` -1 and 0 elsewhere.
    """
    Q, G = distances.shape
    average_precision = distances.new_zeros(Q, dtype=torch.float64)
    inverse_negative_penalty = distances.new_zeros(Q, dtype=torch.float64)
    first_match_rank = distances.new_zeros(Q, dtype=torch.int64)
    num_matches = distances.new_zeros(Q, dtype=torch.int64)
    junk = torch.zeros_like(gallery_identity, dtype=torch.bool)
    if junk_identity is not None:
        junk = gallery_identity == junk_identity
    step = max(1, _BLOCK_ELEMENTS // max(1, G))
    for begin in range(0, Q if G else 0, step):
        rows = slice(begin, min(Q, begin + step))
        same = query_identity[rows, None] == gallery_identity[None]
        left_out = junk.expand_as(same)
        if query_codes is not None and gallery_codes is not None:
            left_out = left_out | (same & share_a_code(query_codes[rows, None], gallery_codes))
        order = torch.sort(distances[rows], dim=1, stable=True).indices
        hit = (same & ~left_out).gather(1, order)
        rank = (~left_out).gather(1, order).cumsum(1)
        count = hit.sum(1)
        precision = torch.where(hit, hit.cumsum(1).double() / rank.clamp(min=1), 0.0)
        finite = torch.isfinite(distances[rows]).all(1)
        found = finite & (count > 0)
        average_precision[rows] = torch.where(found, precision.sum(1) / count.clamp(min=1), 0.0)
        last = torch.where(hit, rank, 0).amax(1).clamp(min=1)
        inverse_negative_penalty[rows] = torch.where(found, count.double() / last, 0.0)
        first_match_rank[rows] = torch.where(found, torch.where(hit, rank, G + 1).amin(1), 0)
        num_matches[rows] = torch.where(finite, count, -1)
    return average_precision, inverse_negative_penalty, first_match_rank, num_matches


def ranking_features(
    query: Tensor,
    gallery: Tensor,
    scale: float,
    metric: str,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`ranking_forward` of the float64 distances of features.

    Args:
        query: ``[Q, D]``, floating point.
        gallery: ``[G, D]``.
        scale: a power of two that the features are multiplied by, so that squares stay within float64's range.
        metric: "sqeuclidean", "euclidean" or "cosine"; the first two give the same order.
        query_identity: ``[Q]`` int64; this and what follows as in :func:`ranking_forward`.
        gallery_identity: ``[G]``.
        query_codes: ``[Q, C]`` or None.
        gallery_codes: ``[G, C]`` or None.
        junk_identity: an identity or None.
    """
    metric = "sqeuclidean" if metric == "euclidean" else metric  # a root can make two distances equal
    wide_query, wide_gallery = query.to(torch.float64) * scale, gallery.to(torch.float64) * scale
    distances = exact_distance(wide_query, wide_gallery, metric)
    return ranking_forward(distances, query_identity, gallery_identity, query_codes, gallery_codes, junk_identity)
