"""``vareid evaluate RUN`` or ``vareid evaluate --features query.npz gallery.npz``: the quality of a ranking."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vareid_ext._text import viewpoint_name
from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.rerank import junk_note
from vareid_ext.cli.sources import (
    ABOUT_FILES,
    Sides,
    Source,
    add_source_arguments,
    check_sources,
    fpr_rate,
    is_junk,
    open_sources,
)
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.features import LABELS, FeatureFileError, Features
from vareid_ext.metrics import (
    GroupMetrics,
    QueryRanking,
    RankingMetrics,
    RepeatedMetrics,
    VerificationMetrics,
    evaluate_by_group,
    evaluate_cross_viewpoint,
    evaluate_drawn_gallery,
    evaluate_single_viewpoint,
    rank_features,
    verify_features,
)
from vareid_ext.metrics.exclusion import check_labels, exclusion_note, exclusion_text, label_arguments
from vareid_ext.metrics.queries import IDENTITY_COLUMNS, QUERY_COLUMNS, identity_table, query_table
from vareid_ext.metrics.ranking import check_max_rank, results_table
from vareid_ext.metrics.verification_results import verification_text
from vareid_ext.retrieval.rerank import fit_reranker

_DESCRIPTION = f"""\
CMC, mAP and mINP of trained models, or of features in files; with --verification also whether two images are of one
identity: ROC, TPR at fixed FPR, EER and open-set DIR at fixed FAR; with --by from which viewpoint or camera to which.

RUN is a run folder or a checkpoint, several of them are compared. Each is evaluated on its own test images, or with
--data and --root on those of another data set, or of several (--data cargo-a-a,cargo-g-g): then the features of images
that they share are made once.

{ABOUT_FILES}
It may also hold the one set of images that all protocols but the standard one need.
"""


_EXAMPLES = """\
  vareid evaluate runs/mine runs/yours --rerank
  vareid evaluate runs/mine --data market1501 --root Market-1501
  vareid evaluate runs/mine --data cargo,cargo-a-a,cargo-g-g,cargo-a-g --root CARGO
  vareid evaluate runs/mine --data vehicleid-800 --root VehicleID_V1.0 --protocol drawn-gallery
  vareid evaluate --features query.npz gallery.npz --rerank
  vareid evaluate --features features.mat --protocol cross-viewpoint
  vareid evaluate runs/mine --by viewpoint camera --per-query queries.csv --per-identity people.csv
  vareid evaluate runs/mine --exclude "identity&camera | identity&clothes"
  vareid evaluate --features query.npz gallery.npz --recommend-threshold fpr=1e-3
  vareid evaluate --features query.npy gallery.npy --query-identity query.txt --gallery-identity gallery.txt \\
      --no-cameras --json
"""


GROUPS = ("viewpoint", "camera")
"""What images can be grouped by."""


def _parser() -> Parser:
    parser = command_parser("evaluate", _DESCRIPTION, _EXAMPLES)
    add_source_arguments(parser, "also with k-reciprocal re-ranking")
    parser.add_argument("--max-rank", type=int, default=50, help="length of the CMC curve (default: %(default)s)")
    parser.add_argument(
        "--protocol", choices=("standard", "drawn-gallery", "single-viewpoint", "cross-viewpoint"), default="standard",
        help="standard: queries against the gallery; the others take both sides together, in which the same images "
        "count once. drawn-gallery: one random image of each identity is the gallery, the others ask, as VehicleID is "
        "measured; single-viewpoint, cross-viewpoint: as in the VA-reID supplement",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=10, help="draws of drawn-gallery, single-viewpoint (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of these draws (default: %(default)s)")
    group = parser.add_argument_group("where it fails")
    group.add_argument(
        "--by", nargs="+", choices=GROUPS, default=[], metavar="LABEL",
        help="also mAP and rank-1 from each to each of the images' viewpoints, cameras: viewpoint, camera, or both",
    )  # fmt: skip
    for what, columns in (("query", QUERY_COLUMNS), ("identity", IDENTITY_COLUMNS)):
        group.add_argument(f"--per-{what}", metavar="FILE", help=f"write a .csv with the columns {', '.join(columns)}")
    group = parser.add_argument_group("verification")
    group.add_argument("--verification", action="store_true", help="also ROC, TPR@FPR, EER and open-set DIR@FAR")
    group.add_argument(
        "--recommend-threshold", type=fpr_rate, metavar="fpr=RATE",
        help="also the distance up to which two images are to be taken for one identity, so that at most this share of "
        "the pairs of two identities is, and its errors with 95 %% confidence intervals; implies --verification",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="write the results to this .json file")
    return parser


class Results(NamedTuple):
    """What has been found, by name."""

    ranking: dict[str, RankingMetrics | RepeatedMetrics]
    verification: dict[str, VerificationMetrics]
    """Empty unless it was asked for, as `groups`."""
    groups: dict[str, dict[str, GroupMetrics]]
    """By ranking and label."""
    queries: dict[str, tuple[Features, QueryRanking]]
    """The queries and what each has reached, of the standard protocol."""
    rules: dict[str, str]
    """Of exclusion, of the rankings under one that is not the usual."""
    notes: list[str]
    """What is left out, or what may not be meant."""

    def add(self, prefix: str, other: Results) -> None:
        """Take over what another holds, but for its notes."""
        for mine, theirs in zip(self[:5], other[:5], strict=True):
            mine.update({f"{prefix}{name}": result for name, result in theirs.items()})  # type: ignore[attr-defined]


def _together(query: Features, gallery: Features, same: bool) -> dict[str, Any]:
    """Both sides as one set of images, in which the same images are once."""
    D, other = query.feature.shape[1], gallery.feature.shape[1]
    if other != D:
        raise FeatureFileError(f"gallery: features of {other} elements were given, but query's have {D}")
    images: dict[str, Any] = {}
    for name in ("feature", *LABELS):
        sides = getattr(query, name), getattr(gallery, name)
        if same and not (torch.equal if name == "feature" else np.array_equal)(*sides):
            raise FeatureFileError(f"--gallery-{name}: differs from query's, but the images are the same")
        images[name] = sides[0] if same else (torch.cat if name == "feature" else np.concatenate)(sides)
    images["columns"] = {
        name: query.columns[name] if same else np.concatenate([side.columns[name] for side in (query, gallery)])
        for name in query.columns
    }
    return images


def _by_path(images: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The images in the order of their paths, where these are known, so that a seed draws the same of them."""
    if len(paths) != len(images["identity"]):
        return images
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__))
    columns = {name: values[order] for name, values in images["columns"].items()}
    return {**{name: values[order] for name, values in images.items() if name != "columns"}, "columns": columns}


