"""k-reciprocal re-ranking from neighbour lists that another program has found."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops._checks import check_count, check_same_device, check_shape, check_values, dtype_name
from vareid_ext.ops._features import refuse_row
from vareid_ext.retrieval.rerank.k_reciprocal import K1, K2, LAMBDA_VALUE, check_parameters, encode
from vareid_ext.retrieval.rerank.one_query import list_width

_ROUNDING = 1e-3  # share of the largest distance up to which what cannot be is a rounding error
_CHUNK = 1 << 21  # elements of the largest temporary


def k_reciprocal_from_neighbors(
    index: Any,
    distance: Any,
    num_query: int,
    *,
    topk: int,
    k1: int = K1,
    k2: int = K2,
    lambda_value: float = LAMBDA_VALUE,
    row_max: Any = None,
    queries: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Re-rank with k-reciprocal encoding (Zhong et al., CVPR 2017), from the neighbour lists of any program.

    M rows, the queries and then the gallery, were searched for in all M. Lists may be approximate, in any order and
    of different lengths; ties are ordered by index. A row that does not list itself is taken to, at distance 0. What
    a row does not list counts, where its distance is needed, as being as far as the farthest that it lists; lists and
    means over them end where a row's list ends. It takes O(M k) memory.

    With the k nearest of all rows and the true ``row_max``, the result is that of :func:`k_reciprocal_rerank` if
    ``topk`` is at most the number of gallery rows that every query lists, and the lists reach far enough: each row's
    to all members of R*, each query's to all gallery rows that share something with it (Jaccard distance below 1).
    k = M always does. Near ties are told apart as finely as the distances given are.

    Args:
        index: int32 or int64 [M, k], rows from 0 to M - 1, none twice in a row; at the end of a row, -1 for nothing
            found. k is at least max(k1 + 1, k2), one less where no row lists itself, or M.
        distance: float32 or float64 [M, k], squared Euclidean in any unit, so 1 - cosine too; what stands beside -1 is
            not read. Negative values of up to 1e-3 of the largest are rounding errors and taken as 0.
        num_query: Q, how many of the rows are queries, 1 to M - 1.
        topk: how many gallery rows are asked for, 1 to G.
        k1: size of the k-reciprocal neighbour sets, at least 1.
        k2: neighbours averaged in query expansion, at least 1.
        lambda_value: weight of the original distance, 0 to 1.
        row_max: float32 or float64 [M], each row's largest distance to any of the M rows, in the unit of ``distance``.
            None: twice the largest that the row lists, or the largest itself where it lists all M.
        queries: the first query that is asked for and the one behind the last, 0 to Q; None for all Q. Each one's
            result is the same whoever else is asked for.

    Returns:
        distance float32 [Q, topk], ascending, in [0, 1], and index int64 [Q, topk], counted from the gallery's first
        row, ties by the lower index; rows are the queries that are asked for. The gallery rows that the query lists and
        those that share something with it can occur; if these are fewer than ``topk``, rows end with distance Inf and
        index -1. Where the original distance weighs nothing (``lambda_value`` or the query's ``row_max`` is 0), all
        others are known to be at 1 - ``lambda_value`` and follow. NumPy, PyTorch or CuPy as index was.

    Raises:
        TypeError: not arrays, or of other dtypes.
        ValueError: shapes, devices or parameters do not fit; lists too short for k1 and k2; a row out of range or
            twice in a list; -1 before the end; NaN, Inf or negative distances; similarities in place of distances (no
            row's values rise); ``row_max`` below a listed distance.
    """
    back = returner(index)
    result = rerank_lists(index, distance, num_query, topk, k1, k2, lambda_value, row_max, queries)
    return back(result.distance), back(result.best)


class RerankedLists(NamedTuple):
    """What :func:`k_reciprocal_from_neighbors` gives as tensors, and how far the lists reached.

    Where the lists are exact and ``row_max`` is given, the result is that of re-ranking the features if none of the
    three counts is above 0: what is not listed is farther than it was taken to be, and did not come among the best even
    so.
    """

    distance: Tensor
    best: Tensor
    short: int
    """rows that list fewer than k1 and k2 need"""
    unlisted: int
    """members of a row's set R* that the row does not list, so that their distance was taken to be its farthest"""
    outside: int
    """results that their query does not list, or that are not there"""


