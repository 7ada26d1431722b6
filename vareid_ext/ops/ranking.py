"""Ranking metrics of each query as an operator; the definition is in :mod:`vareid_ext.reference.ranking`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops import _progress
from vareid_ext.ops._features import largest_magnitude
from vareid_ext.ops._filter import Filter, block_side, common_scale, row_blocks, strip_side
from vareid_ext.ops._matmul import full_float32
from vareid_ext.ops._operator import define
from vareid_ext.reference import ranking as reference


def _empty_results(distances: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Q = distances.shape[0]
    return (
        distances.new_empty(Q, dtype=torch.float64),
        distances.new_empty(Q, dtype=torch.float64),
        distances.new_empty(Q, dtype=torch.int64),
        distances.new_empty(Q, dtype=torch.int64),
    )


def _search(values: Tensor, wanted: Tensor, side: Literal["left", "right"]) -> Tensor:
    """torch.searchsorted; on a CPU by one thread, as PyTorch's would meet for a few microseconds of work."""
    if values.is_cuda:
        return torch.searchsorted(values, wanted, side=side)
    return torch.from_numpy(np.searchsorted(values.numpy(), wanted.numpy(), side))


class GroupedLabels:
    """The labels as the kernels take them: the gallery grouped by identity, so that matches are found at once."""

    def __init__(
        self,
        query_identity: Tensor,
        gallery_identity: Tensor,
        query_codes: Tensor | None,
        gallery_codes: Tensor | None,
        junk_identity: int | None,
    ) -> None:
        query_identity = query_identity.contiguous()
        identity, self.order = torch.sort(gallery_identity, stable=True)
        self.begin, self.end = _search(identity, query_identity, "left"), _search(identity, query_identity, "right")
        self.junk = None
        if junk_identity is not None:
            junk = gallery_identity == junk_identity
            self.junk = junk if bool(junk.any()) else None
            self.end = torch.where(query_identity == junk_identity, self.begin, self.end)
        self.query_codes = None if query_codes is None else query_codes.contiguous()
        self.gallery_codes = None if gallery_codes is None else gallery_codes.contiguous()

    def arrays(self, rows: slice) -> tuple[Tensor | None, ...]:
        """Of some queries, for the compiled module."""
        codes = None if self.query_codes is None else self.query_codes[rows]
        return self.order, self.begin[rows], self.end[rows], self.junk, codes, self.gallery_codes

    def most_matches(self) -> int:
        """The largest number of images that one query shares its identity with."""
        return int((self.end - self.begin).max()) if len(self.begin) else 0


