"""``vareid search gallery.index QUERY...``: the best images of an index for each query."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vareid_ext._labels import UNKNOWN, Labels, joined, same_numbers
from vareid_ext._text import table, viewpoint_name
from vareid_ext.cli.common import Parser, Result, command_parser, inference_options, run_command
from vareid_ext.cli.extract import add_image_arguments, check_no_image_options, check_source, gather_images
from vareid_ext.cli.index import check_model, model_identity, read_file
from vareid_ext.cli.rerank import RERANKING, add_max_unpacked
from vareid_ext.files.atomic import check_writable
from vareid_ext.files.features import LABELS
from vareid_ext.retrieval import GalleryIndex, check_parameters

_DESCRIPTION = """\
The best images of an index (of `vareid index`) for each query, which is searched by itself.

QUERY is an image, a folder, a list (.txt) or a manifest (.csv); its features are made by the run that made the index,
or where that has moved, by --run. With --features FILE the queries are features in a file.

Distances are squared Euclidean, as `vareid evaluate` has them, or with --rerank those of k-reciprocal re-ranking with
the whole gallery. --threshold YES says of each image whether it shows the query's person: yes up to this distance, no
beyond it. --threshold YES NO says no beyond the second only, and unsure between the two. `vareid evaluate
--verification` measures which distances to take.
"""
_EXAMPLES = """\
  vareid search gallery.index photos/a.jpg
  vareid search gallery.index photos/a.jpg photos/b.jpg --rerank --topk 5 --strip strip.png
  vareid search gallery.index photos/a.jpg --threshold 0.6 0.9 --json
  vareid search features.index --features query.npz --rerank --exclude-own-camera