def rerank_lists(
    index: Any, distance: Any, num_query: int, topk: int, k1: int, k2: int, lambda_value: float, row_max: Any,
    queries: tuple[int, int] | None,
) -> RerankedLists:  # fmt: skip
    """See :func:`k_reciprocal_from_neighbors`."""
    k1, k2, lambda_value = check_parameters(k1, k2, lambda_value)
    index, distance = to_tensor(index, "index"), to_tensor(distance, "distance")
    check_lists(index, distance)
    M, device = index.shape[0], index.device
    Q = check_count("num_query", num_query, 1, M - 1)
    topk = check_count("topk", topk, 1, M - Q)
    begin, end_query = (0, Q) if queries is None else queries
    end_query = check_count("queries", end_query, 0, Q)
    begin = check_count("queries", begin, 0, end_query)
    K = list_width(M, k1, k2)
    neighbor, near, count = _ordered(index, distance)
    _check_width(index, neighbor, K)
    end = near.where(near.isfinite(), 0).amax(1)
    row_max = _row_max(None if row_max is None else to_tensor(row_max, "row_max"), end, count)
    # Each row in a unit of its own, a power of two: nothing but the range of float32 depends on it.
    unit = (torch.frexp(row_max).mantissa / row_max).nan_to_num(nan=1.0, posinf=1.0)
    near, end, row_max = near.mul_(unit[:, None]).float(), (end * unit).float(), (row_max * unit).float()

    short = int((count < K).sum())
    lists, largest = neighbor[:, :K], row_max
    if short:  # the ends of lists name a row M, which is nobody's neighbour: it has M + 1 alone, that M + 2, that M
        ring = torch.tensor([M + 1, M + 2, M], dtype=torch.int32, device=device)
        lists, largest = torch.cat([lists, ring[:, None].expand(3, K)]), functional.pad(row_max, (0, 3), value=1.0)
    unlisted = 0

    def distance_of(*pattern: Tensor) -> Tensor:
        nonlocal unlisted
        found, unlisted = _listed(neighbor, near, end, *pattern)
        return found

    indptr, entry, value = encode(lists.contiguous(), largest, distance_of, k1, k2)
    indptr = indptr[: M + 1]
    if short:  # the mean of those that are there
        share = min(k2, K) / count.clamp(max=min(k2, K))
        value = value * share.repeat_interleave(indptr.diff())
    encodings = indptr, entry, value
    inverted = stages.k_reciprocal_invert(*encodings, Q, M)

    G, listed = M - Q, max(neighbor.shape[1], topk)
    missing = listed - neighbor.shape[1]
    asked = slice(begin, end_query)
    nearest = functional.pad(neighbor[asked] - Q, (0, missing), value=-1)
    known = (nearest >= 0) & (nearest < G)
    # Rows behind the gallery, which share nothing and are infinitely far, stand where a query lists none of it.
    nearest = nearest.where(known, torch.arange(G, G + listed, dtype=torch.int32, device=device))
    original = functional.pad(near[asked], (0, missing)).where(known, torch.inf)
    # What is not listed is measured from features: these are as far from each query as its list reaches.
    reach, origin = end[asked, None].double().sqrt(), end.new_zeros((G + listed, 1), dtype=torch.float64)
    encodings = indptr[begin:], entry, value
    final, best = stages.k_reciprocal_topk(
        reach, origin, 1.0, nearest, original, row_max[begin:], *encodings, *inverted, lambda_value, topk
    )
    nobody = (best >= G) | final.isinf()
    final.masked_fill_(nobody, torch.inf)
    best.masked_fill_(nobody, -1)
    return RerankedLists(final, best, short, unlisted, _outside(best, nearest))


class FallingError(ValueError):
    """Lists of which no row's distances rise."""


def check_lists(index: Tensor, distance: Tensor) -> None:
    """TypeError or ValueError unless these are lists as :func:`k_reciprocal_from_neighbors` takes them, but for rows
    that occur twice in one.
    """
    for name, value, dtypes in (
        ("index", index, (torch.int32, torch.int64)),
        ("distance", distance, (torch.float32, torch.float64)),
    ):
        check_values(name, value)
        _check_dtype(name, value, dtypes)
    check_shape("index", index, ("M", "k"))
    M, k = index.shape
    if not 2 <= M < 1 << 31 or k == 0:
        raise ValueError(f"index: shape {[M, k]} was given; [M, k], M at least 2 and below 2^31, is needed")
    check_shape("distance", distance, (M, k))
    check_same_device("distance", distance, "index", index)
    found = index >= 0
    _refuse_first("index", (index < -1) | (index >= M), f"names a row that is not one of 0 to {M - 1}, nor -1")
    _refuse_first("index", found[:, 1:] & ~found[:, :-1], "has -1 before its end; what was found stands first")
    _refuse_first("distance", found & ~distance.isfinite(), "holds NaN or Inf")
    rises = distance.diff(dim=1).where(found[:, 1:], 0)
    if bool((rises < 0).any()) and not bool((rises > 0).any()):
        raise FallingError(
            "distance: no row's values rise, so they look like similarities; squared Euclidean distances are needed "
            "(2 - 2 * similarity for features of length 1), or reverse lists that begin with the farthest"
        )
    largest = float(distance.where(found, 0).amax())
    _refuse_first("distance", found & (distance < -_ROUNDING * largest), "holds a negative distance")


