"""Neighbour lists of query and gallery together, some rows at a time."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from vareid_ext._arrays import to_tensor
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops import nearest_neighbors as _op
from vareid_ext.ops._checks import check_choice, check_count, check_shape
from vareid_ext.ops._features import row_magnitudes
from vareid_ext.ops._filter import common_scale, contiguous_rows, has_contiguous_rows
from vareid_ext.retrieval.plan import block_sides, lists_plan
from vareid_ext.retrieval.rerank.base import check_sides
from vareid_ext.retrieval.rerank.k_reciprocal import check_parameters, encode
from vareid_ext.retrieval.rerank.neighbor_lists import check_lists
from vareid_ext.retrieval.rerank.one_query import list_width

METRICS = ("sqeuclidean", "cosine")
"""The distances of lists that can be re-ranked."""


class JointLists:
    """The lists that k-reciprocal re-ranking needs of the M rows of a query and, behind it, a gallery.

    They are exact. On a CPU, what it gives for some rows is bit for bit what it gives for them with any others, and
    with squared Euclidean distances what :func:`vareid_ext.k_reciprocal_rerank` works with. Lists and distances do not
    depend on the processor, the row maxima in their last bits.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; Q at least 1, D at most 16,384.
        gallery: features [G, D] of query's dtype and device; G at least 1.
        k: rows that a list names, 1 to M; None for 100, or M where that is less.
        metric: "sqeuclidean" or "cosine" (1 - cos).
        shard: which of how many equal parts of the rows is wanted, (1, n) to (n, n); parts are whole blocks.
        block_rows: rows of a block of products; None chooses as re-ranking does. Row maxima depend on it in their last
            bits.
        max_memory: bytes that may be used beyond the features, by :func:`vareid_ext.retrieval.plan.lists_plan`; None
            for no limit.

    Attributes:
        k: rows that a list names.
        shape: (Q, G).
        begin: the first row that is wanted, of the queries and then the gallery.
        end: the one behind the last.
        scale: squared distances are those of the features times this power of two, which is 1 unless they would leave
            the range of float32.
        plan: the memory that will be used.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes, devices or parameters do not fit; a row with NaN or Inf; a zero
            row under cosine; ``max_memory`` does not suffice.
    """

    def __init__(
        self,
        query: Any,
        gallery: Any,
        *,
        k: int | None = None,
        metric: str = "sqeuclidean",
        shard: tuple[int, int] = (1, 1),
        block_rows: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        check_choice("metric", metric, METRICS)
        if block_rows is not None:
            block_rows = check_count("block_rows", block_rows, 1)
        if max_memory is not None:
            max_memory = check_count("max_memory", max_memory, 0, 2**63 - 1)
        *features, largest = check_sides(query, gallery)
        Q, G = self.shape = features[0].shape[0], features[1].shape[0]
        self.k = min(100, Q + G) if k is None else check_count("k", k, 1, Q + G)
        if metric == "cosine":
            for name, part in zip(("query", "gallery"), features, strict=True):
                row_magnitudes(name, part, nonzero=True)
        self._metric = metric
        copies = sum(part.numel() * part.element_size() for part in features if not has_contiguous_rows(part))
        block_rows = block_rows or block_sides(Q + G)[0]
        self._edges = _op.edges(Q, G, block_rows)
        self.begin, self.end = part_of_rows(Q, G, block_rows, *shard)
        self.plan = lists_plan(
            Q, G, features[0].shape[1], self.k, self.end - self.begin, block_rows, max_memory=max_memory, copies=copies
        )
        self._features = [contiguous_rows(part) for part in features]
        self.scale = common_scale(self._features, largest) if metric == "sqeuclidean" else 1.0

    def piece(self, begin: int) -> int:
        """Behind which row to stop, from ``begin`` on, for the memory of the plan to suffice."""
        last = bisect.bisect_right(self._edges, begin + self.plan.rows) - 1
        return min(self.end, max(self._edges[last], self._edges[bisect.bisect_right(self._edges, begin)]))

    def rows(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The lists of rows ``begin`` to ``end - 1``, both edges of blocks, as those of :meth:`piece` are.

        Returns:
            index int32 [end - begin, k], ascending in distance, ties by the lower index; distance float32
            [end - begin, k]; row_max float32 [end - begin], each row's largest distance to any of the M rows.
        """
        found: tuple[Tensor, Tensor, Tensor] = _op.neighbors_of_rows(
            *self._features, self.scale, self.k, self._metric, begin, end, self.plan.block_rows
        )
        return found


