"""The poster's ablation on Market-1501, small and fast: a network from random weights, images decoded once and
augmented on the device.

    python -m benchmarks.market_ablation pack Market-1501-v15.09.15 market.npz --viewpoint-file market_labels.pkl
    python -m benchmarks.market_ablation train market.npz OUT --minutes 9

``pack`` writes one file that is small enough to travel: every image but the junk as WebP, with its labels. ``train``
trains one row of the ablation after the other, several at once, as many as the minutes allow, and writes
OUT/results.json and OUT/table.md as each ends. Started again, it goes on where it stopped: a row from its last epoch,
the finished ones not at all. Further options (``--model.backbone=resnet50``, ``--optimizer.lr=1e-3``) are those of
``python -m vareid_ext.train``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import write_atomically
from vareid_ext import evaluate_features
from vareid_ext.data import Batch, ImageList, PKSampler, ReidData, load_data
from vareid_ext.files.atomic import atomic_file
from vareid_ext.files.checkpoint import save_checkpoint
from vareid_ext.methods import Method
from vareid_ext.training.command_line import parse
from vareid_ext.training.config import Config, DataConfig
from vareid_ext.training.device import AUTOCAST
from vareid_ext.training.optimizers import set_learning_rate
from vareid_ext.training.schedule import learning_rate
from vareid_ext.training.state import build

# Name of the recipe, what the poster calls it, its mAP and rank-1 there (a larger network, ImageNet weights).
ROWS = {
    "market1501-va-reid": ("L_y + L_v + L_R", 89.97, 95.87),
    "market1501-xent": ("Xent", 86.30, 94.31),
    "market1501-adaptive-viewpoint": ("L_y + L_v", 88.67, 95.37),
    "market1501-lsr": ("LSR", 86.72, 94.35),
    "market1501-adaptive": ("L_y", 86.97, 94.70),
    "market1501-adaptive-regularizer": ("L_y + L_R", 88.25, 95.25),
}
SETTINGS = ("--model.backbone=resnet18", "--model.pretrained=false", "--data.height=256", "--data.width=128",
            "--optimizer.epochs=60", "--optimizer.schedule=cosine", "--optimizer.warmup_epochs=3",
            "--optimizer.lr=7e-4", "--method.view_weight_drop=40")  # fmt: skip
_SPLITS = ("train", "query", "gallery")
_TEST_BATCH = 512
_ERASED, _RATIO = (0.02, 0.4), (0.3, 3.3)  # share of the image and height to width, as in vareid_ext.data.transforms


# ---- one file of images --------------------------------------------------------------------------------------------
def pack(
    root: Path, target: Path, viewpoint_file: Path | None, *, size: tuple[int, int], quality: int, most: float
) -> int:
    """Write the data set as one file; its bytes.

    Raises:
        ValueError: it takes more than ``most`` MiB. Nothing is written then.
    """
    data = load_data("market1501", root, viewpoint_file=viewpoint_file, check_images=False)

    def encoded(images: ImageList, index: int) -> bytes:
        image, file = images.load(index), io.BytesIO()
        if image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(file, "WEBP", quality=quality, method=6)
        return file.getvalue()

    arrays: dict[str, np.ndarray] = {"identity_names": np.array(data.identity_names)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split in _SPLITS:
            images: ImageList = getattr(data, split)
            files = list(pool.map(encoded, [images] * len(images), range(len(images))))
            arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
            arrays[f"{split}_end"] = np.cumsum([len(file) for file in files])
            for label in ("identity", "camera", "viewpoint"):
                arrays[f"{split}_{label}"] = getattr(images, label)
    total = sum(array.nbytes for array in arrays.values())
    if total > most * 2**20:
        raise ValueError(
            f"quality: {quality} was given, which makes {total / 2**20:.1f} MiB; at most {most} are allowed"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        np.savez(file, **arrays)
    return target.stat().st_size


def check_packed(path: Path) -> Path:
    """`path`; ValueError where it is no whole file of `pack`."""
    try:
        with np.load(path) as file:
            whole = {f"{split}_bytes" for split in _SPLITS} <= set(file.files)
    except (zipfile.BadZipFile, ValueError, EOFError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: is not, or not all of, what `pack` has written; pack it again")
    return path


def unpack(path: Path, device: torch.device) -> tuple[ReidData, dict[str, Tensor]]:
    """The data set, and each split's images as uint8 [N, 3, height, width] on the device."""
    with np.load(check_packed(path)) as file:
        arrays = dict(file)

    def decoded(raw: np.ndarray) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(raw.tobytes())).convert("RGB"))

    lists, pixels = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split in _SPLITS:
            parts = np.split(arrays[f"{split}_bytes"], arrays[f"{split}_end"][:-1])
            whole = torch.from_numpy(np.stack(list(pool.map(decoded, parts))))
            pixels[split] = whole.permute(0, 3, 1, 2).contiguous().to(device)
            labels = [arrays[f"{split}_{label}"] for label in ("identity", "camera", "viewpoint")]
            lists[split] = ImageList(
                *labels, paths=tuple(f"{split}/{i}" for i in range(len(parts))), viewpoint_name=("",) * len(parts)
            )
    return ReidData(path.stem, **lists, identity_names=tuple(arrays["identity_names"].tolist())), pixels


