"""``vareid extract RUN IMAGES --output features.npz``: the features of images by a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vareid_ext._labels import COLUMN
from vareid_ext.cli.common import (
    Parser,
    Result,
    TerminatedError,
    add_inference_arguments,
    command_parser,
    inference_options,
    run_command,
)
from vareid_ext.cli.shards import Parts, add_shard_arguments, check_merge_alone, marks, read_shards, share
from vareid_ext.data import (
    EXTRAS,
    FORMATS,
    READERS,
    UNKNOWN,
    ExtraFiles,
    ImageList,
    ReidData,
    ViewpointClasses,
    join_extras,
    load_data,
)
from vareid_ext.data.extra_files import check_given
from vareid_ext.data.keypoints import ORDERS
from vareid_ext.data.load import listed, unreadable_images
from vareid_ext.data.readers import needs_root
from vareid_ext.data.types import IMAGE_SUFFIXES, SPLITS, is_litter, left_out, unreadable_of
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.features import LABELS, read_arrays
from vareid_ext.trained import TrainedModel, load_trained, unlabelled

_DESCRIPTION = """\
The features of images by a trained model, with its preprocessing: what its own evaluation compares.

RUN is a run folder or a checkpoint. IMAGES is a folder (and what lies in it at any depth), an image, a text file with a
path a line, a manifest (.csv), or with --data the root of a data set.

OUTPUT.npz holds feature float32 [N, D], path, and what is known of identity, camera, viewpoint, their names
(identity_name, camera_name, viewpoint_class) and further columns (column_clothes, column_clothes_name). OUTPUT.npy
holds the features alone, which can be memory-mapped; path and labels lie beside it in OUTPUT.path.npy,
OUTPUT.identity.npy, ...

A command that was interrupted goes on where it was when it is given again. --shard 2/5 takes the second fifth of the
images, so that five machines can share them; --merge puts the outputs of all five together.

Some methods read an input beside each image, such as a parsing, which lies as the images do in theirs.
"""
_EXAMPLES = """\
  vareid extract runs/mine photos/ --output photos.npz
  vareid extract runs/mine Market-1501 --data market1501 --split gallery --output gallery.npz --precision bf16
  vareid extract runs/mine list.txt --output part-1.npz --shard 1/2
  vareid extract --merge part-1.npz part-2.npz --output all.npz
