"""k-reciprocal re-ranking from features; the definition is in :mod:`vareid_ext.reference.k_reciprocal`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops._checks import check_count, check_number
from vareid_ext.ops._filter import block_side, common_scale, contiguous_rows, has_contiguous_rows
from vareid_ext.ops._progress import counted
from vareid_ext.ops.nearest_neighbors import joint_neighbors, nearest_neighbors
from vareid_ext.ops.pairwise_distance import RowDistances
from vareid_ext.retrieval.plan import RerankPlan, rerank_plan
from vareid_ext.retrieval.rerank.base import Reranker, progress_bar

K1, K2, LAMBDA_VALUE = 20, 6, 0.3
"""The parameters that the paper uses and everything here takes unless it is told otherwise."""


def check_parameters(k1: int, k2: int, lambda_value: float) -> tuple[int, int, float]:
    """The parameters of a re-ranking as Python's numbers; TypeError or ValueError unless they can be that."""
    k1, k2 = check_count("k1", k1, 1), check_count("k2", k2, 1)
    check_number("lambda_value", lambda_value)
    if not 0 <= lambda_value <= 1:  # NaN fails too
        raise ValueError(f"lambda_value: {lambda_value} was given; allowed are 0 to 1")
    return k1, k2, float(lambda_value)


