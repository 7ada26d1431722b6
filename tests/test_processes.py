"""What processes do together, in real groups of 1 to 3 of them."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import free_port
from vareid_ext._processes import LostProcessError, agreed, first_does, gather_rows, share, together, whole_batch


def mine(group: Any) -> int:
    return int(group.rank())


def failing(group: Any, who: int) -> Any:
    def action() -> int:
        if mine(group) >= who:
            raise ValueError(f"feature: of process {mine(group)}")
        return mine(group)

    return together(group, action)


def agreeing(group: Any, dims: list[int]) -> None:
    agreed(group, dtype="float32", feature_dim=dims[mine(group)])


def by_the_first(group: Any, fail: bool) -> Any:
    def action() -> int:
        if fail:
            raise FileNotFoundError("data.root: gone")
        return os.getpid()

    return first_does(group, action), os.getpid()


def gathered(group: Any, counts: list[int]) -> Any:
    rows = torch.arange(counts[mine(group)] * 2).reshape(-1, 2) + 100 * mine(group)
    return gather_rows(rows, group)


def differentiated(group: Any, rows: list[torch.Tensor]) -> Any:
    own = rows[mine(group)].clone().requires_grad_()
    whole = whole_batch(own, group)
    # Each process makes something else of the whole.
    (whole.pow(2 + mine(group)).sum()).backward()
    return whole.detach(), own.grad


@pytest.mark.parametrize(("total", "count"), [(0, 3), (1, 3), (7, 3), (9, 3), (10, 4), (2**40 + 1, 7)])
def test_shares_are_in_order_whole_and_even(total, count):
    shares = [share(total, process, count) for process in range(count)]
    assert [0, *(end for _, end in shares)] == [*(begin for begin, _ in shares), total]
    sizes = [end - begin for begin, end in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_together_gives_everybody_all_results(processes, size):
    assert processes.run(size, failing, size) == [list(range(size))] * size


@pytest.mark.parametrize("who", [0, 1, 2])
def test_the_first_error_is_everybodys(processes, who):
    outcomes = processes(3, failing, who)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    assert {str(outcome) for outcome in outcomes} == {f"feature: of process {who}"}
    assert processes.run(3, mine) == [0, 1, 2]  # nobody was left behind


def test_processes_that_disagree_are_named(processes):
    assert processes.run(3, agreeing, [4, 4, 4]) == [None] * 3
    outcomes = processes(3, agreeing, [4, 4, 5])
    assert {str(outcome) for outcome in outcomes} == {
        "feature_dim: process 2 has 5 and process 0 has 4; allowed is one for all processes"
    }


def test_the_first_process_alone_acts(processes):
    results = processes.run(3, by_the_first, False)
    assert {result for result, _ in results} == {results[0][1]}
    outcomes = processes(3, by_the_first, True)
    assert {(type(outcome), str(outcome)) for outcome in outcomes} == {(FileNotFoundError, "data.root: gone")}


def test_one_process_alone_needs_no_group():
    rows = torch.ones(2, 3)
    assert first_does(None, lambda: 5) == 5
    assert whole_batch(rows, None) is rows


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [0, 0], [2, 5, 1]])
def test_rows_of_all_sizes_are_gathered(processes, counts):
    expected = [(torch.arange(n * 2).reshape(-1, 2) + 100 * p).tolist() for p, n in enumerate(counts)]
    for parts in processes.run(len(counts), gathered, counts):
        assert [part.tolist() for part in parts] == expected


def gathered_as_given(group: Any, rows: list[torch.Tensor]) -> Any:
    return gather_rows(rows[mine(group)], group)


@pytest.mark.parametrize("other", [torch.ones(1, 3), torch.ones(1, 2, dtype=torch.float64), torch.ones(1)])
def test_rows_that_differ_are_refused_by_all(processes, other):
    outcomes = processes(3, gathered_as_given, [torch.ones(1, 2), torch.ones(4, 2), other])
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "rows: the processes have float32 [n, 2], float32 [n, 2], float" in str(outcomes[0])


@pytest.mark.parametrize("counts", [[3, 2], [4, 0], [2, 5, 1]])
def test_the_gradient_of_a_row_is_the_sum_over_processes(processes, counts):
    rows = [torch.randn(n, 3, dtype=torch.float64) for n in counts]
    alone = torch.cat(rows).requires_grad_()
    sum(alone.pow(2 + process).sum() for process in range(len(counts))).backward()
    for (whole, gradient), expected in zip(
        processes.run(len(counts), differentiated, rows), alone.grad.split(counts), strict=True
    ):
        assert torch.equal(whole, alone.detach())
        torch.testing.assert_close(gradient, expected)


def one_of_two(process: int, port: int, seconds: float, outcomes: Any) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=2, timeout=timedelta(seconds=seconds)
    )
    group = dist.group.WORLD
    together(group, lambda: None)
    if process == 1:
        os._exit(9)
    try:
        gather_rows(torch.ones(1, 2), group)
    except Exception as error:
        outcomes.put(error)


def test_a_lost_process_is_said_and_not_waited_for():
    context, port = multiprocessing.get_context("spawn"), free_port()
    outcomes = context.Queue()
    both = [context.Process(target=one_of_two, args=(p, port, 20.0, outcomes)) for p in range(2)]
    for process in both:
        process.start()
    error = outcomes.get(timeout=60)
    for process in both:
        process.join()
    assert type(error) is LostProcessError
    assert "of its 2 processes one has ended or did not answer" in str(error)
