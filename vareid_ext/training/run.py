"""A run: what the training loop works with, and all that is logged and saved."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from vareid_ext import data as datasets
from vareid_ext._processes import BatchShare
from vareid_ext.data import Batch, BatchSampler, PKSampler, ReidData, ReidDataset, ShuffledSampler
from vareid_ext.files.checkpoint import save_checkpoint
from vareid_ext.files.features import Features
from vareid_ext.methods import Method, Term
from vareid_ext.metrics.exclusion import exclusion_text
from vareid_ext.models.shared_batch import share_batches
from vareid_ext.training import evaluation
from vareid_ext.training.command_line import to_yaml
from vareid_ext.training.config import DEFAULT_IDENTITIES, Config, SamplerConfig, Stage
from vareid_ext.training.console import TrainingBar, one_line, tell
from vareid_ext.training.device import AUTOCAST
from vareid_ext.training.evaluation import metrics_of
from vareid_ext.training.loggers import Loggers
from vareid_ext.training.optimizers import set_learning_rate, set_training_mode
from vareid_ext.training.processes import ALONE, Processes
from vareid_ext.training.run_folder import RunFolder, unused_path
from vareid_ext.training.schedule import learning_rate
from vareid_ext.training.signals import RunInterruptedError, Signals, ignore_in_worker
from vareid_ext.training.state import TrainingState


class NonFiniteLossError(ArithmeticError):
    """The loss, or a weight, became NaN or infinite."""


@dataclass(frozen=True)
class StagePlan:
    """A stage of training and its place in the run."""

    number: int
    stage: Stage
    sampler: BatchSampler
    first_epoch: int
    first_step: int

    @property
    def end_epoch(self) -> int:
        """The epoch after its last."""
        return self.first_epoch + self.stage.optimizer.epochs

    def step_at(self, epoch: int) -> int:
        """Steps done before an epoch of this stage, its end included."""
        return self.first_step + (epoch - self.first_epoch) * self.sampler.batches_per_epoch

    def epoch_at(self, step: int) -> float:
        """Epochs of the run done after a step of this stage, with their fraction."""
        return self.first_epoch + (step - self.first_step) / self.sampler.batches_per_epoch


def plan_stages(config: Config, data: ReidData, processes: Processes = ALONE) -> tuple[StagePlan, ...]:
    """The stages of a configuration on a data set; ValueError where it has too few identities, or processes too many.

    Each process's samplers give its share of the batches.
    """
    plans: list[StagePlan] = []
    epoch = step = 0
    for number, stage in enumerate(config.resolved_stages):
        sampler = _sampler(stage.sampler, data, config.run.seed, processes)
        plan = StagePlan(number, stage, sampler, epoch, step)
        epoch, step = plan.end_epoch, plan.step_at(plan.end_epoch)
        plans.append(plan)
    return tuple(plans)


def _sampler(config: SamplerConfig, data: ReidData, seed: int, processes: Processes) -> BatchSampler:
    common: dict[str, Any] = {"seed": seed, "batches_per_epoch": config.batches_per_epoch}
    common |= {"rank": processes.rank, "world_size": processes.size}
    if config.kind == "shuffled":
        _check_share("sampler.batch_size", min(config.batch_size, len(data.train)), processes)
        return ShuffledSampler(data.train, batch_size=config.batch_size, **common)
    identities = config.identities or min(DEFAULT_IDENTITIES, data.num_identities)
    if identities > data.num_identities:
        raise ValueError(
            f"sampler.identities: {identities} was given; the training split has only {data.num_identities} identities"
        )
    _check_share("sampler.identities", identities, processes)
    return PKSampler(
        data.train,
        identities_per_batch=identities,
        instances=config.instances,
        spread=config.spread,
        **common,
    )


def _check_share(field: str, count: int, processes: Processes) -> None:
    if count < processes.size:
        raise ValueError(
            f"{field}: a batch has {count}, and {processes.size} processes share it; allowed is at least one for each"
        )


class _Averaged(nn.Module):
    """A network whose gradients DistributedDataParallel averages, and a parameter without one.

    DistributedDataParallel warns on every process where it looks for unused parameters and finds none.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.unused = network, nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> dict[str, Term]:
        return self.network(batch)