def _check_dtype(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in dtypes:
        allowed = ", ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name}: dtype {dtype_name(value.dtype)} was given; allowed are {allowed}")


def _refuse_first(name: str, bad: Tensor, what: str) -> None:
    """ValueError naming the first row in which something is bad."""
    rows = bad.any(1)
    if bool(rows.any()):
        refuse_row(name, int(rows.nonzero()[0]), what)


def _ordered(index: Tensor, distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lists in order, ties by index, each row among its own.

    Returns:
        neighbor int32 [M, k + 1] and distance float64 [M, k + 1], with M and Inf behind the end; how many there are,
        int64 [M].
    """
    M, k = index.shape
    neighbor = index.new_empty((M, k + 1), dtype=torch.int32)
    near = distance.new_empty((M, k + 1), dtype=torch.float64)
    for begin in range(0, M, max(1, _CHUNK // (k + 1))):
        at = slice(begin, begin + max(1, _CHUNK // (k + 1)))
        row = torch.arange(M, device=index.device)[at, None]
        found, own = index[at] >= 0, index[at] == row
        members = torch.cat([index[at].where(found, M), row.where(~own.any(1, keepdim=True), M)], 1)
        values = distance[at].double().clamp(min=0).where(found, torch.inf).masked_fill(own, 0)
        values = torch.cat([values, values.new_zeros(len(row), 1)], 1).where(members < M, torch.inf)
        members, order = members.sort(1)
        twice = (members.diff(dim=1) == 0) & (members[:, 1:] < M)
        if bool(twice.any()):
            refuse_row("index", begin + int(twice.any(1).nonzero()[0]), "lists a row twice")
        near[at], order = values.gather(1, order).sort(dim=1, stable=True)
        neighbor[at] = members.gather(1, order)
    return neighbor, near, (neighbor < M).sum(1)


def _check_width(index: Tensor, neighbor: Tensor, K: int) -> None:
    """ValueError if lists end before the K rows that count, but not for lack of rows that were found."""
    M, k = index.shape
    if k >= K or (k == K - 1 and bool((neighbor[:, K - 1] < M).where(index[:, -1] >= 0, True).all())):
        return
    raise ValueError(f"index: lists of {k} rows were given; k1 and k2 need {K}, or {K - 1} where no row lists itself")


def _row_max(row_max: Tensor | None, end: Tensor, count: Tensor) -> Tensor:
    """float64 [M]; ``end`` is the largest distance that each row lists."""
    M = end.shape[0]
    if row_max is None:
        return end.where(count == M, (2 * end).where(end > 0, 1))
    check_values("row_max", row_max)
    _check_dtype("row_max", row_max, (torch.float32, torch.float64))
    check_shape("row_max", row_max, (M,))
    check_same_device("row_max", row_max, "index", end)
    _refuse_first("row_max", ~row_max.isfinite()[:, None], "is NaN or Inf")
    low = row_max < (1 - _ROUNDING) * end
    if bool(low.any()):
        row = int(low.nonzero()[0])
        refuse_row("row_max", row, f"has {float(row_max[row]):g}, but lists a distance of {float(end[row]):g}")
    return row_max.double()


def _outside(best: Tensor, nearest: Tensor) -> int:
    """How many of each query's results are not among its ``nearest``, or are -1."""
    outside = 0
    for some in torch.arange(len(best), device=best.device).split(max(1, _CHUNK // nearest.shape[1])):
        listed = nearest[some].sort(1).values.long()
        at = torch.searchsorted(listed, best[some]).clamp_(max=listed.shape[1] - 1)
        outside += int((listed.gather(1, at) != best[some]).sum())
    return outside


def _listed(neighbor: Tensor, near: Tensor, end: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, int]:
    """Distances of the pairs of a CSR pattern, float32, the row's ``end`` for those that it does not list; and how many
    these are.
    """
    rows = torch.arange(indptr.shape[0] - 1, device=index.device).repeat_interleave(indptr.diff())
    out, unlisted = end[rows], len(rows)
    for some in torch.arange(len(rows), device=index.device).split(max(1, _CHUNK // neighbor.shape[1])):
        pair, place = (neighbor[rows[some]] == index[some, None]).nonzero(as_tuple=True)
        out[some[pair]] = near[rows[some[pair]], place]
        unlisted -= len(pair)
    return out, unlisted
