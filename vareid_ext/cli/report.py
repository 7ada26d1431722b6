"""``vareid report RUN ... --output report.html``: what a model does, as one page."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vareid_ext._labels import Labels, joined
from vareid_ext._text import viewpoint_name
from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.compare import add_bootstrap_arguments, check_bootstrap
from vareid_ext.cli.sources import (
    ABOUT_FILES,
    Sides,
    Source,
    add_source_arguments,
    check_sources,
    fpr_rate,
    one_rule,
    open_sources,
)
from vareid_ext.data.types import open_image
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.features import Features
from vareid_ext.metrics.comparison import PairedDifference, check_same_queries, compare_rankings, gallery_notes
from vareid_ext.metrics.exclusion import exclusion_note
from vareid_ext.ops._checks import check_count
from vareid_ext.report import plots
from vareid_ext.report.feature_map import (
    METHODS,
    MOST_IMAGES,
    center_angles,
    centers_of,
    check_method,
    chosen_images,
    feature_map,
    learned_centers,
    mean_centers,
)
from vareid_ext.report.history import History, read_history
from vareid_ext.report.measure import measure
from vareid_ext.report.page import (
    Page,
    Part,
    Table,
    difference_table,
    heat_map,
    history_tables,
    metrics_table,
    render,
)
from vareid_ext.report.pictures import Pictures
from vareid_ext.report.ranked import Compared, ranked_lists

if TYPE_CHECKING:
    from vareid_ext.data import ReidData
    from vareid_ext.trained import TrainedModel

_DESCRIPTION = f"""\
One HTML file, without anything beside it, that shows what a trained model does, or features in files: metrics with
intervals, CMC and ROC with a recommended threshold, distances of matches and non-matches, results from each viewpoint
and camera to each, ranked lists with the hardest queries first, a map of the features, and of a run how it was trained.
Several runs, or sets of files, stand side by side, with differences to the first.

RUN is a run folder or a checkpoint, measured on its own test images or, with --data and --root, on those of another
data set. The images are read again by their paths; one that is not there any more is shown as a placeholder.

{ABOUT_FILES} Their pictures are shown where they hold paths.
"""
_EXAMPLES = """\
  vareid report runs/mine --output report.html
  vareid report runs/mine runs/yours --output both.html --queries 20
  vareid report --features query.npz gallery.npz --output features.html
