"""Step: compute-sanitizer over one small call of every kernel (tests/cuda_on_cpu/representative.py), tool by tool.

The tools run side by side: most of their time is spent by one processor core. PyTorch's caching of memory is switched
off, so that each tensor is an allocation of its own, with an end and without older contents.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import Records, Skip
from benchmarks.gpu.step import DEVICE, DRY_RUN, check_native

_OURS = "vareid"  # in the mangled name of every kernel of this project, and of no other
# What other kernels write is memory that has been written: initcheck has to see them all.
_TOOLS = {
    "memcheck": ["--kernel-name", f"kns={_OURS}"],
    "racecheck": ["--kernel-name", f"kns={_OURS}"],
    "initcheck": [],
}
_UNSUPPORTED = "not supported"  # what the tool says of a GPU or a runtime that it cannot work with


def find_sanitizer() -> str | None:
    """The tool's path: on PATH, or in a toolkit's usual places."""
    beside_nvcc = Path(os.path.realpath(shutil.which("nvcc") or "/")).parent
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(
        map(str, (beside_nvcc, "/usr/local/cuda/bin", "/opt/cuda/bin"))
    ))  # fmt: skip


def run_tool(tool: str, options: list[str]) -> dict[str, Any]:
    """All calls under one tool; raises with its first finding."""
    command = [sys.executable, "-m", "benchmarks.gpu.sanitizer", "--calls"]
    if not DRY_RUN:
        sanitizer = find_sanitizer()
        if sanitizer is None:
            raise Skip("compute-sanitizer is not here")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *options, *command]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    said = [line.lstrip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
    if done.returncode and any(_UNSUPPORTED in line.lower() for line in said):
        raise Skip(next(line for line in said if _UNSUPPORTED in line.lower()))
    assert done.returncode == 0, next((line for line in said[1:] if line), f"exit status {done.returncode}")
    return {"said": said[-1]} if said else {}


def make_calls() -> None:
    """Every representative call, forward and backward."""
    check_native()
    import torch

    from tests.cuda_on_cpu.representative import REPRESENTATIVE

    for shapes in REPRESENTATIVE.values():
        for shape in shapes:
            shape.call(DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    if "--calls" in sys.argv:
        make_calls()
        return
    records = Records()
    with ThreadPoolExecutor() as pool:
        for tool, options in {"calls": []}.items() if DRY_RUN else _TOOLS.items():
            pool.submit(records.check, tool, lambda tool=tool, options=options: run_tool(tool, options))


if __name__ == "__main__":
    main()
