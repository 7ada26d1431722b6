"""One command for a person with a GPU: correctness, times, GB/s and ratios, as gpu_report.json and gpu_report.md.

    python -m benchmarks.gpu_report

Runs tests/gpu on the real kernels, measures the copy bandwidth, and times every operator (CUDA events, caches flushed
before each call, contenders in turn) against plain PyTorch, eager and compiled. Without a usable GPU it says why and
ends with status 2; ``--device cpu`` is a dry run that shows the report is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vareid_ext
from benchmarks.harness import environment, write_atomically
from vareid_ext.reference.angular_center import angular_center
from vareid_ext.reference.viewpoint_aware_cross_entropy import soft_target

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    ``eager`` is plain PyTorch as one would write it and also what is compiled; None where the operator has no such
    counterpart. ``bytes_moved`` is what ours must move at least, for GB/s; 0 where arithmetic bounds it.
    """

    operator: str
    size: str
    ours: Callable[[], Any]
    eager: Callable[[], Any] | None
    bytes_moved: int = 0
    compiled: bool = True
    leaves: tuple[Tensor, ...] = field(default=())


def _normal(device: torch.device, *size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device)


def _angular_center(device: torch.device, K: int, V: int, D: int, dtype: torch.dtype) -> Case:
    W = _normal(device, K, D).to(dtype).requires_grad_()
    U = _normal(device, K, V, D, seed=1).to(dtype).requires_grad_()

    def ours() -> None:
        vareid_ext.angular_center_regularizer(W, U).backward()

    def eager() -> Tensor:
        return angular_center(W, U)

    size = f"K {K}, V {V}, D {D}, {_name(dtype)}"
    return Case("angular_center", size, ours, eager, 3 * (W.nbytes + U.nbytes), leaves=(W, U))


def _cross_entropy(device: torch.device, N: int, K: int, V: int, dtype: torch.dtype) -> Case:
    rng = torch.Generator().manual_seed(2)
    z = _normal(device, N, K).to(dtype).requires_grad_()
    s = _normal(device, N, K, V, seed=1).to(dtype).requires_grad_()
    identity = torch.randint(K, (N,), generator=rng).to(device)
    viewpoint = torch.randint(V, (N,), generator=rng).to(device)

    def ours() -> None:
        L_y, L_v = vareid_ext.viewpoint_aware_cross_entropy(z, s, identity, viewpoint)
        (L_y + L_v).backward()

    def eager() -> Tensor:
        joint = s.flatten(1)
        with torch.no_grad():
            identity_target = soft_target(z[:, :, None], identity)[:, :, 0]
            joint_target = soft_target(s, identity, viewpoint).flatten(1)
        return torch.nn.functional.cross_entropy(z.float(), identity_target) + torch.nn.functional.cross_entropy(
            joint.float(), joint_target
        )

    size = f"N {N}, K {K}, V {V}, {_name(dtype)}"
    return Case("viewpoint_aware_cross_entropy", size, ours, eager, 3 * (z.nbytes + s.nbytes), leaves=(z, s))


def _pairwise_distance(device: torch.device, M: int, N: int, D: int) -> Case:
    x, y = _normal(device, M, D), _normal(device, N, D, seed=1)
    return Case(
        "pairwise_distance", f"{M} x {N}, D {D}, float32", lambda: vareid_ext.pairwise_distance(x, y),
        lambda: torch.cdist(x, y), 4 * (M * N + (M + N) * D),
    )  # fmt: skip


def _nearest_neighbors(device: torch.device, M: int, N: int, D: int, k: int) -> Case:
    x, y = _normal(device, M, D), _normal(device, N, D, seed=1)
    return Case(
        "nearest_neighbors", f"{M} x {N}, D {D}, k {k}, float32", lambda: vareid_ext.nearest_neighbors(x, y, k=k),
        lambda: torch.cdist(x, y).topk(k, largest=False), compiled=False,
    )  # fmt: skip


