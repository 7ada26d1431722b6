"""``vareid index RUN IMAGES --output gallery.index``: a gallery on disk that ``vareid search`` searches."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vareid_ext._labels import NAMED, UNKNOWN, Labels
from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.extract import (
    add_image_arguments,
    check_no_image_options,
    check_source,
    complete,
    fingerprint,
    gather_images,
    parts_of,
)
from vareid_ext.cli.rerank import RERANKING, add_max_unpacked
from vareid_ext.files.features import LABELS, Features, read_features
from vareid_ext.files.gallery_folder import check_new
from vareid_ext.retrieval import GalleryIndex, check_parameters
from vareid_ext.trained import TrainedModel, load_trained

_DESCRIPTION = """\
A gallery on disk: its features, the neighbour lists of re-ranking, labels and paths. `vareid search` opens it in no
time, and with --rerank gives for a query what re-ranking it with the whole gallery gives.

The features are those of images by a trained model, RUN and IMAGES as for `vareid extract`, or of a file, --features.
INDEX is a folder. With --add images are added to one that is there: only their distances are computed, and those whose
path it has already are left out. An index that is being searched goes on with what it had; one that is being written
refuses a second writer; whatever is interrupted leaves it as it was.
"""
_EXAMPLES = """\
  vareid index runs/mine photos/ --output gallery.index
  vareid index runs/mine more-photos/ --output gallery.index --add
  vareid index --features gallery.npz --output features.index
  vareid index runs/mine Market-1501 --data market1501 --split gallery --output market.index
