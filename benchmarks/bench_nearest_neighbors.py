"""Exact neighbours against the matrix product, and against product and ``torch.topk`` (which is not exact)."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from benchmarks.harness import Suite
from benchmarks.retrieval import features
from vareid_ext import nearest_neighbors, reference_backend
from vareid_ext.ops._byte_filter import ByteFilter


def run_case(suite: Suite, N: int, D: int, k: int) -> None:
    x = features(1, N - 1, D).feature.to(suite.device)
    squares = x.square().sum(1)

    def ours() -> Any:
        return nearest_neighbors(x, k=k)

    def one_sided() -> Any:
        return nearest_neighbors(x, x, k=k)

    def by_float32() -> Any:
        with mock.patch.object(ByteFilter, "pays", return_value=False):
            return nearest_neighbors(x, k=k)

    def product() -> Any:
        return x @ x.T

    def topk() -> Any:
        return torch.topk(squares[:, None] + squares - 2 * (x @ x.T), k, largest=False)

    def plain() -> Any:
        with reference_backend():
            return nearest_neighbors(x, k=k)

    contenders = {
        "ours": ours,
        "ours, x with x": one_sided,
        "ours, float32 filter": by_float32,
        "product": product,
        "product and topk": topk,
    }
    suite.case(f"N={N} D={D} k={k}", contenders, rounds=min(suite.arguments.rounds, 5))
    if N * N * D <= 1 << 31:
        suite.case(f"N={N} D={D} k={k}, plain PyTorch", {"ours": ours, "reference": plain}, rounds=1)


def main() -> None:
    suite = Suite("bench_nearest_neighbors", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 200, 32, 10)
    else:
        for D, k in ((256, 21), (2048, 21), (2048, 100)):
            run_case(suite, 4000, D, k)
        run_case(suite, 1000, 512, 21)
    suite.finish()


if __name__ == "__main__":
    main()