"""
_NAMES = ("viewpoint_class", "identity_name", "camera_name")
_WRITTEN = ("path", *LABELS, *_NAMES, "shard", "request")  # beside the features
_PART, _SECONDS = 4096, 60.0  # images and time after which features are written


def _parser() -> Parser:
    parser = command_parser("extract", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="folder, image, list (.txt), manifest (.csv), root")
    parser.add_argument("--output", required=True, metavar="OUTPUT", help="the features: .npz or .npy")
    add_image_arguments(parser)
    add_shard_arguments(parser, "images")
    return parser


def add_image_arguments(parser: Parser, *, flip: bool = True) -> None:
    """How images are found, read and embedded; `flip` as for the inference arguments."""
    parser.add_argument("--data", choices=READERS, metavar="KIND", help=f"a data set's kind: {', '.join(READERS)}")
    parser.add_argument(
        "--split", choices=SPLITS,
        help="of a data set or a manifest (default: all of it; without identities, unless they are the same people in "
        "all splits, as in a manifest)",
    )  # fmt: skip
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    add_inference_arguments(parser, flip=flip)
    group = parser.add_argument_group("inputs beside the images, for methods that need them")
    for name, formats in FORMATS.items():
        group.add_argument(f"--{name}", metavar="PATH", help=formats)
    group.add_argument("--keypoints-order", choices=ORDERS, default="auto", help="of keypoints (default: %(default)s)")
    group.add_argument(
        "--missing", choices=("error", "neutral"), default="error",
        help="what happens to images without one (default: %(default)s)",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> Result:
    output = check_writable(options.output, (".npz", ".npy"), options.merge or ())
    if options.merge:
        check_merge_alone(options, _parser())
        return _merge(options.merge, output)
    if options.run is None:
        raise ValueError("RUN, IMAGES: both are needed")
    check_source(options.images, options.data)
    model = load_trained(options.run, options.device)
    (images,), notes, skipped = gather_images(model, [options.images], options)
    request = fingerprint(model, images, options)
    arrays = marks(request, options.shard)
    if options.shard is not None:
        images = images.select(np.arange(*share(len(images), options.shard)))
        request = "{} {}/{}".format(request, *options.shard)
    parts = parts_of(output, request)
    notes = (*parts.notes(), *notes)
    feature = complete(parts, model, images, options)
    _write(output, {"feature": feature, **_described(images), **arrays})
    parts.remove()
    text = "\n".join([f"{output}: features {list(feature.shape)}", *notes])
    values = {"output": str(output), "images": len(feature), "D": feature.shape[1]}
    return Result(text, {**values, "skipped": skipped, "notes": list(notes)})


def gather_images(
    model: TrainedModel, sources: Sequence[str | None], options: argparse.Namespace, name: str = "IMAGES"
) -> tuple[list[ImageList], tuple[str, ...], list[str]]:
    """The images of each source that can be read, with what the model reads beside them; what is to be said; and those
    left out.

    Args:
        model: of the run.
        sources: as :func:`read_images` takes them.
        options: of :func:`add_image_arguments`.
        name: of the argument that names the sources.
    """
    files = ExtraFiles(**{field.name: getattr(options, field.name) for field in fields(ExtraFiles)})
    inputs = model.method.test_inputs
    check_given(files, inputs, f"method {model.config.method.name!r}")
    lists, notes = [], []
    for source in sources:
        images, said = read_images(
            source, options.data, options.split, progress=not options.quiet, name=name,
            viewpoints=model.config.data.declared_viewpoints(),
        )  # fmt: skip
        found, missing = join_extras({"": images}, files, {"": inputs}, folder_of(source))
        lists.append(found[""])
        notes += [*said, *missing]
    lists, left, skipped = readable(lists, options.skip_bad_images, progress=not options.quiet)
    unread = [f"{name} are given, but the method does not read them" for name in EXTRAS
              if getattr(files, name) is not None and name not in inputs]  # fmt: skip
    return lists, tuple(dict.fromkeys((*left, *notes, *unread))), skipped


def check_source(source: str | None, kind: str | None, name: str = "IMAGES") -> None:
    """ValueError unless images are named where they are needed, and only there.

    Args:
        source: as :func:`read_images` takes it.
        kind: likewise.
        name: of the argument.
    """
    rendered = kind is not None and not needs_root(kind)
    if source is None and not rendered:
        raise ValueError(f"{name}: nothing was given; a folder, an image, a list (.txt), a manifest (.csv) is needed")
    if source is not None and rendered:
        raise ValueError(f"{name}: {source} was given, but --data {kind} draws its images; leave it out")


def check_no_image_options(options: argparse.Namespace) -> None:
    """ValueError for options of images, where features are read from a file."""
    for name in ("data", "split", "skip_bad_images"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')}: is for images, but --features was given")


def folder_of(source: str | None) -> str:
    """The folder that relative paths start from."""
    if source is None:
        return ""
    return source if os.path.isdir(source) else os.path.dirname(source)


def read_images(
    source: str | None,
    kind: str | None,
    split: str | None,
    *,
    progress: bool,
    name: str = "IMAGES",
    viewpoints: ViewpointClasses | None = None,
) -> tuple[ImageList, tuple[str, ...]]:
    """The images that a command line names, and what is to be said of them: a folder, an image, a list, a manifest or a
    data set, or a split of these; None for a data set that is rendered.

    A manifest's viewpoints are those that `viewpoints` declares, as a run does that was trained with them.

    Raises:
        ValueError: it does not name any.
        OSError: it is not there.
    """
    check_source(source, kind, name)
    if (kind is None and Path(source or "").suffix.lower() == ".csv") or (
        kind == "auto" and os.path.isfile(source or "")
    ):
        kind = "manifest"
    if kind is not None:
        needed = () if split is None else (split,)
        declared = viewpoints if os.path.isfile(source or "") else None
        data = load_data(kind, source, viewpoints=declared, check_images=False, needed=needed, progress=progress)
        if split is None:
            images, said = _all_images(data, kind)
            return images, (*data.notes, *said)
        return data.with_own_identities() if split == "train" else data.splits[split], data.notes
    assert source is not None
    path = Path(source)
    if split is not None:
        raise ValueError(
            f"--split: {split!r} was given, but {source} is no manifest, and --data says no data set's kind"
        )
    if path.is_dir():
        found = (os.path.join(folder, file) for folder, _, files in os.walk(source) for file in files)
        paths = sorted(p for p in found if Path(p).suffix.lower() in IMAGE_SUFFIXES and not is_litter(p))
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        paths = [source]
    elif path.suffix.lower() == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        paths = [os.path.join(path.parent, line.strip()) for line in lines if line.strip()]
    elif path.exists():
        raise ValueError(
            f"{name}: {source} was given; allowed are a folder, an image, a list (.txt), a manifest (.csv)"
        )
    else:
        raise FileNotFoundError(f"{name}: {source} does not exist")
    if not paths:
        raise ValueError(f"{name}: {source} holds no images")
    return unlabelled(paths), ()


def _all_images(data: ReidData, kind: str) -> tuple[ImageList, tuple[str, ...]]:
    """The images of all splits; without identities where equal ones in training and test may not be the same people,
    which is said.
    """
    lists = [data.with_own_identities(), data.query, data.gallery]
    further = dict.fromkeys(name for images in lists for name in images.columns)
    columns: dict[str, Any] = {
        "columns": {
            name: np.concatenate([images.columns.get(name, np.full(len(images), UNKNOWN)) for images in lists])
            for name in further
        },
        "camera": np.concatenate([images.camera for images in lists]),
        "viewpoint": np.concatenate([images.viewpoint for images in lists]),
        "paths": tuple(path for images in lists for path in images.paths),
        "viewpoint_name": tuple(name for images in lists for name in images.viewpoint_name),
        "viewpoints": data.query.viewpoints,
        "names": data.query.names,
    }
    identity = np.concatenate([images.identity for images in lists])
    said: tuple[str, ...] = ()
    if kind != "manifest" and "identity" not in data.query.names and sum(map(bool, map(len, lists))) > 1:
        identity = np.full(len(identity), UNKNOWN)
        said = ("identities: left out, as those of other splits may be other people; --split keeps those of one",)
    return ImageList(identity=identity, loader=data.query.loader, **columns), said


def readable(
    lists: Sequence[ImageList], skip: bool, *, progress: bool
) -> tuple[list[ImageList], tuple[str, ...], list[str]]:
    """The images of each list without those that cannot be read; what is to be said about these; and their paths."""
    bad = [unreadable_images(images, progress=progress) for images in lists]
    every = [problem for problems in bad for problem in problems]
    if not every:
        return list(lists), (), []
    if not skip:
        raise ValueError(listed(every, "--skip-bad-images"))
    if len(every) == sum(map(len, lists)):
        raise ValueError(f"none of the {len(every)} images can be read: {every[0].why}")
    paths = [images.paths[b.number] for images, problems in zip(lists, bad, strict=True) for b in problems]
    left = []
    for images, problems in zip(lists, bad, strict=True):
        keep = np.ones(len(images), dtype=bool)
        keep[[b.number for b in problems]] = False
        left.append(images.select(keep))
    return left, left_out(unreadable_of(*lists), paths), paths


def fingerprint(model: TrainedModel, images: ImageList, options: argparse.Namespace) -> str:
    """A text that differs where the features would."""
    digest = hashlib.sha256(model.checkpoint.read_bytes())
    extras = {name: getattr(options, name) for name in (*EXTRAS, "keypoints_order", "missing")}
    how = {"flip": options.flip, "precision": options.precision, "paths": images.paths, **extras}
    how["preprocessing"] = dataclasses.asdict(model.preprocessing)
    digest.update(json.dumps(how).encode())
    return digest.hexdigest()


def parts_of(output: Path, request: str) -> Parts:
    """Where features are kept until all that go into `output` are done."""
    return Parts(Path(f"{output}.parts"), request, "images, model or options")


def complete(parts: Parts, model: TrainedModel, images: ImageList, options: argparse.Namespace) -> np.ndarray:
    """The features of all images, of which those that are not there yet are made: float32 [N, D]."""
    _extract(model, images, parts, inference_options(options), progress=not options.quiet)
    return np.concatenate([*parts.read(len(images)), np.empty((0, model.feature_dim), np.float32)])


def _extract(model: TrainedModel, images: ImageList, parts: Parts, how: dict[str, Any], *, progress: bool) -> None:
    """The features of the images that are left, into the parts."""
    rest = images.select(np.arange(parts.done, len(images)))
    held: list[torch.Tensor] = []
    written = time.monotonic()
    try:
        with tqdm(total=len(images), initial=parts.done, desc="features", unit="image", disable=not progress) as bar:
            for feature in model.batches(rest, **how) if len(rest) else ():
                held.append(feature.cpu())
                bar.update(len(feature))
                if sum(map(len, held)) >= _PART or time.monotonic() - written >= _SECONDS:
                    whole, held, written = (
                        torch.cat(held),
                        [],
                        time.monotonic(),
                    )  # an interruption must not add it twice
                    parts.add(whole.numpy())
    except (KeyboardInterrupt, TerminatedError):
        print(
            f"{parts.done + sum(map(len, held))} of {len(images)} images are done; the same command goes on there",
            file=sys.stderr,
        )
        raise
    finally:
        if held:
            parts.add(torch.cat(held).numpy())


def _described(images: ImageList) -> dict[str, np.ndarray]:
    """Paths and labels; without labels that are not known of any image."""
    labels = {name: getattr(images, name) for name in LABELS}
    labels |= {COLUMN + name: values for name, values in images.columns.items()}
    known = {name: values for name, values in labels.items() if (values != UNKNOWN).any()}
    if "viewpoint" in known:
        known["viewpoint_class"] = images.viewpoint_classes()
    known |= {key: called for key, called in images.called_by_key().items() if key.removesuffix("_name") in known}
    return {"path": np.array(images.paths, dtype=np.str_), **known}


def _beside(output: Path, name: str) -> Path:
    """Where an array lies whose features lie in `output`, a .npy file."""
    return output if name == "feature" else output.with_suffix(f".{name}.npy")


def _there(output: Path) -> list[str]:
    """The arrays that lie beside a .npy file of features."""
    begin, end = f"{output.stem}.", ".npy"
    found = (file.name for file in output.parent.iterdir() if file.name.startswith(begin) and file.suffix == end)
    names = (name.removeprefix(begin).removesuffix(end) for name in found)
    return sorted(name for name in names if name in _WRITTEN or name.startswith(COLUMN))


def _write(output: Path, arrays: dict[str, Any]) -> None:
    if output.suffix.lower() == ".npz":
        with atomic_file(output) as file:
            np.savez(file, **arrays)
        return
    for name in _there(output):
        _beside(output, name).unlink()
    for name in reversed(arrays):  # the features last
        with atomic_file(_beside(output, name)) as file:
            np.save(file, arrays[name])


def _read(path: Path) -> dict[str, np.ndarray]:
    """What :func:`_write` has written."""
    if path.suffix.lower() == ".npz":
        return read_arrays(path)
    files = {name: _beside(path, name) for name in ("feature", *_there(path))}
    return {name: read_arrays(file)[""] for name, file in files.items()}


def _merge(names: Sequence[str], output: Path) -> Result:
    shards, _ = read_shards(names, _read, "other images, another model or other options")
    # A shard's labels may all be unknown where another's are not.
    known = (*LABELS, *_NAMES)
    labels = {
        name: "" if values.dtype.kind == "U" else UNKNOWN
        for shard in shards
        for name, values in shard.items()
        if name in known or name.startswith(COLUMN)
    }
    filled = [_filled(shard, labels) for shard in shards]
    merged = {name: np.concatenate([shard[name] for shard in filled]) for name in filled[0]}
    _write(output, merged)
    shape = merged["feature"].shape
    text = f"{output}: features {list(shape)} of {len(shards)} shards"
    return Result(text, {"output": str(output), "images": shape[0], "D": shape[1], "shards": len(shards)})


def _filled(arrays: dict[str, np.ndarray], unknown: Mapping[str, int | str]) -> dict[str, np.ndarray]:
    """The arrays, and those that are missing, of what is written where a label is unknown."""
    return {**{name: np.full(len(arrays["feature"]), value) for name, value in unknown.items()}, **arrays}


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