"""


def _parser() -> Parser:
    parser = command_parser("index", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="folder, image, list (.txt), manifest (.csv), root")
    parser.add_argument("--output", required=True, metavar="INDEX", help="the index, a folder")
    parser.add_argument("--add", action="store_true", help="add to the index that is there")
    for name in ("k1", "k2"):
        parser.add_argument(
            f"--{name}", type=int, metavar="K", help=f"of re-ranking, once for all (default: {RERANKING[name]})"
        )
    group = parser.add_argument_group("features in a file")
    group.add_argument("--features", metavar="FILE", help="a file in place of RUN and IMAGES: .npz, .npy, .pt, .mat")
    group.add_argument("--key", metavar="KEY", help="key of the features (default: the usual names)")
    for label in LABELS:
        group.add_argument(f"--{label}", metavar="SOURCE", help="key, file or file:key (default: the usual names)")
    add_max_unpacked(group)
    add_image_arguments(parser)
    return parser


_OF_FILES = ("key", *LABELS, "max_unpacked")


def model_identity(model: TrainedModel, flip: bool | None) -> dict[str, Any]:
    """What says whose features an index holds.

    Args:
        model: of the run.
        flip: whether the mirrored image's feature is added; None as the run.
    """
    how = dataclasses.asdict(model.preprocessing) | ({} if flip is None else {"flip": flip})
    digest = hashlib.sha256()
    for name, tensor in sorted(model.method.state_dict().items()):
        # Of the weights and not of the file: a shared model's are those of its run.
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "checkpoint": os.path.abspath(model.checkpoint.parent if model.is_shared else model.checkpoint),
        "sha256": digest.hexdigest(),
        "preprocessing": {name: list(value) if isinstance(value, tuple) else value for name, value in how.items()},
    }


def check_model(index: GalleryIndex, found: dict[str, Any]) -> tuple[str, ...]:
    """What is to be said about a model whose features are compared with an index's; ValueError if they are another's.

    Args:
        index: of the gallery.
        found: of :func:`model_identity`.
    """
    if index.about is None:
        return ("the index was made of a file of features: whether by this model is not known",)
    given, made = found["checkpoint"], index.about["checkpoint"]
    if found["sha256"] != index.about["sha256"]:
        what = "has changed since it" if given == made else f"has other weights than {made}, which"
        raise ValueError(
            f"RUN: {given} {what} made the index {index.folder}; features of two models cannot be compared: give the "
            "model that made it, or make another index"
        )
    how, before = found["preprocessing"], index.about["preprocessing"]
    for name in how:
        if how[name] == before.get(name):
            continue
        if name == "flip":
            was, option = ("with", "--no-flip") if before[name] else ("without", "--flip")
            raise ValueError(
                f"{option}: the index {index.folder} was made {was} the mirrored images' features; leave {option} out, "
                "or make another index"
            )
        raise ValueError(
            f"RUN: {given} reads images with {name} {how[name]}, but the index {index.folder} was made with "
            f"{before.get(name)}; make another index"
        )
    return ()


def _unlike(index: GalleryIndex, labels: Labels) -> tuple[str, ...]:
    """What is to be said of labels that images which are added have otherwise than those that are there."""
    notes = []
    for label in LABELS:
        there, new = ((getattr(part, label) != UNKNOWN).any() for part in (index.labels, labels))
        if there != new:
            those, others = ("were there", "are added") if there else ("are added", "were there")
            notes.append(f"{label}: known of images that {those}, of none that {others}")
        elif there and (label in index.labels.names) != (label in labels.names):
            named = "those that were there" if label in index.labels.names else "those that are added"
            notes.append(
                f"{label}: {named} have names, the others numbers; a number is the name that is written like it"
            )
    return tuple(notes)


def read_file(options: argparse.Namespace, side: str) -> Features:
    """The features that --features names, of "query" or "gallery" where the file holds both."""
    labels: dict[str, Any] = {label: getattr(options, label, None) for label in LABELS}
    return read_features(
        options.features, side, key=options.key, max_unpacked=options.max_unpacked, paths=True, **labels
    )


def _check(options: argparse.Namespace) -> None:
    if (options.run is None) == (options.features is None):
        found = "none was" if options.run is None else "both were"
        raise ValueError(f"RUN IMAGES, --features: {found} given; one of the two is needed")
    if options.features is None:
        check_source(options.images, options.data)
    else:
        check_no_image_options(options)
    given = [n for n in _OF_FILES if options.features is None and getattr(options, n) != _parser().get_default(n)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')}: is for --features, which was not given")


def _run(options: argparse.Namespace) -> Result:
    _check(options)
    output = Path(options.output)
    index = GalleryIndex(output) if options.add else None
    if index is None:
        check_new(output)
        for name in ("k1", "k2"):
            setattr(options, name, RERANKING[name] if getattr(options, name) is None else getattr(options, name))
        check_parameters(options.k1, options.k2, 0.0)
        if not Path(os.path.realpath(output)).parent.is_dir():
            raise ValueError(f"{output}: the folder {Path(os.path.realpath(output)).parent} does not exist")
    else:
        for name in ("k1", "k2"):
            if getattr(options, name) not in (None, getattr(index, name)):
                raise ValueError(
                    f"--{name}: {getattr(options, name)} was given, but {output} was made with {getattr(index, name)}"
                )
    if options.features is not None:
        return _index_file(options, index)
    model = load_trained(options.run, options.device)
    if index is not None and options.flip is None and index.about is not None:
        options.flip = index.about["preprocessing"]["flip"]
    about = model_identity(model, options.flip)
    said = () if index is None else check_model(index, about)
    (images,), notes, skipped = gather_images(model, [options.images], options)
    paths = _absolute(images.paths)
    new = _new(index, paths)
    images = images.select(new)
    if not len(images):
        return _result(options, index, 0, len(new), notes, skipped)
    if index is not None:
        said = (*said, *_unlike(index, images))
    parts = parts_of(output, fingerprint(model, images, options))
    notes = (*said, *parts.notes(), *notes)
    index, added = _write(options, index, images, complete(parts, model, images, options), paths, new, about)
    parts.remove()
    return _result(options, index, added, len(new), (*notes, *_meanwhile(len(images) - added)), skipped)


def _index_file(options: argparse.Namespace, index: GalleryIndex | None) -> Result:
    found = read_file(options, "gallery")
    notes = [found.used()]
    if not found.paths:
        notes.append("paths: not known, so there will be no pictures")
    if index is not None and index.about is not None:
        notes.append(f"whether they are of the index's model, {index.about['checkpoint']}, is not known")
    paths = _absolute(found.paths)
    new = _new(index, paths) if paths else np.ones(len(found), dtype=bool)
    if not paths and index is not None:
        notes.append("so whether some of them were there already is not known")
    added = 0
    if new.any():
        if index is not None:
            notes += _unlike(index, found.select(new))
        index, added = _write(options, index, found.select(new), found.select(new).feature, paths, new, None)
        notes += _meanwhile(int(new.sum()) - added)
    return _result(options, index, added, len(new), notes, ())


def _meanwhile(images: int) -> tuple[str, ...]:
    """What is said of images that another process has added since the index was opened."""
    return (f"added by another process meanwhile, and so not again: {images} images",) if images else ()


def _absolute(paths: Sequence[str]) -> list[str]:
    """Paths as an index keeps them, so that they do not depend on the folder a command is given in."""
    return [os.path.abspath(path) if os.path.exists(path) else path for path in paths]


def _new(index: GalleryIndex | None, paths: Sequence[str]) -> np.ndarray:
    """bool [N]: which images the index does not have yet, by their paths; of equal paths the first."""
    known = set() if index is None or not index.has_paths else {index.path(row) for row in range(len(index))}
    new = []
    for path in paths:
        new.append(path not in known)
        known.add(path)
    return np.array(new, dtype=bool)


def _write(
    options: argparse.Namespace,
    index: GalleryIndex | None,
    labels: Labels,
    feature: Any,
    paths: Sequence[str],
    new: np.ndarray,
    about: Any,
) -> tuple[GalleryIndex, int]:
    """The index with these images, of whose `paths` those are theirs that are `new`; and how many were added."""
    rows: dict[str, Any] = {name: getattr(labels, name) for name in (*LABELS, "viewpoints")}
    rows |= {name: labels.called(name) for name in NAMED if name in labels.names}
    rows["paths"] = [path for path, is_new in zip(paths, new.tolist(), strict=False) if is_new]
    rows["progress"] = not options.quiet
    if index is None:
        index = GalleryIndex.build(options.output, feature, k1=options.k1, k2=options.k2, about=about, **rows)
        return index, len(index)
    return index, index.add(feature, skip_known=bool(rows["paths"]), **rows)


def _result(
    options: argparse.Namespace,
    index: GalleryIndex | None,
    added: int,
    given: int,
    notes: Sequence[str],
    skipped: Sequence[str],
) -> Result:
    if index is None:
        raise ValueError("--features: no rows were given; at least one is needed")
    images, D = index.feature.shape
    lines = [f"{options.output}: {images} images, features of {D} elements"]
    if options.add or added < given:
        others = "" if added == given else "; the others were there, by their paths"
        lines.append(f"{added} of {given} images are new{others}")
    values = {
        "output": options.output, "images": images, "D": D, "added": added, "known": given - added,
        "skipped": list(skipped), "notes": list(notes),
    }  # fmt: skip
    return Result("\n".join([*lines, *notes]), values)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
