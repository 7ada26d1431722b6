"""Query and gallery as the commands that measure take them: of runs, or out of files of features."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vareid_ext._labels import NAMED, UNKNOWN, same_numbers
from vareid_ext.cli.common import Parser, add_inference_arguments, inference_options
from vareid_ext.cli.rerank import RERANKING, add_junk_identity, add_max_unpacked, add_rerank_arguments
from vareid_ext.files.features import LABELS, SIDES, FeatureFileError, Features, read_features
from vareid_ext.metrics.exclusion import USUAL, check_exclusion, exclusion_text, parse_exclusion
from vareid_ext.metrics.ranking import check_junk_identity
from vareid_ext.retrieval import check_parameters

if TYPE_CHECKING:
    from vareid_ext.data import ImageList, ReidData
    from vareid_ext.trained import TrainedModel
    from vareid_ext.training.config import Config

ABOUT_FILES = """\
--features are files (.npy, .npz, .pt, .mat; memory-mapped where the format can be).
Features, identities, cameras and viewpoints are looked for under the usual names in the same file (feature, feat,
embedding; identity, pid, label, id; camera, camid, cam; viewpoint, view, viewid; singular or plural, also with query_,
gallery_, q_ and g_ before them), and the names that were used are printed. Otherwise name a key of that file, a file of
their own (.npy, .txt with whole numbers, ...), or FILE:KEY. A column that --exclude names (clothes) is looked for under
its own name, also with column_ before it. Camera -1 is unknown; viewpoint -1 is unknown. One file may
hold both sides."""


class Sides(NamedTuple):
    """A query and a gallery."""

    query: Features
    gallery: Features
    same: bool
    """whether they are the same images: a file named twice, a link to it, a copy"""
    notes: list[str]
    """where they are from"""
    junk: int | None
    """the number of the junk identity among theirs"""


@dataclass(frozen=True)
class Source:
    """What is measured: a run, or files of features.

    Attributes:
        name: the run, or the files, as given.
        rerank: the parameters of re-ranking.
        exclude: the rule of exclusion; None for the usual one, which needs no cameras.
        read: the features; those of a run are made here.
        model: of the run, None for files.
        data: the data set of the run that it is measured on.
    """

    name: str
    rerank: dict[str, Any]
    exclude: str | None
    read: Callable[[], Sides]
    model: TrainedModel | None = None
    data: Callable[[], ReidData] | None = None


def add_source_arguments(parser: Parser, rerank_help: str) -> None:
    """RUN, --features, and what says how they are read and compared.

    Args:
        parser: of the command.
        rerank_help: what --rerank does.
    """
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--data", metavar="KIND", help="another data set than the run's: market1501, manifest, ...")
    parser.add_argument("--root", metavar="PATH", help="of this data set; without --data, of the run's own")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    parser.add_argument(
        "--features", nargs="+", action="append", metavar=("QUERY", "GALLERY"),
        help="the two files, or the one for both; may be given several times",
    )  # fmt: skip
    for side in SIDES:
        parser.add_argument(f"--{side}-key", metavar="KEY", help=f"key of the {side} features")
        for label in LABELS:
            parser.add_argument(f"--{side}-{label}", metavar="SOURCE", help="key, file or file:key")
        parser.add_argument(
            f"--{side}-column", type=_column, action="append", default=[], metavar="NAME=SOURCE",
            help="the same for a column that --exclude names; may be given several times",
        )  # fmt: skip
    add_max_unpacked(parser)
    parser.add_argument("--no-cameras", action="store_true", help="leave the cameras out of account")
    parser.add_argument(
        "--exclude", metavar="RULE",
        help="gallery images to leave out for a query, those with all columns of a term the same: 'identity&camera | "
        "identity&clothes', or none (default: as the run, else identity&camera where cameras are known)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", choices=("sqeuclidean", "euclidean", "cosine"), default="sqeuclidean",
        help="distance (default: %(default)s)",
    )  # fmt: skip
    add_junk_identity(parser)
    parser.add_argument("--block-rows", type=int, metavar="ROWS", help="queries handled at once (default: chosen)")
    group = parser.add_argument_group("re-ranking")
    group.add_argument("--rerank", action="store_true", help=rerank_help)
    add_rerank_arguments(group, "as the run, else ")
    add_inference_arguments(parser)


_OF_FILES = (
    "query_key", "query_identity", "query_camera", "query_viewpoint", "query_column", "gallery_key",
    "gallery_identity", "gallery_camera", "gallery_viewpoint", "gallery_column", "max_unpacked",
)  # fmt: skip
_OF_RUNS = ("data", "root", "skip_bad_images", "device", "precision", "flip", "batch_size", "workers")


def check_sources(options: argparse.Namespace, parser: Parser) -> None:
    """ValueError where the options of :func:`add_source_arguments` do not go together."""
    if bool(options.runs) == bool(options.features):
        given = "both were" if options.runs else "none was"
        raise ValueError(f"RUN, --features: {given} given; one of the two is needed")
    for name in _OF_FILES if options.runs else _OF_RUNS:
        if getattr(options, name) != parser.get_default(name):
            what = "feature files, but runs were" if options.runs else "runs, but feature files were"
            raise ValueError(f"--{name.replace('_', '-')}: is for {what} given")
    features = [run for run in options.runs if Path(run).suffix.lower() in (".npy", ".npz", ".mat", ".txt")]
    if features:
        raise ValueError(f"RUN: {features[0]} was given; files of features go behind --features")
    names = options.runs or [" ".join(files) for files in options.features]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{'RUN' if options.runs else '--features'}: {twice[0]} was given twice")
    check_junk_identity(options.junk_identity)
    named = _columns_of(options.exclude, "--exclude")
    for side in SIDES:
        for column, _ in getattr(options, f"{side}_column"):
            if column not in named:
                raise ValueError(f"--{side}-column: {column} was given; allowed are columns that --exclude names")


def _columns_of(rule: str | None, name: str) -> list[str]:
    """The columns that a rule names, but for the identity."""
    terms = () if rule is None else parse_exclusion(rule, name)
    return list(dict.fromkeys(column for term in terms for column in term if column != "identity"))


def _column(text: str) -> tuple[str, str]:
    """The name and the source in ``NAME=SOURCE``."""
    name, _, source = text.partition("=")
    if not name or not source:
        raise argparse.ArgumentTypeError(f"{text!r} was given; NAME=SOURCE is needed: clothes=clothes.npy")
    return name, source


def one_rule(sources: Sequence[Source]) -> str | None:
    """The rule of exclusion of what is compared. Raises ValueError where there are several."""
    rules = {exclusion_text(source.exclude): source for source in sources}
    if len(rules) > 1:
        said = [f"{source.name} leaves out by {rule or USUAL}" for rule, source in rules.items()]
        raise ValueError(f"--exclude: {', '.join(said)}; one rule is needed for all")
    return sources[0].exclude


def open_sources(
    options: argparse.Namespace,
    needed: Sequence[str],
    *,
    wanted: Sequence[str] = (),
    paths: bool = False,
    kinds: Sequence[str] = (),
) -> list[Source]:
    """What the options name, opened, so that a missing one stops all before any work.

    Args:
        options: of :func:`add_source_arguments`.
        needed: labels that both sides must have.
        wanted: labels of feature files that are read where they are there.
        paths: whether the paths that feature files hold are wanted.
        kinds: of several data sets, on each of which the runs are measured, instead of that of the options.

    Raises:
        ValueError, OSError: a run or a file cannot be read or lacks something; parameters of re-ranking do not fit.
    """
    if not options.runs:
        rerank, exclude = _reranking(options), _rule(options, None)
        return [
            Source(
                " ".join(files), rerank, exclude,
                functools.partial(_read_files, options, files, needed, wanted, paths),
            )
            for files in options.features
        ]  # fmt: skip
    from vareid_ext.data.readers import check_kind
    from vareid_ext.trained import load_trained  # what feature files do not need

    for kind in kinds:
        check_kind(kind, options.root)
    models = [load_trained(run, options.device) for run in options.runs]
    sets: dict[str, ReidData] = {}
    sources = []
    for run, model in zip(options.runs, models, strict=True):
        exclude = _rule(options, model.config.evaluation.exclude)
        features = _extractor(options, model, once=len(kinds) > 1)
        for kind in kinds or (options.data,):
            data = functools.partial(_data, options, kind, model.config, sets)
            read = functools.partial(_extract, options, model, features, data, exclude)
            name = run if len(kinds) < 2 else kind if len(models) == 1 else f"{run} {kind}"
            sources.append(Source(name, _reranking(options, model.config.evaluation), exclude, read, model, data))
    return sources


def _rule(options: argparse.Namespace, of_run: str | None) -> str | None:
    """The rule that is given, else the run's where that is not the usual one, which needs no cameras."""
    rule = options.exclude if options.exclude is not None else of_run if exclusion_text(of_run) else None
    if options.no_cameras and "camera" in _columns_of(rule, "--exclude"):
        raise ValueError(f"--exclude: {rule} names the camera, but --no-cameras was given")
    return rule


