"""``vareid views RUN IMAGES --output DIR``: the pictures that PN-GAN's generator draws, as files that `pngan` reads."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vareid_ext.cli.common import (
    Parser,
    Result,
    TerminatedError,
    add_inference_arguments,
    command_parser,
    inference_options,
    run_command,
)
from vareid_ext.cli.extract import check_source, folder_of, read_images, readable
from vareid_ext.data import READERS, Batch
from vareid_ext.data.types import SPLITS
from vareid_ext.files.atomic import atomic_file, remove_unfinished
from vareid_ext.methods.pngan_generated import PnganGenerated
from vareid_ext.trained import TrainedModel, load_trained

_DESCRIPTION = """\
The people on images in eight poses, drawn by the generator of a run of method pngan-generated, whose stage of the
generator must be done. Method pngan reads them: --views DIR.

RUN is a run folder or a checkpoint. IMAGES is a folder (and what lies in it at any depth), an image, a text file with a
path a line, a manifest (.csv), or with --data the root of a data set. The pictures of IMAGES/a/b.jpg are
DIR/a/b_to_1.png to b_to_8.png, of the height and width of the run's images.

Images whose eight pictures are there are left out, so that a command that was interrupted goes on where it was, and
further images may follow. A folder that holds something else is an error.
"""
_EXAMPLES = """\
  vareid views runs/generator Market-1501 --data market1501 --output views/
  vareid train --recipe market1501-pngan --root Market-1501 --views views/
"""


def _parser() -> Parser:
    parser = command_parser("views", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="folder, image, list (.txt), manifest (.csv), root")
    parser.add_argument("--output", required=True, metavar="DIR", dest="folder", help="folder of the pictures")
    parser.add_argument("--data", choices=READERS, metavar="KIND", help=f"a data set's kind: {', '.join(READERS)}")
    parser.add_argument("--split", choices=SPLITS, help="of a data set or a manifest (default: all of it)")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    add_inference_arguments(parser, flip=False)
    return parser


def _run(options: argparse.Namespace) -> Result:
    check_source(options.images, options.data)
    model = load_trained(options.run, options.device)
    generator = model.method
    if not isinstance(generator, PnganGenerated):
        raise ValueError(
            f"RUN: a run of method {model.config.method.name!r} was given; one of 'pngan-generated' is needed"
        )
    _check_that_the_generator_is_trained(model)
    output, source = Path(options.folder), folder_of(options.images)
    inside = os.path.isdir(options.images or "") and output.resolve().is_relative_to(Path(source).resolve())
    if inside and options.data is None:
        raise ValueError(f"--output: {output} lies in {source}: the views would be among the images next time")
    images, said = read_images(options.images, options.data, options.split, progress=not options.quiet)
    targets = _targets(images.paths, source, output)
    _claim(output, _fingerprint(model, generator))
    for folder in {files[0].parent for files in targets if files[0].parent.is_dir()}:
        remove_unfinished(folder)
    todo = np.flatnonzero([not all(file.is_file() for file in files) for files in targets])
    (rest,), notes, skipped = readable([images.select(todo)], options.skip_bad_images, progress=not options.quiet)
    notes = (*said, *notes)
    done = len(images) - len(todo)
    if done:
        notes = (f"{done} of them by an earlier start", *notes)
    files_of = dict(zip(images.paths, targets, strict=True))
    left = [files_of[path] for path in rest.paths]
    how = {**inference_options(options), "compute": _drawing(model, generator)}
    try:
        with (
            tqdm(total=len(images), initial=done, desc="views", unit="image", disable=options.quiet) as bar,
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
        ):
            number = 0
            for views in model.batches(rest, **how) if left else ():
                jobs = zip(views.cpu().numpy(), left[number : number + len(views)], strict=True)
                for _ in pool.map(lambda job: _write(*job), jobs):
                    bar.update()
                    done += 1
                number += len(views)
    except (KeyboardInterrupt, TerminatedError):
        print(f"{done} of {len(images)} images are done; the same command goes on there", file=sys.stderr)
        raise
    text = "\n".join([f"{output}: eight views of each of {done} images", *notes])
    return Result(text, {"output": str(output), "images": done, "skipped": skipped})


def _check_that_the_generator_is_trained(model: TrainedModel) -> None:
    """ValueError where a stage that trains the generator is not done."""
    stages, progress = model.config.resolved_stages, model.progress
    finished = any(entry["epoch"] == model.config.epochs for entry in progress.evaluations)
    for number, stage in enumerate(stages[progress.stage :], progress.stage + 1):
        if not finished and (stage.train is None or any(part.split(".")[0] == "generator" for part in stage.train)):
            raise ValueError(
                f"RUN: {model.checkpoint} was given, whose stage {number} of {len(stages)}, which trains the "
                f"generator, is not done; vareid train --resume {model.checkpoint.parent} goes on"
            )


def _targets(paths: Sequence[str], source: str, output: Path) -> list[tuple[Path, ...]]:
    """The eight files of each image; ValueError where two images have the same, or one lies outside the folder."""
    stems: dict[str, str] = {}
    targets = []
    for path in paths:
        relative = os.path.relpath(path, source or ".")
        if relative.startswith(os.pardir):
            raise ValueError(f"IMAGES: {path} lies outside {source or '.'}, where the paths of views start")
        stem = os.path.splitext(relative)[0]
        other = stems.setdefault(stem, path)
        if other != path:
            raise ValueError(f"IMAGES: {other} and {path} were given, whose views would have the same names")
        targets.append(tuple(output / f"{stem}_to_{k}.png" for k in range(1, 9)))
    return targets


def _fingerprint(model: TrainedModel, generator: PnganGenerated) -> str:
    """A text that differs where the pictures would."""
    digest = hashlib.sha256(repr(model.preprocessing).encode())
    for tensor in (generator.poses, *generator.generator.state_dict().values()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _claim(folder: Path, request: str) -> None:
    """Make the folder of a generator's pictures; ValueError where it holds something else."""
    told = folder / "generator"
    folder.mkdir(parents=True, exist_ok=True)
    if not told.exists() and not os.listdir(folder):
        with atomic_file(told) as file:
            file.write(request.encode())
    if not told.is_file() or told.read_text() != request:
        raise ValueError(
            f"--output: {folder} holds {'views by another generator' if told.is_file() else 'something else'}; choose "
            "another folder"
        )


def _drawing(model: TrainedModel, generator: PnganGenerated) -> Callable[[Batch], Tensor]:
    """What makes of a batch its pictures, uint8 [n, 8, H, W, 3]."""
    how = model.preprocessing
    mean, std = (torch.tensor(v, device=model.device).reshape(3, 1, 1) for v in (how.mean, how.std))

    def draw(batch: Batch) -> Tensor:
        colours = (generator.pictures(batch).float() * std + mean).clamp(0, 1)
        return (255 * colours).round().byte().movedim(2, -1)

    return draw


def _write(views: np.ndarray, files: Sequence[Path]) -> None:
    """Eight pictures [8, H, W, 3]."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for view, path in zip(views, files, strict=True):
        with atomic_file(path, tidy=False) as file:
            Image.fromarray(view).save(file, format="PNG")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
