"""``vareid label-viewpoints IMAGES --output labels.csv``: viewpoint labels of images that have none."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.extract import check_source, folder_of, read_images, readable
from vareid_ext.data import FORMATS, READERS, UNKNOWN, ExtraFiles, ImageList, ViewpointClasses, join_extras
from vareid_ext.data.keypoints import ORDERS
from vareid_ext.data.load import load_data
from vareid_ext.data.types import SPLITS, left_out
from vareid_ext.data.viewpoint_classes import PERSON
from vareid_ext.data.viewpoint_rule import ViewpointRule, fit_rule, frontness
from vareid_ext.data.viewpoints import read_viewpoint_labels
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.metrics.classification import ClassificationMetrics, evaluate_classification
from vareid_ext.models.viewpoint_network import load_viewpoint_network, save_viewpoint_network
from vareid_ext.report.contact_sheet import Shown, contact_sheet
from vareid_ext.training.device import device_named
from vareid_ext.training.viewpoint_network import (
    small_pictures,
    split_people,
    train_viewpoint_network,
    viewpoint_probabilities,
)

_DESCRIPTION = """\
Viewpoint labels of images of people, as a CSV file that training reads: --viewpoint-file.

IMAGES is a folder (and what lies in it at any depth), an image, a text file with a path a line, a manifest (.csv), or
with --data the root of a data set.

With --keypoints the labels (front, side, back) come from the keypoints that a pose estimator has written: the width of
shoulders and hips, signed by which of them is to the left. --fit adjusts that rule to labels of a few hundred of the
images. With --model they come from the images alone, by a small network that --train has made of labelled images.

OUTPUT.csv has the columns path,viewpoint,confidence. A viewpoint is the probability of each, such as
`front:0.912 side:0.085 back:0.003`, with --hard the name of the likeliest; it is -1 where neither both shoulders nor
both hips are seen, or the largest probability is below --min-confidence.

--train learns from a data set's or manifest's training images (or --split), or from all of a manifest without splits,
whose people are known: from eight tenths of the people. One more tenth makes the probabilities right, and on the last
it is measured.
"""
_EXAMPLES = """\
  vareid label-viewpoints photos/ --keypoints alphapose.json --output labels.csv --contact-sheet sheet.png
  vareid label-viewpoints photos/ --keypoints openpose/ --fit labelled.csv --output labels.csv
  vareid label-viewpoints Market-1501 --data market1501 --keypoints openpose/ --output labels.csv
  vareid label-viewpoints Market-1501 --data market1501 --viewpoint-file labels.pkl --train --model views.safetensors
  vareid label-viewpoints photos/ --model views.safetensors --output labels.csv
  vareid train --recipe market1501-va-reid --root Market-1501 --viewpoint-file labels.csv --viewpoint-labels soft
