"""Pairs of queries and gallery images counted by distance: the definition, in plain PyTorch.

A pair is a match if both images show one identity, else a non-match. As in :mod:`vareid_ext.reference.ranking`, gallery
images of ``junk_identity`` are left out, and so are those with the query's identity and one of its codes.

The key of a distance is the integer that orders as the distance does: its bits, all but the sign inverted for negative
ones; -0 has the key of 0. A key's digits are of 16 bits, the first of them signed: one for 16-bit distances, two for
float32, four for float64. Counts by the first digit are exact error rates at 65,536 thresholds (128 for each doubling
of a float32 distance); counts by the next digit, of the keys with one prefix, are those in between.

In every result the matches come first and the non-matches second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vareid_ext.reference.ranking import share_a_code

DIGIT_VALUES = 1 << 16
_BLOCK_ELEMENTS = 1 << 22
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keys_of(distances: Tensor) -> Tensor:
    """The keys of float32, float64, float16 or bfloat16 distances, int64 of the same shape."""
    integer = _INTEGERS[distances.element_size()]
    bits = distances.contiguous().view(integer)
    keys = bits ^ ((bits >> (8 * distances.element_size() - 1)) & torch.iinfo(integer).max)
    return torch.where(keys == -1, 0, keys).to(torch.int64)


def distances_of(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The distances of a dtype that have these keys, float64."""
    integer = _INTEGERS[dtype.itemsize]
    bits = keys.to(integer)
    bits = bits ^ ((bits >> (8 * dtype.itemsize - 1)) & torch.iinfo(integer).max)
    return bits.view(dtype).to(torch.float64)


def _pairs(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of queries, and whether each of their pairs is a match or a non-match: bool [2, rows, G]."""
    Q, G = distances.shape
    junk = torch.zeros_like(gallery_identity, dtype=torch.bool)
    if junk_identity is not None:
        junk = gallery_identity == junk_identity
    step = max(1, _BLOCK_ELEMENTS // max(1, G))
    for begin in range(0, Q, step):
        rows = slice(begin, min(Q, begin + step))
        match = query_identity[rows, None] == gallery_identity[None]
        non_match = ~match & ~junk
        match = match & ~junk
        if query_codes is not None and gallery_codes is not None:
            match = match & ~share_a_code(query_codes[rows, None], gallery_codes)
        yield rows, torch.stack([match, non_match])


def verification_histogram(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs by the first digit of their keys, and each query's nearest match and non-match.

    Args:
        distances: ``[Q, G]``, float32, float64, float16 or bfloat16, smaller is nearer.
        query_identity: ``[Q]`` int64.
        gallery_identity: ``[G]`` int64.
        query_codes: ``[Q, C]`` int64 or None; -1 is unknown.
        gallery_codes: ``[G, C]`` int64, None if and only if ``query_codes`` is.
        junk_identity: gallery images of this identity are left out; None leaves none out.

    Returns:
        ``(counts [2, 65536] int64, nearest_distance [2, Q] float64, nearest_index [2, Q] int64)``. ``counts[:, d]`` are
        the pairs whose first digit is ``d - 2**15``. Ties by the lower gallery index; a query without a pair has
        infinity and -1; a row of ``distances`` with NaN or Inf has NaN and -1, and ``counts`` then mean nothing.
    """
    Q, G = distances.shape
    counts = distances.new_zeros((2, DIGIT_VALUES), dtype=torch.int64)
    nearest_distance = distances.new_full((2, Q), torch.inf, dtype=torch.float64)
    nearest_index = distances.new_full((2, Q), -1, dtype=torch.int64)
    labels = (query_identity, gallery_identity, query_codes, gallery_codes, junk_identity)
    for rows, pairs in _pairs(distances, *labels) if G else ():
        digit = (keys_of(distances[rows]) >> (8 * distances.element_size() - 16)) + DIGIT_VALUES // 2
        exact = distances[rows].to(torch.float64) + 0.0  # -0 becomes 0
        not_finite = ~torch.isfinite(exact).all(1)
        for kind in range(2):
            counts[kind] += torch.bincount(digit[pairs[kind]], minlength=DIGIT_VALUES)
            candidates = torch.where(pairs[kind], exact, torch.inf)
            distance = candidates.amin(1)
            first = (pairs[kind] & (candidates == distance[:, None])).to(torch.uint8).argmax(1)
            none = not_finite | ~pairs[kind].any(1)
            nearest_distance[kind, rows] = torch.where(not_finite, torch.nan, distance)
            nearest_index[kind, rows] = torch.where(none, -1, first)
    return counts, nearest_distance, nearest_index


def verification_refine(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
    prefixes: Sequence[int],
    digits: int,
) -> Tensor:
    """Pairs whose keys begin with given digits, by the next digit.

    Args:
        distances: ``[Q, G]``, float32 or float64; this and the labels as in :func:`verification_histogram`.
        query_identity: ``[Q]``.
        gallery_identity: ``[G]``.
        query_codes: ``[Q, C]`` or None.
        gallery_codes: ``[G, C]`` or None.
        junk_identity: an identity or None.
        prefixes: the first ``digits`` digits of keys, 1 to 8 different ones.
        digits: 1 for float32, 1 to 3 for float64.

    Returns:
        counts ``[2, P, 65536]`` int64.
    """
    counts = distances.new_zeros((2, len(prefixes), DIGIT_VALUES), dtype=torch.int64)
    below = 8 * distances.element_size() - 16 * digits
    labels = (query_identity, gallery_identity, query_codes, gallery_codes, junk_identity)
    for rows, pairs in _pairs(distances, *labels) if distances.shape[1] else ():
        keys = keys_of(distances[rows])
        for place, prefix in enumerate(prefixes):
            inside, digit = keys >> below == prefix, (keys >> (below - 16)) & (DIGIT_VALUES - 1)
            for kind in range(2):
                counts[kind, place] += torch.bincount(digit[inside & pairs[kind]], minlength=DIGIT_VALUES)
    return counts


def verification_accepted(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
    threshold: float,
) -> Tensor:
    """Each query's pairs whose distance is at most ``threshold``, int64 ``[2, Q]``; labels as above."""
    accepted = distances.new_zeros((2, distances.shape[0]), dtype=torch.int64)
    labels = (query_identity, gallery_identity, query_codes, gallery_codes, junk_identity)
    for rows, pairs in _pairs(distances, *labels):
        accepted[:, rows] = (pairs & (distances[rows].to(torch.float64) <= threshold)).sum(2)
    return accepted
