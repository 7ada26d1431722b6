"""All pairs' distances against the matrix product alone and ``torch.cdist``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Suite
from vareid_ext import pairwise_distance, reference_backend


def run_case(suite: Suite, M: int, N: int, D: int, metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, D, generator=generator).to(suite.device) for rows in (M, N))

    def ours() -> Any:
        return pairwise_distance(x, y, metric=metric)

    def itself() -> Any:
        return pairwise_distance(x, metric=metric)

    def product() -> Any:
        return x @ y.T

    def cdist() -> Any:
        return torch.cdist(x, y)

    def plain() -> Any:
        with reference_backend():
            return pairwise_distance(x, y, metric=metric)

    contenders = {"ours": ours, "ours, x with itself": itself, "product": product, "torch.cdist": cdist}
    suite.case(f"M={M} N={N} D={D} {metric}", contenders, rounds=min(suite.arguments.rounds, 5))
    if M * N * D <= 1 << 31:
        suite.case(f"M={M} N={N} D={D} {metric}, plain PyTorch", {"ours": ours, "reference": plain}, rounds=1)


def main() -> None:
    suite = Suite("bench_pairwise_distance", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 60, 80, 32, "euclidean")
    else:
        for metric in ("euclidean", "sqeuclidean", "cosine"):
            run_case(suite, 1000, 1000, 2048, metric)
        run_case(suite, 4000, 4000, 2048, "euclidean")
        run_case(suite, 300, 19732, 28, "euclidean")  # little work in each block: threads that wait show here
    suite.finish()


if __name__ == "__main__":
    main()
