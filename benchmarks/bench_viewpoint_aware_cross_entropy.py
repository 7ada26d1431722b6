"""Soft-label cross-entropy: ``0.1 * (L_y + L_v)`` against a copy of the logits and PyTorch's own losses."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness import Suite
from vareid_ext import reference_backend, viewpoint_aware_cross_entropy


def run_case(suite: Suite, N: int, K: int, V: int, dtype: torch.dtype, *, dense: bool, reference: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(N, K, generator=rng).to(suite.device, dtype).requires_grad_()
    s = torch.randn(N, K, V, generator=rng).to(suite.device, dtype).requires_grad_()
    identity = torch.randint(K, (N,), generator=rng).to(suite.device)
    viewpoint = torch.randint(V, (N,), generator=rng).to(suite.device)
    # One tensor of the same size, for the copies and for PyTorch's losses.
    joint = torch.randn(N, K * (V + 1), generator=rng).to(suite.device, dtype).requires_grad_()
    plain, out = joint.detach(), torch.empty_like(joint)
    target = torch.softmax(plain.float(), 1).to(dtype) if dense else None

    def drop_gradients() -> None:
        z.grad = s.grad = joint.grad = None

    def ours() -> None:
        L_y, L_v = viewpoint_aware_cross_entropy(z, s, identity, viewpoint)
        (0.1 * (L_y + L_v)).backward()

    @torch.no_grad()
    def forward() -> Any:
        return viewpoint_aware_cross_entropy(z, s, identity, viewpoint)

    def closed_form() -> None:
        with reference_backend():
            ours()

    def label_smoothed() -> None:
        (0.1 * functional.cross_entropy(joint, identity, label_smoothing=0.1)).backward()

    def soft_label() -> None:
        (0.1 * functional.cross_entropy(joint, target)).backward()

    contenders = {
        "ours": ours, "clone": plain.clone, "ours forward": forward, "exp into out": lambda: torch.exp(plain, out=out),
        "sum": plain.sum,
    }  # fmt: skip
    if reference:
        contenders["closed form"] = closed_form
        contenders["torch label-smoothed"] = label_smoothed
    if dense:
        contenders["torch soft-label"] = soft_label
    size = plain.numel() * plain.element_size()
    record = suite.case(
        f"B={N} K={K} V={V} ({K} + {K * V} classes) {str(dtype).removeprefix('torch.')}",
        contenders,
        bytes_moved={"ours": 3 * size, "clone": 2 * size, "ours forward": size, "exp into out": 2 * size, "sum": size},
        setup=drop_gradients,
    )
    if record is None:
        return
    median = {name: row["median_s"] for name, row in record["contenders"].items()}
    ratios = [("ours", "clone"), ("ours forward", "exp into out"), ("ours", "torch label-smoothed"),
              ("ours", "torch soft-label"), ("ours", "closed form")]  # fmt: skip
    record["ratios"] = {f"{a} / {b}": median[a] / median[b] for a, b in ratios if b in median}
    print("  " + ", ".join(f"{name} = {ratio:.2f}" for name, ratio in record["ratios"].items()))


def main() -> None:
    suite = Suite("bench_viewpoint_aware_cross_entropy", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 16, 100, 3, torch.float32, dense=True, reference=True)
    else:
        run_case(suite, 256, 751, 3, torch.float32, dense=True, reference=True)
        run_case(suite, 256, 2_500, 3, torch.float32, dense=False, reference=True)
        run_case(suite, 256, 7_500, 3, torch.float32, dense=False, reference=True)
        run_case(suite, 256, 25_000, 3, torch.float32, dense=False, reference=False)
        run_case(suite, 256, 75_000, 3, torch.float32, dense=False, reference=False)
        run_case(suite, 256, 25_000, 3, torch.bfloat16, dense=False, reference=False)
    suite.finish()


if __name__ == "__main__":
    main()
