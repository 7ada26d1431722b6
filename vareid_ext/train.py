"""Train and evaluate a re-identification model: ``python -m vareid_ext.train``, which ``--help`` explains.

The file reads from top to bottom: the program, the steps of a run, the training loop, and the pieces these use.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vareid_ext import data as datasets
from vareid_ext._program import run_program
from vareid_ext.checkpoint import save_checkpoint
from vareid_ext.config import DEFAULT_IDENTITIES, Config
from vareid_ext.data import Batch, PKSampler, ReidData, ReidDataset
from vareid_ext.losses import ViewpointAwareLoss
from vareid_ext.models import ModelOutput, ReidModel
from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy
from vareid_ext.training import extraction
from vareid_ext.training.command_line import Request, parse_or_exit, to_yaml
from vareid_ext.training.extraction import Features
from vareid_ext.training.report import (
    LABELS,
    closing_tables,
    draw_figures,
    introduction,
    metrics_of,
    one_line,
    per_viewpoint,
)
from vareid_ext.training.run_folder import RunFolder, TensorBoard, default_folder, environment, unused_path
from vareid_ext.training.schedule import learning_rate, view_weight
from vareid_ext.training.signals import RunInterruptedError, Signals, ignore_in_worker
from vareid_ext.training.state import TrainingState, build
from vareid_ext.training.terminal import TrainingBar, tell
from vareid_ext.training.triplet import batch_hard_triplet

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ArithmeticError):
    """The loss, or a weight, became NaN or infinite."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program.

    Returns:
        Its exit code: 0 done; 2 the request cannot be met; 3 the loss became NaN or infinite; 128 + n: signal n.
    """
    try:
        run(parse_or_exit(arguments))
    except BrokenPipeError:  # the reader of the output has gone: run_program
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except RunInterruptedError as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing to save", file=sys.stderr)
        return 130
    return 0


def run(request: Request) -> dict[str, Any]:
    """Train, evaluate and fill the run folder.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError, OSError: a request that cannot be met (data, weights, device, run folder).
        NonFiniteLossError: the batch at fault lies in the run folder; the checkpoints are as they were.
        RunInterruptedError: by SIGINT or SIGTERM, with everything saved.
    """
    started = time.monotonic()
    request = request._replace(config=request.config.with_absolute_paths())
    with Signals() as signals:
        with signals.immediate("before the first step; nothing was lost"):
            config, device, folder, data, sampler, state = prepare(request)
            tell(introduction(request, folder, data, state, device, sampler))
            if not request.resume:
                measure_baselines(config, data, state, device)
        train(config, data, sampler, state, folder, device, signals, started)
        with signals.immediate(f"everything was saved; go on with --resume {folder.path}"):
            return conclude(config, data, state, folder, device, request.name, started)


def prepare(request: Request) -> tuple[Config, torch.device, RunFolder, ReidData, PKSampler, TrainingState]:
    """Check the request, load the data set, build or restore the state, and begin the run folder."""
    config = request.config
    device = choose_device(config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    text = to_yaml(config)
    # A folder that was asked for is looked at before the data set is read, which takes its time.
    folder = None
    if request.output is not None:
        folder = RunFolder(request.output, resume=request.resume, config_text=text, command=request.command)
    data = datasets.load_data(
        config.data.kind,
        config.data.root,
        viewpoint_file=config.data.viewpoint_file,
        viewpoint_labels=config.data.viewpoint_labels,
        skip_bad_images=config.data.skip_bad_images,
        synthetic=config.data.synthetic,
    )
    identities = config.sampler.identities or min(DEFAULT_IDENTITIES, data.num_identities)
    if identities > data.num_identities:
        raise ValueError(
            f"sampler.identities: {identities} was given; the training split has only {data.num_identities} identities"
        )
    sampler = PKSampler(
        data.train,
        identities_per_batch=identities,
        instances=config.sampler.instances,
        spread=config.sampler.spread,
        seed=config.run.seed,
        batches_per_epoch=config.sampler.batches_per_epoch,
    )
    state = build(config, data, device, load_weights=not request.resume)
    if folder is None:
        folder = RunFolder(default_folder(request.name), resume=False, command=request.command)
    folder.create()
    if request.resume:
        state.restore(folder.last)
        steps = config.optimizer.epochs * sampler.batches_per_epoch
        if state.progress.step > steps:
            raise ValueError(
                f"optimizer.epochs: {config.optimizer.epochs} was given, which is {steps} steps; "
                f"{folder.path} has trained {state.progress.step} already"
            )
        folder.rewind_log(state.progress.step, state.progress.evaluations)
    else:
        folder.write_config(text)
    folder.write_json(folder.environment, environment(device, request.command))
    return config, device, folder, data, sampler, state


def measure_baselines(config: Config, data: ReidData, state: TrainingState, device: torch.device) -> None:
    """What the trained network is compared with: the untrained one, raw pixels and colour histograms."""
    baselines = state.progress.baselines
    if config.evaluation.baselines:
        kinds = (
            ("raw_pixels", extraction.raw_pixel_features),
            ("colour_histogram", extraction.colour_histogram_features),
        )
        for name, features_of in kinds:
            query, gallery = features_of(data.query), features_of(data.gallery)
            baselines[name] = metrics_of(extraction.score(extraction.feature_distances(query, gallery), query, gallery))
    query, gallery = extract(config, data, state.model, device, "untrained network")
    scores = extraction.score(extraction.feature_distances(query, gallery), query, gallery)
    baselines["untrained"] = metrics_of(scores)
    for name, values in baselines.items():
        tell(one_line(LABELS[name], values))


def train(
    config: Config,
    data: ReidData,
    sampler: PKSampler,
    state: TrainingState,
    folder: RunFolder,
    device: torch.device,
    signals: Signals,
    started: float,
) -> None:
    """The training loop, from wherever `state` is to the last epoch."""
    model, loss, progress = state.model, state.loss, state.progress
    # `forward` may be compiled; `model` owns the weights.
    forward: nn.Module = torch.compile(model) if config.run.compile else model  # type: ignore[assignment]
    steps_per_epoch, epochs = sampler.batches_per_epoch, config.optimizer.epochs
    total_steps = epochs * steps_per_epoch
    loader = training_loader(config, data, sampler, device)
    writer = TensorBoard(folder.tensorboard if config.run.tensorboard else None, after=progress.step)
    bar = TrainingBar(total_steps, progress.step)

    with contextlib.closing(bar), contextlib.closing(writer):
        # A run that ended within an epoch, or between an epoch and its evaluation, goes on right there.
        for epoch in range(max(progress.step - 1, 0) // steps_per_epoch, epochs):
            sampler.set_epoch(epoch, start_batch=progress.step - epoch * steps_per_epoch)
            loss.view_weight = view_weight(config.loss, epoch)
            model.train()
            bar.start_epoch(epoch, epochs)
            for batch in loader:
                rate = learning_rate(config.optimizer, progress.step / steps_per_epoch)
                for group in state.optimizer.param_groups:
                    group["lr"] = rate
                batch = batch.to(device, non_blocking=True)
                parts = training_loss(config, forward, loss, batch)
                # The one synchronisation of a step: the loss is looked at before it can spoil the weights.
                values = dict(zip(parts, torch.stack([p.detach() for p in parts.values()]).tolist(), strict=True))
                if not math.isfinite(values["total"]):
                    kept = save_batch(folder, data, batch, progress.step, values)
                    raise NonFiniteLossError(
                        f"the loss of step {progress.step + 1} (epoch {epoch + 1}) is {values['total']}; "
                        f"its batch is in {kept}, the checkpoints are as they were"
                    )
                state.optimizer.zero_grad(set_to_none=True)
                state.scaler.scale(parts["total"]).backward()
                if config.optimizer.clip_norm is not None:
                    state.scaler.unscale_(state.optimizer)
                    nn.utils.clip_grad_norm_(state.parameters, config.optimizer.clip_norm)
                state.scaler.step(state.optimizer)
                state.scaler.update()
                if state.average is not None:
                    state.average.update_parameters(model)
                progress.step += 1
                bar.update(len(batch), values, rate)
                if progress.step == 1 or progress.step % config.run.log_every == 0 or progress.step == total_steps:
                    entry = {
                        "step": progress.step,
                        "epoch": progress.step / steps_per_epoch,
                        "lr": rate,
                        "loss": values,
                    }
                    folder.append_log({**entry, "images_per_second": round(bar.images_per_second, 1)})
                    writer.add("loss", values, progress.step)
                    writer.add("optimizer", {"lr": rate}, progress.step)
                if signals.received:
                    save(state, folder, started)
                    raise RunInterruptedError(signals.received, f"saved; go on with --resume {folder.path}")

            last, every = epoch + 1 == epochs, config.evaluation.every
            evaluated = any(entry["epoch"] == epoch + 1 for entry in progress.evaluations)
            evaluate = bool(every) and (epoch + 1) % every == 0 and not last and not evaluated
            # A signal ends an evaluation at once, so that all must be saved before it.
            if last or evaluate or (epoch + 1) % config.run.save_every == 0:
                save(state, folder, started)
            if evaluate:
                with bar.paused(), signals.immediate(f"everything was saved; go on with --resume {folder.path}"):
                    query, gallery = extract(config, data, state.evaluated_model, device, f"epoch {epoch + 1}")
                    scores = extraction.score(extraction.feature_distances(query, gallery), query, gallery)
                record(state, folder, epoch + 1, metrics_of(scores), started)
                writer.add("metrics", metrics_of(scores), progress.step)
                tell(one_line(f"epoch {epoch + 1}", metrics_of(scores)))


def training_loss(config: Config, forward: nn.Module, loss: ViewpointAwareLoss, batch: Batch) -> dict[str, Tensor]:
    """The loss of a batch: "total", the one to differentiate, and its parts by name, not weighted."""
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    dtype = _AUTOCAST[config.run.precision]
    with torch.autocast(batch.image.device.type, dtype, enabled=dtype is not None):
        output: ModelOutput = forward(batch.image.contiguous(memory_format=layout))
    parts = loss(output.feature, batch.identity, batch.viewpoint)
    named = {"total": parts.total, "identity": parts.identity}
    if config.loss.use_viewpoint:
        named["viewpoint"] = parts.viewpoint
    if config.loss.use_regularizer:
        named["regularizer"] = parts.regularizer
    if output.stripe_logits is not None:
        stripes = output.stripe_logits.shape[1]
        named["stripes"] = identity_cross_entropy(
            output.stripe_logits.flatten(0, 1),
            batch.identity.repeat_interleave(stripes),
            smoothing=config.loss.smoothing,
            alpha=config.loss.alpha,
            epsilon=config.loss.epsilon,
        )
        named["triplet"] = batch_hard_triplet(output.pooled, batch.identity, margin=config.loss.triplet_margin)
        named["total"] = (
            named["total"]
            + config.loss.stripe_weight * named["stripes"]
            + config.loss.triplet_weight * named["triplet"]
        )
    return named


def conclude(
    config: Config,
    data: ReidData,
    state: TrainingState,
    folder: RunFolder,
    device: torch.device,
    name: str,
    started: float,
) -> dict[str, Any]:
    """Evaluate the final weights with and without re-ranking; write metrics and figures; print the closing tables.

    The last weights are reported, not those that were best on the test images.
    """
    evaluation = config.evaluation
    query, gallery = extract(config, data, state.evaluated_model, device, "trained network")
    distances = extraction.feature_distances(query, gallery)
    trained = extraction.score(distances, query, gallery)
    reranked_distances = extraction.reranked_distances(
        query, gallery, k1=evaluation.k1, k2=evaluation.k2, lambda_value=evaluation.lambda_value
    )
    reranked = extraction.score(reranked_distances, query, gallery)
    if not any(entry["epoch"] == config.optimizer.epochs for entry in state.progress.evaluations):
        record(state, folder, config.optimizer.epochs, metrics_of(trained), started)

    if evaluation.save_features:
        query.save(folder.query_features)
        gallery.save(folder.gallery_features)
    main_results = {**state.progress.baselines, "trained": metrics_of(trained), "reranked": metrics_of(reranked)}
    seconds = state.progress.seconds + time.monotonic() - started
    views = {key: per_viewpoint(scores) for key, scores in (("trained", trained), ("reranked", reranked))}
    results: dict[str, Any] = {**main_results, "seconds": round(seconds, 1), "by_query_viewpoint": views}
    folder.write_json(folder.metrics, results)
    draw_figures(
        config,
        data,
        state.progress,
        folder,
        name,
        (query, gallery),
        {"trained": (distances, trained), "re-ranked": (reranked_distances, reranked)},
    )
    tell()
    tell(closing_tables(main_results, trained, reranked))
    tell()
    tell(
        f"{trained.overall.num_valid_queries} queries counted of {trained.overall.num_queries}; {seconds:.0f} s in all"
    )
    tell(f"metrics.json, curves.png, ranking.png and checkpoints are in {folder.path}")
    return results


def choose_device(config: Config) -> torch.device:
    """The device a configuration asks for; ValueError where it does not exist or cannot do what is asked."""
    wanted = config.run.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"run.device: {wanted!r} was given; allowed are auto, cpu, cuda and cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"run.device: {wanted!r} was given; allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"run.device: {wanted!r} was given; PyTorch finds {torch.cuda.device_count()} CUDA devices here"
        )
    if config.run.precision == "fp16" and device.type != "cuda":
        raise ValueError("run.precision: fp16 needs a CUDA device; use bf16 or fp32")
    return device


def training_loader(config: Config, data: ReidData, sampler: PKSampler, device: torch.device) -> DataLoader[Batch]:
    """The augmented training images in the sampler's batches."""
    transform = datasets.build_transform(
        config.data.height,
        config.data.width,
        train=True,
        flip=config.data.flip,
        pad=config.data.pad,
        erasing=config.data.erasing,
        mean=config.data.mean,
        std=config.data.std,
    )
    return DataLoader(
        ReidDataset(data.train, transform),
        batch_sampler=sampler,
        num_workers=config.data.processes,
        collate_fn=datasets.collate,
        worker_init_fn=start_worker,
        # A generator of its own: without one the loader would draw from the global one.
        generator=torch.Generator().manual_seed(config.run.seed),
        pin_memory=device.type == "cuda",
    )


