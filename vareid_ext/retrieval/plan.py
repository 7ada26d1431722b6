"""The memory that k-reciprocal re-ranking needs, known before it begins."""

from __future__ import annotations

import dataclasses
import math

import torch

from vareid_ext.ops import nearest_neighbors as _nearest
from vareid_ext.ops._checks import check_count
from vareid_ext.ops._filter import strip_side
from vareid_ext.reference.pairwise_distance import rows_per_block


@dataclasses.dataclass(frozen=True)
class RerankPlan:
    """How a re-ranking will use memory beyond its input and result, in bytes. Made by :func:`rerank_plan`."""

    block_rows: int
    """Rows and columns of a block of products."""
    copies: int
    """Copies of features whose rows are not contiguous."""
    candidates: int
    """Candidates of every row, while the products go by, and the rows' norms and bounds."""
    block: int
    """A block of products (on a GPU some that lie side by side), the product's own buffers, two blocks of features for
    where they must be converted or centred, two where they are rounded, and the list of the blocks."""
    lists: int
    """The neighbour lists and their distances."""
    rescan: int
    """What the rows that have more near ties than candidates take beyond a block when they are done again."""
    entries: int
    """Entries of the sparse encodings, estimated: how many they have depends on the features."""
    sparse: int
    """The sparse encodings with so many entries."""
    sent: int = 0
    """What a process sends to others, at most, if all hold equal shares of query and of gallery and the encodings have
    so many entries."""

    def entry_limit(self, max_memory: int) -> int:
        """Entries of the encodings for which ``max_memory`` bytes suffice."""
        return self.entries + (max_memory - self.copies - self.lists - self.sparse) // _ENTRY

    @property
    def peak(self) -> int:
        """The largest of the phases: products, rows done again, encodings."""
        return self.copies + self.lists + max(max(self.candidates, self.rescan) + self.block, self.sparse)

    def __str__(self) -> str:
        parts = ("copies", "candidates", "block", "lists", "rescan", "sparse", "peak")
        sizes = ", ".join(f"{name} {getattr(self, name) / 2**20:.1f} MiB" for name in parts)
        sent = f"; sends at most {self.sent / 2**20:.1f} MiB" if self.sent else ""
        return f"re-ranking in blocks of {self.block_rows} rows: {sizes}{sent}"


_PRODUCT_BUFFERS = 4 << 20  # what the vendor's product packs its operands into
_THREAD_PRODUCTS = 1 << 18  # products that a thread looks at at once, in each of two scans
_PACKED = 64  # elements that a packed row is a multiple of, at most
_ENTRY = 16  # bytes of an entry of the expanded encodings and of their inverted index
_MERGED = 16 << 20  # lists that are being merged
_PLACE = 256  # bytes of a block's place in the list of blocks
_SIDES = (1024, 768, 512, 256, 128, 64)


def block_sides(M: int) -> list[int]:
    """Rows of a block of products of M rows that are tried, the first unless memory is short."""
    return [side for side in _SIDES if side <= max(_SIDES[-1], M)]