def _native_forward(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if distances.shape[1] > 1 and distances.stride(1) != 1:
        distances = distances.contiguous()
    labels = GroupedLabels(query_identity, gallery_identity, query_codes, gallery_codes, junk_identity)
    results = _empty_results(distances)
    _rank_rows(distances, labels, slice(None), results, 0 if distances.is_cuda else labels.most_matches())
    return results


def _rank_rows(
    distances: Tensor, labels: GroupedLabels, rows: slice, results: tuple[Tensor, ...], most_matches: int
) -> None:
    """Writes the results of some queries, whose distances have contiguous rows."""
    workspace = None
    if not distances.is_cuda:
        needed = _native.module().ranking_workspace_bytes(most_matches, torch.get_num_threads())
        workspace = torch.empty(needed, dtype=torch.uint8)
    _native.launch(
        "ranking_forward", distances, labels.arrays(rows), [result[rows] for result in results], workspace,
        most_matches, on=distances,
    )  # fmt: skip


ranking_forward = define(
    "ranking_forward(Tensor distances, Tensor query_identity, Tensor gallery_identity, Tensor? query_codes, "
    "Tensor? gallery_codes, SymInt? junk_identity) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda distances, *_arguments: _empty_results(distances),
    reference=reference.ranking_forward,
    native=_native_forward,
)
"""Per-query results; arguments and results are those of :func:`vareid_ext.reference.ranking.ranking_forward`."""


def _reference_features(
    query: Tensor,
    gallery: Tensor,
    metric: str,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    junk_identity: int | None,
    block_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    largest = largest_magnitude({"query": query, "gallery": gallery}, nonzero=metric == "cosine")
    scale = 1.0 if metric == "cosine" else common_scale((query, gallery), largest)
    results = _empty_results(query)
    for begin in range(0, query.shape[0], block_rows):
        rows = slice(begin, begin + block_rows)
        block = reference.ranking_features(
            query[rows], gallery, scale, metric, query_identity[rows], gallery_identity,
            None if query_codes is None else query_codes[rows], gallery_codes, junk_identity,
        )  # fmt: skip
        for result, part in zip(results, block, strict=True):
            result[rows] = part
        _progress.advance(block[0].shape[0] * gallery.shape[0])
    return results


def _products(filtered: Filter, block_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries and their products with the whole gallery, [rows, G]; each is valid until the next."""
    side = block_side(filtered.norm.device)
    of_queries = row_blocks(filtered, [0], min(block_rows, side))
    of_gallery = row_blocks(filtered, [1], strip_side(filtered.norm.device, side))
    height, G = max((last - first for _, first, last, _ in of_queries), default=0), filtered.parts[1].shape[0]
    buffer = filtered.norm.new_empty((height, G))
    for _, first, last, _ in of_queries:
        products = buffer[: last - first]
        with full_float32(buffer.device.type):
            rows = filtered.block(0, first, last, 0)
            for _, begin, end, _ in of_gallery:
                torch.mm(rows, filtered.block(1, begin, end, 1).T, out=products[:, begin:end])
        yield slice(first, last), products
        _progress.advance((last - first) * G)


def _native_features(query: Tensor, gallery: Tensor, metric: str, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel that ranks by products and measures what they leave open."""
    *of_labels, block_rows = given
    filtered = Filter([query, gallery], ["query", "gallery"], metric)
    labels, results, workspace, most_matches = GroupedLabels(*of_labels), _empty_results(query), None, 0
    if not query.is_cuda:
        most_matches = labels.most_matches()
        needed = _native.module().ranking_features_workspace_bytes(
            most_matches, gallery.shape[0], torch.get_num_threads()
        )
        workspace = torch.empty(needed, dtype=torch.uint8)

    def features(which: int, at: slice) -> tuple[Tensor | None, ...]:
        factor = filtered.factors[which]
        return (
            filtered.parts[which][at], None if factor is None else factor[at], filtered.norms[which][at],
            filtered.windows[which][at],
        )  # fmt: skip

    for rows, products in _products(filtered, block_rows):
        _native.launch(
            "ranking_features", products, features(0, rows), features(1, slice(None)), labels.arrays(rows),
            [result[rows] for result in results], workspace, most_matches, on=products,
        )  # fmt: skip
    return results


ranking_features = define(
    "ranking_features(Tensor query, Tensor gallery, str metric, Tensor query_identity, Tensor gallery_identity, "
    "Tensor? query_codes, Tensor? gallery_codes, SymInt? junk_identity, SymInt block_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda query, *_arguments: _empty_results(query),
    reference=_reference_features,
    native=_native_features,
)
"""Per-query results from features, in the order of their float64 distances, ties by gallery index.

Args:
    query: [Q, D].
    gallery: [G, D], G at least 1.
    metric: "sqeuclidean", "euclidean" (the same order) or "cosine".
    query_identity: as the following, that of :func:`ranking_forward`.
    gallery_identity: [G].
    query_codes: [Q, C] or None.
    gallery_codes: [G, C] or None.
    junk_identity: gallery images of this identity are left out; None leaves none out.
    block_rows: queries handled at once, as far as 1,024 by the native kernel.

Raises:
    ValueError: a row with NaN or Inf, or a zero row under cosine.
"""