"""
_NOISE = "noise"  # the label of images that the paper's annotators could not tell either
_FOLDS, _SEED = 5, 0
_COLUMNS = 12  # of the contact sheet


class _Told(NamedTuple):
    """The viewpoints of N images, as far as they can be told."""

    names: tuple[str, ...]
    """of the V viewpoints"""
    probability: np.ndarray
    """[N, V]"""
    confidence: np.ndarray
    """[N], the largest probability, 0 where there is nothing to tell the viewpoint by"""
    label: np.ndarray
    """int64 [N], -1 where the confidence is too small"""


def _parser() -> Parser:
    parser = command_parser("label-viewpoints", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="folder, image, list (.txt), manifest (.csv), root")
    parser.add_argument("--output", metavar="OUTPUT.csv", help="the labels")
    parser.add_argument("--data", choices=READERS, metavar="KIND", help=f"a data set's kind: {', '.join(READERS)}")
    parser.add_argument("--split", choices=SPLITS, help="of a data set or a manifest (default: all; of --train, train)")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    parser.add_argument("--hard", action="store_true", help="write the likeliest viewpoint's name alone")
    parser.add_argument(
        "--min-confidence", type=float, default=0.5, metavar="P",
        help="-1 where the largest probability is below this (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--contact-sheet", metavar="SHEET.png", help=f"picture of {_COLUMNS} images of each viewpoint")
    parser.add_argument(
        "--viewpoint-file", metavar="FILE", help="true labels (.csv, .pkl), to measure how good these are"
    )
    group = parser.add_argument_group("from keypoints")
    group.add_argument("--keypoints", metavar="PATH", help=FORMATS["keypoints"])
    group.add_argument("--keypoints-order", choices=ORDERS, default="auto", help="of keypoints (default: %(default)s)")
    group.add_argument("--fit", metavar="LABELLED.csv", help="adjust the rule to these labels: path,viewpoint")
    group = parser.add_argument_group("from images alone")
    group.add_argument("--model", metavar="FILE.safetensors", help="the network to label with, or that --train writes")
    group.add_argument("--train", action="store_true", help="make the network, from images whose viewpoint is known")
    group.add_argument("--epochs", type=int, default=15, metavar="N", help="of --train (default: %(default)s)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def _run(options: argparse.Namespace) -> Result:
    _check(options)
    return _train(options) if options.train else _label(options)


def _check(options: argparse.Namespace) -> None:
    """ValueError for options that are missing or do not go together."""
    unfit = ("output", "keypoints", "contact_sheet", "fit") if options.train else () if options.keypoints else ("fit",)
    for name in unfit:
        if getattr(options, name):
            why = "does not go with --train" if options.train else "goes with --keypoints"
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(options, name)} was given, which {why}")
    if not (options.model if options.train else options.output):
        raise ValueError(f"--{'model' if options.train else 'output'}: nothing was given; a file to write is needed")
    if not options.train and bool(options.keypoints) == bool(options.model):
        raise ValueError("--keypoints, --model: one of the two is needed")
    if not 0 <= options.min_confidence <= 1:
        raise ValueError(f"--min-confidence: {options.min_confidence} was given; allowed are values from 0 to 1")
    if options.epochs < 1:
        raise ValueError(f"--epochs: {options.epochs} was given; allowed are values from 1 on")


def _train(options: argparse.Namespace) -> Result:
    """Make a network of labelled images, and measure it on people that it has not seen."""
    file = check_writable(options.model, (".safetensors",))
    device, progress = device_named(options.device, "--device"), not options.quiet
    check_source(options.images, options.data)
    if options.data is None and Path(options.images).suffix.lower() != ".csv":
        raise ValueError(
            f"IMAGES: {options.images} was given; --train needs a manifest (.csv) or --data, which say who is on an "
            "image: people are held out"
        )
    data = load_data(
        options.data or "manifest", options.images, viewpoint_file=options.viewpoint_file, check_images=False,
        needed=[options.split] if options.split else (), progress=progress,
    )  # fmt: skip
    if data.classes.angles:
        raise ValueError("--train: the viewpoints are angles; names are needed")
    undivided = not len(data.train) and not len(data.query)
    split = options.split or ("gallery" if undivided else "train")
    images, names = data.splits[split], data.classes.names
    known = (images.viewpoint >= 0) & np.array([name != _NOISE for name in images.viewpoint_name], dtype=bool)
    if not known.any():
        of = "" if undivided else f" of split {split}"
        raise ValueError(
            f"--train: none of the {len(images):,} images{of} has a viewpoint; --viewpoint-file gives them"
        )
    (images,), notes, skipped = readable([images.select(known)], options.skip_bad_images, progress=progress)
    learn, tune, test = split_people(images.identity)
    label = images.viewpoint
    missing = [name for number, name in enumerate(names) if not (label[learn] == number).any()]
    if missing:
        raise ValueError(f"--train: none of the {learn.sum():,} images to learn from is labelled {missing[0]}")
    pictures = small_pictures(images, progress=progress)
    network = train_viewpoint_network(
        pictures[~test], label[~test], tune[~test], names, epochs=options.epochs, device=device, progress=progress
    )
    metrics = evaluate_classification(viewpoint_probabilities(network, pictures[test]), label[test], names)
    save_viewpoint_network(network, file)
    people = len(np.unique(images.identity[test]))
    temperature = float(network.temperature)
    lines = [
        f"{file}: learned from {learn.sum():,} images, temperature {temperature:.2f}", *data.notes, *notes,
        f"\non {people:,} people that were held out:\n{metrics}",
    ]  # fmt: skip
    values = {
        "model": str(file), "images": int(learn.sum()), "temperature": temperature,
        "measured": {"held_out": metrics.as_dict()}, "skipped": skipped, "notes": [*data.notes, *notes],
    }  # fmt: skip
    return Result("\n".join(lines), values)


def _label(options: argparse.Namespace) -> Result:
    sources = (options.images, options.keypoints, options.model, options.viewpoint_file, options.fit)
    inputs = [name for name in sources if name]
    output = check_writable(options.output, (".csv",), inputs)
    sheet = check_writable(options.contact_sheet, (".png",), inputs) if options.contact_sheet else None
    progress, folder = not options.quiet, folder_of(options.images)
    network = (
        load_viewpoint_network(options.model).to(device_named(options.device, "--device")) if options.model else None
    )
    classes = PERSON if network is None or network.names == PERSON.names else ViewpointClasses(network.names)
    images, said = read_images(options.images, options.data, options.split, progress=progress)
    names = dict(zip(images.paths, _names(images.paths, folder), strict=True))
    unfit: tuple[str, ...] = ()
    if network is None:
        images, unfit = _with_keypoints(images, options)
    (images,), bad, skipped = readable([images], options.skip_bad_images, progress=progress)
    truth, unused = _labels_of(images, classes, options.viewpoint_file, folder)
    notes = [*said, *unfit, *bad, *unused]
    measured = {}
    known, posed = np.ones((2, len(images)), dtype=bool)
    rule = ViewpointRule()
    if network:
        probability = viewpoint_probabilities(network, small_pictures(images, progress=progress))
    else:
        s = _frontness(images, progress=progress)
        known = ~np.isnan(s)
        posed = np.array([entry is not None for entry in images.extras["keypoints"].entries])
        if options.fit:
            given, unused = _labels_of(images, PERSON, options.fit, folder)
            notes += unused
            rule, metrics = _fit(s, given, images.identity, options.fit)
            measured["fit"] = ("--fit, each image by a rule fitted without it and its person", metrics)
            truth = np.where(given < 0, truth, UNKNOWN)  # the rule knows the others
        probability = rule.probabilities(s)
    told = _told(classes.names, probability, known, options.min_confidence)
    compared = (truth >= 0) & (told.label >= 0)
    if compared.any():
        metrics = evaluate_classification(told.probability[compared], truth[compared], told.names)
        measured["known"] = ("where the viewpoint is known, and not -1 here", metrics)
    if sheet:
        _draw(sheet, images, told, truth)
    _write(output, [names[path] for path in images.paths], told, hard=options.hard)

    counts = {name: int((told.label == number).sum()) for number, name in enumerate(told.names)}
    unknown, nothing, bare = (int(mask.sum()) for mask in (told.label < 0, ~known & posed, ~posed))
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    lines = [
        f"{output}: {len(images):,} images: {found}, {unknown:,} unknown (-1)",
        f"of the unknown {bare:,} have no keypoints, {nothing:,} neither both shoulders nor both hips, "
        f"{unknown - nothing - bare:,} a confidence below {options.min_confidence:g}",
        *notes,
        *(f"\n{title}:\n{metrics}" for title, metrics in measured.values()),
    ]
    if network:
        lines[1] = f"the unknown have a confidence below {options.min_confidence:g}"
    values = {
        "output": str(output), "images": len(images), "viewpoints": counts, "unknown": unknown,
        "measured": {name: metrics.as_dict() for name, (_, metrics) in measured.items()},
        "skipped": skipped, "notes": notes,
    } | ({} if network else {"rule": rule.as_dict()})  # fmt: skip
    return Result("\n".join(lines), values)


def _names(paths: Sequence[str], folder: str) -> list[str]:
    """What the images are called in the output: by their path in the folder, those outside by their whole path."""
    names = []
    for path in paths:
        relative = os.path.relpath(path, folder or ".")
        names.append(os.path.abspath(path) if relative.startswith(os.pardir) else relative)
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise ValueError(
                f"IMAGES: {path!r} was given; the CSV file is in UTF-8, in which that name cannot be written"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"IMAGES: {twice[0]} was given twice")
    return names


def _with_keypoints(images: ImageList, options: argparse.Namespace) -> tuple[ImageList, tuple[str, ...]]:
    """The images with their keypoints, where there are any, and notes. ValueError where no image has."""
    files = ExtraFiles(keypoints=options.keypoints, keypoints_order=options.keypoints_order, missing="neutral")
    joined, notes = join_extras({"": images}, files, {"": ["keypoints"]}, folder_of(options.images))
    if all(entry is None for entry in joined[""].extras["keypoints"].entries):
        raise ValueError(
            f"--keypoints: none of the {len(images):,} images, such as {images.paths[0]}, has any in "
            f"{options.keypoints}; it holds {FORMATS['keypoints']}"
        )
    return joined[""], notes


def _frontness(images: ImageList, *, progress: bool) -> np.ndarray:
    joints, heights = [], []
    for index in tqdm(range(len(images)), desc="keypoints", unit="image", disable=not progress, leave=False):
        width, height = images.load(index).size
        joints.append(images.load_extras(index, height, width)["keypoints"].numpy())
        heights.append(height)
    return frontness(np.stack(joints), np.array(heights))


def _labels_of(
    images: ImageList, classes: ViewpointClasses, file: str | None, folder: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The images' labels, int64 [N], -1 where unknown, in a file or else as the data has them; and notes."""
    found, notes = images.viewpoint_name, tuple[str, ...]()
    if file:
        labels = read_viewpoint_labels(file, classes)
        found, unused = labels.find(images.paths, folder)
        notes = left_out(f"labels that fit no image here, or several, of {len(labels):,} in {file},", unused)
        if not any(found):
            raise ValueError(f"{file}: none of its {len(labels):,} labels fits an image, such as {images.paths[0]}")
    elif any(found) and images.viewpoints != classes.names:
        found = ("",) * len(images)
        notes = (f"the data's viewpoints ({', '.join(images.viewpoints)}) are not these and not compared",)
    return np.array([UNKNOWN if label == _NOISE else classes.number(label) for label in found]), notes