def encode(
    neighbor: Tensor,
    row_max: Tensor,
    distance_of: Callable[[Tensor, Tensor], Tensor],
    k1: int,
    k2: int,
    limit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The encodings of all rows after query expansion.

    Args:
        neighbor: int32 [M, max(k1 + 1, k2) or M], the nearest rows of each row.
        row_max: float32 [M], each row's largest distance.
        distance_of: gives the distances of a CSR pattern's pairs, from its indptr and index.
        k1: as in :func:`k_reciprocal_rerank`.
        k2: as in :func:`k_reciprocal_rerank`.
        limit: more entries are a ValueError; None for no limit.

    Returns:
        CSR rows: indptr [M+1], index, value.
    """
    indptr, index = stages.k_reciprocal_robust_sets(neighbor, k1, limit)
    value = stages.k_reciprocal_encode(indptr, distance_of(indptr, index), row_max)
    return stages.k_reciprocal_query_expansion(neighbor, k2, indptr, index, value, limit)


class KReciprocal(Reranker):
    """k-reciprocal re-ranking of a gallery for some queries, prepared once.

    The neighbour lists, the encodings and their inverted index are made when it is first asked, or by ``prepare``.
    ``matrix`` and ``topk`` are cheapest as the first question: they then share the products of the neighbour lists.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; Q at least 1, D at most 16,384.
        gallery: features [G, D] of query's dtype and device; G at least 1.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.
        block_rows: as in :func:`k_reciprocal_rerank`.
        max_memory: as in :func:`k_reciprocal_rerank`.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes, devices or parameters do not fit; a row with NaN or Inf;
            ``max_memory`` does not suffice.
    """

    def __init__(
        self,
        query: Any,
        gallery: Any,
        *,
        k1: int = K1,
        k2: int = K2,
        lambda_value: float = LAMBDA_VALUE,
        block_rows: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.k1, self.k2, self.lambda_value = check_parameters(k1, k2, lambda_value)
        if block_rows is not None:
            block_rows = check_count("block_rows", block_rows, 1)
        if max_memory is not None:
            max_memory = check_count("max_memory", max_memory, 0, 2**63 - 1)
        super().__init__(query, gallery)
        features = self.query, self.gallery
        if block_rows is None and max_memory is None and self.query.is_cuda:
            block_rows = block_side(self.query.device)
        self._block_rows, self._max_memory = block_rows, max_memory
        self._copies = sum(part.numel() * part.element_size() for part in features if not has_contiguous_rows(part))
        self.plan()
        self.query, self.gallery = map(contiguous_rows, features)
        self._scale = common_scale((self.query, self.gallery), self.largest)
        self._original = RowDistances(self.query, self.gallery, self._scale)
        self._encodings: tuple[Tensor, ...] | None = None

    def plan(self, topk: int | None = None) -> RerankPlan:
        """The memory that :meth:`matrix` or :meth:`topk` will need; ValueError if ``max_memory`` does not suffice."""
        return rerank_plan(
            *self.shape, self.query.shape[1], k1=self.k1, k2=self.k2, topk=topk, block_rows=self._block_rows,
            max_memory=self._max_memory, copies=self._copies, on_gpu=self.query.is_cuda,
        )  # fmt: skip

    def prepare(self) -> None:
        """Makes the neighbour lists, the encodings and their inverted index, unless they are there."""
        if self._encodings is None:
            self._encode()

    def distances(self, begin: int, end: int) -> Tensor:
        """As :meth:`Reranker.distances`."""
        self.prepare()
        block = self._original(begin, end)
        self._blend(block, begin)
        return block

    def topk(self, k: int) -> tuple[Any, Any]:
        """As :meth:`Reranker.topk`; the order is that of the distances before they are rounded to float32."""
        k = check_count("k", k, 1, self.shape[1])
        nearest = self._encode(nearest=k) if self._encodings is None else self._nearest(k)
        assert self._encodings is not None
        best = stages.k_reciprocal_topk(
            self.query, self.gallery, self._scale, *nearest, *self._encodings, self.lambda_value
        )
        return self._back(best[0]), self._back(best[1])

    def matrix(self, out: Any = None) -> Any:
        """As :meth:`Reranker.matrix`."""
        if self._encodings is not None:
            return super().matrix(out)
        result = self._result(out)
        self._encode(original=result)
        self._blend(result, 0)
        return self._back(result) if out is None else out

    def _encode(self, original: Tensor | None = None, nearest: int = 0) -> tuple[Tensor, Tensor]:
        """Prepares everything; on the way ``original`` [Q, G] receives the squared distances.

        Returns:
            Each query's ``nearest`` gallery rows: index int32 [Q, nearest], squared distance float32 [Q, nearest].
        """
        (Q, G), plan = self.shape, self.plan(nearest or None)
        neighbor, near, row_max, *best = joint_neighbors(
            self.query, self.gallery, self._scale, min(Q + G, max(self.k1 + 1, self.k2)), nearest, original,
            plan.block_rows,
        )  # fmt: skip
        encodings = encode(
            neighbor,
            row_max,
            lambda *pattern: stages.listed_distance(self.query, self.gallery, self._scale, neighbor, near, *pattern),
            self.k1,
            self.k2,
            None if self._max_memory is None else plan.entry_limit(self._max_memory),
        )
        self._encodings = row_max, *encodings, *stages.k_reciprocal_invert(*encodings, Q, Q + G)
        return best[0], best[1]

    def _nearest(self, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`_encode` returns them."""
        (Q, G), device = self.shape, self.query.device
        _, index = nearest_neighbors(self.query, self.gallery, k, "sqeuclidean")
        indptr = torch.arange(Q + G + 1, device=device).clamp_(max=Q) * k  # the gallery's rows have no entries
        unknown = torch.full((Q + G, 1), -1, dtype=torch.int32, device=device)
        distance = stages.listed_distance(
            self.query, self.gallery, self._scale, unknown, unknown.float(), indptr, (index + Q).flatten().int()
        )
        return index.int(), distance.view(Q, k)

    def _blend(self, original: Tensor, begin: int) -> None:
        """Turns the squared distances of queries from ``begin`` on into final ones."""
        assert self._encodings is not None
        row_max, indptr, *rest = self._encodings
        stages.k_reciprocal_blend(original, row_max[begin:], indptr[begin:], *rest, self.lambda_value)


def k_reciprocal_rerank(
    query: Any,
    gallery: Any,
    *,
    k1: int = K1,
    k2: int = K2,
    lambda_value: float = LAMBDA_VALUE,
    topk: int | None = None,
    out: Any = None,
    block_rows: int | None = None,
    max_memory: int | None = None,
    show_plan: bool = False,
    progress: bool = False,
    group: ProcessGroup | None = None,
) -> Any:
    """Re-rank with k-reciprocal encoding (Zhong et al., CVPR 2017), from features.

    The neighbour sets are those of the definition on float64 distances, ties and duplicates included; the values are
    right to 1e-5. Products run in full float32 whatever TF32, matmul precision or autocast say. Query and gallery are
    never concatenated, and nothing of size (Q+G) x (Q+G) is held.

    Over processes, with topk: each gives its rows of query and gallery, Q and G being those of all together, and gets
    the results of its queries, with indices into the whole gallery, in order of the processes: those of one process
    with as many threads and the same ``block_rows``, on CPUs bit for bit. Shares may be of any size, and empty; blocks
    of rows are shared out evenly. Neighbour lists and sparse encodings of all rows are held by all processes.
    :func:`rerank_plan` states what each holds and sends.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; Q at least 1, D at most 16,384.
        gallery: features [G, D] of query's dtype and device; G at least 1.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.
        topk: return only each query's topk best gallery rows (1 to G), where Q x G does not fit. Their order is that of
            the distances before they are rounded to float32, ties by the lower index.
        out: float32 [Q, G] that receives the result, a writable memory map for example; not with topk.
        block_rows: rows and columns of a block of products; None chooses. The sets do not depend on it, and values
            only in their last bits.
        max_memory: bytes that may be used beyond input and result, by :func:`rerank_plan`; None for no limit. How large
            the sparse encodings get depends on the features: if they are found to be larger than what is left for
            them, that is an error too, and ``out`` then holds unfinished values. What the system's allocator keeps of
            freed memory comes on top: with glibc's up to about 10 MiB, or none with ``MALLOC_TRIM_THRESHOLD_=65536``
            in the environment.
        show_plan: print the plan on standard error; over processes the first one does. Without a group, also after the
            work how rows were filtered, how many had candidates measured early, for want of places, and how many had
            to be done again.
        progress: show a progress bar on standard error; likewise, of what the first one does.
        group: the processes that hold the rows, all of which call this; None for this one alone. Features on CPUs need
            gloo, on GPUs NCCL.

    Returns:
        float32 [Q, G], the final distances, in [0, 1]; with topk: distance float32 [Q, topk], ascending, and index
        int64 [Q, topk]. NumPy, PyTorch or CuPy as query was; ``out`` itself if it was given.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes, devices or parameters do not fit; a row with NaN or Inf;
            ``max_memory`` does not suffice; a group without topk; processes that disagree. All processes raise the
            same.
        LostProcessError: a RuntimeError; a process of the group ended, or did not answer within its time limit.
    """
    if group is not None:
        from vareid_ext.retrieval.rerank.over_processes import rerank_shares  # which imports this module

        return rerank_shares(
            query, gallery, k1, k2, lambda_value, topk, out, block_rows, max_memory, show_plan, progress, group
        )
    if topk is not None and out is not None:
        raise ValueError("out: was given together with topk, whose result it cannot hold")
    fit = KReciprocal(
        query, gallery, k1=k1, k2=k2, lambda_value=lambda_value, block_rows=block_rows, max_memory=max_memory
    )
    if topk is not None:
        topk = check_count("topk", topk, 1, fit.shape[1])
    plan = fit.plan(topk)
    if show_plan:
        print(plan, file=sys.stderr)
    with progress_bar(progress, fit), counted() as counts:
        result = fit.matrix(out) if topk is None else fit.topk(topk)
    if show_plan and counts:
        print("neighbours: " + ", ".join(f"{number} {what}" for what, number in counts.items()), file=sys.stderr)
    return result