def _reranking(options: argparse.Namespace, otherwise: Any = None) -> dict[str, Any]:
    """The parameters of re-ranking: those given, else the run's, else the usual ones; checked before work is done."""
    values = {}
    for name, usual in RERANKING.items():
        given = getattr(options, name)
        values[name] = getattr(otherwise, name, usual) if given is None else given
    if options.rerank:
        check_parameters(**values)
    return values


def _read_files(
    options: argparse.Namespace, files: Sequence[str], needed: Sequence[str], wanted: Sequence[str], paths: bool
) -> Sides:
    if len(files) > 2:
        raise FeatureFileError(f"--features: {len(files)} files were given; one or two are needed")
    columns = _columns_of(options.exclude, "--exclude")
    needed = list(dict.fromkeys([*needed, *(column for column in columns if column in LABELS)]))
    further = [column for column in columns if column not in LABELS]
    looked_for = [*needed, *wanted, *([] if options.no_cameras else ["camera"])]
    query, gallery = (
        read_features(
            path, side, key=getattr(options, f"{side}_key"), max_unpacked=options.max_unpacked, paths=paths,
            labels=list(dict.fromkeys(looked_for)),
            **{label: getattr(options, f"{side}_{label}") for label in LABELS},
            columns={**dict.fromkeys(further), **dict(getattr(options, f"{side}_column"))},
        )
        for side, path in zip(SIDES, (files[0], files[-1]), strict=True)
    )  # fmt: skip
    same = query.feature.dtype == gallery.feature.dtype and torch.equal(query.feature, gallery.feature)
    if same:
        query, gallery = _completed(query, gallery), _completed(gallery, query)
    mixed = [
        f"{label}: one side has names, the other numbers; a number is the name that is written like it"
        for label in (*NAMED, *further)
        if label in query.sources and label in gallery.sources and (label in query.names) != (label in gallery.names)
    ]
    query, gallery = same_numbers(query, gallery)
    for side, path, found in zip(SIDES, (files[0], files[-1]), (query, gallery), strict=True):
        for label in needed:
            if label not in found.sources:
                raise FeatureFileError(f"--{side}-{label}: is needed, as {path} holds none")
        for column in further:
            if column not in found.columns:
                raise FeatureFileError(
                    f"--{side}-column: {column}=SOURCE is needed, as --exclude names it and {path} holds none"
                )
    standard = getattr(options, "protocol", "standard") == "standard"  # the others take both sides together
    known = query.identity[query.identity != UNKNOWN]
    if standard and len(query) and len(gallery) and not np.isin(known, gallery.identity).any():
        why = "".join(f"; {note}" for note in mixed if note.startswith("identity"))
        raise FeatureFileError(
            f"--features: none of the {len(query)} queries has a match in the gallery, as {files[0]} and {files[-1]} "
            f"have no identity in common{why}"
        )
    check_exclusion(options.exclude, query, gallery, "--exclude")
    if ("camera" in query.sources) != ("camera" in gallery.sources):
        side = "gallery" if "camera" in query.sources else "query"
        raise FeatureFileError(f"--{side}-camera: is needed, as the other side has cameras (or give --no-cameras)")
    notes = [f"{side}: {found.used()}" for side, found in zip(SIDES, (query, gallery), strict=True)]
    return Sides(query, gallery, same, [*notes, *mixed], gallery.number_of("identity", options.junk_identity))


