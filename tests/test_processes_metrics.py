"""Ranking metrics over real processes against those of one, bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories import features, people
from vareid_ext import KReciprocal, evaluate_features, rank_features, reference_backend
from vareid_ext.metrics.over_processes import rank_shares

SHARES = [([23], [60]), ([11, 12], [31, 29]), ([0, 23], [60, 0]), ([20, 0, 3], [0, 1, 59]), ([7, 8, 8], [20, 20, 20])]


def split(values: Any, sizes: list[int], process: int) -> Any:
    begin = sum(sizes[:process])
    return None if values is None else values[begin : begin + sizes[process]]


def own(group: Any, given: list[Any], columns: Any, shares: Any) -> tuple[list[Any], Any]:
    """This process's share of query, gallery, their labels, and of pairs of columns."""
    parts = [split(values, shares[place % 2], group.rank()) for place, values in enumerate(given)]
    pairs = columns and {
        name: tuple(split(side, sizes, group.rank()) for side, sizes in zip(pair, shares, strict=True))
        for name, pair in columns.items()
    }
    return parts, pairs


def evaluated(group: Any, given: list[Any], columns: Any, shares: Any, options: dict[str, Any], backend: str) -> Any:
    parts, pairs = own(group, given, columns, shares)
    with reference_backend() if backend == "reference" else contextlib.nullcontext():
        metrics = evaluate_features(*parts, columns=pairs, group=group, **options)
        plain = {"exclude": None, "metric": "sqeuclidean", "junk_identity": -1, "block_rows": None, "rerank": False}
        *rows, one, two, three, four = [*parts, None, None][:6]
        each = rank_shares(
            *rows, (one, two), (three, four), columns=pairs, max_rank=50, progress=False, group=group,
            **plain | options,
        )  # fmt: skip
    return metrics, each


def evaluated_alone(_group: Any, given: list[Any], columns: Any, options: dict[str, Any], backend: str) -> Any:
    """In a process like the others, which has as many threads."""
    with reference_backend() if backend == "reference" else contextlib.nullcontext():
        metrics = evaluate_features(*given, columns=columns, **options)
        return metrics, rank_features(*given, columns=columns, **options)