def _block_bytes(side: int, M: int, D: int, on_gpu: bool = False) -> int:
    rows = min(max(_nearest.MIN_ROWS, side), M)
    if on_gpu:  # features of float32 and of bfloat16
        columns = min(strip_side(torch.device("cuda"), rows), M)
        return 4 * rows * columns + 6 * (rows + columns) * D + _PRODUCT_BUFFERS + _PLACE * -(-M // side)
    packed = 2 * rows * -(-D // _PACKED) * _PACKED + 4 * rows * D  # two blocks of 8 bits, one of float32
    packed += 2 * torch.get_num_threads() * _THREAD_PRODUCTS
    return 4 * rows * (rows + 2 * D) + packed + _PRODUCT_BUFFERS + _PLACE * -(-M // side)


def rerank_plan(
    Q: int, G: int, D: int, *, k1: int = 20, k2: int = 6, topk: int | None = None, block_rows: int | None = None,
    max_memory: int | None = None, copies: int = 0, processes: int = 1, element_size: int = 4,
    on_gpu: bool = False,
) -> RerankPlan:  # fmt: skip
    """The memory that :func:`k_reciprocal_rerank` will need beyond its input and result.

    Over processes it is that of each, whatever the others' shares. Features, and candidates of their neighbours, are
    divided by their number; the lists and the encodings of all rows are held by all.

    Args:
        Q: number of queries.
        G: number of gallery rows.
        D: elements of a feature.
        k1: as in :func:`k_reciprocal_rerank`.
        k2: as in :func:`k_reciprocal_rerank`.
        topk: as in :func:`k_reciprocal_rerank`.
        block_rows: rows of a block of products; None chooses.
        max_memory: bytes that may be used; None for no limit.
        copies: bytes of features whose rows are not contiguous.
        processes: how many the ``group`` has, 1 or more.
        element_size: bytes of an element of a feature, 1 or more; it counts over several processes.
        on_gpu: whether the features lie on a GPU. Blocks and candidates are then those of a GPU; the encodings are
            counted as on the CPU.

    Raises:
        TypeError: ``processes`` or ``element_size`` is no int.
        ValueError: one of the two is out of range; ``max_memory`` does not suffice.
    """
    processes = check_count("processes", processes, 1)
    element_size = check_count("element_size", element_size, 1)
    M, threads = Q + G, torch.get_num_threads()
    k = min(M, max(k1 + 1, k2))
    lists = M * (8 * k + 16)
    native = max(k, topk or 0) <= _nearest.MAX_NEIGHBORS["cuda" if on_gpu else "cpu"]
    candidates = M * (_nearest.candidate_bytes(k, on_gpu) + 48)
    if topk:
        candidates += Q * (_nearest.candidate_bytes(topk, on_gpu) + 24)
    rescan = _nearest.rescan_bytes(M, threads) if not on_gpu else 0
    if not native:  # whole rows in float64, of features in float64
        candidates, rescan = 16 * M * D + 56 * M * min(M, rows_per_block(M)), 0
    entries = M * min(M, math.ceil(2 * (k1 + 1) * math.sqrt(k2)))
    sparse = _ENTRY * entries + M * (40 + 24 * threads)
    for side in [block_rows] if block_rows else block_sides(M):
        block = _block_bytes(side, M, D, on_gpu)
        plan = RerankPlan(side, copies, candidates, block, lists, rescan, entries, sparse)
        if processes > 1:
            plan = _of_each(plan, Q, G, D * element_size, k, topk or 0, processes, native, on_gpu)
        if max_memory is None or plan.peak <= max_memory:
            return plan
    raise ValueError(f"max_memory: {max_memory} bytes were given, but the least needed is {plan.peak}: {plan}")


@dataclasses.dataclass(frozen=True)
class ListsPlan:
    """How neighbour lists will use memory beyond the features, in bytes. Made by :func:`lists_plan`."""

    block_rows: int
    """Rows and columns of a block of products."""
    rows: int
    """Rows whose lists are made at once."""
    copies: int
    """Copies of features whose rows are not contiguous."""
    candidates: int
    """Candidates of the rows that are made at once, and the norms and bounds of all."""
    block: int
    """Two blocks of products, and what a block of them takes in a re-ranking."""
    lists: int
    """The lists of the rows that are made at once; while they are written there are two copies of them."""
    rescan: int
    """What the rows that have more near ties than candidates take beyond a block when they are done again."""

    @property
    def peak(self) -> int:
        """The largest of the phases: products, rows done again, writing."""
        return self.copies + self.block + self.lists + max(self.candidates, self.rescan, 2 * self.lists)

    def __str__(self) -> str:
        parts = ("copies", "candidates", "block", "lists", "rescan", "peak")
        sizes = ", ".join(f"{name} {getattr(self, name) / 2**20:.1f} MiB" for name in parts)
        return f"lists of {self.rows} rows at once, in blocks of {self.block_rows}: {sizes}"


_ROWS_AT_ONCE = (
    1 << 17
)  # more save products (every block of theirs with each other serves both), and are lost if killed


def lists_plan(
    Q: int, G: int, D: int, k: int, rows: int, block_rows: int, *, max_memory: int | None = None, copies: int = 0
) -> ListsPlan:
    """The memory that :class:`vareid_ext.retrieval.joint_lists.JointLists` will need on the CPU beyond the features.

    Args:
        Q: number of queries.
        G: number of gallery rows.
        D: elements of a feature.
        k: how many rows a list names.
        rows: how many rows' lists are wanted.
        block_rows: rows of a block of products.
        max_memory: bytes that may be used; None for no limit.
        copies: bytes of features whose rows are not contiguous.

    Raises:
        ValueError: ``max_memory`` does not suffice.
    """
    M = Q + G
    block = _block_bytes(block_rows, M, D) + 4 * min(block_rows, M) ** 2
    while True:
        candidates = rows * (_nearest.candidate_bytes(k) + 24) + 48 * M
        rescan = _nearest.rescan_bytes(M, torch.get_num_threads())
        if k > _nearest.MAX_NEIGHBORS["cpu"]:  # whole rows in float64, of features in float64
            candidates, rescan = 16 * M * D + 56 * M * min(rows, rows_per_block(M)), 0
        plan = ListsPlan(block_rows, rows, copies, candidates, block, rows * (8 * k + 8), rescan)
        if rows <= _ROWS_AT_ONCE and (max_memory is None or plan.peak <= max_memory):
            return plan
        if rows <= block_rows:
            raise ValueError(f"max_memory: {max_memory} bytes were given, but the least needed is {plan.peak}: {plan}")
        rows = max(block_rows, rows // 2)


def _of_each(
    alone: RerankPlan, Q: int, G: int, row: int, k: int, topk: int, processes: int, native: bool,
    on_gpu: bool,
) -> RerankPlan:  # fmt: skip
    """What each of several processes uses, where one would use that alone; ``row`` is a feature's bytes."""
    M, side = Q + G, alone.block_rows

    def share(rows: int) -> int:
        blocks = -(-rows // side)
        return min(rows, -(-blocks // processes) * -(-rows // blocks))

    q, n = share(Q), share(Q) + share(G)
    own, coming = n * row, (min(processes, 3) - 1) * n * row
    entries = -(-alone.entries * n // M)
    found = n * (60 * k + 16)  # lists of own rows and of visitors, on their way, and being merged
    candidates = coming + found + 2 * n * (_nearest.candidate_bytes(k, on_gpu) + 64) + alone.rescan + _MERGED
    if not native:
        candidates = coming + found + alone.candidates + _MERGED
    measured = coming + 48 * entries + 40 * n
    nearest = (
        coming
        + n * 128
        + q * (_nearest.candidate_bytes(topk, on_gpu) + topk * (8 * processes + 48))
        + 16 * M
        + alone.rescan
    )
    rounds = processes // 2
    sent = (
        own  # to even shares out
        + rounds * n * (row + 12 * k + 8)  # neighbours
        + (processes - 1) * (2 * own + n * (4 * k + 4) + 4 * entries)  # two rounds more; lists; distances
        + q * 12 * topk
    )
    return dataclasses.replace(
        alone, copies=alone.copies + 2 * own, candidates=candidates, lists=M * (8 * k + 16),
        sparse=alone.sparse + max(measured, nearest + _ENTRY * entries), rescan=0, sent=sent,
    )  # fmt: skip