def _evaluate(options: argparse.Namespace, sides: Sides, source: Source) -> Results:
    query, gallery, same, _, junk = sides
    variants: dict[str, dict[str, Any]] = {"original": {"metric": options.metric}}
    if options.rerank:
        variants["reranked"] = {"rerank": source.rerank}
    common: dict[str, Any] = {"max_rank": options.max_rank, "junk_identity": junk}
    results = Results({}, {}, {}, {}, {}, [])
    if (query.camera == -1).all() and source.exclude is None:
        results.notes.append("no cameras: same-camera images stay in")
    if options.protocol == "standard":
        labels = label_arguments(query, gallery, source.exclude)
        streamed = {"block_rows": options.block_rows, "progress": not options.quiet}
        for name, variant in variants.items():
            if "rerank" in variant and (options.verification or options.by):  # fitted once for all
                kept = torch.from_numpy(~is_junk(gallery.identity, junk))
                variant = {"rerank": fit_reranker(source.rerank, query.feature, gallery.feature[kept])}
            if options.verification:  # first, as it needs more of the labels
                results.verification[name] = verify_features(
                    query.feature, gallery.feature, **labels, **variant, recommend_fpr=options.recommend_threshold,
                    junk_identity=junk, **streamed,
                )  # fmt: skip
            ranking = rank_features(query.feature, gallery.feature, **labels, **variant, junk_identity=junk, **streamed)
            results.ranking[name] = ranking.metrics(options.max_rank)
            results.queries[name] = query, ranking
            results.groups[name] = {
                label: evaluate_by_group(
                    query.feature, gallery.feature, **labels, **variant, junk_identity=junk,
                    query_group=getattr(query, label), gallery_group=getattr(gallery, label),
                    names=query.viewpoints if label == "viewpoint" else query.names.get(label, ()),
                )
                for label in options.by
            }  # fmt: skip
        results.notes.extend(_notes(labels, junk, same))
        return _with_rule(results, source.exclude)
    images = _together(query, gallery, same)
    if options.protocol == "drawn-gallery":
        images = _by_path(images, query.paths if same else query.paths + gallery.paths)
    draws = {"repeats": options.repeats, "seed": options.seed}
    for name, variant in variants.items():
        if options.protocol == "drawn-gallery":
            results.ranking[name] = evaluate_drawn_gallery(
                **images, exclude=source.exclude, **variant, **common, **draws
            )
            continue
        by_viewpoint: Mapping[int, RankingMetrics | RepeatedMetrics]
        if options.protocol == "cross-viewpoint":
            by_viewpoint = evaluate_cross_viewpoint(**images, exclude=source.exclude, **variant, **common)
        else:
            by_viewpoint = evaluate_single_viewpoint(**images, exclude=source.exclude, **variant, **common, **draws)
        called = {view: viewpoint_name(view, query.viewpoints) for view in by_viewpoint}
        results.ranking.update({f"{name} {called[view]}": result for view, result in by_viewpoint.items()})
    left_out = is_junk(images["identity"], junk)
    why = "junk"
    if options.protocol != "drawn-gallery":
        left_out, why = left_out | (images["viewpoint"] < 0), "junk or of unknown viewpoint"
    results.notes.append(f"{len(left_out)} images, {'one set' if same else 'of query and gallery'}")
    if options.protocol == "drawn-gallery":
        last = options.seed + options.repeats - 1
        results.notes.append(f"gallery: one random image of each identity, seeds {options.seed} to {last}")
    if left_out.any():
        results.notes.append(f"{why}, left out: {int(left_out.sum())} of them")
    return _with_rule(results, source.exclude)


