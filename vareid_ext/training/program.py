"""The training program: what happens before the loop and after it."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vareid_ext import _native
from vareid_ext import data as datasets
from vareid_ext.data import EXTRAS, ReidData, check_given, renders_extras
from vareid_ext.data.types import SPLITS
from vareid_ext.files.features import SIDES, Features
from vareid_ext.files.lock import locked
from vareid_ext.methods import METHODS, Method
from vareid_ext.metrics.exclusion import check_exclusion, exclusion_text
from vareid_ext.retrieval import KReciprocal
from vareid_ext.retrieval.rerank import Reranker
from vareid_ext.training import evaluation
from vareid_ext.training.command_line import Request, pairs, to_config, to_yaml
from vareid_ext.training.config import Config, OptimizerConfig
from vareid_ext.training.console import one_line, tell
from vareid_ext.training.device import device_named
from vareid_ext.training.evaluation import Scores, metrics_of, per_viewpoint
from vareid_ext.training.loggers import check_loggers
from vareid_ext.training.loop import train
from vareid_ext.training.optimizers import belongs
from vareid_ext.training.processes import ALONE, Processes, launch, restarts
from vareid_ext.training.run import Run, StagePlan, plan_stages
from vareid_ext.training.run_folder import RunFolder, begun_by, default_folder, environment
from vareid_ext.training.schedule import learning_rate
from vareid_ext.training.signals import Signals
from vareid_ext.training.state import TrainingState, build, check_method

SHOWN = 10
"""Images of a ranking that rankings.json keeps of each chosen query."""


def run(request: Request, processes: Processes = ALONE) -> tuple[RunFolder, ReidData]:
    """Train, evaluate and fill the run folder, but for the figures.

    Args:
        request: what the command line asks for.
        processes: those that train together, all of which call this with the same request.

    Raises:
        ValueError, OSError: a request that cannot be met (data, weights, device, run folder).
        NonFiniteLossError: the batch at fault lies in the run folder; the checkpoints are as they were.
        RunInterruptedError: by SIGINT or SIGTERM, with everything saved.
        LostProcessError: another process has ended.
    """
    started = time.monotonic()
    request = request._replace(config=request.config.with_absolute_paths())
    request = processes.first_does(lambda: restarted(request))
    with contextlib.ExitStack() as locks, Signals() as signals:
        with signals.immediate("before the first step; nothing was lost"):
            run = prepare(request, signals, started, locks, processes)
            tell(introduction(request, run))
            if not request.resume:
                measure_baselines(run)
        with run.logging():
            train(run)
            with run.interruptible(f"everything was saved; go on with --resume {run.folder.path}"):
                conclude(run)
    return run.folder, run.data


def restarted(request: Request) -> Request:
    """The request, to go on with the run that it began where torchrun has started the processes again.

    Raises:
        ValueError: torchrun may do that, and no folder is given.
    """
    again, most = restarts()
    if request.output is None and most:
        raise ValueError(
            f"output: nothing was given; with torchrun --max-restarts {most} a folder is needed, in which processes "
            "that are started again go on"
        )
    if not again or request.resume or request.output is None or not begun_by(request.output, launch()):
        return request
    resume = (request.output / "last.pt").is_file()
    if not resume:
        RunFolder.forget(request.output)
    return request._replace(resume=resume)


def prepare(
    request: Request, signals: Signals, started: float, locks: contextlib.ExitStack, processes: Processes = ALONE
) -> Run:
    """Check the request, load the data set, build or restore the state, and begin the run folder, locked by `locks`.

    The folder is the first process's, which also reads the data set.
    """
    config = request.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    text = to_yaml(config)
    device = processes.all_do(lambda: check(config, resume=request.resume, processes=processes))

    def find_folder() -> RunFolder | None:
        # A folder that was asked for, too, is looked at before the data set is read.
        if request.output is None:
            return None
        found = RunFolder(request.output, resume=request.resume, config_text=text, command=request.command)
        if request.resume:
            locks.enter_context(locked(found.path))
        return found

    asked_for = processes.first_does(find_folder)
    data = processes.first_does(lambda: load_run_data(config, train=True))
    if exclusion_text(config.evaluation.exclude):
        check_exclusion(config.evaluation.exclude, data.query, data.gallery, "evaluation.exclude")
    plans = plan_stages(config, data, processes)
    state = processes.all_do(
        lambda: build(config, data, device, load_weights_file=not request.resume, group=processes.group)
    )
    check_identities_are_whole(state.method, plans, processes)

    def begin_folder() -> RunFolder:
        folder = asked_for or RunFolder(default_folder(request.name), resume=False, command=request.command)
        folder.path.mkdir(parents=True, exist_ok=True)
        if not request.resume:
            locks.enter_context(locked(folder.path))
            # Another run may have begun and ended here while the data set was read.
            folder.check_that_nothing_is_lost(text)
        folder.remove_unfinished()
        return folder

    folder = processes.first_does(begin_folder)
    if request.resume:
        processes.all_do(lambda: state.restore(folder.last, own_device=processes.group is not None))
        check_steps(state, plans, folder)

    def write_what_it_is() -> None:
        if request.resume:
            folder.rewind_log(state.progress.step, state.progress.evaluations)
        else:
            folder.write_config(text)
        folder.write_json(folder.environment, environment(device, request.command, processes.size, launch()))

    processes.first_does(write_what_it_is)
    return Run(config, data, plans, state, folder, device, signals, started, processes)


def check_identities_are_whole(method: Method, plans: tuple[StagePlan, ...], processes: Processes) -> None:
    """ValueError where processes share the images of an identity that training compares."""
    names = [n for n, _ in method.named_parameters() if belongs(n, method.needs_whole_identities)]
    for plan in plans:
        parts = plan.stage.train
        trained = any(parts is None or belongs(name, parts) for name in names)
        if trained and plan.stage.sampler.kind == "shuffled" and processes.size > 1:
            raise ValueError(
                f"sampler.kind: 'shuffled' was given for stage {plan.number + 1} on {processes.size} processes; "
                f"{', '.join(method.needs_whole_identities)} of method {method.about.title} compares images of an "
                "identity, which 'identities' keeps on one process"
            )


def check(config: Config, *, resume: bool = False, processes: Processes = ALONE) -> torch.device:
    """Look at what is the same for every data set, before that is read, which takes its time.

    Args:
        config: of a run.
        resume: whether the run goes on from a checkpoint, which brings its own weights.
        processes: those that train together.

    Returns:
        The device that the run asks for.

    Raises:
        ValueError, OSError: as :func:`choose_device` and :func:`vareid_ext.training.state.check_method`; an extra that
            the method reads is not given; a logger is not installed.
    """
    device = choose_device(config, processes)
    check_loggers(config.run.loggers)
    if not renders_extras(config.data.kind):
        names = METHODS[config.method.name].inputs_with(config.method)
        check_given(config.data.extras, [name for name in names if name in EXTRAS], prefix="data.extras.")
    check_method(config, load_weights_file=not resume)
    return device


def load_run_data(config: Config, *, train: bool = False, check_images: bool = True, progress: bool = True) -> ReidData:
    """The data set of a run, with the extras that its method reads at test and, with `train`, in training."""
    method = METHODS[config.method.name]
    return datasets.load_data(
        config.data.kind,
        config.data.root,
        viewpoint_file=config.data.viewpoint_file,
        viewpoint_labels=config.data.viewpoint_labels,
        viewpoints=config.data.declared_viewpoints(),
        division=config.data.division,
        skip_bad_images=config.data.skip_bad_images,
        check_images=check_images,
        synthetic=config.data.synthetic,
        extras=config.data.extras,
        train_extras=[name for name in method.inputs_with(config.method) if name in EXTRAS and train],
        test_extras=method.test_inputs,
        needed=SPLITS if train else SIDES,
        progress=progress,
    )


def check_steps(state: TrainingState, plans: tuple[StagePlan, ...], folder: RunFolder) -> None:
    """ValueError where a run has gone further in its stage than that now goes, or began it elsewhere."""
    plan = plans[state.progress.stage]
    before = to_config(state.restored or {}).resolved_stages
    for over in plans[: plan.number]:
        was = before[over.number]
        if (over.stage.optimizer.epochs, over.stage.sampler) != (was.optimizer.epochs, was.sampler):
            raise ValueError(
                f"stages[{over.number}]: other epochs or batches were given; {folder.path} has trained this stage"
            )
    done, steps = state.progress.step - plan.first_step, plan.step_at(plan.end_epoch) - plan.first_step
    if not 0 <= done <= steps:
        field = "optimizer.epochs" if len(plans) == 1 else f"stages[{plan.number}].epochs"
        raise ValueError(
            f"{field}: {plan.stage.optimizer.epochs} was given, which is {steps} steps; {folder.path} has trained "
            f"{done} already"
        )


def measure_baselines(run: Run) -> None:
    """What the trained network is compared with: the untrained one, raw pixels and colour histograms."""
    data, baselines = run.data, run.state.progress.baselines
    if run.config.evaluation.baselines:
        kinds = (
            ("raw_pixels", evaluation.raw_pixel_features),
            ("colour_histogram", evaluation.colour_histogram_features),
        )

        def measured() -> dict[str, dict[str, float]]:
            sides = {name: (features_of(data.query), features_of(data.gallery)) for name, features_of in kinds}
            return {name: metrics_of(evaluation.score(*both, exclude=run.exclude)) for name, both in sides.items()}

        baselines |= run.processes.first_does(measured)
    baselines["untrained"] = run.metrics(run.state.method, "untrained network")
    for name, values in baselines.items():
        tell(one_line(name.replace("_", " "), values))


def conclude(run: Run) -> None:
    """Evaluate the final weights with and without re-ranking, and write what was found.

    The last weights are reported, not those that were best on the test images.
    """
    config, sides = run.config.evaluation, run.extract(run.state.evaluated, "trained network")
    found: dict[str, tuple[Scores, Reranker | None]] = {}

    def ranked() -> dict[str, float]:
        query, gallery = sides
        rerank = KReciprocal(
            query.feature, gallery.feature, k1=config.k1, k2=config.k2, lambda_value=config.lambda_value
        )
        found["trained"] = evaluation.score(query, gallery, exclude=run.exclude), None
        found["reranked"] = evaluation.score(query, gallery, rerank, run.exclude), rerank
        return metrics_of(found["trained"][0])

    values = run.processes.first_does(ranked)
    if not any(entry["epoch"] == run.total_epochs for entry in run.state.progress.evaluations):
        run.record(run.total_epochs, values)
    run.processes.first_does(lambda: write_results(run, sides, found))


def write_results(run: Run, sides: Sequence[Features], found: Mapping[str, tuple[Scores, Reranker | None]]) -> None:
    """The features of query and gallery if they are asked for, rankings.json, and metrics.json at the end."""
    config, progress, folder = run.config.evaluation, run.state.progress, run.folder
    query, gallery = sides
    trained = found["trained"][0]
    if config.save_features:
        query.save(folder.query_features)
        gallery.save(folder.gallery_features)
    folder.write_json(folder.rankings, rankings(query, gallery, found, config.ranking_queries, run.exclude))
    results: dict[str, Any] = {
        **progress.baselines,
        **{name: metrics_of(scores) for name, (scores, _) in found.items()},
        "queries": {"counted": trained.overall.num_valid_queries, "all": trained.overall.num_queries},
        "seconds": round(progress.seconds + time.monotonic() - run.started, 1),
        "by_query_viewpoint": {name: per_viewpoint(scores) for name, (scores, _) in found.items()},
    }
    folder.write_json(folder.metrics, results)


def rankings(
    query: Features,
    gallery: Features,
    found: Mapping[str, tuple[Scores, Reranker | None]],
    count: int,
    exclude: str | None = None,
) -> list[dict[str, Any]]:
    """What rankings.json holds: some queries, and for each ranking the gallery images found first and its AP."""
    first = found["trained"][0].queries
    chosen = choose_queries(
        query.viewpoint, np.asarray(first.average_precision.cpu()), np.asarray(first.num_matches.cpu()) > 0, count
    )
    rows: list[dict[str, Any]] = [{"query": q} for q in chosen]
    for name, (scores, rerank) in found.items():
        lists = evaluation.first_found(query, gallery, chosen, SHOWN, rerank, exclude)
        for row, images in zip(rows, lists, strict=True):
            precision = float(scores.queries.average_precision[row["query"]])
            row[name] = {"gallery": images, "average_precision": precision}
    return rows


def choose_queries(
    viewpoint: np.ndarray, average_precision: np.ndarray, countable: np.ndarray, count: int
) -> list[int]:
    """Queries to show: the viewpoints in turn, and within each a good, a middling and a poor one.

    Args:
        viewpoint: [Q], -1 unknown.
        average_precision: [Q].
        countable: bool [Q], queries that have a match.
        count: how many at most.

    Returns:
        Query indices, ordered by viewpoint, the better first.
    """
    groups = [np.flatnonzero(countable & (viewpoint == label)) for label in np.unique(viewpoint[countable])]
    groups = [group[np.lexsort((group, -average_precision[group]))] for group in groups if len(group)]
    chosen: set[int] = set()
    quantiles = (0.25, 0.85, 0.5, 0.97, 0.05, 0.7, 0.35)
    for round_number in range(count):
        for group in groups:
            if len(chosen) < count:
                at = quantiles[round_number % len(quantiles)] * (len(group) - 1)
                rest = [int(i) for i in group if int(i) not in chosen]
                if rest:
                    wanted = int(group[round(at)])
                    chosen.add(wanted if wanted not in chosen else rest[0])
    position = {int(q): (g, i) for g, group in enumerate(groups) for i, q in enumerate(group)}
    return sorted(chosen, key=lambda q: position[q])


def choose_device(config: Config, processes: Processes = ALONE) -> torch.device:
    """The device a configuration asks for; ValueError where it does not exist or cannot do what is asked.

    Each of several processes has the GPU of its number on its machine.
    """
    device = device_named(config.run.device, "run.device")
    if device.type == "cuda" and processes.group is not None:
        if device.index is not None:
            raise ValueError(
                f"run.device: {config.run.device!r} was given; {processes.size} processes have a GPU each: allowed are "
                "auto, cpu and cuda"
            )
        device = device_named(f"cuda:{processes.on_machine}", "run.device")
    if config.run.precision == "fp16" and device.type != "cuda":
        raise ValueError("run.precision: fp16 needs a CUDA device; use bf16 or fp32")
    return device


def introduction(request: Request, run: Run) -> str:
    """What a run is about to do, in lines of text."""
    config, state = run.config, run.state
    size = state.num_parameters / 1e6
    steps = [
        f"{plan.stage.optimizer.epochs} epochs of {plan.sampler.batches_per_epoch} steps of {plan.sampler.description}"
        for plan in run.plans
    ]
    network = config.model.backbone if state.has_backbone else "a network of its own"
    losses = "native" if _native.available(run.device) else "PyTorch"
    lines = [
        run.data.summary(),
        "",
        f"recipe   {request.name}",
        f"method   {config.method.name}, {network}, {size:.2f} M parameters, "
        f"{config.data.height} x {config.data.width} images",
        f"training {', then '.join(steps)}; {run.total_steps} steps in all",
        f"device   {run.device}, {torch.get_num_threads()} threads, losses: {losses}",
        *([f"process  1 of {run.processes.size}, which share each batch"] if run.processes.size > 1 else []),
        f"output   {run.folder.path}",
    ]
    if state.left_out:
        left_out = textwrap.shorten(", ".join(state.left_out), 80)
        lines += [f"weights  {len(state.left_out)} entries of {config.model.weights} left out: {left_out}"]
    if state.restored is not None:
        lines += [f"resumed  at step {state.progress.step}", *_changes(state.restored, run)]
    return "\n".join([*lines, ""])


def _changes(before: Mapping[str, Any], run: Run) -> list[str]:
    """What a resumed run does otherwise than the configuration `before` said, in lines of text."""
    old, new = dict(pairs(to_config(before).plain())), dict(pairs(run.config.plain()))
    names = [name for name in new if name in old and new[name] != old[name]]
    lines = [f"changed  {name}: {new[name]!r} now, {old[name]!r} before" for name in names]
    plan = run.plans[run.state.progress.stage]
    epoch = plan.epoch_at(run.state.progress.step) - plan.first_epoch
    rates = [learning_rate(c, epoch) for c in (run.config.optimizer, OptimizerConfig(**before["optimizer"]))]
    if len(run.plans) == 1 and rates[0] != rates[1]:
        lines.append(f"schedule the learning rate goes on at {rates[0]:.3g}; it was to go on at {rates[1]:.3g}")
    return lines