def _completed(images: Features, same: Features) -> Features:
    """The images with the labels that only the other set of the same images has."""
    missing = [label for label in LABELS if label not in images.sources]
    changes: dict[str, Any] = {label: getattr(same, label) for label in missing}
    if "viewpoint" in missing:
        changes["viewpoints"] = same.viewpoints
    missing += [column for column in same.columns if column not in images.columns]
    names = {label: same.names[label] for label in missing if label in same.names}
    changes |= {"names": {**images.names, **names}}
    changes |= {"sources": {**same.sources, **images.sources}, "columns": {**same.columns, **images.columns}}
    return dataclasses.replace(images, **changes)


def _extractor(options: argparse.Namespace, model: TrainedModel, *, once: bool) -> Callable[[ImageList], Features]:
    """What makes the features of a list of images; with `once` those of an image that is in several lists once."""
    made: dict[str, torch.Tensor] = {}

    def features(images: ImageList) -> Features:
        new = images.select(np.array([path not in made for path in images.paths])) if once else images
        if len(new):
            found = model.features(new, progress=not options.quiet, **inference_options(options))
            if not once:
                return found
            made.update(zip(found.paths, found.feature, strict=True))
        return Features.of(torch.stack([made[path] for path in images.paths]), images, images.paths)

    return features