def _with_rule(results: Results, exclude: str | None) -> Results:
    if rule := exclusion_text(exclude):
        results.rules.update(dict.fromkeys(results.ranking, rule))
        results.notes.append(exclusion_note(exclude))
    return results


def _notes(labels: dict[str, Any], junk_identity: int | None, same: bool) -> list[str]:
    """What is to be said about an evaluation of queries against a gallery."""
    junk = is_junk(labels["gallery_identity"], junk_identity)
    notes = [junk_note(int(junk.sum()), len(junk))] if junk.any() else []
    if same:
        found = (labels["query_identity"] == labels["gallery_identity"]) & ~junk
        found &= ~check_labels(**labels).left_out(slice(None), slice(None)).numpy()
        notes.append(f"query and gallery are the same images: {int(found.sum())} of {len(found)} find themselves")
    return notes


def _report(result: RankingMetrics | RepeatedMetrics) -> dict[str, Any]:
    """What the .json file holds of a result."""
    if isinstance(result, RepeatedMetrics):
        return {**result.mean(), "std": result.std(), "repeats": len(result.runs)}
    return {
        **result.as_dict(), "cmc": result.cmc.tolist(), "num_valid_queries": result.num_valid_queries,
        "num_queries": result.num_queries,
    }  # fmt: skip


def _uncounted(results: Mapping[str, RankingMetrics | RepeatedMetrics]) -> list[str]:
    """Where queries are not counted, how many."""
    lines = []
    for name, result in results.items():
        runs = result.runs if isinstance(result, RepeatedMetrics) else (result,)
        queries, valid = (sum(getattr(run, what) for run in runs) for what in ("num_queries", "num_valid_queries"))
        if valid < queries:
            lines.append(f"{name}: {queries - valid} of {queries} queries have no match and are not counted")
    return lines


def _group_text(name: str, label: str, cells: GroupMetrics) -> str:
    """The table of one ranking by one label, and what was left out of it."""
    lines = [f"\n{name}, by {label}: mAP / rank-1, % (queries with a match)", str(cells)]
    for side, count in zip(("queries", "gallery images"), cells.left_out, strict=True):
        if count:
            lines.append(f"{count} {side} of unknown {label} are left out")
    return "\n".join([*lines, ""])


def _check(options: argparse.Namespace) -> None:
    """ValueError where options do not go together."""
    check_sources(options, _parser())
    options.verification = options.verification or options.recommend_threshold is not None
    check_max_rank(options.max_rank)
    for name in ("verification", "by", "per_query", "per_identity"):
        if getattr(options, name) and options.protocol != "standard":
            raise ValueError(
                f"--{name.replace('_', '-')}: was given with --protocol {options.protocol}; it is for standard"
            )
    if options.no_cameras and "camera" in options.by:
        raise ValueError("--by: camera was given with --no-cameras")
    options.by = list(dict.fromkeys(options.by))


def _evaluate_sources(options: argparse.Namespace) -> Results:
    needed = ["identity", *(["viewpoint"] if options.protocol.endswith("viewpoint") else []), *options.by]
    kinds = () if options.data is None else tuple(dict.fromkeys(options.data.split(",")))
    sources = open_sources(options, needed, paths=options.protocol == "drawn-gallery", kinds=kinds)
    for source in sources:
        if source.data is not None:
            source.data()  # a data set that is missing stops all before any is measured
    results = Results({}, {}, {}, {}, {}, [])
    for source in sources:
        sides = source.read()
        found = _evaluate(options, sides, source)
        results.add(f"{source.name} " if len(sources) > 1 else "", found)
        results.notes.extend([*sides.notes, *found.notes])
    return results


def _run(options: argparse.Namespace) -> Result:
    _check(options)
    output = None if options.output is None else check_writable(options.output, (".json",))
    tables = {
        what: None if path is None else check_writable(path, (".csv",))
        for what, path in (("query", options.per_query), ("identity", options.per_identity))
    }
    results = _evaluate_sources(options)
    report = {name: _report(result) for name, result in results.ranking.items()}
    for name, rule in results.rules.items():
        report[name]["exclude"] = rule
    for name, result in results.verification.items():
        report[name]["verification"] = result.as_dict()
    for name, by in results.groups.items():
        report[name].update({f"by_{label}": cells.as_dict() for label, cells in by.items()})
    texts = (
        (output, lambda: json.dumps(report, indent=2) + "\n"),
        (tables["query"], lambda: query_table(results.queries)),
        (tables["identity"], lambda: identity_table(results.queries)),
    )
    for path, text in texts:
        if path is not None:
            with atomic_file(path) as file:
                file.write(text().encode())
    parts = [results_table(results.ranking), *_uncounted(results.ranking)]
    if results.verification:
        parts += ["", verification_text(results.verification), ""]
    for name, by in results.groups.items():
        parts += [_group_text(name, label, cells) for label, cells in by.items()]
    return Result("\n".join([*parts, *results.notes]), report)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
