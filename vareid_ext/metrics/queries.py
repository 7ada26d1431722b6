"""What each query and each identity has reached, as tables that a spreadsheet or pandas reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vareid_ext._labels import UNKNOWN
from vareid_ext.files.features import Features
from vareid_ext.metrics.ranking import QueryRanking

QUERY_COLUMNS = (
    "ranking", "query", "path", "identity", "camera", "viewpoint", "matches", "average_precision",
    "inverse_negative_penalty", "first_match_rank",
)  # fmt: skip
"""Of :func:`query_table`; fractions, ranks from 1, -1 for what is not known.
A query without a match has 0 matches and its last three empty."""

IDENTITY_COLUMNS = ("ranking", "identity", "queries", "counted", "mAP", "mINP", "rank1")
"""Of :func:`identity_table`; means over the counted queries, those with a match, and empty where there is none."""


def query_table(rankings: Mapping[str, tuple[Features, QueryRanking]]) -> str:
    """A line of CSV for each query of each ranking, in their order; columns :data:`QUERY_COLUMNS`."""

    def lines() -> Iterator[Sequence[object]]:
        for name, (query, ranking) in rankings.items():
            ap, inp, first, matches = _columns(ranking)
            identity, camera = _written(query, "identity"), _written(query, "camera")
            for q in range(len(query)):
                path = query.paths[q] if query.paths else ""
                values = (ap[q], inp[q], first[q]) if matches[q] else ("", "", "")
                yield name, q, path, identity[q], camera[q], query.viewpoint[q], matches[q], *values

    return _csv(QUERY_COLUMNS, lines())


def identity_table(rankings: Mapping[str, tuple[Features, QueryRanking]]) -> str:
    """A line of CSV for each identity of each ranking's queries, by number; columns :data:`IDENTITY_COLUMNS`."""

    def lines() -> Iterator[Sequence[object]]:
        for name, (query, ranking) in rankings.items():
            ap, inp, first, matches = _columns(ranking)
            for identity in np.unique(query.identity):
                all_of_it = query.identity == identity
                counted = all_of_it & (matches > 0)
                means = ("", "", "")
                if counted.any():
                    means = ap[counted].mean(), inp[counted].mean(), (first[counted] == 1).mean()
                yield name, _written(query, "identity")[all_of_it][0], all_of_it.sum(), counted.sum(), *means

    return _csv(IDENTITY_COLUMNS, lines())


def _written(query: Features, label: str) -> np.ndarray:
    return np.where(getattr(query, label) == UNKNOWN, str(UNKNOWN), query.called(label).astype(str))


def _columns(ranking: QueryRanking) -> list[np.ndarray]:
    return [np.asarray(values.cpu()) for values in vars(ranking).values()]


def _csv(header: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
