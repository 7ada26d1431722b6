"""The benchmark harness: interleaved rounds, medians with their spread, GB/s and multiples of a plain copy.

A benchmark names its cases; everything else is here::

    suite = Suite("angular_center")
    suite.case("K=10000 D=2048", {"ours": f, "reference": g, "clone": h, "sum": s}, bytes_moved={"ours": 3 * n})
    suite.finish()

The contenders of one case run in turn, round after round, so that a slow spell of the machine hits all of them; what
is compared is the ratio of medians within the run. "clone" and "sum" are the machine's two ceilings (copying and
reading the inputs); "reference" is plain PyTorch.
"""

from __future__ import annotations

import os

# Before torch loads its OpenMP: spinning threads of one library steal the cores from another's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import vareid_ext
from vareid_ext.files.atomic import atomic_file

CEILINGS = ("clone", "sum")


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on: the device, the versions, the threads and how busy the machine is."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "vareid_ext": vareid_ext.__version__,
        "backends": vareid_ext.backends(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())


class Suite:
    """One benchmark: its command line, its cases, its table and its JSON file."""

    def __init__(self, name: str, *, description: str = "", rounds: int = 15, arguments: Any = None) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
        parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds for each case (default {rounds})")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
        parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
        parser.add_argument("--only", default="", help="run the cases whose name contains this text")
        parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
        parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
        self.arguments = parser.parse_args(arguments)
        if self.arguments.rounds < 1:
            parser.error(f"--rounds: {self.arguments.rounds} was given; at least 1 is needed")
        if self.arguments.threads:
            torch.set_num_threads(self.arguments.threads)
        self.name = name
        self.device = torch.device(self.arguments.device)
        self.quick: bool = self.arguments.quick
        self.environment = environment(self.device)
        self.results: list[dict[str, Any]] = []
        print(f"{name}: {self.environment['device']}, {self.environment['threads']} threads, "
              f"torch {self.environment['torch']}, vareid_ext {self.environment['vareid_ext']}, "
              f"load {self.environment['load_average'][0]}")  # fmt: skip
        if self.environment["load_average"][0] > 0.5:
            print("warning: the machine is not idle; medians may be off", file=sys.stderr)
        if os.environ["OMP_WAIT_POLICY"].lower() != "passive":
            print("warning: OMP_WAIT_POLICY is not passive; waiting threads may steal cores", file=sys.stderr)

    def _seconds(self, run: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        result = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        del result  # freed outside the timed span
        return seconds

    def case(
        self,
        name: str,
        contenders: Mapping[str, Callable[[], Any]],
        *,
        bytes_moved: Mapping[str, int] | None = None,
        setup: Callable[[], Any] | None = None,
        rounds: int | None = None,
    ) -> dict[str, Any] | None:
        """Run the contenders in turn and record them.

        Args:
            name: the case's sizes, for the table.
            contenders: name -> function; what it returns is freed after the clock stops.
            bytes_moved: name -> bytes that must move, for GB/s.
            setup: called before each timed call, untimed (dropping old gradients, say).
            rounds: in place of the command line's number.

        Returns:
            The case's record, or None if ``--only`` left it out.
        """
        if self.arguments.only not in name:
            return None
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        gc.collect()
        gc.disable()
        try:
            for index in range(-1, rounds or self.arguments.rounds):  # round -1 warms up
                for contender, run in contenders.items():
                    if setup is not None:
                        setup()
                    elapsed = self._seconds(run)
                    if index >= 0:
                        seconds[contender].append(elapsed)
        finally:
            gc.enable()
        record = {"case": name, "rounds": len(next(iter(seconds.values()))), "contenders": {}}
        medians = {contender: statistics.median(times) for contender, times in seconds.items()}
        for contender, times in seconds.items():
            row: dict[str, Any] = {"median_s": medians[contender], "min_s": min(times), "max_s": max(times)}
            for against in (*CEILINGS, "reference"):
                if against in medians and against != contender:
                    row[f"times_{against}"] = medians[contender] / medians[against]
            if bytes_moved and contender in bytes_moved:
                row["gigabytes_per_s"] = bytes_moved[contender] / medians[contender] / 1e9
            record["contenders"][contender] = row
        self.results.append(record)
        self._print(record)
        return record

    def _print(self, record: dict[str, Any]) -> None:
        print(f"\n{record['case']}  ({record['rounds']} rounds)")
        header = (
            f"  {'':<24}{'median ms':>11}{'min':>10}{'max':>10}{'GB/s':>8}{'x clone':>9}{'x sum':>8}{'x reference':>13}"
        )
        print(header)
        for contender, row in record["contenders"].items():
            optional = "".join(
                f"{row[key]:>{width}.{digits}f}" if key in row else " " * (width - 1) + "-"
                for key, width, digits in (
                    ("gigabytes_per_s", 8, 1), ("times_clone", 9, 2), ("times_sum", 8, 2), ("times_reference", 13, 3),
                )
            )  # fmt: skip
            times = "".join(
                f"{row[key] * 1e3:>{width}.2f}" for key, width in (("median_s", 11), ("min_s", 10), ("max_s", 10))
            )
            print(f"  {contender:<24}{times}{optional}")

    def finish(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self.arguments.output is not None:
            report = {"benchmark": self.name, "environment": self.environment, "cases": self.results}
            write_atomically(self.arguments.output, json.dumps(report, indent=2) + "\n")
            print(f"\nwritten to {self.arguments.output}")