def start_worker(worker: int) -> None:
    """Prepare a process that loads images."""
    datasets.worker_init(worker)
    ignore_in_worker()


def extract(
    config: Config, data: ReidData, model: ReidModel, device: torch.device, what: str
) -> tuple[Features, Features]:
    """The features of query and gallery, under a progress bar."""
    transform = datasets.build_transform(
        config.data.height, config.data.width, train=False, mean=config.data.mean, std=config.data.std
    )
    total = len(data.query) + len(data.gallery)
    with tqdm(total=total, desc=f"{what}: features", unit="image", leave=False, mininterval=0.5) as bar:
        query, gallery = (
            extraction.extract_features(
                model,
                images,
                transform,
                batch_size=config.evaluation.batch_size,
                device=device,
                workers=config.data.processes,
                autocast=_AUTOCAST[config.run.precision],
                progress=bar.update,
            )
            for images in (data.query, data.gallery)
        )
    return query, gallery


def record(state: TrainingState, folder: RunFolder, epoch: int, values: Mapping[str, float], started: float) -> None:
    """Note an evaluation in the log and the checkpoint, and keep the weights if they are the best so far."""
    entry = {"step": state.progress.step, "epoch": epoch, **values}
    folder.append_log(entry)
    state.progress.evaluations.append(entry)
    # The best weights first: a run killed between the two evaluates again when it is resumed.
    if values["mAP"] >= max(e["mAP"] for e in state.progress.evaluations):
        state.save(folder.best, time.monotonic() - started)
    save(state, folder, started)


def save(state: TrainingState, folder: RunFolder, started: float) -> None:
    """Write last.pt, and config.yaml where a resumed run goes on with other options than it holds.

    Raises:
        NonFiniteLossError: the last step has spoiled the weights, though its loss was finite; nothing is written.
    """
    if not all(bool(torch.isfinite(p).all()) for p in state.parameters):
        raise NonFiniteLossError(
            f"the weights are not finite after step {state.progress.step}; the checkpoints are as they were"
        )
    state.save(folder.last, time.monotonic() - started)
    folder.write_config(to_yaml(state.config))


def save_batch(folder: RunFolder, data: ReidData, batch: Batch, step: int, values: Mapping[str, float]) -> Path:
    """Keep the batch whose loss is not finite, for inspection with ``torch.load``, beside earlier ones."""
    path = unused_path(folder.non_finite_batch)
    paths = [data.train.paths[i] for i in batch.index.tolist()]
    tensors = {name: getattr(batch, name).cpu() for name in ("image", "identity", "camera", "viewpoint", "index")}
    save_checkpoint(path, {"step": step, "loss": dict(values), "paths": paths, **tensors})
    return path


if __name__ == "__main__":
    run_program(main)