# ---- images on the device ------------------------------------------------------------------------------------------
def resized(images: Tensor, config: DataConfig) -> Tensor:
    """uint8 [N, 3, h, w] -> float32 [N, 3, height, width] in [0, 1]."""
    size = (config.height, config.width)
    x = functional.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
    return x.clamp_(0, 255).div_(255)


def normalised(x: Tensor, config: DataConfig) -> Tensor:
    """Each channel's mean and standard deviation taken out."""
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (config.mean, config.std))
    return (x - mean) / std


def augmented(x: Tensor, config: DataConfig, generator: torch.Generator) -> Tensor:
    """Flip, shift within a black border, normalise, erase: what ``build_transform`` does to one image, for a batch.

    A rectangle to erase that is longer than the image is cut to it (there another one is drawn).
    """
    N, C, H, W = x.shape

    def draw(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(N, device=x.device, generator=generator)

    x = torch.where((draw() < config.flip)[:, None, None, None], x.flip(3), x)
    if config.pad:
        wide = functional.pad(x, [config.pad] * 4)
        top, left = ((draw() * (2 * config.pad + 1)).long() for _ in range(2))
        rows, columns = (first[:, None] + torch.arange(n, device=x.device) for first, n in ((top, H), (left, W)))
        image, channel = torch.arange(N, device=x.device), torch.arange(C, device=x.device)
        x = wide[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    x = normalised(x, config)
    area, ratio = draw(*_ERASED) * H * W, draw(*np.log(_RATIO)).exp()
    inside = draw()[:, None, None] < config.erasing
    for extent, length, axis in ((H, (area * ratio).sqrt(), 1), (W, (area / ratio).sqrt(), 2)):
        length = length.clamp(max=extent)
        first = draw() * (extent - length)
        place = torch.arange(extent, device=x.device) + 0.5
        within = (place >= first[:, None]) & (place < (first + length)[:, None])
        inside = inside & within.unsqueeze(3 - axis)
    return x.masked_fill(inside[:, None], 0.0)


# ---- one row -------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def features(method: Method, images: Tensor, config: Config) -> Tensor:
    """float32 [N, D], rows of length 1."""
    dtype, was_training = AUTOCAST[config.run.precision], method.training
    method.eval()
    parts = []
    for some in images.split(_TEST_BATCH):
        x = normalised(resized(some, config.data), config.data).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            nothing = torch.zeros(len(x), dtype=torch.long, device=x.device)
            parts.append(method.embed(Batch(x, nothing, nothing, nothing, nothing)))
    method.train(was_training)
    return torch.cat(parts)


def train_row(
    config: Config, data: ReidData, pixels: dict[str, Tensor], checkpoint: Path, stop: float
) -> dict[str, float] | None:
    """Train from the checkpoint on, if there is one; the metrics, or None if ``stop`` of time.monotonic came first."""
    device, dtype = pixels["train"].device, AUTOCAST[config.run.precision]
    started = time.monotonic()
    state = build(config, data, device)
    if checkpoint.exists():
        state.restore(checkpoint)
    sampler = PKSampler(
        data.train, identities_per_batch=config.sampler.identities, instances=config.sampler.instances,
        spread=config.sampler.spread, seed=config.run.seed, batches_per_epoch=config.sampler.batches_per_epoch,
    )  # fmt: skip
    steps, progress = sampler.batches_per_epoch, state.progress
    labels = [torch.from_numpy(x.copy()).to(device)
              for x in (data.train.identity, data.train.camera, data.train.viewpoint)]  # fmt: skip
    generator = torch.Generator(device)
    forward: Any = torch.compile(state.method) if config.run.compile else state.method
    for epoch in range(progress.step // steps, config.optimizer.epochs):
        sampler.set_epoch(epoch)
        generator.manual_seed(config.run.seed * 1_000_003 + epoch)
        state.method.at_epoch(epoch)
        state.method.train()
        order = torch.tensor([[draw.index for draw in draws] for draws in sampler]).to(device)
        for index in order:
            set_learning_rate(state.optimizer, learning_rate(config.optimizer, progress.step / steps))
            image = augmented(resized(pixels["train"][index], config.data), config.data, generator)
            image = image.contiguous(memory_format=torch.channels_last)
            batch = Batch(image, *(label[index] for label in labels), index)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                terms = forward(batch)
            total = sum(term.weight * term.value for term in terms.values())
            state.optimizer.zero_grad(set_to_none=True)
            total.backward()
            state.optimizer.step()
            progress.step += 1
        value = float(total.detach())  # the epoch's only wait
        print(f"{checkpoint.stem}: epoch {epoch + 1}, loss {value:.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if not np.isfinite(value):
            raise ArithmeticError(f"the loss became {value} in epoch {epoch + 1}")
        save_checkpoint(checkpoint, state.content(time.monotonic() - started))
        if time.monotonic() > stop and epoch + 1 < config.optimizer.epochs:
            return None
    query, gallery = (features(state.evaluated, pixels[split], config) for split in ("query", "gallery"))
    known = (data.query.identity, data.gallery.identity, data.query.camera, data.gallery.camera)
    plain = evaluate_features(query, gallery, *known)
    reranked = evaluate_features(query, gallery, *known, rerank=True)
    return {"mAP": plain.mAP, "rank-1": plain.rank1, "re-ranked mAP": reranked.mAP, "re-ranked rank-1": reranked.rank1,
            "seconds": progress.seconds + time.monotonic() - started}  # fmt: skip


def row_config(row: str, device: str, options: Sequence[str]) -> Config:
    """The recipe's configuration with this program's settings and the options of the command line."""
    precision = "bf16" if device.startswith("cuda") else "fp32"
    own = [*SETTINGS, f"--run.precision={precision}", f"--run.device={device}"]
    return parse([f"--recipe={row}", "--root=unused", *own, *options]).config


# ---- all rows ------------------------------------------------------------------------------------------------------
def table(results: dict[str, dict[str, float]], backbone: str, epochs: int) -> str:
    """The finished rows as Markdown."""
    lines = [f"# Market-1501, {backbone} from random weights, {epochs} epochs", "",
             "| loss | mAP | rank-1 | re-ranked mAP | re-ranked rank-1 | s | poster's mAP | rank-1 |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in sorted(results, key=lambda row: ROWS[row][1]):
        name, published, published_rank = ROWS[row]
        found = results[row]
        ours = [f"{100 * found[key]:.2f}" for key in ("mAP", "rank-1", "re-ranked mAP", "re-ranked rank-1")]
        cells = [name, *ours, f"{found['seconds']:.0f}", f"{published:.2f}", f"{published_rank:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def train_rows(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Train the rows, several at once, each in a process of its own; 0 if all are finished, else 1."""
    stop = time.monotonic() + 60 * options.minutes
    work: Path = options.output / "rows"
    work.mkdir(parents=True, exist_ok=True)
    config = row_config(options.rows[0], options.device, settings)  # errors are told before any process starts
    check_packed(options.packed)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: {options.device} was given, but PyTorch sees no GPU")

    def one(row: str) -> None:
        left = stop - time.monotonic()
        if left > 0 and not (work / f"{row}.json").exists():
            command = [sys.executable, "-m", __spec__.name, "row", str(options.packed), str(work), row]
            command += ["--device", options.device, "--seconds", str(left), *settings]
            if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
                print(f"{row}: failed", file=sys.stderr)
        done = {r: json.loads((work / f"{r}.json").read_text()) for r in ROWS if (work / f"{r}.json").exists()}
        write_atomically(options.output / "results.json", json.dumps(done, indent=1) + "\n")
        page = table(done, config.model.backbone, config.optimizer.epochs)
        write_atomically(options.output / "table.md", page)

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(one, options.rows))
    print((options.output / "table.md").read_text())
    unfinished = [row for row in options.rows if not (work / f"{row}.json").exists()]
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}; start again to go on", file=sys.stderr)
    return 1 if unfinished else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.market_ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the data set as one small file")
    packing.add_argument("root", type=Path, help="the folder Market-1501-v15.09.15, or one laid out like it")
    packing.add_argument("packed", type=Path, help="the file to write")
    packing.add_argument("--viewpoint-file", type=Path, help="viewpoint labels; without them L_v cannot be trained")
    packing.add_argument("--size", type=int, nargs=2, default=(128, 64), metavar=("H", "W"), help="pixels (128 64)")
    packing.add_argument("--quality", type=int, default=80, help="of WebP, 1 to 100 (80)")
    packing.add_argument("--most", type=float, default=60, help="MiB that the file may take (60)")
    training = commands.add_parser("train", help="train the rows")
    training.add_argument("packed", type=Path)
    training.add_argument("output", type=Path, help="folder of results.json, table.md and the rows' checkpoints")
    training.add_argument("--minutes", type=float, default=9, help="after which the rows save and stop (9)")
    training.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which, in this order")
    training.add_argument("--at-once", type=int, default=3, help="rows trained at the same time (3)")
    training.add_argument("--device", default="cuda")
    row = commands.add_parser("row")  # one process of `train`
    row.add_argument("packed", type=Path)
    row.add_argument("work", type=Path)
    row.add_argument("row")
    row.add_argument("--device", required=True)
    row.add_argument("--seconds", type=float, required=True)
    options, settings = parser.parse_known_args(arguments)
    if settings and options.command == "pack":
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    try:
        if options.command == "pack":
            size = pack(options.root, options.packed, options.viewpoint_file, size=tuple(options.size),
                        quality=options.quality, most=options.most)  # fmt: skip
            print(f"{options.packed}: {size / 2**20:.1f} MiB")
            return 0
        if options.command == "train":
            return train_rows(options, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stop = time.monotonic() + options.seconds
    config = row_config(options.row, options.device, settings)
    data, pixels = unpack(options.packed, torch.device(options.device))
    found = train_row(config, data, pixels, options.work / f"{options.row}.pt", stop)
    if found is not None:
        write_atomically(options.work / f"{options.row}.json", json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
