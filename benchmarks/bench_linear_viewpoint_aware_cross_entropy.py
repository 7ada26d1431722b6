"""Losses from features: against the bare matrix products, the dense path, and public peers where installed.

The bare products are the three of each head (logits, gradient of the feature, gradient of the centres), each allocating
its output. The memory is what a process of its own holds at its peak beyond the inputs and their gradients.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Suite
from vareid_ext import linear_viewpoint_aware_cross_entropy, viewpoint_aware_cross_entropy


class Case:
    """The tensors of one case, and what runs on them."""

    def __init__(self, device: torch.device, B: int, D: int, K: int, V: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.feature = torch.randn(B, D, generator=rng).to(device).requires_grad_()
        self.W = torch.empty(K, D).normal_(std=0.02, generator=rng).to(device).requires_grad_()
        self.U = torch.empty(K, V, D).normal_(std=0.02, generator=rng).to(device).requires_grad_()
        self.labels = (
            torch.randint(K, (B,), generator=rng).to(device),
            torch.randint(V, (B,), generator=rng).to(device),
        )

    def drop_gradients(self) -> None:
        self.feature.grad = self.W.grad = self.U.grad = None

    def ours(self) -> None:
        L_y, L_v = linear_viewpoint_aware_cross_entropy(self.feature, self.W, self.U, *self.labels)
        (L_y + 0.3 * L_v).backward()

    def normalized(self) -> None:
        L_y, L_v = linear_viewpoint_aware_cross_entropy(
            self.feature, self.W, self.U, *self.labels, normalize=True, scale=16.0
        )
        (L_y + 0.3 * L_v).backward()

    def step(self) -> None:
        self.drop_gradients()
        self.ours()
        torch.optim.SGD([self.W, self.U], lr=0.1, foreach=False).step()

    def dense(self) -> None:
        (B, _), (K, V, _) = self.feature.shape, self.U.shape
        z = self.feature @ self.W.T
        s = (self.feature @ self.U.flatten(0, 1).T).view(B, K, V)
        L_y, L_v = viewpoint_aware_cross_entropy(z, s, *self.labels)
        (L_y + 0.3 * L_v).backward()

    @torch.no_grad()
    def products(self) -> Any:
        kept = []
        for centers in (self.W, self.U.flatten(0, 1)):
            logits = self.feature @ centers.T
            kept.append((logits @ centers, logits.T @ self.feature))
        return kept

    def liger(self) -> None:
        """Liger-Kernel's fused linear cross-entropy, hard labels, of the identity head and the joint head."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        identity, viewpoint = self.labels
        joint = identity * self.U.shape[1] + viewpoint
        (loss(self.W, self.feature, identity) + 0.3 * loss(self.U.flatten(0, 1), self.feature, joint)).backward()


# The contenders whose memory is measured, by their names in the table.
CONTENDERS: dict[str, Callable[[Case], None]] = {
    "ours": Case.ours, "ours, SGD step": Case.step, "ours, normalized": Case.normalized, "dense": Case.dense,
    "liger": Case.liger,
}  # fmt: skip


def measure_memory(case: Case, run: Callable[[], None]) -> float:
    """MiB at the peak of one run beyond inputs and gradients."""
    gradients = sum(x.numel() * x.element_size() for x in (case.feature, case.W, case.U))
    if case.feature.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free pages that a gradient could take again would hide as much of the peak
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return (_status_bytes("VmHWM") - before - gradients) / 2**20


def memory_of_new_process(name: str, device: torch.device, sizes: tuple[int, int, int, int]) -> float:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--memory", name, str(device), *map(str, sizes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def print_memory(name: str, device: str, *sizes: str) -> None:
    """What the new process does."""
    CONTENDERS[name](Case(torch.device(device), 64, 32, 8, 2))  # the libraries' own buffers exist
    case = Case(torch.device(device), *map(int, sizes))
    print(measure_memory(case, lambda: CONTENDERS[name](case)))


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run_case(suite: Suite, B: int, D: int, K: int, V: int, *, dense: bool = True, rounds: int | None = None) -> None:
    case = Case(suite.device, B, D, K, V)
    contenders: dict[str, Callable[[], Any]] = {"ours": case.ours, "bare products": case.products}
    if dense:
        contenders["ours, normalized"] = case.normalized
        contenders["dense"] = case.dense
    else:
        contenders["ours, SGD step"] = case.step
    if suite.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        contenders["liger"] = case.liger
    record = suite.case(f"B={B} D={D} K={K} V={V} float32", contenders, setup=case.drop_gradients, rounds=rounds)
    if record is None:
        return
    median = {name: row["median_s"] for name, row in record["contenders"].items()}
    record["ratios"] = {f"{name} / bare products": median[name] / median["bare products"] for name in median}
    print("  " + ", ".join(f"{name} = {ratio:.2f}" for name, ratio in record["ratios"].items()))
    if suite.device.type == "cuda" or sys.platform == "linux":
        del case, contenders  # the new processes need the memory
        record["mebibytes_beyond"] = {
            name: memory_of_new_process(name, suite.device, (B, D, K, V)) for name in median if name in CONTENDERS
        }
        print("  MiB beyond inputs and gradients: "
              + ", ".join(f"{name} {size:.0f}" for name, size in record["mebibytes_beyond"].items()))  # fmt: skip


def main() -> None:
    if "--memory" in sys.argv:
        print_memory(*sys.argv[sys.argv.index("--memory") + 1 :])
        return
    suite = Suite("bench_linear_viewpoint_aware_cross_entropy", description=__doc__ or "", rounds=5)
    if suite.quick:
        run_case(suite, 16, 64, 200, 3)
    else:
        run_case(suite, 96, 2048, 751, 3, rounds=20)
        run_case(suite, 256, 2048, 10_000, 3)
        run_case(suite, 256, 2048, 100_000, 3, rounds=3)
        run_case(suite, 256, 256, 1_000_000, 3, dense=False, rounds=3)
    suite.finish()


if __name__ == "__main__":
    main()