def part_of_rows(query: int, gallery: int, block_rows: int, number: int, count: int) -> tuple[int, int]:
    """The first row of part ``number`` (1 to ``count``) of so many rows in blocks, and the one behind its last."""
    edges = _op.edges(query, gallery, block_rows)
    blocks = len(edges) - 1
    return edges[blocks * (number - 1) // count], edges[blocks * number // count]


def rerank_with_lists(
    query: Any, gallery: Any, index: Any, distance: Any, row_max: Any, *, topk: int, k1: int, k2: int,
    lambda_value: float, queries: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`vareid_ext.k_reciprocal_rerank` gives for some queries, where the lists are known: the same bits.

    Args:
        query: as for :class:`JointLists`.
        gallery: likewise.
        index: int32 [M, k], of :meth:`JointLists.rows` for all rows of these features, by squared Euclidean distances;
            k at least max(k1 + 1, k2), or M.
        distance: float32 [M, k], likewise.
        row_max: float32 [M], likewise.
        topk: best gallery rows for each query, 1 to G.
        k1: as in :func:`vareid_ext.k_reciprocal_rerank`.
        k2: as there.
        lambda_value: as there.
        queries: the first query that is asked for and the one behind the last.

    Returns:
        distance float32 and index int64 [queries that are asked for, topk].

    Raises:
        TypeError, ValueError: as :class:`JointLists`; the lists do not fit.
    """
    k1, k2, lambda_value = check_parameters(k1, k2, lambda_value)
    query, gallery, largest = check_sides(query, gallery)
    (Q, G), (begin, end) = (query.shape[0], gallery.shape[0]), queries
    topk = check_count("topk", topk, 1, G)
    K = list_width(Q + G, k1, k2)
    lists = [to_tensor(value[:, :K], name).contiguous() for name, value in (("index", index), ("distance", distance))]
    row_max = to_tensor(row_max, "row_max")
    check_lists(*lists)
    if lists[0].shape != (Q + G, K):
        raise ValueError(f"index: shape {list(index.shape)} was given; k1 and k2 need {[Q + G, K]} or more")
    check_shape("row_max", row_max, (Q + G,))
    if bool((lists[0] < 0).any()):
        raise ValueError(f"index: holds -1; k1 and k2 need {K} rows in every list")
    query, gallery = contiguous_rows(query), contiguous_rows(gallery)
    scale = common_scale((query, gallery), largest)
    encodings = encode(
        lists[0], row_max, lambda *pattern: stages.listed_distance(query, gallery, scale, *lists, *pattern), k1, k2
    )
    inverted = stages.k_reciprocal_invert(*encodings, Q, Q + G)
    indptr, *entries = encodings
    asked, count = query[begin:end], end - begin
    _, near = _op.nearest_neighbors(asked, gallery, topk, "sqeuclidean")
    pattern = torch.arange(count + G + 1).clamp_(max=count) * topk  # the gallery's rows have no entries
    unknown = torch.full((count + G, 1), -1, dtype=torch.int32)
    original = stages.listed_distance(
        asked, gallery, scale, unknown, unknown.float(), pattern, (near + count).flatten().int()
    )
    best: tuple[Tensor, Tensor] = stages.k_reciprocal_topk(
        asked, gallery, scale, near.int(), original.view(count, topk), row_max[begin:], indptr[begin:], *entries,
        *inverted, lambda_value,
    )  # fmt: skip
    return best