def _fit(
    s: np.ndarray, label: np.ndarray, identity: np.ndarray, file: str
) -> tuple[ViewpointRule, ClassificationMetrics]:
    """The rule for labelled images, and how good it is on images of people that it was not fitted to."""
    use = (label >= 0) & ~np.isnan(s)
    s, label, identity = s[use], label[use], identity[use]
    for number, name in enumerate(PERSON.names):
        if not (label == number).any():
            raise ValueError(
                f"--fit: {file} has no image labelled {name} with both shoulders or both hips; each of "
                f"{', '.join(PERSON.names)} is needed"
            )
    alone = identity < 0
    person = np.where(alone, -1 - np.arange(len(s)), identity)  # images of unknown people count as people of their own
    _, person = np.unique(person, return_inverse=True)
    fold = np.random.default_rng(_SEED).permutation(person.max() + 1)[person] % _FOLDS
    probability = np.empty((len(s), len(PERSON)))
    for number in np.unique(fold):
        test = fold == number
        probability[test] = fit_rule(s[~test], label[~test]).probabilities(s[test])
    return fit_rule(s, label), evaluate_classification(probability, label, PERSON.names)


def _told(names: tuple[str, ...], probability: np.ndarray, known: np.ndarray, least: float) -> _Told:
    confidence = np.where(known, probability.max(axis=1), 0)
    label = np.where(known & (confidence >= least), probability.argmax(axis=1), UNKNOWN)
    return _Told(names, probability, confidence, label)


