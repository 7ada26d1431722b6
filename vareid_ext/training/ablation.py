"""Runs beside each other: the rows of the paper's Table 2, which differ in the loss, or methods, as in its Table 1."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vareid_ext.data.readers import needs_root
from vareid_ext.files.lock import locked
from vareid_ext.methods import METHODS, VaReid
from vareid_ext.training import program
from vareid_ext.training.command_line import (
    CommandLineError,
    Request,
    nearest,
    pairs,
    parse,
    recipe_names,
    split_method_settings,
)
from vareid_ext.training.config import Config

SET_BY_THE_ROWS = ("smoothing", "use_viewpoint", "use_regularizer", "local")
"""The settings of the method in which the rows of Table 2 differ."""

_LOSSES = {  # run -> the values of SET_BY_THE_ROWS
    "xent": ("none", False, False, False),
    "lsr": ("uniform", False, False, False),
    "adaptive": ("adaptive", False, False, False),
    "adaptive-viewpoint": ("adaptive", True, False, False),
    "adaptive-regularizer": ("adaptive", False, True, False),
    "va-reid": ("adaptive", True, True, False),
    "va-reid-local": ("adaptive", True, True, True),
}


class _Published(NamedTuple):
    """A row of Table 2; the scores are (mAP, rank-1), percent."""

    title: str
    run: str
    ranking: str
    market1501: tuple[float, float]
    dukemtmc: tuple[float, float]


TABLE_2 = (
    _Published("Xent", "xent", "trained", (86.30, 94.31), (76.70, 86.94)),
    _Published("LSR", "lsr", "trained", (86.72, 94.35), (77.47, 87.43)),
    _Published("L_y", "adaptive", "trained", (86.97, 94.70), (77.99, 87.39)),
    _Published("L_y + L_v", "adaptive-viewpoint", "trained", (88.67, 95.37), (78.86, 88.38)),
    _Published("L_y + L_R", "adaptive-regularizer", "trained", (88.25, 95.25), (78.25, 87.84)),
    _Published("VA-reID", "va-reid", "trained", (89.97, 95.87), (81.48, 91.11)),
    _Published("VA-reID + RR", "va-reid", "reranked", (95.09, 96.32), (90.66, 92.46)),
    _Published("VA-reID + local", "va-reid-local", "trained", (91.70, 96.23), (84.51, 91.61)),
    _Published("VA-reID + local + RR", "va-reid-local", "reranked", (95.43, 96.79), (91.82, 93.85)),
)
"""Table 2 of the paper; the authors' logs have the scores of its row VA-reID for another network (docs/method.md)."""


class Row(NamedTuple):
    """A line of the table."""

    title: str
    run: str
    """the name of its runs, which rows may share; that of seed 0 has the folder <run>-0"""
    config: Config
    ranking: str = "trained"
    """the entry of the runs' metrics.json: "trained", or "reranked" for re-ranking"""
    published: tuple[float, float] | None = None
    """mAP and rank-1 of the paper on this data set, percent"""


def rows_of_losses(config: Config) -> list[Row]:
    """The nine rows of Table 2, of seven networks.

    Args:
        config: of method va-reid; what the rows differ in is set by them.

    Raises:
        ValueError: `config` is of another method.
    """
    if not isinstance(config.method, VaReid.Config):
        raise ValueError(
            f"method.name: {config.method.name!r} was given; the losses of 'va-reid' are compared, methods by --methods"
        )
    rows = []
    for line in TABLE_2:
        losses: dict[str, Any] = dict(zip(SET_BY_THE_ROWS, _LOSSES[line.run], strict=True))
        published = {"market1501": line.market1501, "dukemtmc-reid": line.dukemtmc}.get(config.data.kind)
        changed = replace(config, method=replace(config.method, **losses))
        rows.append(Row(line.title, line.run, changed, line.ranking, published))
    return rows


_IMAGES = (
    "kind",
    "root",
    "viewpoint_labels",
    "viewpoint_file",
    "viewpoints",
    "viewpoints_between",
    "viewpoint_bins",
    "division",
    "skip_bad_images",
    "synthetic",
    "extras",
)
"""The fields of section data that say which images are used, rather than how."""


