"""The stages of re-ranking after the neighbour lists, each against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Suite
from benchmarks.retrieval import features
from vareid_ext import reference_backend
from vareid_ext.ops import k_reciprocal as op
from vareid_ext.ops.nearest_neighbors import joint_neighbors


def run_case(suite: Suite, Q: int, G: int, D: int, k1: int, k2: int) -> None:
    data = features(Q, G, D)
    query, gallery = (data.feature[:Q].to(suite.device), data.feature[Q:].to(suite.device))
    original = torch.empty(Q, G, device=suite.device)
    neighbor, near, row_max, _, _ = joint_neighbors(query, gallery, 1.0, max(k1 + 1, k2), 0, original, 1024)
    indptr, index = op.k_reciprocal_robust_sets(neighbor, k1)
    value = op.k_reciprocal_encode(
        indptr, op.listed_distance(query, gallery, 1.0, neighbor, near, indptr, index), row_max
    )
    encodings = op.k_reciprocal_query_expansion(neighbor, k2, indptr, index, value)
    inverted = op.k_reciprocal_invert(*encodings, Q, Q + G)
    work = original.clone()
    stages: dict[str, Callable[[], Any]] = {
        "sets": lambda: op.k_reciprocal_robust_sets(neighbor, k1),
        "distances": lambda: op.listed_distance(query, gallery, 1.0, neighbor, near, indptr, index),
        "encode": lambda: op.k_reciprocal_encode(indptr, value, row_max),
        "expand": lambda: op.k_reciprocal_query_expansion(neighbor, k2, indptr, index, value),
        "invert": lambda: op.k_reciprocal_invert(*encodings, Q, Q + G),
        "blend": lambda: op.k_reciprocal_blend(work, row_max, *encodings, *inverted, 0.3),
    }

    def plain(run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with reference_backend():
                return run()

        return inside

    for name, run in stages.items():
        contenders = {"ours": run, "reference": plain(run)}
        if name == "blend":
            contenders |= {"clone": original.clone, "sum": original.sum}
        suite.case(f"Q={Q} G={G} {name}", contenders, rounds=min(suite.arguments.rounds, 5))


def main() -> None:
    suite = Suite("bench_k_reciprocal", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 30, 100, 16, 8, 3)
    else:
        run_case(suite, 500, 3000, 512, 20, 6)
        run_case(suite, 2000, 8000, 256, 20, 6)
    suite.finish()


if __name__ == "__main__":
    main()
