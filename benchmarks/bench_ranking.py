"""Ranking metrics: ``evaluate_ranking`` against reading the distances once (``tensor.sum()``), ``evaluate_features``
against one float32 product of queries and gallery and against the metrics of float32 distances. Where fastreid is
installed and its evaluation compiled (``make all`` in ``fastreid/evaluation/rank_cylib``), that is measured too."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Suite
from benchmarks.retrieval import features
from vareid_ext import evaluate_features, evaluate_ranking, pairwise_distance, reference_backend


def _compiled_peers() -> Iterator[tuple[str, Callable[..., Any]]]:
    """evaluate_cy of fastreid, whose package is not imported: it needs much else."""
    installed = importlib.util.find_spec("fastreid")
    for folder in (installed and installed.submodule_search_locations) or ():
        for file in Path(folder).glob("evaluation/rank_cylib/rank_cy*.so"):
            spec = importlib.util.spec_from_file_location("rank_cy", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            yield "fastreid", module.evaluate_cy


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
        arrays = [distances.cpu().numpy(), *(label.cpu().numpy() for label in labels)]
        peers = {tool: functools.partial(evaluate, *arrays, 50) for tool, evaluate in _compiled_peers()}
        suite.case(f"Q={Q} G={G} against other tools", {"ours": ours, "reference": plain, **peers}, rounds=1)


def run_features(suite: Suite, Q: int, G: int, D: int) -> None:
    data = features(Q, G, D)
    query, gallery = (part.to(suite.device) for part in data.feature.split([Q, G]))
    labels = [part.to(suite.device) for label in (data.identity, data.camera) for part in label.split([Q, G])]

    def rounded() -> Any:
        return evaluate_ranking(lambda a, b: pairwise_distance(query[a:b], gallery, metric="sqeuclidean"), *labels)

    suite.case(
        f"features Q={Q} G={G} D={D}",
        {
            "ours": lambda: evaluate_features(query, gallery, *labels),
            "product": lambda: query @ gallery.T,
            "of float32 distances": rounded,
        },
        rounds=5,
    )


def main() -> None:
    suite = Suite("bench_ranking", description=__doc__ or "")
    if suite.quick:
        run_case(suite, 50, 400, 20, torch.float32)
        run_features(suite, 50, 400, 32)
    else:
        run_case(suite, 3368, 15913, 750, torch.float32)
        for identities in (5000, 300, 100, 20):
            run_case(suite, 3368, 15913, identities, torch.float32, reference=False)
        for identities in (750, 100):
            run_case(suite, 3368, 15913, identities, torch.float32, separated=True, reference=False)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            run_case(suite, 3368, 15913, 750, dtype, reference=False)
        for D in (256, 2048):
            run_features(suite, 3368, 15913, D)
    suite.finish()


if __name__ == "__main__":
    main()
