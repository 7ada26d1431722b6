"""Retrieval over real processes against that of one, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import processes as benchmark
from tests import factories
from tests.factories import features
from tests.processes import free_port
from vareid_ext import _native, evaluate_features, k_reciprocal_rerank, nearest_neighbors, reference_backend
from vareid_ext._processes import LostProcessError
from vareid_ext.losses import ViewpointAwareLoss, batch_hard_triplet
from vareid_ext.losses.center import CenterLoss
from vareid_ext.ops import _byte_filter, _filter
from vareid_ext.ops import _shared_neighbors as neighbors_module
from vareid_ext.ops import nearest_neighbors as _nearest_op
from vareid_ext.retrieval import rerank_plan

SHARES = ([5, 3], [70, 0], [0, 1, 60], [23, 23, 24], [31])


def of(group: Any, shares: Any) -> Any:
    """This process's share; None stays."""
    return None if shares is None else shares[group.rank()]


def neighbors(group: Any, x: Any, y: Any, options: dict[str, Any], backend: str = "native") -> Any:
    with reference_backend() if backend == "reference" else contextlib.nullcontext():
        return nearest_neighbors(of(group, x), of(group, y), group=group, **options)


def assert_as_one(processes: Any, x: torch.Tensor, y: Any, shares: Any, other: Any = None, **options: Any) -> None:
    backend = options.pop("backend", "native")
    with reference_backend() if backend == "reference" else contextlib.nullcontext():
        expected = nearest_neighbors(x, y, **options)
    given = None if y is None else y.split(other)
    results = processes.run(len(shares), neighbors, x.split(shares), given, options, backend)
    for result, whole in zip(zip(*results, strict=True), expected, strict=True):
        assert [len(part) for part in result] == list(shares)
        assert result[0].dtype == whole.dtype
        assert torch.equal(torch.cat(result), whole)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_a_set_has_the_neighbours_of_one_process(processes, backend, shares, metric):
    x = features(sum(shares), 7)
    assert_as_one(processes, x, None, shares, k=min(6, len(x)), metric=metric, backend=backend)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_another_set_has_them_too(processes, backend, shares, metric):
    x, y = features(sum(shares), 5), features(sum(shares) + 4, 5, 1)
    other = [*shares[1:], shares[0] + 4]
    assert_as_one(processes, x, y, shares, other, k=5, metric=metric, backend=backend)