def rows_of_methods(arguments: Sequence[str], names: Sequence[str]) -> list[Row]:
    """A row for each method, by the recipe <data set>-<name> where there is one; otherwise by its defaults.

    Args:
        arguments: of the command line of the training, which hold for every row, settings of a method for those that
            have them. Of the recipe that they name the images (`_IMAGES`) are taken; their size and augmentation and
            the training are each method's.
        names: of methods, or what recipes have behind the name of the data set, such as "srb-r50".

    Raises:
        ValueError: a name that is neither; a name that is given twice; a setting that none of the methods has.
    """
    general, settings = split_method_settings(arguments)
    base = parse(general)
    images = {field: getattr(base.config.data, field) for field in _IMAGES}
    dataset, recipes = base.config.data.kind.partition("-")[0], recipe_names()
    rows = []
    for name in names:
        recipe = f"{dataset}-{name}"
        if recipe not in recipes and name not in METHODS:
            known = [*METHODS, *(r.partition("-")[2] for r in recipes if r.startswith(f"{dataset}-"))]
            raise CommandLineError(f"--methods: {name!r} was given{nearest(name, list(dict.fromkeys(known)))}")
        chosen = f"--recipe={recipe}" if recipe in recipes else f"--method={name}"
        request = parse([*general, chosen])
        own = [option for field, option in settings.items() if hasattr(request.config.method, field)]
        config = parse([*general, chosen, *own]).config if own else request.config
        config = replace(config, data=replace(config.data, **images))
        method = METHODS[config.method.name]
        rows.append(Row(name, name, config, published=method.about.published.get(recipe)))
    if len(set(names)) < len(names):
        raise CommandLineError(f"--methods: {', '.join(names)} was given; each may be given once")
    for field in settings:
        if not any(hasattr(row.config.method, field) for row in rows):
            raise CommandLineError(f"method.{field}: was given; none of {', '.join(names)} has such a setting")
    return rows


def folder_of(output: Path, run: str, seed: int) -> Path:
    """The folder of a run."""
    return output / f"{run}-{seed}"


def plan(rows: Sequence[Row], seeds: Sequence[int], output: Path) -> dict[Path, Config]:
    """The runs of rows: folder -> configuration, in the order in which they are done, all of a seed before the next.

    Raises:
        ValueError, OSError: a folder holds a run of another configuration; the data set of the first run that is not
            finished cannot be read; :func:`vareid_ext.training.program.check` refuses one of them.
    """
    runs = {}
    for seed in seeds:
        for row in rows:
            config = replace(row.config, run=replace(row.config.run, seed=seed))
            runs[folder_of(output, row.run, seed)] = config.with_absolute_paths()
    for folder, config in runs.items():
        if (folder / "config.yaml").is_file():
            _check_same(config, parse(["--resume", str(folder)]).config, folder)
    _check_all({folder: config for folder, config in runs.items() if not (folder / "metrics.json").is_file()})
    return runs


def _check_all(runs: Mapping[Path, Config]) -> None:
    for config in list(runs.values())[:1]:
        if needs_root(config.data.kind):
            program.load_run_data(config, train=True, check_images=False, progress=False)
    checked: list[Config] = []
    for folder, config in runs.items():
        same = replace(config, run=replace(config.run, seed=0))
        if same not in checked:
            try:
                program.check(config, resume=(folder / "last.pt").is_file())
            except (ValueError, OSError) as error:
                raise ValueError(f"{folder.name}: {error}") from error
            checked.append(same)


def _check_same(config: Config, kept: Config, folder: Path) -> None:
    wanted, found = dict(pairs(config.plain())), dict(pairs(kept.plain()))
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise CommandLineError(
                f"{name}: {wanted.get(name)!r} was given; {folder} holds a run with {found.get(name)!r}: choose "
                "another --output"
            )


def finish_run(config: Config, folder: Path, command: str) -> None:
    """Begin a run of :func:`plan`, or go on with it, up to its metrics.json; nothing where that exists.

    A run that was killed before its first checkpoint begins again.

    Args:
        config, folder: of the run.
        command: the command line, for config.yaml.

    Raises:
        OSError, ValueError, NonFiniteLossError, RunInterruptedError: as :func:`vareid_ext.training.program.run`.
    """
    if (folder / "metrics.json").is_file():
        return
    resume = (folder / "last.pt").is_file()
    if not resume and (folder / "config.yaml").is_file():
        # Renamed first: half of a folder could not begin again.
        abandoned = folder.with_name(f"{folder.name}.abandoned")
        with locked(folder):
            shutil.rmtree(abandoned, ignore_errors=True)
            shutil.rmtree(folder.rename(abandoned))
    program.run(Request(config, folder.name, folder, resume, command))


def results(rows: Sequence[Row], seeds: Sequence[int], output: Path) -> list[dict[str, Any]]:
    """What the finished runs reached, a dictionary for each row: title, run, ranking, the metrics of its `runs` by
    seed, their `mean` and `std` (of the sample; None for one run), and the `published` ones or None; fractions."""
    found = []
    for row in rows:
        runs: dict[int, dict[str, float]] = {}
        for seed in seeds:
            file = folder_of(output, row.run, seed) / "metrics.json"
            if file.is_file():
                runs[seed] = json.loads(file.read_text(encoding="utf-8"))[row.ranking]
        values = {name: [run[name] for run in runs.values()] for name in next(iter(runs.values()), {})}
        published = None
        if row.published is not None:
            published = {
                name: round(value / 100, 6) for name, value in zip(("mAP", "rank1"), row.published, strict=True)
            }
        found.append(
            {
                "title": row.title,
                "run": row.run,
                "ranking": row.ranking,
                "runs": runs,
                "mean": {name: statistics.fmean(v) for name, v in values.items()},
                "std": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()},
                "published": published,
            }
        )
    return found
