"""Ranking metrics from a distance matrix: ``evaluate_ranking`` against reading the matrix once (``tensor.sum()``)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Suite
from vareid_ext import evaluate_ranking, reference_backend


def run_case(
    suite: Suite,
    Q: int,
    G: int,
    identities: int,
    dtype: torch.dtype,
    *,
    separated: bool = False,
    reference: bool = True,
) -> None:
    """Random distances are the slow case: with separated ones most images come after every match."""
    generator = torch.Generator().manual_seed(0)
    query_identity = torch.randint(0, identities, (Q,), generator=generator)
    gallery_identity = torch.randint(0, identities, (G,), generator=generator).sort().values
    cameras = [torch.randint(0, 6, (size,), generator=generator) for size in (Q, G)]
    distances = torch.rand(Q, G, generator=generator)
    if separated:
        distances += 0.7 * (query_identity[:, None] != gallery_identity[None])
    distances = distances.to(suite.device, dtype)
    labels = [label.to(suite.device) for label in (query_identity, gallery_identity, *cameras)]

    def ours() -> Any:
        return evaluate_ranking(distances, *labels)

    def total() -> Any:
        return distances.sum()

    def plain() -> Any:
        with reference_backend():
            return evaluate_ranking(distances, *labels)

    kind = f"{'separated' if separated else 'random'} {str(dtype).removeprefix('torch.')}"
    suite.case(
        f"Q={Q} G={G} matches={G / identities:.0f} {kind}",
        {"ours": ours, "sum": total},
        bytes_moved=dict.fromkeys(("ours", "sum"), distances.numel() * distances.element_size()),
    )
    if reference:
        suite.case(f"Q={Q} G={G} against plain PyTorch", {"ours": ours, "reference": plain}, rounds=1)


def main() -> None:
    suite = Suite("bench_ranking", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 50, 400, 20, torch.float32)
    else:
        run_case(suite, 3368, 15913, 750, torch.float32)
        for identities in (5000, 300, 100, 20):
            run_case(suite, 3368, 15913, identities, torch.float32, reference=False)
        run_case(suite, 3368, 15913, 750, torch.float32, separated=True, reference=False)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            run_case(suite, 3368, 15913, 750, dtype, reference=False)
    suite.finish()


if __name__ == "__main__":
    main()