def assert_as_one(
    processes: Any, given: list[Any], shares: Any, columns: Any = None, backend: str = "native", **options: Any
) -> None:
    (expected,) = processes.run(1, evaluated_alone, given, columns, options, backend)
    tolerance = 1e-15 if backend == "reference" else 0  # plain PyTorch sums precisions in another order
    for found in processes.run(len(shares[0]), evaluated, given, columns, shares, options, backend):
        for got, truth in zip(found, expected, strict=True):
            for name, value in vars(truth).items():
                np.testing.assert_allclose(
                    np.asarray(getattr(got, name)), np.asarray(value), rtol=0, atol=tolerance, err_msg=name
                )


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_metrics_are_those_of_one_process(processes, backend, shares, metric):
    assert_as_one(processes, list(people(0, 23, 60)), shares, metric=metric, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_metrics_of_all_types_in_several_blocks(processes, dtype):
    given = list(people(3, 23, 60, dtype=dtype))
    given[1][40:] = given[1][:20]  # ties
    given[1] *= 1e-3
    given[0] *= 1e-3
    assert_as_one(processes, given, SHARES[3], block_rows=4)


def test_metrics_of_whole_numbers_whose_distances_tie(processes):
    generator = np.random.default_rng(0)
    rows = [torch.from_numpy(generator.integers(0, 3, (n, 4))).float() for n in (30, 1300)]
    labels = [generator.integers(0, 5, n) for n in (30, 1300)] + [generator.integers(-1, 3, n) for n in (30, 1300)]
    labels[1][::4] = -1
    assert_as_one(processes, [*rows, *labels], ([14, 16], [1290, 10]))
    assert_as_one(processes, [*rows, *labels], ([14, 16, 0], [0, 1290, 10]), junk_identity=None)
    assert_as_one(processes, [*rows, *labels[:2]], ([14, 16], [1290, 10]), junk_identity=2)


@pytest.mark.parametrize(
    "exclude", ["none", "identity&camera | identity&clothes", "camera", "camera&clothes | identity&camera"]
)
def test_rules_leave_the_same_out(processes, exclude):
    given, generator = list(people(1, 23, 60)), np.random.default_rng(1)
    columns = {"clothes": (generator.integers(-1, 4, 23), generator.integers(-1, 4, 60))}
    for shares in SHARES[1:4]:
        assert_as_one(processes, given, shares, columns, exclude=exclude)


@pytest.mark.parametrize("shares", SHARES[1:4], ids=str)
@pytest.mark.parametrize("block_rows", [None, 5])
def test_reranked_metrics_are_those_of_one_process(processes, backend, shares, block_rows):
    given = list(people(2, 23, 60))
    given[1] = given[1] + 5  # centred, by the rows that are no junk
    given[0] = given[0] + 5
    given[3][::7] = -1
    rerank = {"k1": 6, "k2": 3, "block_rows": 8}
    assert_as_one(processes, given, shares, backend=backend, rerank=rerank, block_rows=block_rows)


def test_reranked_metrics_by_default_and_without_labels_of_junk(processes):
    given = list(people(2, 23, 60, dtype=torch.float16))
    assert_as_one(processes, given, SHARES[4], rerank=True)
    assert_as_one(processes, given, SHARES[1], rerank="k_reciprocal", junk_identity=None)
    assert_as_one(processes, given, SHARES[1], rerank={"k1": 2060, "lambda_value": 1.0})


def varied(group: Any, arguments: list[tuple[list[Any], dict[str, Any]]]) -> Any:
    given, options = arguments[group.rank()]
    if options.get("rerank") == "fitted":
        options = {"rerank": KReciprocal(given[0], given[1])}
    return evaluate_features(*given, group=group, **options).mAP


@pytest.mark.parametrize(
    ("place", "value", "options", "message"),
    [
        (2, [1, 2], {}, "query_identity (process 1): length 2 was given, expected 5 (as query)"),
        (3, [0.5] * 8, {}, "gallery_identity (process 1): dtype torch.float64 was given"),
        (2, None, {}, "query_identity (process 1): None was given"),
        (4, None, {}, "query_camera: was given by process 1 or by process 0, but not by both"),
        (0, features(5, 3), {}, "gallery (process 1): features of 16 elements were given, but query's have 3"),
        (None, None, {"metric": "cosine"}, "metric: process 1 has 'cosine' and process 0 has 'sqeuclidean'"),
        (None, None, {"exclude": "none"}, "exclude: process 1 has 'none' and process 0 has None"),
        (None, None, {"max_rank": 0}, "max_rank: 0 was given"),
        (None, None, {"rerank": True}, "rerank: process 1 has {'k1': 20, 'k2': 6, 'lambda_value': 0.3, 'block_rows'"),
        (None, None, {"rerank": {"k3": 1}}, "rerank: 'k3' was given; allowed keys are method, k1, k2, lambda_value"),
        (None, None, {"rerank": True, "metric": "cosine"}, "metric: 'cosine' was given, but re-ranking is defined on"),
        (None, None, {"rerank": "fitted"}, "rerank: a fitted re-ranker was given"),
        (None, None, {"columns": {"clothes": [1]}}, "columns: clothes of both: list was given; a pair is needed"),
    ],
)  # fmt: skip
def test_what_one_process_gets_wrong_all_raise(processes, place, value, options, message):
    good = list(people(0, 5, 8))
    bad = [value if at == place else given for at, given in enumerate(good)]
    outcomes = processes(2, varied, [(good, {}), (bad, options)])
    assert len({(type(outcome), str(outcome)) for outcome in outcomes}) == 1
    assert message in str(outcomes[0])


def test_no_matches_and_no_rows_are_said_by_all(processes):
    query, gallery, *_ = people(0, 5, 8)
    for given, message in (
        ([query, gallery, [1] * 5, [2] * 8], "query_identity: none of the 10 queries has a match"),
        ([query[:0], gallery, [], [2] * 8], "query_identity: the query set is empty"),
        ([query, gallery, [1] * 5, [-1] * 8], "gallery_identity: every image has the junk identity -1"),
    ):
        outcomes = processes(2, varied, [(given, {"rerank": "junk" in message})] * 2)
        assert len({str(outcome) for outcome in outcomes}) == 1
        assert message in str(outcomes[0])