@pytest.mark.parametrize("shares", [[40, 41], [0, 81, 0], [1, 50, 30]], ids=str)
def test_ties_go_by_index_and_lists_may_be_longer_than_shares(processes, backend, shares):
    x = torch.arange(81 * 3).reshape(81, 3).remainder(3).float()  # whole numbers: 3 different rows
    assert_as_one(processes, x, None, shares, k=81, backend=backend)
    assert_as_one(processes, x[:, :2].contiguous(), x[:, 1:].contiguous(), shares, shares[::-1], k=60, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_all_types_of_features(processes, dtype):
    assert_as_one(processes, features(60, 9).to(dtype), None, [20, 11, 29], k=7)
    assert_as_one(processes, features(60, 9).to(dtype), features(30, 9, 1).to(dtype), [20, 40], [29, 1], k=7)


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_features_far_from_one_share_a_scale(processes, factor, metric):
    x = features(40, 6).double()
    x[:20] *= 1e-3  # one process alone would take another scale
    assert_as_one(processes, x * factor, None, [20, 20], k=5, metric=metric)
    shifted = (1 + 1e-9 * x) * factor
    assert_as_one(processes, shifted, None, [0, 13, 27], k=5, metric=metric)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_many_blocks_and_near_ties(processes, count):
    x = features(900, 16)
    x = torch.cat([x, x[:300], x[:300] + 1e-6 * features(300, 16, 3)])
    x += 100 * features(1, 16, 2)
    cuts = [1500 * p * p // count**2 for p in range(count + 1)]
    assert_as_one(processes, x, None, [b - a for a, b in itertools.pairwise(cuts)], k=70)


@pytest.mark.parametrize(("shares", "other"), [([700], [9]), ([300, 400], [500, 9]), ([0, 650, 50], [70, 1, 500])])
def test_rows_for_which_products_of_8_bits_pay(processes, shares, other):
    x = features(700, 130)
    x[600:] = x[:100] + 1e-5 * features(100, 130, 1)
    assert_as_one(processes, x, None, shares, k=20)
    assert_as_one(processes, x, features(sum(other), 130, 2), shares, other, k=9, metric="cosine")


def as_numpy(group: Any, x: Any) -> Any:
    rows = of(group, x).numpy()[:, ::-1]
    return nearest_neighbors(rows, k=3, group=group), nearest_neighbors(rows, rows[:2], k=3, group=group)


def test_numpy_in_numpy_out(processes):
    x = features(21, 4)
    for each in processes.run(2, as_numpy, x.split([10, 11])):
        assert all(isinstance(part, np.ndarray) for pair in each for part in pair)
    flipped = x.flip(1).contiguous()
    expected = nearest_neighbors(flipped, k=3)[1].numpy()
    found = processes.run(2, as_numpy, x.split([10, 11]))
    assert np.array_equal(np.concatenate([each[0][1] for each in found]), expected)


def varied(group: Any, arguments: list[dict[str, Any]]) -> Any:
    return nearest_neighbors(group=group, **arguments[group.rank()])


def nan_row() -> torch.Tensor:
    x = features(5, 4)
    x[3, 1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": features(5, 4).double()}, ValueError, "dtype of x: process 1 has 'float64' and process 0 has 'float32'"),
        ({"x": features(5, 3)}, ValueError, "elements of a row of x: process 1 has 3 and process 0 has 4"),
        ({"k": 3}, ValueError, "k: process 1 has 3 and process 0 has 2"),
        ({"metric": "cosine"}, ValueError, "metric: process 1 has 'cosine' and process 0 has 'sqeuclidean'"),
        ({"y": features(5, 4)}, ValueError, "y: process 1 has 'an array' and process 0 has 'None'"),
        ({"x": nan_row()}, ValueError, r"x (process 1): row 3 holds NaN or Inf"),
        ({"x": [1.0]}, TypeError, "x (process 1): list was given"),
        ({"x": features(5, 4)[0]}, ValueError, "x (process 1): shape [4] was given"),
        ({"k": 0}, ValueError, "k: 0 was given; allowed are 1 to"),
        ({"metric": "manhattan"}, ValueError, "metric: 'manhattan' was given"),
    ],
)  # fmt: skip
def test_what_one_process_gets_wrong_all_raise(processes, changes, kind, message):
    good = {"x": features(5, 4), "k": 2, "metric": "sqeuclidean"}
    outcomes = processes(3, varied, [good, good | changes, good])
    assert {type(outcome) for outcome in outcomes} == {kind}
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert message in str(outcomes[0])
    assert processes.run(3, varied, [good] * 3)[0][0].shape == (5, 2)  # nobody was left behind


def test_k_is_at_most_the_rows_of_all(processes):
    arguments = [{"x": features(2, 4), "k": 7}] * 3
    outcomes = processes(3, varied, arguments)
    assert {str(outcome) for outcome in outcomes} == {
        "k: 7 was given; allowed are 1 to 6, the number of rows of x of all processes"
    }


def test_a_group_is_one():
    with pytest.raises(TypeError, match=r"group: str was given; a torch\.distributed\.ProcessGroup is needed"):
        nearest_neighbors(features(5, 4), k=1, group="gloo")
    with pytest.raises(TypeError, match="group: int was given"):
        nearest_neighbors(features(5, 4), k=1, group=7)
    identity = torch.arange(5)
    for function in (
        functools.partial(nearest_neighbors, features(5, 4), k=1),
        functools.partial(k_reciprocal_rerank, features(5, 4), features(5, 4), topk=1),
        functools.partial(batch_hard_triplet, features(5, 4), identity),
        functools.partial(CenterLoss(5, 4), features(5, 4), identity),
        ViewpointAwareLoss(5, 4).shard_identities,
    ):
        with pytest.raises(ValueError, match="group: this process is no member of the group"):
            function(group=dist.GroupMember.NON_GROUP_MEMBER)


def bytes_sent(group: Any, function: Any, *arguments: Any) -> int:
    """What this process sends to others of features and lists while it runs a function."""
    sent, batch = [], dist.batch_isend_irecv

    def counted(operations: Any) -> Any:
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        function(group, *arguments)
    return sum(sent)


def test_rows_are_sent_as_often_as_they_are_needed(processes):
    N, D, k = 48, 16, 5
    x, y, row, lists = features(N, D), features(N, D, 1), 4 * D, 12 * k + 4
    for count in (1, 2, 3):
        even = x.split(N // count), y.split(N // count)
        # Every row of y is needed by all other processes.
        sent = processes.run(count, bytes_sent, neighbors, *even, {"k": k})
        assert sent == [(count - 1) * N // count * row] * count
    # Of two opposite processes one compares its first half with all of the other's, which compares the second half.
    sent = processes.run(2, bytes_sent, neighbors, x.split(24), None, {"k": k})
    reached = row + 4  # what a row's list already reaches goes with it
    assert sent == [12 * reached + 24 * lists, 24 * reached + 12 * lists]
    # Of three, each pair meets once.
    assert processes.run(3, bytes_sent, neighbors, x.split(16), None, {"k": k}) == [16 * (reached + lists)] * 3


def one_of_two(process: int, port: int, outcomes: Any) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=2, timeout=timedelta(seconds=20)
    )
    begun = neighbors_module.visits

    def ending(*arguments: Any) -> Any:
        for step in begun(*arguments):
            if process == 1:
                os._exit(9)  # with features on their way
            yield step

    neighbors_module.visits = ending
    try:
        nearest_neighbors(features(100, 4), k=3, group=dist.group.WORLD)  # lists of each other's rows are sent back
    except Exception as error:
        outcomes.put(error)


def test_a_process_that_ends_on_the_way_is_said():
    context, port = multiprocessing.get_context("spawn"), free_port()
    outcomes = context.Queue()
    both = [context.Process(target=one_of_two, args=(p, port, outcomes)) for p in range(2)]
    for process in both:
        process.start()
    error = outcomes.get(timeout=60)
    for process in both:
        process.join()
    assert type(error) is LostProcessError
    assert "of its 2 processes one has ended or did not answer" in str(error)


def reranked(group: Any, query: Any, gallery: Any, options: dict[str, Any], backend: str = "native") -> Any:
    with reference_backend() if backend == "reference" else contextlib.nullcontext():
        return k_reciprocal_rerank(of(group, query), of(group, gallery), group=group, **options)


def reranked_alone(group: Any, query: Any, gallery: Any, options: dict[str, Any], backend: str = "native") -> Any:
    """In a process like the others, which has as many threads."""
    with reference_backend() if backend == "reference" else contextlib.nullcontext():
        return k_reciprocal_rerank(query, gallery, **options)


def assert_reranked_as_one(
    processes: Any, query: torch.Tensor, gallery: torch.Tensor, shares: Any, others: Any, **options: Any
) -> None:
    backend = options.pop("backend", "native")
    (expected,) = processes.run(1, reranked_alone, query, gallery, options, backend)
    parts = query.split(shares), gallery.split(others)
    results = processes.run(len(shares), reranked, *parts, options, backend)
    for result, whole in zip(zip(*results, strict=True), expected, strict=True):
        assert [len(part) for part in result] == list(shares)
        assert torch.equal(torch.cat(result), whole)


def people(Q: int, G: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows near a few centres, some of them twice, which re-ranking changes."""
    x = features(9, D).repeat(-(-(Q + G) // 9), 1)[: Q + G] + 0.5 * features(Q + G, D, 1)
    x[Q + 2 : Q + 6] = x[0]
    return x[:Q].clone(), x[Q:].clone()


@pytest.mark.parametrize(
    ("shares", "others"), [([7], [90]), ([7, 6], [0, 90]), ([0, 13], [40, 50]), ([1, 0, 12], [30, 31, 29])], ids=str
)
@pytest.mark.parametrize("options", [{}, {"block_rows": 16}, {"k1": 5, "k2": 1, "lambda_value": 0.0, "block_rows": 9}])
def test_reranking_is_that_of_one_process(processes, shares, others, options):
    query, gallery = people(sum(shares), sum(others), 6)
    assert_reranked_as_one(processes, query, gallery, shares, others, topk=12, **options)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize(("shares", "others"), [([30, 70], [200, 260]), ([0, 20, 80], [330, 0, 130])], ids=str)
def test_reranking_by_products_of_8_bits_is_that_of_one_process(processes, shares, others, offset):
    """Largest distances are measured, in one process and in many; or, with the rows far from 0, in none."""
    query, gallery = (x + offset * torch.eye(130)[5] * (1 - 2 * (x[:, :1] > 0)) for x in people(100, 460, 130))
    if _native.available("cpu") and _byte_filter.byte_products():
        parts = _filter.samples([query, gallery])
        assert _nearest_op.pairs_pay(parts, "sqeuclidean", 1.0, 560) == (offset == 0)
    assert_reranked_as_one(processes, query, gallery, shares, others, topk=12, block_rows=64)


def test_reranking_without_the_kernels(processes):
    query, gallery = people(5, 40, 6)
    assert_reranked_as_one(processes, query, gallery, [2, 0, 3], [9, 31, 0], topk=40, block_rows=4, backend="reference")


@pytest.mark.parametrize("factor", [1e120, 1e-120, 1.0, 1e-3, 8e3])
def test_reranking_of_all_types_and_scales(processes, factor):
    dtype = torch.float16 if factor in (1e-3, 8e3) else torch.float64
    query, gallery = (factor * (x.double() / 4 + 2) for x in people(11, 60, 6))  # far from 0: centred, by all rows
    gallery[40:] *= 0.5
    query, gallery = query.to(dtype), gallery.to(dtype)
    assert_reranked_as_one(processes, query, gallery, [5, 6], [20, 40], topk=60, block_rows=7, lambda_value=1.0)


def test_reranking_of_rows_that_are_all_the_same(processes):
    assert_reranked_as_one(processes, torch.ones(4, 3), torch.ones(20, 3), [1, 1, 2], [20, 0, 0], topk=9, block_rows=2)


def test_long_lists_are_made_without_the_kernels(processes):
    query, gallery = people(4, 30, 5)
    assert_reranked_as_one(processes, query, gallery, [2, 2], [15, 15], k1=2100, topk=3)


def varied_reranking(group: Any, arguments: list[dict[str, Any]]) -> Any:
    return k_reciprocal_rerank(group=group, **arguments[group.rank()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": None}, "topk: processes of a group make no [Q, G] result; topk is needed"),
        ({"out": torch.ones(2, 2)}, "out: processes of a group make no [Q, G] result"),
        ({"topk": 3}, "topk: process 1 has 3 and process 0 has 2"),
        ({"k1": 3}, "k1: process 1 has 3 and process 0 has 20"),
        ({"lambda_value": 2.0}, "lambda_value: 2.0 was given; allowed are 0 to 1"),
        ({"block_rows": 4}, "block_rows: process 1 has 4 and process 0 has None"),
        ({"gallery": nan_row()}, "gallery (process 1): row 3 holds NaN or Inf"),
        ({"gallery": features(5, 4).half()}, "gallery (process 1): dtype float16 was given; float32 is needed"),
    ],
)
def test_what_one_process_gets_wrong_of_a_reranking_all_raise(processes, changes, message):
    good = {"query": features(5, 4, 1), "gallery": features(5, 4), "topk": 2}
    outcomes = processes(2, varied_reranking, [good, good | changes])
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert message in str(outcomes[0])


def test_reranking_needs_rows_and_memory_of_all_processes(processes):
    good = {"query": features(5, 4, 1), "gallery": features(5, 4), "topk": 2}
    for changes, message in (
        ({"query": features(5, 4)[:0]}, "query: no rows were given by any process; at least one is needed"),
        ({"topk": 11}, "topk: 11 was given; allowed are 1 to 10"),
        ({"max_memory": 10}, "max_memory: 10 bytes were given, but the least needed is"),
    ):
        outcomes = processes(2, varied_reranking, [good | changes] * 2)
        assert len({str(outcome) for outcome in outcomes}) == 1
        assert message in str(outcomes[0])


def test_the_documented_search_runs_under_torchrun(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "your-own-data.md").read_text()
    text = page.partition("## Features shared out among processes\n")[2]
    (tmp_path / "search.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    query, gallery, *labels = factories.people(0, 9, 40)
    sides = {"query": (query, *labels[::2]), "gallery": (gallery, *labels[1::2])}
    for side, arrays in sides.items():
        np.savez(tmp_path / f"{side}.npz", **dict(zip(("feature", "identity", "camera"), arrays, strict=True)))
    words = shlex.split(text.partition("```bash\n")[2].partition("```")[0])
    assert words.pop(0) == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port()), *words], cwd=tmp_path,
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(evaluate_features(query, gallery, *labels, rerank=True)) in done.stdout


def test_memory_and_bytes_sent_stay_within_the_plan(tmp_path, monkeypatch):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process reset its peak")
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    for name, value in benchmark.SETTINGS.items():
        monkeypatch.setenv(name, value)
    Q, G, D, topk = 500, 7500, 256, 50
    x = features(Q + G, D).double().numpy()
    np.save(tmp_path / "x.npy", x)
    measured, codes = benchmark.run_case(str(tmp_path / "x.npy"), Q, "rerank", topk, 2)
    assert len(codes) == Q
    plan = rerank_plan(Q, G, D, topk=topk, processes=2, element_size=x.itemsize)
    for each in measured:
        assert each["bytes_beyond"] <= plan.peak + (4 << 20)  # the buffers of the vendor's product differ
        assert each["bytes_sent"] <= plan.sent