"""
STRIP_QUERIES, STRIP_IMAGES = 40, 20
"""What a strip shows at most."""
_CAMERAS = 20  # that a note lists


def _parser() -> Parser:
    parser = command_parser("search", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("index", metavar="INDEX", help="of vareid index")
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="image, folder, list (.txt), manifest (.csv)")
    parser.add_argument("--run", metavar="RUN", help="run folder or checkpoint (default: the one that made the index)")
    parser.add_argument("--topk", type=int, default=10, metavar="K", help="images a query (default: %(default)s)")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking with the whole gallery")
    parser.add_argument(
        "--lambda-value", type=float, default=RERANKING["lambda_value"], metavar="L",
        help="weight of the original distance in it, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        metavar=("YES", "NO"),
        help="say of each image: same person yes, no, unsure",
    )
    parser.add_argument(
        "--exclude-camera",
        nargs="+",
        default=[],
        metavar="C",
        help="leave out images of these cameras, numbers or names",
    )
    parser.add_argument(
        "--exclude-own-camera", action="store_true", help="leave out images of the query's camera, where it is known"
    )
    parser.add_argument("--strip", metavar="FILE", help="draw the images that are found: .png")
    group = parser.add_argument_group("features in a file")
    group.add_argument("--features", metavar="FILE", help="a file in place of QUERY: .npz, .npy, .pt, .mat")
    group.add_argument("--key", metavar="KEY", help="key of the features (default: the usual names)")
    group.add_argument("--camera", metavar="SOURCE", help="key, file or file:key (default: the usual names)")
    add_max_unpacked(group)
    add_image_arguments(parser, flip=False)
    return parser


class _Queries(NamedTuple):
    feature: Tensor
    names: list[str]
    labels: Labels
    paths: Sequence[str]
    """empty if they are not known"""
    notes: tuple[str, ...]
    skipped: Sequence[str] = ()
    """paths of images that could not be read"""


def _check(options: argparse.Namespace) -> None:
    if options.features is not None:
        if options.queries:
            raise ValueError("QUERY, --features: both were given; one of the two is needed")
        if options.run is not None:
            raise ValueError("--run: is for images, but --features was given")
        check_no_image_options(options)
    elif not options.queries and options.data is None:
        raise ValueError("QUERY, --features: none was given; one of the two is needed")
    else:
        for source in options.queries or [None]:
            check_source(source, options.data, "QUERY")
    if options.lambda_value != RERANKING["lambda_value"] and not options.rerank:
        raise ValueError(f"--lambda-value: {options.lambda_value} was given without --rerank")
    if options.topk < 1:
        raise ValueError(f"--topk: {options.topk} was given; allowed are values from 1 on")
    check_parameters(1, 1, options.lambda_value)
    bounds = options.threshold
    if bounds is not None and (len(bounds) > 2 or not np.isfinite(bounds).all() or bounds != sorted(bounds)):
        given = " ".join(map(str, bounds))
        raise ValueError(f"--threshold: {given} was given; allowed are one distance, or two of which none is less")
    if options.strip is not None:
        check_writable(options.strip, (".png",), options.queries)


def _of_images(options: argparse.Namespace, index: GalleryIndex) -> _Queries:
    from vareid_ext.trained import load_trained

    run = options.run or (index.about or {}).get("checkpoint")
    if run is None:
        raise ValueError("--run: is needed, as the index was made of a file of features; or give --features")
    if not os.path.exists(run):
        how = "" if options.run else "; it made the index; where it has moved, --run says where it is"
        raise FileNotFoundError(f"--run: {run} does not exist{how}")
    model = load_trained(run, options.device)
    flip = None if index.about is None else index.about["preprocessing"]["flip"]
    notes = check_model(index, model_identity(model, flip))
    lists, said, skipped = gather_images(model, options.queries or [None], options, "QUERY")
    found = [
        model.features(images, progress=not options.quiet, flip=flip, **inference_options(options))
        for images in lists
        if len(images)
    ]
    paths = [path for images in found for path in images.paths]
    feature = torch.cat([images.feature.cpu() for images in found])
    return _Queries(feature, paths, joined(*found), paths, (*notes, *said), skipped)


def _of_file(options: argparse.Namespace) -> _Queries:
    found = read_file(options, "query")
    names = list(found.paths) or [f"{options.features}[{i}]" for i in range(len(found))]
    return _Queries(found.feature, names, found, found.paths, (found.used(),))


def _excluded(options: argparse.Namespace, index: GalleryIndex, queries: _Queries) -> tuple[Any, list[str]]:
    """bool [Q, G], or None for nothing; and what is to be said about it."""
    if not options.exclude_camera and not options.exclude_own_camera:
        return None, []
    gallery = index.labels.named("camera")
    if (gallery.camera == UNKNOWN).all():
        wanted = "--exclude-camera" if options.exclude_camera else "--exclude-own-camera"
        raise ValueError(
            f"{wanted}: the index knows the camera of none of its images; vareid index takes cameras from a manifest, "
            "a data set (--data) or a file of features"
        )
    notes = []
    names = {gallery.names["camera"][number]: number for number in np.unique(gallery.camera) if number != UNKNOWN}
    mask = np.isin(gallery.camera, [names[name] for name in options.exclude_camera if name in names])
    if options.exclude_camera:
        notes.append(f"of the excluded cameras: {int(mask.sum())} of {len(index)} images")
    absent = [name for name in options.exclude_camera if name not in names]
    if absent:
        more = ", ..." if len(names) > _CAMERAS else ""
        notes.append(
            f"no image is by camera {', '.join(absent)}; they are by {', '.join(list(names)[:_CAMERAS])}{more}"
        )
    if not options.exclude_own_camera:
        return torch.from_numpy(mask), notes
    if ("camera" in index.labels.names) != ("camera" in queries.labels.names):
        named = "the index's images" if "camera" in index.labels.names else "the queries"
        notes.append(f"camera: {named} have names, the others numbers; a number is the name that is written like it")
    gallery, asked = same_numbers(gallery, queries.labels)
    own = asked.camera != UNKNOWN
    if not own.any():
        raise ValueError(
            "--exclude-own-camera: the camera of none of the queries is known; a manifest, a data set (--data) or a "
            "file of features tells it"
        )
    if not own.all():
        notes.append(f"queries of unknown camera, for which no camera is excluded: {int((~own).sum())} of {len(own)}")
    strange = own & ~np.isin(asked.camera, gallery.camera)
    if strange.any():
        notes.append(f"queries by a camera that no image of the index is by: {int(strange.sum())} of {len(own)}")
    if (gallery.camera == UNKNOWN).any():
        count = int((gallery.camera == UNKNOWN).sum())
        notes.append(f"images of unknown camera, which stay in: {count} of {len(index)}")
    return torch.from_numpy(mask | (own[:, None] & (gallery.camera == asked.camera[:, None]))), notes


def verdict(distance: float, bounds: Sequence[float]) -> str:
    """Whether an image shows the query's person: yes up to the first bound, no beyond the last, else unsure."""
    return "yes" if distance <= bounds[0] else "no" if distance > bounds[-1] else "unsure"


