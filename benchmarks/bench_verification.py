"""Verification metrics: ``evaluate_verification`` against reading the distances once (``tensor.sum()``), and in plain
PyTorch; ``verify_features`` against one float32 product of queries and gallery."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Suite
from benchmarks.retrieval import features
from vareid_ext import evaluate_verification, pairwise_distance, reference_backend, verify_features


def run_case(suite: Suite, Q: int, G: int, D: int, *, reference: bool = True) -> None:
    """Distances of clustered features, as a network gives them."""
    data = features(Q, G, D)
    query, gallery = (part.to(suite.device) for part in data.feature.split([Q, G]))
    labels = [part.to(suite.device) for label in (data.identity, data.camera) for part in label.split([Q, G])]
    distances = pairwise_distance(query, gallery, metric="sqeuclidean")

    def plain() -> Any:
        with reference_backend():
            return evaluate_verification(distances, *labels)

    suite.case(
        f"Q={Q} G={G} D={D}",
        {
            "ours": lambda: evaluate_verification(distances, *labels),
            "with a recommended threshold": lambda: evaluate_verification(distances, *labels, recommend_fpr=1e-3),
            "sum": distances.sum,
        },
    )
    if reference:
        contenders = {"ours": lambda: evaluate_verification(distances, *labels), "reference": plain}
        suite.case(f"Q={Q} G={G} D={D} against plain PyTorch", contenders, rounds=1)
        contenders = {"ours": lambda: verify_features(query, gallery, *labels), "product": lambda: query @ gallery.T}
        suite.case(f"features Q={Q} G={G} D={D}", contenders, rounds=3)


def main() -> None:
    suite = Suite("bench_verification", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 50, 400, 32)
    else:
        run_case(suite, 3368, 15913, 256)
        run_case(suite, 3368, 15913, 2048, reference=False)
    suite.finish()


if __name__ == "__main__":
    main()