def _rerank(device: torch.device, Q: int, G: int, D: int) -> Case:
    query, gallery = _normal(device, Q, D), _normal(device, G, D, seed=1)

    def ours() -> Any:
        return vareid_ext.k_reciprocal_rerank(query, gallery)

    def eager() -> Any:
        with vareid_ext.reference_backend():
            return ours()

    return Case("k_reciprocal_rerank", f"{Q} + {G}, D {D}, float32", ours, eager, compiled=False)


def _ranking(device: torch.device, Q: int, G: int, identities: int) -> Case:
    rng = torch.Generator().manual_seed(3)
    distances = torch.rand(Q, G, generator=rng).to(device)
    query, gallery = (torch.randint(identities, (n,), generator=rng).to(device) for n in (Q, G))
    query_camera, gallery_camera = (torch.randint(6, (n,), generator=rng).to(device) for n in (Q, G))

    def ours() -> Any:
        return vareid_ext.evaluate_ranking(distances, query, gallery, query_camera, gallery_camera)

    def eager() -> Any:
        with vareid_ext.reference_backend():
            return ours()

    return Case("ranking", f"{Q} x {G}, {identities} identities", ours, eager, distances.nbytes, compiled=False)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The operators at the sizes of the report; each case's arrays live until the next is asked for."""
    f32, bf16 = torch.float32, torch.bfloat16
    if quick:
        yield _angular_center(device, 16, 3, 64, f32)
        yield _cross_entropy(device, 8, 20, 3, f32)
        yield _pairwise_distance(device, 30, 40, 16)
        yield _nearest_neighbors(device, 30, 40, 16, 5)
        yield _rerank(device, 20, 60, 16)
        yield _ranking(device, 20, 60, 5)
        return
    for dtype in (f32, bf16):
        yield _angular_center(device, 751, 3, 2048, dtype)
        yield _angular_center(device, 10_000, 3, 2048, dtype)
        yield _cross_entropy(device, 256, 751, 3, dtype)
        yield _cross_entropy(device, 256, 25_000, 3, dtype)
    yield _pairwise_distance(device, 3368, 15_913, 2048)
    yield _nearest_neighbors(device, 3368, 15_913, 2048, 50)
    yield _rerank(device, 3368, 15_913, 2048)
    yield _ranking(device, 3368, 15_913, 751)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Clock:
    """Times one call: CUDA events after a flush of the caches, or the wall clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one call."""
        if self._flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Median seconds of each, run in turn; three rounds warm up."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for index in range(-3, rounds):
            for name, run in contenders.items():
                elapsed = self.seconds(run)
                if index >= 0:
                    times[name].append(elapsed)
        return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: torch.device, clock: Clock, rounds: int, quick: bool) -> float:
    """GB/s of a large device-to-device copy, read and write counted."""
    source = torch.empty((1 if quick else 512) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.medians({"copy": lambda: target.copy_(source)}, rounds)["copy"] / 1e9


def measure(case: Case, clock: Clock, rounds: int, copy: float, compile_eager: bool) -> dict[str, Any]:
    """Times and ratios of a case."""

    def with_backward(loss: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for leaf in case.leaves:
                leaf.grad = None
            result = loss()
            if case.leaves and result is not None:
                result.backward()

        return run

    contenders = {"ours": with_backward(case.ours)}
    record: dict[str, Any] = {"operator": case.operator, "size": case.size}
    if case.eager is not None:
        contenders["eager"] = with_backward(case.eager)
        if case.compiled and compile_eager:
            contenders["compiled"] = with_backward(torch.compile(case.eager, dynamic=False))
    record["milliseconds"] = {k: v * 1e3 for k, v in clock.medians(contenders, rounds).items()}
    ours = record["milliseconds"]["ours"]
    record["times_as_fast"] = {k: v / ours for k, v in record["milliseconds"].items() if k != "ours"}
    if case.bytes_moved:
        record["gigabytes_per_s"] = case.bytes_moved / (ours / 1e3) / 1e9
        record["of_copy"] = record["gigabytes_per_s"] / copy
    return record


def run_tests() -> dict[str, Any]:
    """Counts of tests/gpu and the names of those that fail."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return {"status": "not run: tests/gpu is not here (run in the source folder)"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", f"--junitxml={log}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not log.exists():
            return {"status": f"pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"}
        tests = list(xml.etree.ElementTree.parse(log).iter("testcase"))
    failed = [t.get("name", "?") for t in tests if t.find("failure") is not None or t.find("error") is not None]
    skipped = sum(t.find("skipped") is not None for t in tests)
    passed = len(tests) - len(failed) - skipped
    return {"status": "failed" if failed else "passed" if passed else "nothing ran", "passed": passed,
            "skipped": skipped, "failed": failed}  # fmt: skip


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What the times depend on, beside benchmarks.harness.environment."""
    if device.type != "cuda":
        return {"dry run": "these are times of the CPU and say nothing about a GPU"}
    properties = torch.cuda.get_device_properties(device)
    facts = {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
             "capability": f"{properties.major}.{properties.minor}", "count": torch.cuda.device_count()}  # fmt: skip
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
        facts["driver, clocks"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return facts


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    env, tests = report["environment"], report["tests"]
    lines = ["# GPU report", "", *(f"- {k}: {v}" for k, v in {**env, **report["gpu"]}.items()), ""]
    lines += ["## Correctness", "", f"tests/gpu: {tests['status']}"]
    if "passed" in tests:
        lines[-1] += f" ({tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed)"
        lines += [f"- failed: {name}" for name in tests["failed"]]
    lines += ["", "## Times", "", f"Measured copy: {report['copy_gigabytes_per_s']:.0f} GB/s. Medians.", ""]
    lines += ["| operator | size | ms | GB/s | of the copy | eager ms | eager / ours | compiled ms | compiled / ours |",
              "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in report["cases"]:
        ms, fast = row["milliseconds"], row["times_as_fast"]
        cells = [f"{row['gigabytes_per_s']:.0f}", f"{row['of_copy']:.0%}"] if "of_copy" in row else ["-", "-"]
        for name in ("eager", "compiled"):
            cells += [f"{ms[name]:.3f}", f"{fast[name]:.2f}"] if name in ms else ["-", "-"]
        lines.append(f"| {row['operator']} | {row['size']} | {ms['ours']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def missing_reason(device: torch.device) -> str:
    """Why nothing can be measured on the device, or ""."""
    if device.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    reason = vareid_ext.backends()["cuda"]
    return "" if reason == "native" else reason


def main(arguments: list[str] | None = None) -> int:
    """Writes both files; 0 if all is well, 1 if a test failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the two files (default: here)")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a dry run (default cuda:0)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of each case (default 30)")
    parser.add_argument("--quick", action="store_true", help="small sizes, no compilation")
    parser.add_argument("--no-tests", action="store_true", help="do not run tests/gpu")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} was given; at least 1 is needed")
    device = torch.device(options.device)
    reason = missing_reason(device)
    if reason:
        print(f"no report: {reason}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"environment": environment(device), "gpu": gpu_facts(device)}
    report["tests"] = {"status": "not run (--no-tests)"} if options.no_tests else run_tests()
    print(f"tests/gpu: {report['tests']['status']}")
    clock = Clock(device)
    copy = report["copy_gigabytes_per_s"] = copy_bandwidth(device, clock, options.rounds, options.quick)
    report["cases"] = []
    for case in cases(device, options.quick):
        print(f"{case.operator}: {case.size}", flush=True)
        report["cases"].append(measure(case, clock, options.rounds, copy, not options.quick))
    write_atomically(options.output / "gpu_report.json", json.dumps(report, indent=2) + os.linesep)
    write_atomically(options.output / "gpu_report.md", markdown(report))
    print(f"written: {options.output / 'gpu_report.json'}, {options.output / 'gpu_report.md'}")
    return 1 if report["tests"]["status"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
