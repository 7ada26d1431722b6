"""Ranking metrics: CMC, mAP and mINP, from distances (whole, by blocks, or computed on demand)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext import _arrays
from vareid_ext._text import table
from vareid_ext.metrics.exclusion import Columns, RankingLabels, check_labels, label_vector
from vareid_ext.ops._checks import check_count, check_values
from vareid_ext.ops.ranking import ranking_forward
from vareid_ext.retrieval.distance import rows_in_block

METRIC_NAMES = ("mAP", "mINP", "rank1", "rank5", "rank10")
"""What :meth:`RankingMetrics.as_dict` holds, in order."""

_MAX_RANKS = 1 << 20
_DISTANCE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RankingMetrics:
    """Results over a set of queries, all as fractions in [0, 1]. ``print`` shows them as a table, in percent.

    Attributes:
        cmc: ``[max_rank]`` float64; ``cmc[r - 1]`` is the share of the counted queries with a match among the nearest
            ``r``. Its kind (NumPy, PyTorch, CuPy) is that of the distances.
        mAP: mean average precision over the counted queries.
        mINP: mean inverse negative penalty over the counted queries.
        num_valid_queries: the counted queries: those with at least one match in the gallery.
        num_queries: all queries.
    """

    cmc: Any
    mAP: float
    mINP: float
    num_valid_queries: int
    num_queries: int

    def _rank(self, r: int) -> float:
        if r > len(self.cmc):
            raise IndexError(f"rank{r} needs max_rank >= {r}; the metrics were made with max_rank={len(self.cmc)}")
        return float(self.cmc[r - 1])

    @property
    def rank1(self) -> float:
        """The share of the counted queries whose nearest image is a match."""
        return self._rank(1)

    @property
    def rank5(self) -> float:
        """The share of the counted queries with a match among the nearest 5; IndexError if ``max_rank`` is smaller."""
        return self._rank(5)

    @property
    def rank10(self) -> float:
        """The share of the counted queries with a match among the nearest 10; IndexError if ``max_rank`` is smaller."""
        return self._rank(10)

    def as_dict(self) -> dict[str, float]:
        """:data:`METRIC_NAMES` and their values, the ranks as far as ``max_rank`` goes."""
        beyond = {f"rank{r}" for r in (1, 5, 10) if r > len(self.cmc)}
        return {name: getattr(self, name) for name in METRIC_NAMES if name not in beyond}

    def cells(self) -> dict[str, str]:
        """The columns of a table by name: the counted queries, and :meth:`as_dict` in percent."""
        counted = str(self.num_valid_queries)
        queries = counted if self.num_valid_queries == self.num_queries else f"{counted} of {self.num_queries}"
        return {"queries": queries, **{name: f"{100 * value:.2f}" for name, value in self.as_dict().items()}}

    def __str__(self) -> str:
        return results_table({"": self})


def results_table(rows: Mapping[str, Any]) -> str:
    """Results by name, all of one class with ``cells``, as a table."""
    cells = {name: row.cells() for name, row in rows.items()}
    return table(("%", *next(iter(cells.values()))), [(name, *row.values()) for name, row in cells.items()])


@dataclass(frozen=True)
class QueryRanking:
    """Results of each query. A query without a match in the gallery has 0 in all four arrays.

    Attributes:
        average_precision: ``[Q]`` float64 in [0, 1].
        inverse_negative_penalty: ``[Q]`` float64 in [0, 1].
        first_match_rank: ``[Q]`` int64, the rank of the nearest match, counted from 1.
        num_matches: ``[Q]`` int64, the matches in the gallery.
    """

    average_precision: Any
    inverse_negative_penalty: Any
    first_match_rank: Any
    num_matches: Any

    def metrics(self, max_rank: int = 50, *, subset: Any = None) -> RankingMetrics:
        """The means over the queries that have a match.

        Args:
            max_rank: length of the CMC curve, 1 to 2^20.
            subset: a boolean ``[Q]`` array or query indices, to count these queries only (those of one viewpoint, say).

        Raises:
            ValueError: ``max_rank`` out of range, a ``subset`` of wrong length or with an index that no query has, no
                query with a match.
            TypeError: a ``subset`` of another kind.
        """
        check_max_rank(max_rank)
        back = _arrays.returner(self.num_matches)
        ap, inp, first, matches = (
            _arrays.to_tensor(value, "QueryRanking")
            for value in (
                self.average_precision,
                self.inverse_negative_penalty,
                self.first_match_rank,
                self.num_matches,
            )
        )
        if subset is not None:
            chosen = check_subset(subset, len(matches)).to(matches.device)
            ap, inp, first, matches = ap[chosen], inp[chosen], first[chosen], matches[chosen]
        counted = matches > 0
        num_valid = int(counted.sum())
        if num_valid == 0:
            raise ValueError(
                f"query_identity: none of the {len(matches)} queries has a match in the gallery (an image of its "
                "identity that is not left out: by default those by its camera are)"
            )
        first = first[counted].clamp(max=max_rank + 1)
        hits = torch.bincount(first, minlength=max_rank + 2)[1 : max_rank + 1]
        return RankingMetrics(
            cmc=back(hits.cumsum(0).double() / num_valid),
            mAP=float(ap[counted].mean()),
            mINP=float(inp[counted].mean()),
            num_valid_queries=num_valid,
            num_queries=len(matches),
        )


def check_subset(subset: Any, queries: int, name: str = "subset") -> Tensor:
    """A boolean mask or indices of queries, checked."""
    if isinstance(subset, list | tuple | range):
        subset = np.asarray(subset, dtype=np.int64 if len(subset) == 0 else None)
    chosen = _arrays.to_tensor(subset, name)
    check_values(name, chosen)
    if chosen.dtype != torch.bool:
        chosen = label_vector(chosen, name)
        outside = chosen[(chosen < -queries) | (chosen >= queries)]
        if len(outside):
            raise ValueError(f"{name}: index {int(outside[0])} was given, but there are {queries} queries")
    elif tuple(chosen.shape) != (queries,):
        raise ValueError(f"{name}: shape {tuple(chosen.shape)} was given, expected {(queries,)}")
    return chosen


def check_max_rank(max_rank: int) -> None:
    """ValueError unless ``max_rank`` is a whole number from 1 to 2^20."""
    if isinstance(max_rank, bool) or not isinstance(max_rank, int | np.integer) or not 1 <= max_rank <= _MAX_RANKS:
        raise ValueError(f"max_rank: {max_rank!r} was given; allowed are whole numbers from 1 to {_MAX_RANKS}")


def check_junk_identity(junk_identity: int | None) -> None:
    """TypeError unless ``junk_identity`` is a whole number or None."""
    if junk_identity is not None:
        check_count("junk_identity", junk_identity, -(2**63), 2**63 - 1)


def _check_block(tensor: Tensor, num_gallery: int) -> None:
    check_values("distances", tensor)
    if tensor.dim() != 2:
        raise ValueError(f"distances: shape {tuple(tensor.shape)} was given, expected [queries, gallery]")
    if tensor.dtype not in _DISTANCE_DTYPES:
        raise TypeError(
            f"distances: dtype {tensor.dtype} was given; allowed are float32, float64, float16 and bfloat16"
        )
    if tensor.shape[1] != num_gallery:
        raise ValueError(
            f"gallery_identity: length {num_gallery} was given, but distances has {tensor.shape[1]} columns"
        )


def _asked_rows(distances: Callable[[int, int], Any], begin: int, end: int) -> Any:
    block = distances(begin, end)
    shape = tuple(_arrays.to_tensor(block, "distances: the function's result").shape)
    if len(shape) == 2 and shape[0] != end - begin:  # other shapes are refused as those of any block
        raise ValueError(
            f"distances: the function gave {shape[0]} rows for queries {begin} to {end}, expected {end - begin}"
        )
    return block


def _blocks(distances: Any, num_queries: int, num_gallery: int, block_rows: int | None) -> Iterator[Any]:
    """The rows of the distances in order, in blocks, whichever way they were given."""
    if callable(distances) and not hasattr(distances, "__dlpack__"):
        begin, step = 0, block_rows or rows_in_block(num_gallery, torch.device("cpu"))
        while begin < num_queries:
            end = min(num_queries, begin + step)
            block = _asked_rows(distances, begin, end)
            step = block_rows or rows_in_block(num_gallery, _arrays.to_tensor(block, "distances").device)
            yield block
            del block  # before the next one is made
            begin = end
    elif isinstance(distances, Tensor | np.ndarray) or hasattr(distances, "__dlpack__"):
        yield distances
    elif isinstance(distances, Iterable):
        yield from distances
    else:
        raise TypeError(
            f"distances: {type(distances).__name__} was given; allowed are a [Q, G] array, an iterable of row blocks "
            "and a function of (begin, end)"
        )


def labelled_blocks(
    distances: Any, labels: RankingLabels, block_rows: int | None
) -> Iterator[tuple[int, Any, Tensor, RankingLabels]]:
    """The rows of the distances in order, in blocks, checked.

    Yields:
        the first row's number, the block as it was given and as a tensor, and the labels of its pairs on its device.
    """
    num_queries, num_gallery = len(labels.query_identity), len(labels.gallery_identity)
    begin = 0
    for block in _blocks(distances, num_queries, num_gallery, block_rows):
        tensor = _arrays.to_tensor(block, "distances")
        _check_block(tensor, num_gallery)
        end = begin + tensor.shape[0]
        if end > num_queries:
            raise ValueError(f"query_identity: length {num_queries} was given, but distances has {end} rows or more")
        labels = labels.on(tensor.device)
        yield begin, block, tensor, labels.of_queries(slice(begin, end))
        del block, tensor  # before the next one is made
        begin = end
    if begin != num_queries:
        raise ValueError(f"query_identity: length {num_queries} was given, but distances has {begin} rows")


def refuse_not_finite(distances: Tensor, refused: Tensor, begin: int) -> None:
    """ValueError, naming the first, if rows of a block that starts at row ``begin`` are refused for NaN or Inf."""
    rows = torch.nonzero(refused)
    if len(rows):
        row = int(rows[0])
        column = int(torch.nonzero(~torch.isfinite(distances[row]))[0])
        raise ValueError(
            f"distances: row {begin + row} holds {float(distances[row, column])} (column {column}); NaN and Inf are "
            f"not allowed ({len(rows)} such rows among {begin} to {begin + len(distances) - 1})"
        )


def rank_queries(
    distances: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> QueryRanking:
    """The ranking results of each query; the arguments are those of :func:`evaluate_ranking`.

    Args:
        block_rows: rows asked of a function at a time (default: as many as make 2^23 distances, more on a large GPU).
        progress: called with the number of further queries done after each block.

    Returns:
        A :class:`QueryRanking` of the kind of array that the distances are.

    Raises:
        ValueError: as :func:`evaluate_ranking`, but for queries without a match, which have ``num_matches`` 0.
    """
    labels = check_labels(query_identity, gallery_identity, query_camera, gallery_camera, exclude, columns)
    return rank_labelled(distances, labels, junk_identity, block_rows, progress)


def rank_labelled(
    distances: Any,
    labels: RankingLabels,
    junk_identity: int | None,
    block_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> QueryRanking:
    """:func:`rank_queries` with labels that are checked."""
    if block_rows is not None:
        check_count("block_rows", block_rows, 1)
    check_junk_identity(junk_identity)
    parts: list[tuple[Tensor, ...]] = []
    back: Callable[[Tensor], Any] | None = None
    for begin, block, tensor, of_block in labelled_blocks(distances, labels, block_rows):
        back = back or _arrays.returner(block)
        result = of_block.results(
            junk_identity, lambda rows, operands, tensor=tensor: ranking_forward(tensor[rows], *operands)
        )
        refuse_not_finite(tensor, result[3] < 0, begin)
        parts.append(result)
        if progress is not None:
            progress(len(tensor))
        del block, tensor  # before the next one is made
    assert back is not None  # there are queries, so there was a block
    return QueryRanking(*(back(torch.cat([part[i].to(parts[0][i].device) for part in parts])) for i in range(4)))


def evaluate_ranking(
    distances: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    max_rank: int = 50,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> RankingMetrics:
    """CMC, mAP and mINP of a retrieval.

    For each query, gallery images are left out by a rule, by default those with its identity AND its camera (when
    cameras are given), and so are those of ``junk_identity``; the rest is ordered by distance, ties by gallery index.
    Queries without a match are not counted. The definition stands in :mod:`vareid_ext.reference.ranking`; nothing is
    sorted to compute it.

    Args:
        distances: smaller is nearer. A ``[Q, G]`` array (NumPy, PyTorch or DLPack; float32, float64, float16 or
            bfloat16), an iterable of its row blocks in order, or a function of ``(begin, end)`` that returns the rows
            of these queries: neither of the latter two ever needs the whole matrix to exist.
        query_identity: ``[Q]`` whole numbers; labels may be on any device.
        gallery_identity: ``[G]`` whole numbers.
        query_camera: ``[Q]`` whole numbers, or None if cameras are not known; -1: this one is not known.
        gallery_camera: ``[G]`` whole numbers; given if and only if ``query_camera`` is.
        exclude: which images are left out: names of columns joined by ``&``, of which all must be equal and known (not
            -1), and such terms joined by ``|``, such as "identity&camera | identity&clothes"; "none" leaves none out.
            Terms without the identity leave out images of other people, too. None is "identity&camera" where cameras
            are given, else "none".
        columns: what a rule can name beside identity and camera, by name: a pair of ``[Q]`` and ``[G]`` whole numbers,
            ``{"clothes": (query_clothes, gallery_clothes)}``.
        max_rank: length of the CMC curve, 1 to 2^20; a gallery shorter than that repeats its last value.
        junk_identity: the identity of gallery images to leave out; None for none.
        block_rows: rows asked of a function at a time (default: as many as make 2^23 distances, more on a large GPU).
        progress: called with the number of further queries done after each block.

    Returns:
        :class:`RankingMetrics`; sums in float64.

    Raises:
        ValueError: shapes or lengths that do not fit, an empty query set or gallery, one camera argument without the
            other, a rule that is none or names a column that is not given, NaN or Inf in ``distances`` (named by row),
            no query with a match.
        TypeError: an array of a wrong kind or dtype.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015; Ye et al., "Deep Learning for
    Person Re-identification: A Survey and Outlook", TPAMI 2022, equation 8 (INP).
    """
    check_max_rank(max_rank)
    return rank_queries(
        distances,
        query_identity,
        gallery_identity,
        query_camera,
        gallery_camera,
        exclude=exclude,
        columns=columns,
        junk_identity=junk_identity,
        block_rows=block_rows,
        progress=progress,
    ).metrics(max_rank)