def _run(options: argparse.Namespace) -> Result:
    _check(options)
    index = GalleryIndex(options.index)
    if options.strip is not None and not index.has_paths:
        raise ValueError("--strip: the index does not know the paths of its images")
    queries = _of_file(options) if options.features is not None else _of_images(options, index)
    exclude, notes = _excluded(options, index, queries)
    distance, row = index.search(
        queries.feature, topk=options.topk, rerank=options.rerank, lambda_value=options.lambda_value, exclude=exclude,
        progress=not options.quiet,
    )  # fmt: skip
    found = [
        [_found(index, i, float(d), options.threshold) for d, i in zip(ds, rows, strict=True) if i >= 0]
        for ds, rows in zip(distance, row.tolist(), strict=True)
    ]
    gone: dict[str, None] = {}
    if index.has_paths:
        gone = dict.fromkeys(f["path"] for results in found for f in results if not os.path.exists(f["path"]))
    if gone:
        notes.append(f"{len(gone)} of the images that were found are not where they were, such as {next(iter(gone))}")
    if options.strip is not None:
        notes += _draw(options, index, queries, row.tolist(), found)
    values = {
        "index": str(index.folder), "images": len(index),
        "distance": "k-reciprocal" if options.rerank else "sqeuclidean", "threshold": options.threshold,
        "moved": list(gone), "skipped": list(queries.skipped), "notes": [*queries.notes, *notes],
        "queries": [{"query": name, "results": results} for name, results in zip(queries.names, found, strict=True)],
    }  # fmt: skip
    blocks = [_text(name, results) for name, results in zip(queries.names, found, strict=True)]
    return Result("\n".join(["\n\n".join(blocks), "", *queries.notes, *notes]).rstrip(), values)


def _found(index: GalleryIndex, row: int, distance: float, bounds: Sequence[float] | None) -> dict[str, Any]:
    """What is known of an image that was found."""
    labels = {name: int(getattr(index.labels, name)[row]) for name in LABELS}
    known: dict[str, Any] = {name: label for name, label in labels.items() if label != UNKNOWN}
    known |= {name: called[known[name]] for name, called in index.labels.names.items() if name in known}
    if "viewpoint" in known:
        known["viewpoint"] = viewpoint_name(known["viewpoint"], index.labels.viewpoints)
    same = {} if bounds is None else {"same": verdict(distance, bounds)}
    return {"row": row, "distance": distance, **same, **known, **({"path": index.path(row)} if index.has_paths else {})}


def _text(name: str, results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return f"{name}: every image is excluded"
    columns = [key for key in ("distance", "same", *LABELS) if any(key in f for f in results)]
    header = ["rank", *columns, "row"]
    rows = [
        [str(rank), *(f"{f[c]:.6g}" if c == "distance" else str(f.get(c, "")) for c in columns), str(f["row"])]
        for rank, f in enumerate(results, 1)
    ]
    lines = table(header, rows).split("\n")
    if "path" in results[0]:
        lines = [
            lines[0] + "  path",
            *lines[1:2],
            *(f"{a}  {f['path']}" for a, f in zip(lines[2:], results, strict=True)),
        ]
    return "\n".join([name, *lines])


def _draw(
    options: argparse.Namespace,
    index: GalleryIndex,
    queries: _Queries,
    rows: Sequence[Sequence[int]],
    found: Sequence[Sequence[dict[str, Any]]],
) -> list[str]:
    """Draws the strip; what is to be said about it."""
    from vareid_ext.data.types import open_image
    from vareid_ext.report.figures import draw_results
    from vareid_ext.report.pictures import Pictures

    gallery = Pictures(lambda row: open_image(index.path(row)))
    asked = Pictures((lambda i: open_image(queries.paths[i])) if queries.paths else None)
    shown = [
        (
            asked.image(i),
            [(gallery.image(f["row"]), f"{f['distance']:.4g}", f.get("same", "")) for f in results[:STRIP_IMAGES]],
        )
        for i, results in enumerate(found[:STRIP_QUERIES])
    ]
    draw_results(options.strip, shown, title=f"{index.folder.name}: {len(index)} images")
    notes = [str(options.strip)]
    if len(found) > STRIP_QUERIES:
        notes[0] += f": the first {STRIP_QUERIES} of {len(found)} queries"
    if max(map(len, found)) > STRIP_IMAGES:
        notes[0] += f": the first {STRIP_IMAGES} images of each query"
    missing = len(gallery.missing) + (len(asked.missing) if queries.paths else len(shown))
    if missing:
        first = next(iter([*gallery.missing.values(), *asked.missing.values()]), "the queries' paths are not known")
        notes.append(f"{missing} pictures could not be read and are placeholders: {first}")
    return notes


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
