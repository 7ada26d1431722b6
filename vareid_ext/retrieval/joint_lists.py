"""Neighbour lists of query and gallery together, some rows at a time."""

from __future__ import annotations

import bisect
from typing import Any

from torch import Tensor

from vareid_ext.ops import nearest_neighbors as _op
from vareid_ext.ops._checks import check_choice, check_count
from vareid_ext.ops._features import row_magnitudes
from vareid_ext.ops._filter import common_scale, contiguous_rows, has_contiguous_rows
from vareid_ext.retrieval.plan import block_sides, lists_plan
from vareid_ext.retrieval.rerank.base import check_sides

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
