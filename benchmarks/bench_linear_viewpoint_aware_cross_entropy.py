"""Losses from features: against the bare matrix products, the dense path, and public peers where installed.

The bare products are the three of each head (logits, gradient of the feature, gradient of the centres), each allocating
its output. The memory is what the process holds at its peak beyond the inputs and their gradients.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Suite
from vareid_ext import linear_viewpoint_aware_cross_entropy, viewpoint_aware_cross_entropy


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def measure_memory(case: Case, run: Callable[[], None]) -> float:
    """MiB at the peak of one run beyond inputs and gradients."""
    case.drop_gradients()
    gradients = sum(x.numel() * x.element_size() for x in (case.feature, case.W, case.U))
    if case.feature.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
    before = _resident_bytes()
    if _peak_bytes() > before + 2**26:
        _reset_peak()
    run()
    return (_status_bytes("VmHWM") - before - gradients) / 2**20


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def run_case(suite: Suite, B: int, D: int, K: int, V: int, *, dense: bool = True, rounds: int | None = None) -> None:
    case = Case(suite.device, B, D, K, V)
    contenders: dict[str, Callable[[], Any]] = {"ours": case.ours, "bare products": case.products}
    if dense:
        contenders["ours, normalized"] = case.normalized
        contenders["dense"] = case.dense
    if suite.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        contenders["liger"] = case.liger
    record = suite.case(f"B={B} D={D} K={K} V={V} float32", contenders, setup=case.drop_gradients, rounds=rounds)
    if record is None:
        return
    median = {name: row["median_s"] for name, row in record["contenders"].items()}
    record["ratios"] = {f"{name} / bare products": median[name] / median["bare products"] for name in median}
    print("  " + ", ".join(f"{name} = {ratio:.2f}" for name, ratio in record["ratios"].items()))
    if suite.device.type == "cuda" or sys.platform == "linux":
        record["mebibytes_beyond"] = {
            name: measure_memory(case, run) for name, run in contenders.items() if name != "bare products"
        }
        print("  MiB beyond inputs and gradients: "
              + ", ".join(f"{name} {size:.0f}" for name, size in record["mebibytes_beyond"].items()))  # fmt: skip


def main() -> None:
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