class Run:
    """A training run in progress.

    Args:
        config: what it is.
        data: the data set.
        plans: its stages.
        state: the method and what trains it, from wherever it goes on.
        folder: what it leaves behind.
        device: where it computes.
        signals: those that ask it to stop.
        started: when the program started, ``time.monotonic()``.
        processes: those that train it together.
    """

    def __init__(
        self,
        config: Config,
        data: ReidData,
        plans: tuple[StagePlan, ...],
        state: TrainingState,
        folder: RunFolder,
        device: torch.device,
        signals: Signals,
        started: float,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.data, self.plans, self.state = config, data, plans, state
        self.folder, self.device, self.signals, self.started = folder, device, signals, started
        self.total_steps = plans[-1].step_at(plans[-1].end_epoch)
        self.total_epochs = plans[-1].end_epoch
        self._saved = f"go on with --resume {folder.path}"
        self.processes = processes
        # Compiled or not; the state's method owns the weights.
        self._network: nn.Module = torch.compile(state.method) if config.run.compile else state.method  # type: ignore[assignment]
        self._asked = 0
        self._enter(plans[state.progress.stage])
        self._batch: Batch
        self._values: dict[str, float] = {}
        self._loggers = Loggers()

    def _enter(self, plan: StagePlan) -> None:
        """Prepare a stage, whose parameters are chosen: the images that this process has of a batch, the averaging."""
        self._plan, self._forward, self._fraction = plan, self._network, 1.0
        group, method, options = self.processes.group, self.state.method, self.config.run
        if group is not None:
            share = BatchShare(group, *plan.sampler.own, plan.sampler.batch_size)
            share_batches(method, share, batch_norm=options.sync_batch_norm)
            method.share, method.gather_triplets = share, options.gather_triplets
            self._fraction = share.fraction
            with warnings.catch_warnings():
                # The newest PyTorch has another name for it, the oldest only this one.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                # Not all that a stage trains has a part in every loss, nor in every step.
                network = _Averaged(self._network).to(self.device)
                if self.state.shards is not None:
                    self.state.shards.keep_out_of_averages(network)
                self._forward = DistributedDataParallel(
                    network, process_group=group, broadcast_buffers=False, find_unused_parameters=True
                )

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """A block with a progress bar."""
        self._bar = TrainingBar(self.total_steps, self.state.progress.step)
        with contextlib.closing(self._bar):
            yield

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """A block in which values go to TensorBoard and the loggers of the configuration."""
        if self.processes.first:
            self._loggers = Loggers.open(self.folder, self.config, self.state.progress.step)
        finished = False
        try:
            yield
            finished = True
        finally:
            self._loggers.close(finished)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the method prepared for each.

        A run that ended within an epoch, or between an epoch and its evaluation, goes on right there.
        """
        begin = max(self.state.progress.step, 1)
        for plan in self.plans:
            for epoch in range(plan.first_epoch, plan.end_epoch):
                if plan.step_at(epoch + 1) < begin:
                    continue
                if plan.number != self.state.progress.stage:
                    self.state.begin_stage(plan.number)
                    self._enter(plan)
                    tell(f"stage {plan.number + 1} of {len(self.plans)}, from epoch {epoch + 1} on")
                self._plan = plan
                self.state.method.at_epoch(epoch)
                yield epoch

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch that are left, on the device."""
        plan = self._plan
        plan.sampler.set_epoch(epoch, start_batch=self.state.progress.step - plan.step_at(epoch))
        set_training_mode(self.state.method, plan.stage.train)
        self._bar.start_epoch(epoch, self.total_epochs)
        layout = torch.channels_last if self.config.run.channels_last else torch.contiguous_format
        for batch in training_loader(self.config, self.data, plan.sampler, self.device):
            batch = batch.to(self.device, non_blocking=True)
            yield replace(batch, image=batch.image.contiguous(memory_format=layout))

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The terms of the loss of a batch."""
        self._batch = batch
        dtype = AUTOCAST[self.config.run.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self._forward(batch)

    def step(self, terms: Mapping[str, Term]) -> None:
        """Lower the loss by one step of the optimizer.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the batch is kept.
            ValueError: no loss depends on what the stage trains.
        """
        state, plan, step = self.state, self._plan, self.state.progress.step
        if not any(term.value.requires_grad for term in terms.values()):
            parts = "everything" if plan.stage.train is None else ", ".join(plan.stage.train)
            raise ValueError(
                f"stages[{plan.number}].train: {parts} was given; no loss of method {self.config.method.name!r} "
                "depends on it"
            )
        weighted = {name: term.weight * term.value for name, term in terms.items()}
        loss = functools.reduce(torch.add, weighted.values())
        # The one synchronisation of a step: the loss is looked at before it can spoil the weights.
        numbers = torch.stack([value.detach() for value in (loss, *weighted.values())])
        means, self._asked = self.processes.agree(numbers, self._fraction, self.signals.received)
        self._values = dict(zip(("total", *weighted), means, strict=True))
        if not math.isfinite(self._values["total"]):
            whole = self.processes.whole(self._batch)
            kept = self.processes.first_does(lambda: save_batch(self.folder, self.data, whole, step, self._values))
            raise NonFiniteLossError(
                f"the loss of step {step + 1} (epoch {int(plan.epoch_at(step)) + 1}) is {self._values['total']}; "
                f"its batch is in {kept}, the checkpoints are as they were"
            )
        self._rate = learning_rate(plan.stage.optimizer, plan.epoch_at(step) - plan.first_epoch)
        set_learning_rate(state.optimizer, self._rate)
        state.optimizer.zero_grad(set_to_none=True)
        if self.processes.group is not None:
            # The mean over the processes that DistributedDataParallel takes becomes the mean over the batch.
            loss = loss * (self._fraction * self.processes.size)
        state.scaler.scale(loss).backward()
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        if state.shards is not None:
            state.shards.share_overflow(parameters)
        if plan.stage.optimizer.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            clip = nn.utils.clip_grad_norm_ if state.shards is None else state.shards.clip_norm
            clip(parameters, plan.stage.optimizer.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.method)
        state.progress.step += 1

    def log(self, terms: Mapping[str, Term]) -> None:
        """Show the step, and write some of them to the log and the loggers: each term as what it adds to the total."""
        step, values = self.state.progress.step, self._values
        self._bar.update(self._plan.sampler.batch_size, values, self._rate)
        if step == 1:
            shown = (f"{term.weight:g} {name}" if term.weight != 1 else name for name, term in terms.items())
            tell(f"the loss is {' + '.join(shown)}")
        if step == 1 or step % self.config.run.log_every == 0 or step == self.total_steps:
            entry = {"step": step, "epoch": self._plan.epoch_at(step), "lr": self._rate, "loss": values}
            if self.processes.first:
                self.folder.append_log({**entry, "images_per_second": round(self._bar.images_per_second, 1)})
            self._loggers.add("loss", values, step)
            self._loggers.add("optimizer", {"lr": self._rate}, step)

    def stop_if_asked(self) -> None:
        """Save and raise RunInterruptedError where a signal came, to any of the processes."""
        asked = self.signals.received if self.processes.group is None else self._asked
        if asked:
            self.save()
            raise RunInterruptedError(asked, f"saved; {self._saved}")

    def end_epoch(self, epoch: int) -> None:
        """Save and evaluate where it is time."""
        last, every = epoch + 1 == self.total_epochs, self.config.evaluation.every
        evaluated = any(entry["epoch"] == epoch + 1 for entry in self.state.progress.evaluations)
        evaluate = bool(every) and (epoch + 1) % every == 0 and not last and not evaluated
        # A signal ends an evaluation at once, so that all must be saved before it.
        if last or evaluate or (epoch + 1) % self.config.run.save_every == 0:
            self.save()
        if evaluate:
            with self._bar.paused(), self.interruptible(f"everything was saved; {self._saved}"):
                values = self.metrics(self.state.evaluated, f"epoch {epoch + 1}")
            self.record(epoch + 1, values)
            tell(one_line(f"epoch {epoch + 1}", values))

    @contextlib.contextmanager
    def interruptible(self, reason: str) -> Iterator[None]:
        """A block in which nothing is lost: a signal that came, to any process, raises RunInterruptedError at once."""
        _, asked = self.processes.agree(torch.zeros(0), 1.0, self.signals.received)
        if asked:
            raise RunInterruptedError(asked, reason)
        with self.signals.immediate(reason):
            yield

    @property
    def exclude(self) -> str | None:
        """The rule of exclusion that the configuration names; None for the usual one, which needs no cameras."""
        rule = self.config.evaluation.exclude
        return rule if exclusion_text(rule) else None

    def metrics(self, method: Method, what: str) -> dict[str, float]:
        """The metrics of a method without re-ranking, on all processes."""
        sides = self.extract(method, what)

        def scored() -> dict[str, float]:
            query, gallery = sides
            return metrics_of(evaluation.score(query, gallery, exclude=self.exclude))

        return self.processes.first_does(scored)

    def extract(self, method: Method, what: str) -> list[Features]:
        """The features of query and gallery, under a progress bar; on the first process, nothing on the others."""
        self._same_buffers()
        config, sides = self.config, (self.data.query, self.data.gallery)
        transform = datasets.build_transform(
            config.data.height, config.data.width, train=False, mean=config.data.mean, std=config.data.std
        )
        size, found = config.evaluation.batch_size, []
        # A process takes whole batches, which are then computed as one process computes them.
        shares = [[size * end for end in self.processes.share(-(-len(images) // size))] for images in sides]
        rows = [range(begin, min(end, len(images))) for (begin, end), images in zip(shares, sides, strict=True)]
        with tqdm(
            total=sum(map(len, rows)), desc=f"{what}: features", unit="image", leave=False, mininterval=0.5
        ) as bar:
            for images, own in zip(sides, rows, strict=True):
                parts = evaluation.extract_features(
                    method,
                    images,
                    transform,
                    rows=own,
                    batch_size=size,
                    device=self.device,
                    workers=config.data.processes,
                    autocast=AUTOCAST[config.run.precision],
                    flip=config.evaluation.flip,
                    normalize=config.evaluation.normalize,
                    progress=bar.update,
                )
                if self.processes.group is not None:
                    of_all = self.processes.to_first([part.cpu() for part in parts])
                    parts = [part.to(self.device) for of_process in of_all for part in of_process]
                if self.processes.first:
                    found.append(Features.of(torch.cat(parts), images, images.paths))
        return found

    def record(self, epoch: int, values: Mapping[str, float]) -> None:
        """Note an evaluation in log, loggers and checkpoint, and keep the weights if they are the best so far."""
        progress = self.state.progress
        entry = {"step": progress.step, "epoch": epoch, **values}
        progress.evaluations.append(entry)

        def write() -> None:
            self.folder.append_log(entry)
            self._loggers.add("metrics", values, progress.step)

        self.processes.first_does(write)
        # The best weights first: a run killed between the two evaluates again when it is resumed.
        if values["mAP"] >= max(e["mAP"] for e in progress.evaluations):
            self._save_checkpoint(self.folder.best)
        self.save()

    def save(self) -> None:
        """Write last.pt, and config.yaml where a resumed run goes on with other options than it holds.

        Raises:
            NonFiniteLossError: the last step has spoiled the weights, though its loss was finite; nothing is written.
        """
        self.processes.all_do(self._check_weights)
        self._same_buffers()
        self._save_checkpoint(self.folder.last)
        self.processes.first_does(lambda: self.folder.write_config(to_yaml(self.config)))

    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.state.method.parameters()):
            raise NonFiniteLossError(
                f"the weights are not finite after step {self.state.progress.step}; the checkpoints are as they were"
            )

    def _save_checkpoint(self, path: Path) -> None:
        content = self.state.content(time.monotonic() - self.started)
        self.processes.first_does(lambda: save_checkpoint(path, content))

    def _same_buffers(self) -> None:
        """Without the statistics of the whole batch, batch norms of all processes are those of the first."""
        if self.processes.group is not None and not self.config.run.sync_batch_norm:
            for module in dict.fromkeys((self.state.method, self.state.evaluated)):
                self.processes.as_the_first(module)


def training_loader(config: Config, data: ReidData, sampler: BatchSampler, device: torch.device) -> DataLoader[Batch]:
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


def save_batch(folder: RunFolder, data: ReidData, batch: Batch, step: int, values: Mapping[str, float]) -> Path:
    """Keep the batch whose loss is not finite, for inspection with ``torch.load``, beside earlier ones."""
    path = unused_path(folder.non_finite_batch)
    paths = [data.train.paths[i] for i in batch.index.tolist()]
    tensors = {name: getattr(batch, name).cpu() for name in ("image", "identity", "camera", "viewpoint", "index")}
    extras = {name: value.cpu() for name, value in batch.extras.items()}
    save_checkpoint(path, {"step": step, "loss": dict(values), "paths": paths, **tensors, **extras})
    return path
