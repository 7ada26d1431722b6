"""Step: the machine, the versions, and whether the kernels run at all."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

import vareid_ext
from benchmarks.gpu.records import Records
from benchmarks.gpu.step import DEVICE, DRY_RUN
from benchmarks.harness import environment


def describe() -> dict[str, Any]:
    """What every number depends on."""
    facts = {name: str(value) for name, value in environment(DEVICE).items()}
    if DRY_RUN:
        return {**facts, "dry run": "tiny sizes on the CPU; these numbers say nothing about a GPU"}
    properties = torch.cuda.get_device_properties(DEVICE)
    facts["capability"] = f"{properties.major}.{properties.minor}"
    facts["multiprocessors"] = str(properties.multi_processor_count)
    facts["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
    if shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
        facts[fields.replace(",", ", ")] = said.strip().splitlines()[0] if said.strip() else "nvidia-smi says nothing"
    return facts


def kernels_run() -> None:
    """Raises the reason where plain PyTorch would run in the kernels' place."""
    reason = vareid_ext.backends()[DEVICE.type]
    assert reason == "native", reason


def main() -> None:
    records = Records()
    records.check("environment", describe)
    records.check("native kernels", kernels_run)


if __name__ == "__main__":
    main()
