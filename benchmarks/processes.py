"""Retrieval over some processes with one thread each, against one process with one thread.

``python -m benchmarks.processes --size 10000 990000 256 --topk 100`` compares the neighbours of all rows among
themselves and re-ranking: seconds, CPU seconds, memory at the peak beyond features and result, bytes sent, and whether
all results are those of one process. Features are random with the structure that features of people have; the processes
read their rows from a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import environment, write_atomically
from benchmarks.retrieval import features
from vareid_ext import k_reciprocal_rerank, nearest_neighbors
from vareid_ext._processes import share
from vareid_ext.retrieval import rerank_plan

_TASKS = ("neighbors", "rerank")
SETTINGS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _task(task: str, queries: int, topk: int) -> Callable[..., Any]:
    if task == "neighbors":
        return lambda rows, group: nearest_neighbors(rows, k=topk, group=group)
    return lambda rows, group: k_reciprocal_rerank(rows[:queries], rows[queries:], topk=topk, group=group)


def _codes(distance: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A number for each row's distances and indices, bit by bit."""
    odd = torch.randint(-(2**62), 2**62, (2, index.shape[1]), generator=torch.Generator().manual_seed(0)) * 2 + 1
    parts = [
        (rows * odd[0]).sum(1) + (values.view(torch.int32) * odd[1]).sum(1)
        for values, rows in zip(distance.split(4096), index.split(4096), strict=True)
    ]
    return torch.cat([odd.new_empty(0), *parts])


def work(process: int, processes: int, port: int, path: str, queries: int, task: str, topk: int, out: Any) -> None:
    """One process: prints nothing, puts what it measured and the codes of its results."""
    torch.set_num_threads(1)
    whole = np.load(path, mmap_mode="r")
    ranges = [share(queries, process, processes), share(len(whole) - queries, process, processes)]
    (q0, q1), (g0, g1) = ranges
    rows = torch.from_numpy(np.concatenate([whole[q0:q1], whole[queries + g0 : queries + g1]]))
    if task == "neighbors":
        begin, end = share(len(whole), process, processes)
        rows = torch.from_numpy(whole[begin:end].copy())
    run, group = _task(task, q1 - q0, topk), None
    sent: list[int] = []
    batch = dist.batch_isend_irecv
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=processes,
            timeout=timedelta(hours=1),
        )  # fmt: skip
        group = dist.group.WORLD

    def counted(operations: Any) -> Any:
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch(operations)

    dist.batch_isend_irecv = counted
    small = _task(task, 50, 10)  # libraries' own buffers exist
    small(torch.randn(400, rows.shape[1]), group)
    torch.mm(torch.randn(1024, rows.shape[1]), torch.randn(rows.shape[1], 1024))
    sent.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    memory, start, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    distance, index = run(rows, group)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    result = distance.nbytes + index.nbytes
    measured = {
        "seconds": seconds, "cpu_seconds": cpu, "bytes_sent": sum(sent),
        "bytes_beyond": _memory("VmHWM") - memory - result,
    }  # fmt: skip
    out.put((process, measured, _codes(distance, index).numpy()))


def run_case(path: str, queries: int, task: str, topk: int, processes: int) -> tuple[list[dict[str, float]], Any]:
    """What each process measured, and the codes of all results in order."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = context.Queue()
    arguments = processes, port, path, queries, task, topk, out
    workers = [context.Process(target=work, args=(process, *arguments), daemon=True) for process in range(processes)]
    for worker in workers:
        worker.start()
    results = []
    while len(results) < processes:
        try:
            results.append(out.get(timeout=5))
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                for worker in workers:
                    worker.terminate()
                raise SystemExit("a process failed") from None
    for worker in workers:
        worker.join()
    results.sort(key=lambda result: result[0])
    return [measured for _, measured, _ in results], np.concatenate([codes for *_, codes in results])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--size", nargs=3, type=int, default=(1000, 29000, 256), metavar=("Q", "G", "D"))
    parser.add_argument("--topk", type=int, default=100, help="neighbours and best gallery rows (default 100)")
    parser.add_argument("--processes", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--only", choices=_TASKS, help="one of the two")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to see that it runs")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    Q, G, D = (40, 360, 32) if arguments.quick else arguments.size
    topk = min(arguments.topk, G)
    os.environ.update(SETTINGS)  # of the processes that are begun: one thread, and memory given back when it is freed
    facts = environment(torch.device("cpu"))
    print(f"processes: {facts['device']}, torch {facts['torch']}, load {facts['load_average'][0]}")
    if facts["load_average"][0] > 0.5:
        print("warning: the machine is not idle; seconds may be off, CPU seconds less", file=sys.stderr)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "features.npy")
        np.save(path, features(Q, G, D).feature.numpy())
        for task in _TASKS if arguments.only is None else (arguments.only,):
            print(f"\n{task}: Q={Q} G={G} D={D} topk={topk}")
            alone, expected = run_case(path, Q, task, topk, 1)
            several, found = run_case(path, Q, task, topk, arguments.processes)
            for measured in (*alone, *several):
                print(f"  {measured['seconds']:9.1f} s, {measured['cpu_seconds']:9.1f} CPU s, "
                      f"{measured['bytes_beyond'] / 2**20:8.0f} MiB beyond features and result, "
                      f"{measured['bytes_sent'] / 2**20:8.1f} MiB sent")  # fmt: skip
            if task == "rerank":
                for processes in (1, arguments.processes):
                    plan = rerank_plan(Q, G, D, topk=topk, processes=processes)
                    print(f"  planned for each of {processes}: {plan.peak / 2**20:.0f} MiB, at most "
                          f"{plan.sent / 2**20:.1f} MiB sent")  # fmt: skip
            for unit in ("seconds", "cpu_seconds"):
                ratio = alone[0][unit] / max(measured[unit] for measured in several)
                print(f"  {ratio:.2f} times as fast as one process by {unit.replace('_', ' ')}")
            print("  the same results" if np.array_equal(expected, found) else "  OTHER RESULTS", flush=True)
            cases.append({"case": f"{task} Q={Q} G={G} D={D} topk={topk}", "one": alone, "several": several})
    if arguments.output is not None:
        report = {"benchmark": "processes", "environment": facts, "cases": cases}
        write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")
        print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
