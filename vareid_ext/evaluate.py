"""Evaluate features from the command line: ``python -m vareid_ext.evaluate --features query.npz gallery.npz``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vareid_ext._program import run_program
from vareid_ext.feature_files import FeatureFileError, FeatureSet, read_features
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.metrics import (
    RankingMetrics,
    evaluate_cross_viewpoint,
    evaluate_features,
    evaluate_single_viewpoint,
)
from vareid_ext.rerank import add_rerank_arguments
from vareid_ext.retrieval import check_parameters

_DESCRIPTION = """\
CMC, mAP and mINP of features in files (.npy, .npz, .pt, .mat; memory-mapped where the format can be).

Identities, cameras and viewpoints are looked for under the usual names in the same file (identity, pid, label; camera,
camid, cam; viewpoint, view; also with query_ and gallery_ before them). Otherwise name a key of that file, a file of
their own (.npy, .txt with whole numbers, ...), or FILE:KEY. Camera -1 is unknown; viewpoint -1 is unknown. One file may
hold both sides: name it twice.
"""
_VIEWS = {0: "front", 1: "side", 2: "back"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vareid_ext.evaluate", description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--features", nargs=2, required=True, metavar=("QUERY", "GALLERY"), help="the two files")
    for side in ("query", "gallery"):
        parser.add_argument(f"--{side}-key", metavar="KEY", help=f"key of the {side} features")
        for label in ("identity", "camera", "viewpoint"):
            parser.add_argument(f"--{side}-{label}", metavar="SOURCE", help="key, file or file:key")
    parser.add_argument("--no-cameras", action="store_true", help="leave the cameras out of account")
    parser.add_argument(
        "--metric", choices=("sqeuclidean", "euclidean", "cosine"), default="sqeuclidean",
        help="distance (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-rank", type=int, default=50, help="length of the CMC curve (default: %(default)s)")
    parser.add_argument(
        "--junk-identity", type=int, default=-1, metavar="ID", help="gallery images to leave out (default: %(default)s)"
    )
    parser.add_argument("--block-rows", type=int, metavar="ROWS", help="queries handled at once (default: chosen)")
    parser.add_argument(
        "--protocol", choices=("standard", "single-viewpoint", "cross-viewpoint"), default="standard",
        help="standard: queries against the gallery; the others follow the VA-reID supplement, on both sides together",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10, help="draws of single-viewpoint (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of these draws (default: %(default)s)")
    group = parser.add_argument_group("re-ranking")
    group.add_argument("--rerank", action="store_true", help="also with k-reciprocal re-ranking")
    add_rerank_arguments(group)
    parser.add_argument("--output", metavar="FILE", help="write the results to this .json file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _read(options: argparse.Namespace) -> tuple[FeatureSet, FeatureSet]:
    sides = []
    for side, path in zip(("query", "gallery"), options.features, strict=True):
        given = {label: getattr(options, f"{side}_{label}") for label in ("identity", "camera", "viewpoint")}
        found = read_features(path, side, key=getattr(options, f"{side}_key"), **given)
        if found.identity is None:
            raise FeatureFileError(f"{path}: holds no identities; give --{side}-identity")
        sides.append(found)
    query, gallery = sides
    if not options.no_cameras and (query.camera is None) != (gallery.camera is None):
        side = "query" if query.camera is None else "gallery"
        raise FeatureFileError(f"--{side}-camera: is needed, as the other side has cameras (or give --no-cameras)")
    return query, gallery


def _together(query: FeatureSet, gallery: FeatureSet, cameras: bool) -> dict[str, Tensor | None]:
    """Both sides as one set of images."""
    D, other = query.feature.shape[1], gallery.feature.shape[1]
    if other != D:
        raise FeatureFileError(f"gallery: features of {other} elements were given, but query's have {D}")

    def joined(label: str) -> Tensor:
        sides = {"query": getattr(query, label), "gallery": getattr(gallery, label)}
        for side, value in sides.items():
            if value is None:
                raise FeatureFileError(f"--{side}-{label}: is needed for a viewpoint protocol")
        return torch.cat(list(sides.values()))

    images = {label: joined(label) for label in ("feature", "identity", "viewpoint")}
    return {**images, "camera": joined("camera") if cameras else None}


def _report(metrics: RankingMetrics) -> dict[str, Any]:
    return {
        **metrics.as_dict(), "cmc": metrics.cmc.tolist(), "num_valid_queries": metrics.num_valid_queries,
        "num_queries": metrics.num_queries,
    }  # fmt: skip


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The results by name; each has the keys of :meth:`RankingMetrics.as_dict` and more."""
    rerank = {"k1": options.k1, "k2": options.k2, "lambda_value": options.lambda_value}
    if options.rerank:  # here, as the original ranking comes first and may take long
        check_parameters(**rerank)
    query, gallery = _read(options)
    cameras = query.camera is not None and not options.no_cameras
    variants: dict[str, dict[str, Any]] = {"original": {"metric": options.metric}}
    if options.rerank:
        variants["reranked"] = {"rerank": rerank}
    results: dict[str, Any] = {}
    for name, variant in variants.items():
        settings = {**variant, "max_rank": options.max_rank, "junk_identity": options.junk_identity}
        if options.protocol == "standard":
            metrics = evaluate_features(
                query.feature,
                gallery.feature,
                query.identity,
                gallery.identity,
                query.camera if cameras else None,
                gallery.camera if cameras else None,
                block_rows=options.block_rows,
                progress=not options.quiet,
                **settings,
            )
            results[name] = _report(metrics)
            continue
        images = {**_together(query, gallery, cameras), **settings}
        if options.protocol == "cross-viewpoint":
            for view, metrics in evaluate_cross_viewpoint(**images).items():
                results[f"{name} {_VIEWS.get(view, view)}"] = _report(metrics)
        else:
            draws = evaluate_single_viewpoint(**images, repeats=options.repeats, seed=options.seed)
            for view, runs in draws.items():
                spread = {"std": runs.std(), "repeats": len(runs.runs)}
                results[f"{name} {_VIEWS.get(view, view)}"] = {**runs.mean(), **spread}
    return results


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results in percent."""
    columns = [name for name in ("mAP", "mINP", "rank1", "rank5", "rank10") if name in next(iter(results.values()))]
    width = max(len(name) for name in results)
    lines = [" " * width + "".join(f"{column:>15}" for column in columns)]
    for name, values in results.items():
        spread = values.get("std", {})
        cells = (f"{100 * values[c]:.2f}" + (f" ± {100 * spread[c]:.2f}" if c in spread else "") for c in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
    for name, values in results.items():
        if values.get("num_valid_queries", 0) != values.get("num_queries", 0):
            without = values["num_queries"] - values["num_valid_queries"]
            lines.append(f"{name}: {without} of {values['num_queries']} queries have no match and are not counted")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        output = None if options.output is None else check_writable(options.output, (".json",))
        results = _evaluate(options)
        if output is not None:
            with atomic_file(output) as file:
                file.write((json.dumps(results, indent=2) + "\n").encode())
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(_table(results))
    return 0


if __name__ == "__main__":
    run_program(main)