def _extract(
    options: argparse.Namespace,
    model: TrainedModel,
    features: Callable[[ImageList], Features],
    data_of: Callable[[], ReidData],
    exclude: str | None,
) -> Sides:
    data = data_of()
    sides = [data.query, data.gallery]
    if options.no_cameras:
        sides = [dataclasses.replace(images, camera=np.full(len(images), UNKNOWN)) for images in sides]
    check_exclusion(exclude, sides[0], sides[1], "--exclude")
    query, gallery = map(features, sides)
    images = f"{len(query)} query and {len(gallery)} gallery images of {data.name}"
    junk = gallery.number_of("identity", options.junk_identity)
    return Sides(query, gallery, False, [f"{model.checkpoint}: step {model.step}; {images}"], junk)


def _data(options: argparse.Namespace, kind: str | None, config: Config, sets: dict[str, ReidData]) -> ReidData:
    """The data set that a run is measured on; `sets` holds those that have been read."""
    from vareid_ext.data import load_data
    from vareid_ext.methods import METHODS
    from vareid_ext.training.program import load_run_data

    keywords = {"skip_bad_images": options.skip_bad_images, "progress": not options.quiet}
    if kind is not None:
        # A root that is a file is a manifest, whose labels mean what the run's did.
        viewpoints = config.data.declared_viewpoints() if os.path.isfile(options.root or "") else None
        key = f"{kind} {viewpoints}"
        if key not in sets:
            # Most images of a second set are those of the first; what else there is, is told when it is read.
            check = options.skip_bad_images or not sets
            sets[key] = load_data(
                kind, options.root, viewpoints=viewpoints, check_images=check, needed=SIDES, **keywords
            )
        return sets[key]
    changes = {"root": options.root} if options.root else {}
    if options.skip_bad_images:
        changes["skip_bad_images"] = True
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    inputs = METHODS[config.method.name].test_inputs
    key = json.dumps([config.plain()["data"], inputs])
    if key not in sets:
        sets[key] = load_run_data(config, progress=not options.quiet)
    return sets[key]


def is_junk(identity: np.ndarray, junk_identity: int | None) -> np.ndarray:
    """Where images are of the junk identity, bool [N]."""
    return np.zeros(len(identity), dtype=bool) if junk_identity is None else identity == junk_identity


def fpr_rate(text: str) -> float:
    """The rate in ``fpr=RATE``."""
    name, _, rate = text.partition("=")
    try:
        if name == "fpr" and 0 < float(rate) < 1:
            return float(rate)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} was given; fpr=RATE is needed, a rate above 0 and below 1: fpr=1e-3")
