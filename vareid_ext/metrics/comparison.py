"""Is one ranking better than another? Differences of mAP and rank-1 on the same queries, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from vareid_ext import _arrays
from vareid_ext._labels import same_numbers
from vareid_ext._text import table
from vareid_ext.files.features import Features
from vareid_ext.metrics.ranking import QueryRanking
from vareid_ext.metrics.verification_results import CONFIDENCE
from vareid_ext.ops._checks import check_count

COMPARED = ("mAP", "rank1")
"""The metrics that are compared."""


@dataclass(frozen=True)
class PairedDifference:
    """What a ranking gains over a first one in a metric, over the queries that have a match.

    Attributes:
        difference: of the metric, a fraction; above 0: it is better than the first.
        interval: low and high end of the 95 % percentile interval of that difference.
        won: queries with a higher value (average precision for mAP; for rank-1, whether the nearest image is a match).
        lost: queries with a lower one.
        tied: queries with the same.
    """

    difference: float
    interval: tuple[float, float]
    won: int
    lost: int
    tied: int

    def as_dict(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        return {**vars(self), "interval": list(self.interval)}


def compare_rankings(
    first: QueryRanking,
    other: QueryRanking,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("first", "other"),
) -> dict[str, PairedDifference]:
    """Paired differences between two rankings of the same queries, ``other - first``, by the names of ``COMPARED``.

    The bootstrap draws as many queries as are counted, with replacement, and takes the differences of both rankings on
    the same draw. Two calls with one seed and one number of queries use the same draws.

    Args:
        first: results of each query.
        other: results of the same queries, in the same order.
        resamples: draws of the bootstrap, at least 1.
        seed: of these draws.
        names: what the errors call the two.

    Raises:
        ValueError: another number of queries; a query has a match in one ranking only; no query has one.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
    """
    resamples, seed = check_count("resamples", resamples, 1), check_count("seed", seed, 0)
    matched = [_numbers(ranking.num_matches) > 0 for ranking in (first, other)]
    if len(matched[0]) != len(matched[1]):
        raise ValueError(
            f"{names[1]}: {len(matched[1])} queries were given; {len(matched[0])} are needed, as {names[0]} has"
        )
    unequal = np.flatnonzero(matched[0] != matched[1])
    if len(unequal):
        there, lacking = names if matched[0][unequal[0]] else names[::-1]
        raise ValueError(
            f"{lacking}: query {unequal[0]} has no match in the gallery, but one in that of {there} ({len(unequal)} of "
            f"{len(matched[0])} queries differ so); measure both with one gallery, or leave these queries out"
        )
    if not matched[0].any():
        raise ValueError(f"{names[0]}: none of the {len(matched[0])} queries has a match in the gallery")
    of_first, of_other = (_values(ranking)[matched[0]] for ranking in (first, other))
    differences = of_other - of_first
    rng, n = np.random.default_rng(seed), len(differences)
    draws = np.stack([differences[rng.integers(n, size=n)].mean(0) for _ in range(resamples)])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    return {
        name: PairedDifference(
            difference=float(differences[:, i].mean()),
            interval=(float(low[i]), float(high[i])),
            won=int((differences[:, i] > 0).sum()),
            lost=int((differences[:, i] < 0).sum()),
            tied=int((differences[:, i] == 0).sum()),
        )
        for i, name in enumerate(COMPARED)
    }


def _values(ranking: QueryRanking) -> np.ndarray:
    """Of each query what the metrics of ``COMPARED`` are the means of, float64 [Q, 2]."""
    return np.stack([_numbers(ranking.average_precision), _numbers(ranking.first_match_rank) == 1], axis=1)


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(_arrays.to_tensor(values, "ranking").cpu())


def check_same_queries(sides: Mapping[str, Features]) -> None:
    """ValueError, saying how they differ, unless all have the queries of the first: paths where known, and labels.

    Of paths the names of the files are compared, as folders may have been moved.
    """
    for difference in _differences(sides, "query"):
        raise ValueError(f"queries: {difference}; the same queries in the same order are needed")


def gallery_notes(sides: Mapping[str, Features]) -> list[str]:
    """A line for each gallery that is not that of the first, compared as by :func:`check_same_queries`."""
    return [f"galleries differ: {difference}" for difference in _differences(sides, "image")]


def _differences(sides: Mapping[str, Features], one: str) -> Iterator[str]:
    """How images differ from the first of some: a line for each that does; `one` is what an image is called."""
    (name, first), *others = sides.items()
    for other_name, other in others:
        if len(other) != len(first):
            yield f"{name} has {len(first)} images, {other_name} has {len(other)}"
            continue
        one_named, other_named = same_numbers(first, other)
        columns: dict[str, tuple[Any, Any]] = {
            label: (one_named.called(label), other_named.called(label)) for label in ("identity", "camera")
        }
        if first.paths and other.paths:
            names = ([PurePath(path).name for path in images.paths] for images in (first, other))
            columns = {"path": tuple(map(np.array, names)), **columns}  # type: ignore[dict-item]
        for what, (mine, theirs) in columns.items():
            unequal = np.flatnonzero(mine != theirs)
            if len(unequal):
                i = unequal[0]
                yield (
                    f"{what} of {one} {i} is {mine[i]} in {name}, {theirs[i]} in {other_name} ({len(unequal)} of "
                    f"{len(first)} differ)"
                )
                break


def difference_rows(differences: Mapping[str, Mapping[str, PairedDifference]]) -> list[list[str]]:
    """A row of a table for each ranking and metric: both, percentage points, interval, queries won, lost and tied."""
    rows = []
    for name, by_metric in differences.items():
        for metric, found in by_metric.items():
            low, high = (f"{100 * end:+.2f}" for end in found.interval)
            counts = map(str, (found.won, found.lost, found.tied))
            rows.append([name, metric, f"{100 * found.difference:+.2f}", f"{low} to {high}", *counts])
    return rows


def comparison_text(first: str, differences: Mapping[str, Mapping[str, PairedDifference]], resamples: int) -> str:
    """Differences against the ranking called `first`, by ranking and metric, as a table in percentage points."""
    header = (f"against {first}", "metric", "points", "95 % interval", "queries won", "lost", "tied")
    rows = difference_rows(differences)
    return f"{table(header, rows)}\nintervals: {resamples:,} bootstrap draws of the queries, percentiles"