"""


def _parser() -> Parser:
    parser = command_parser("report", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--output", required=True, metavar="FILE", help="the page, an .html file")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    add_source_arguments(parser, "show k-reciprocal re-ranked rankings")
    group = parser.add_argument_group("what is shown")
    group.add_argument("--queries", type=int, default=40, metavar="N", help="ranked lists (default: %(default)s)")
    group.add_argument("--top", type=int, default=10, metavar="N", help="images of a list (default: %(default)s)")
    group.add_argument(
        "--activations", type=int, default=6, metavar="N",
        help="queries whose images have activation maps (Grad-CAM), the hardest (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--map", choices=tuple(METHODS), default="pca", help="way to the plane (default: %(default)s)")
    group.add_argument(
        "--recommend-threshold", type=fpr_rate, default=1e-3, metavar="fpr=RATE",
        help="the false positive rate of the recommended threshold (default: fpr=1e-3)",
    )  # fmt: skip
    add_bootstrap_arguments(group)
    return parser


@dataclass(frozen=True)
class _Item(Compared):
    """One of the compared, with all that its part of the page is made of."""

    source: Source
    sides: Sides


def _run(options: argparse.Namespace) -> Result:
    started = time.monotonic()
    output = check_writable(options.output, (".html",))
    if output.exists() and not options.force:
        raise ValueError(f"--output: {options.output} exists; choose another file, or give --force to replace it")
    check_sources(options, _parser())
    check_bootstrap(options)
    for name, least in (("queries", 0), ("top", 1), ("activations", 0)):
        check_count(f"--{name}", getattr(options, name), least)
    check_method(options.map)
    sources = open_sources(options, ["identity"], wanted=["viewpoint"], paths=True)
    one_rule(sources)
    items = [_item(options, *pair) for pair in zip(_short(options.runs or options.features), sources, strict=True)]
    measured = {item.source.name: item.measured for item in items}
    check_same_queries({name: result.query for name, result in measured.items()})
    first, *others = measured
    differences = {
        name: compare_rankings(
            measured[first].ranking,
            measured[name].ranking,
            resamples=options.resamples,
            seed=options.seed,
            names=(first, name),
        )
        for name in others
    }
    page = _page(options, items, differences)
    missing = {
        path
        for item in items
        for pictures, side in ((item.query_pictures, item.sides.query), (item.gallery_pictures, item.sides.gallery))
        for path in (side.paths[index] for index in pictures.missing)
    }
    html = render(page).encode()
    with atomic_file(output) as file:
        file.write(html)
    gaps = list(dict.fromkeys(gap for item in items for gap in item.part.gaps))
    values = {
        "output": str(output), "bytes": len(html),
        "metrics": {name: result.metrics.as_dict() for name, result in measured.items()},
        "differences": {name: {m: d.as_dict() for m, d in by.items()} for name, by in differences.items()},
        "missing_pictures": len(missing), "gaps": gaps, "notes": list(page.notes),
    }  # fmt: skip
    text = [f"{output}: {len(html) / 2**20:.1f} MiB, {time.monotonic() - started:.0f} s", *page.notes, *gaps]
    return Result("\n".join(text), values)


def _short(given: Sequence[str | Sequence[str]]) -> list[str]:
    """What to call runs, or the files of each: without folders, where they are different then."""
    paths = [[one] if isinstance(one, str) else one for one in given]
    short = [" ".join(Path(path).name for path in of_one) for of_one in paths]
    return short if len(set(short)) == len(short) and all(short) else [" ".join(of_one) for of_one in paths]


def _item(options: argparse.Namespace, name: str, source: Source) -> _Item:
    sides = source.read()
    measured = measure(
        sides.query, sides.gallery, exclude=source.exclude, metric=options.metric,
        rerank=source.rerank if options.rerank else False, junk_identity=sides.junk,
        recommend_fpr=options.recommend_threshold, block_rows=options.block_rows, progress=not options.quiet,
    )  # fmt: skip
    part = Part(name)
    part.gaps += measured.gaps
    if source.data is None:
        pictures = [_pictures(side) for side in (sides.query, sides.gallery)]
        if not any(picture.load for picture in pictures):
            part.gaps.append(
                f"pictures: {name} holds no paths of images; `vareid extract` writes them, and an array `path` of "
                "texts beside the features is read"
            )
        counts: dict[str, Labels] = {"query": sides.query, "gallery": sides.gallery}
    else:
        data = source.data()
        pictures = [Pictures(images.load) for images in (data.query, data.gallery)]
        counts = {**data.splits}
    part.made = [_counts(counts), Table("Read for this report", ["", ""], [[note, ""] for note in sides.notes])]
    return _Item(name, source.model, measured, pictures[0], pictures[1], part, source, sides)


def _pictures(side: Features) -> Pictures:
    return Pictures((lambda index: open_image(side.paths[index])) if side.paths else None)


def _counts(splits: Mapping[str, Labels]) -> Table:
    rows = []
    for name, images in splits.items():
        cameras = np.unique(images.camera[images.camera >= 0])
        views = [
            f"{viewpoint_name(v, images.viewpoints)} {int((images.viewpoint == v).sum())}"
            for v in np.unique(images.viewpoint).tolist()
        ]
        identities = len(np.unique(images.identity))
        rows.append([name, f"{len(images):,}", f"{identities:,}", str(len(cameras)), ", ".join(views)])
    return Table("Data", ["", "images", "identities", "cameras", "viewpoints"], rows)


def _page(
    options: argparse.Namespace, items: Sequence[_Item], differences: dict[str, dict[str, PairedDifference]]
) -> Page:
    measured = {item.name: item.measured for item in items}
    by_name = {item.source.name: item.name for item in items}
    differences = {by_name[name]: by_metric for name, by_metric in differences.items()}
    for item in items:
        _fill(options, item)
    ranked, note = ranked_lists(items, queries=options.queries, top=options.top, activations=options.activations)
    verified = {name: result.verification for name, result in measured.items() if result.verification is not None}
    shown = [plots.cmc_plot({name: np.asarray(result.metrics.cmc) for name, result in measured.items()})]
    if verified:
        shown.append(plots.roc_plot(verified))
    names = ", ".join(measured)
    version = importlib.metadata.version("vareid_ext")
    how = "k-reciprocal re-ranked" if options.rerank else f"{options.metric} distance"
    how = "; ".join(filter(None, [how, exclusion_note(items[0].source.exclude)]))
    return Page(
        title=f"Re-identification: {names}",
        made_by=f"Made by vareid {version} with torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}; {how}.",
        metrics=metrics_table(measured),
        differences=difference_table(items[0].name, differences, options.resamples) if differences else None,
        parts=[item.part for item in items],
        plots=shown,
        ranked=ranked,
        ranked_note=note,
        notes=_notes(options, items),
        has_pictures=any(item.query_pictures.load for item in items),
        has_activation=any(tile.activation for row in ranked for tile in row.query),
    )


def _notes(options: argparse.Namespace, items: Sequence[_Item]) -> list[str]:
    """What is to be known when reading the page."""
    notes = gallery_notes({item.name: item.measured.gallery for item in items})
    notes += [
        f"{item.name}: a shared model, without the log, the command and the environment of its run"
        for item in items
        if item.model is not None and item.model.is_shared
    ]
    if not options.queries:
        notes.append("ranked lists: left out, by --queries 0")
    return notes


def _fill(options: argparse.Namespace, item: _Item) -> None:
    """The sections of one of the compared, but for the ranked lists."""
    part, measured, name = item.part, item.measured, item.name
    part.heat_maps = [heat_map(name, label, cells) for label, cells in measured.groups.items()]
    if measured.verification is not None:
        part.histogram = plots.histogram_plot(measured.verification, name)
    part.maps = [_test_map(options, item)]
    model = item.model
    if model is None:
        return
    from vareid_ext.training.command_line import to_yaml  # what feature files do not need

    history = History() if model.is_shared else read_history(model.checkpoint.parent)
    part.gaps += history.gaps
    history = dataclasses.replace(
        history, config=history.config or to_yaml(model.config), metrics=history.metrics or model.origin.metrics
    )
    part.commands, part.config = history.commands, history.config
    part.made = [*part.made, *history_tables(history)]
    if history.steps:
        part.curves = [plots.loss_plot(history.steps, name), plots.rate_plot(history.steps, name)]
    evaluations = [*history.evaluations]
    if "untrained" in history.metrics:
        evaluations.insert(0, {"epoch": 0, **history.metrics["untrained"]})
    if evaluations:
        part.curves = [*part.curves, plots.accuracy_plot(evaluations, name)]
    _centers(options, item, model)


def _test_map(options: argparse.Namespace, item: _Item) -> plots.Plot:
    """Test images of a few identities that are asked for, with the means of their features."""
    query, gallery = item.sides.query, item.sides.gallery
    labels = query if item.sides.same else joined(query, gallery)
    feature = query.feature if item.sides.same else torch.cat([query.feature, gallery.feature])
    known = query.identity[np.asarray(item.measured.ranking.num_matches.cpu()) > 0]
    chosen = chosen_images(labels, known)
    some, rows = labels.select(chosen), feature[torch.from_numpy(chosen).to(feature.device)].float()
    what = _what(some, len(np.unique(known)), "test identities; centres are means")
    found = feature_map(rows, some, mean_centers(rows, some), method=options.map, what=what)
    return plots.map_plot(found, item.name, "Test images and the means of their features")


def _what(some: Labels, of: int, what: str) -> str:
    shown = len(np.unique(some.identity))
    return f"{shown} of {of:,} {what}; those with the most images, at most {MOST_IMAGES} of each"


def _centers(options: argparse.Namespace, item: _Item, model: TrainedModel) -> None:
    """What the losses did to the learned centres: their angles, and a map of them with training images."""
    part, name = item.part, item.name
    centers = centers_of(model.method)
    if centers is None:
        part.gaps.append(f"{name}: method {model.config.method.name} has no identity and viewpoint centres")
        return
    before = None
    assert item.source.data is not None
    data = item.source.data()
    if options.data is not None or not len(data.train):
        part.gaps.append(
            f"{name}: centres before training and a map of them need the run's own data set with its training images"
        )
    else:
        before = _initial_centers(model, data)
        part.maps = [*part.maps, _training_map(options, model, data, centers, name)]
    angles = [None if of is None else center_angles(of) for of in (before, centers)]
    part.angles = plots.angle_plot(angles[0], angles[1] or [], name)
    viewpoints = data.classes.names if options.data is None else ()
    rows = []
    for moment, by_view in zip(("before training", "after training"), angles, strict=True):
        for view, values in enumerate(by_view or []):
            if len(values):
                cells = (values.min(), np.median(values), values.max())
                called = f"{moment}, {viewpoint_name(view, viewpoints)}"
                rows.append([called, str(len(values)), *(f"{cell:.1f}" for cell in cells)])
    caption = f"{name}: angles in degrees between the centre of an identity and that of its view"
    part.angle_table = Table(caption, ["", "centres", "least", "median", "greatest"], rows)


def _initial_centers(model: TrainedModel, data: ReidData) -> tuple[Tensor, Tensor, Tensor] | None:
    """The centres that the run began with: made again from its seed, as in `vareid_ext.training.state.build`."""
    from vareid_ext.methods import TrainingClasses
    from vareid_ext.training.state import begin_method

    classes = TrainingClasses(data.num_identities, data.num_viewpoints, torch.from_numpy(data.subclass_mask()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.config.run.seed)
        return centers_of(begin_method(model.config, classes, load_weights_file=False))


def _training_map(
    options: argparse.Namespace, model: TrainedModel, data: ReidData, centers: Sequence[Tensor], name: str
) -> plots.Plot:
    images = data.train.select(chosen_images(data.train))
    features = model.features(images, batch_size=options.batch_size, precision=options.precision)
    learned = learned_centers(centers, np.unique(images.identity))
    if learned[0].shape[1] != features.feature.shape[1]:  # other parts of the feature have no centres
        learned = mean_centers(features.feature, images)
        what = _what(
            images, data.num_identities, "training identities; centres are means, as the learned are of a part"
        )
    else:
        what = _what(images, data.num_identities, "training identities; centres are the learned ones")
    found = feature_map(features.feature.float(), images, learned, method=options.map, what=what)
    return plots.map_plot(found, name, "Training images and centres")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