def _write(output: Path, paths: Sequence[str], told: _Told, *, hard: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "viewpoint", "confidence"))
    for path, row, confidence, label in zip(paths, told.probability, told.confidence, told.label, strict=True):
        viewpoint = "-1" if label < 0 else told.names[label] if hard else _shares(told.names, row)
        writer.writerow((path, viewpoint, f"{confidence:.3f}"))
    with atomic_file(output) as file:
        file.write(text.getvalue().encode())


def _shares(names: Sequence[str], probability: np.ndarray) -> str:
    """As `front:0.912 side:0.085 back:0.003`, in thousandths that sum to 1."""
    thousandths = np.rint(1000 * probability).astype(int)
    thousandths[probability.argmax()] += 1000 - thousandths.sum()
    return " ".join(f"{name}:{share / 1000:.3f}" for name, share in zip(names, thousandths, strict=True))


def _draw(file: Path, images: ImageList, told: _Told, truth: np.ndarray) -> None:
    """A row of pictures of each viewpoint, the surest first, in even steps of rank; those known to be wrong framed."""
    rows = []
    for label, name in (*enumerate(told.names), (UNKNOWN, "unknown")):
        of_label = np.flatnonzero(told.label == label)
        of_label = of_label[np.argsort(-told.confidence[of_label], kind="stable")]
        steps = np.linspace(0, len(of_label) - 1, min(_COLUMNS, len(of_label))).round().astype(int)
        shown = [
            Shown(images.load(i), f"{told.confidence[i]:.3f}", bool(label >= 0 and truth[i] >= 0 and truth[i] != label))
            for i in of_label[steps]
        ]
        rows.append((f"{name}: {len(of_label):,} images, the surest first", shown))
    with atomic_file(file) as target:
        contact_sheet(rows).save(target, format="PNG")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
