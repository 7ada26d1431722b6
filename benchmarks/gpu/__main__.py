"""Runs the steps in the order of their worth, each in a process of its own and within its time, and reports at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import append_record, read_records
from benchmarks.gpu.report import write_report

ROOT = Path(__file__).resolve().parent.parent.parent
_POLL = 0.2  # seconds
_DRY_RUN_FACTOR = 5  # of the steps' times
_MODULE, _TESTS = ["-m"], ["-m", "pytest", "-p", "no:cacheprovider", "--no-header", "--tb=short"]


@dataclass(frozen=True)
class Step:
    """A program that leaves records.

    Attributes:
        name: of its file of records, and of its bit in the exit status.
        title: in the report.
        arguments: of Python.
        seconds: it may take in all.
        patience: seconds without a new record after which it hangs.
        optional: whether it may end without a check that passed.
    """

    name: str
    title: str
    arguments: list[str]
    seconds: float
    patience: float
    optional: bool = False


STEPS = (
    Step("machine", "Machine", [*_MODULE, "benchmarks.gpu.machine"], 40, 40),
    Step("kernels", "Every op's tests on the kernels", [*_TESTS, "tests/gpu/test_gpu_kernels.py"], 100, 40),
    Step("uses", "CuPy, streams, graphs, precision, compilation", [*_TESTS, "tests/gpu/test_gpu_uses.py"], 90, 60),
    Step("ceilings", "What the device can do at most", [*_MODULE, "benchmarks.gpu.ceilings"], 25, 15),
    Step("operators", "Every op: predicted, measured, plain PyTorch", [*_MODULE, "benchmarks.gpu.operators"], 110, 40),
    Step("jobs", "Whole jobs", [*_MODULE, "benchmarks.gpu.jobs"], 150, 90),
    Step("sanitizer", "compute-sanitizer", [*_MODULE, "benchmarks.gpu.sanitizer"], 120, 120, optional=True),
)  # fmt: skip


class Report:
    """What is known so far; every change is written to the folder."""

    def __init__(self, folder: Path, dry_run: bool, build_seconds: float) -> None:
        self._folder, self._started = folder, time.monotonic() - build_seconds
        self.steps: list[dict[str, Any]] = [
            {"name": "build", "title": "Build", "status": "passed", "why": "", "seconds": build_seconds, "records": []}
        ]  # fmt: skip
        self._dry_run = dry_run

    @property
    def seconds(self) -> float:
        """Since the build began."""
        return time.monotonic() - self._started

    def write(self) -> None:
        """Write both files."""
        write_report(self._folder, {"dry run": self._dry_run, "seconds": self.seconds, "steps": self.steps})


def _records(path: Path) -> list[dict[str, Any]]:
    return list(read_records(path).values())


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _watch(
    process: subprocess.Popen[bytes], path: Path, stop: float, patience: float, changed: Callable[[], None]
) -> str:
    """Wait for a process while its records come in; why it was ended, or ""."""
    size, news = -1, time.monotonic()
    try:
        while True:
            ended = process.poll() is not None
            now, found = time.monotonic(), path.stat().st_size if path.exists() else 0
            if found != size:
                size, news = found, now
                changed()
            if ended:
                return ""
            if now > stop:
                return "the time was up"
            if now - news > patience:
                return f"nothing happened for {patience:.0f} s"
            time.sleep(_POLL)
    finally:
        _stop(process)


def run_step(step: Step, path: Path, log: Any, stop: float, changed: Callable[[list[dict[str, Any]]], None]) -> str:
    """Run a step, again after every check that took its process along; why it did not come to its end, or ""."""
    environment = os.environ | {"VAREID_GPU_RECORDS": str(path)}
    stop = min(stop, time.monotonic() + step.seconds)
    while True:
        before = len(_records(path))
        process = subprocess.Popen(
            [sys.executable, *step.arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        why = _watch(process, path, stop, step.patience, lambda: changed(_records(path)))
        code = process.returncode
        if not why and code in (0, 1) and not any(r["status"] == "begun" for r in _records(path)):
            failed = any(r["status"] == "failed" for r in _records(path))
            return "" if code == 0 or failed else f"exit status {code}; the log says why"
        reason = why or (f"ended by signal {-code}" if code < 0 else f"ended with status {code}")
        for record in _records(path):
            if record["status"] == "begun":
                append_record(path, {"name": record["name"], "status": "failed", "why": reason})
        changed(_records(path))
        if time.monotonic() > stop or len(_records(path)) == before:
            return reason


def run_steps(report: Report, budget: float, steps: Mapping[int, Step], log: Any) -> int:
    """Run the steps as far as the time goes; the sum of the numbers of those that did not pass."""
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, step in steps.items():
            entry = {"name": step.name, "title": step.title, "status": "running", "why": "", "seconds": 0.0,
                     "records": []}  # fmt: skip
            report.steps.append(entry)
            began = time.monotonic()

            def changed(records: list[dict[str, Any]], entry: dict[str, Any] = entry, began: float = began) -> None:
                entry["records"], entry["seconds"] = records, time.monotonic() - began
                report.write()

            left = budget - report.seconds
            if left <= 0:
                entry["why"] = "no time was left"
            else:
                path = Path(folder) / f"{step.name}.jsonl"
                entry["why"] = run_step(step, path, log, began + left, changed)
                changed(_records(path))
            statuses = [record["status"] for record in entry["records"]]
            if not entry["why"] and "passed" not in statuses and not step.optional:
                entry["why"] = "nothing was checked"
            if entry["why"] or "failed" in statuses:
                entry["status"] = "failed"
                status += number
            else:
                entry["status"] = "passed" if "passed" in statuses else "skipped"
            report.write()
            print(f"{entry['status']:<8}{step.title} ({entry['seconds']:.0f} s) {entry['why']}", flush=True)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 if everything passed, else the sum of 2 for the machine, 4 for the kernels' tests, and so on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("output", type=Path, help="folder of gpu_report.json, gpu_report.md and log.txt")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=480, help="for all steps and the build (default 480)")
    parser.add_argument("--build-seconds", type=float, default=0, help="that the build has taken")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], help="run these steps only")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["VAREID_GPU_DRY_RUN"] = "1" if options.dry_run else ""
    steps = {2**bit: s for bit, s in enumerate(STEPS, start=1) if options.only is None or s.name in options.only}
    if options.dry_run:  # on a machine that may be busy
        options.seconds *= _DRY_RUN_FACTOR
        steps = {
            bit: replace(s, seconds=s.seconds * _DRY_RUN_FACTOR, patience=s.patience * _DRY_RUN_FACTOR)
            for bit, s in steps.items()
        }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the step's processes end too
    report = Report(options.output, options.dry_run, options.build_seconds)
    with (options.output / "log.txt").open("ab") as log:
        status = run_steps(report, options.seconds, steps, log)
    print(f"written: {options.output / 'gpu_report.json'}, {options.output / 'gpu_report.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
