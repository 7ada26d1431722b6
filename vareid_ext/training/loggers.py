"""Where a run's values are written beside log.jsonl: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vareid_ext.files.atomic import naming
from vareid_ext.training.command_line import pairs
from vareid_ext.training.config import Config
from vareid_ext.training.run_folder import RunFolder

_MOST_PARAMETERS = 100  # that MLflow takes at once


class Logger(Protocol):
    """One of these places."""

    run: str
    """what the place calls the run; a resumed run goes on under it"""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step."""

    def close(self, finished: bool) -> None:
        """Write what is left, and whether the run has come to its end."""


class TensorBoard:
    """Event files in the run folder; those of steps that a resumed run does again are dropped from view."""

    run = ""

    def __init__(self, folder: RunFolder, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder.tensorboard
        self._writer = SummaryWriter(str(self._path), purge_step=after + 1 if after else None)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Logger`."""
        with naming(self._path):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """See :class:`Logger`."""
        with naming(self._path):
            self._writer.close()


class Wandb:
    """A run of Weights & Biases in project WANDB_PROJECT, else vareid_ext; offline (WANDB_MODE) in the run folder."""

    def __init__(self, folder: RunFolder, config: Config, run: str | None) -> None:
        import wandb

        self.run = run or secrets.token_hex(8)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vareid_ext"), id=self.run, resume="allow",
            name=folder.path.absolute().name, dir=str(folder.path), config=config.plain(), allow_val_change=True,
        )  # fmt: skip

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Logger`."""
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """See :class:`Logger`."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run of MLflow where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say; the settings are its parameters."""

    def __init__(self, folder: RunFolder, config: Config, run: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        name = None if run else folder.path.absolute().name
        self.run = mlflow.start_run(run_id=run, run_name=name).info.run_id
        if run is None:
            settings = list(pairs(config.plain()))
            for begin in range(0, len(settings), _MOST_PARAMETERS):
                mlflow.log_params(dict(settings[begin : begin + _MOST_PARAMETERS]))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Logger`."""
        try:
            self._mlflow.log_metrics(dict(values), step=step)
        except self._mlflow.MlflowException as error:
            raise OSError(f"run.loggers: mlflow does not take the values of step {step}: {error}") from error

    def close(self, finished: bool) -> None:
        """See :class:`Logger`."""
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


LOGGERS: dict[str, Callable[[RunFolder, Config, str | None], Logger]] = {"wandb": Wandb, "mlflow": Mlflow}
"""What section run may name, each an extra of the package."""


def check_loggers(names: Sequence[str]) -> None:
    """ValueError, naming all of them, where packages of loggers are not installed."""
    specs = {name: importlib.util.find_spec(name) for name in names}
    # A folder of that name, as they make themselves, is no package.
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise ValueError(
            f"run.loggers: {', '.join(missing)} was given, which is not installed; type: "
            f"pip install 'vareid_ext[{','.join(missing)}]'"
        )


class Loggers:
    """All places that a run writes its values to; without arguments none.

    A resumed run goes on in the same run of each place, and writes no step again that is there already: it computes the
    same values.

    Args:
        places: each with the last steps, by group of values, that it has already.
    """

    def __init__(self, places: Sequence[tuple[Logger, Mapping[str, int]]] = ()) -> None:
        self._places = list(places)

    @classmethod
    def open(cls, folder: RunFolder, config: Config, after: int) -> Loggers:
        """The places of a configuration.

        Args:
            folder: of the run; loggers.json in it remembers what each place calls the run, and what it has.
            config: of the run.
            after: steps done.

        Raises:
            ValueError: a place cannot be used, for want of a login or a server.
        """
        loggers = cls()
        if config.run.tensorboard:
            loggers._places.append((TensorBoard(folder, after), {}))
        known = json.loads(folder.loggers.read_text()) if folder.loggers.exists() else {}
        for name in dict.fromkeys(config.run.loggers):
            before = known.get(name)
            try:
                place = LOGGERS[name](folder, config, before["run"] if before else None)
            except Exception as error:  # of libraries that look at servers, logins and settings of their own
                loggers.close(False)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(f"run.loggers: {name} cannot be used: {reason}") from error
            has = {}
            if before:
                steps = (before["has"], folder.logged)
                has = {group: max(s.get(group, 0) for s in steps) for group in {*steps[0], *steps[1]}}
            loggers._places.append((place, has))
            known[name] = {"run": place.run, "has": has}
        if config.run.loggers:
            folder.write_json(folder.loggers, known)
        return loggers

    def add(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step under the group's name."""
        for place, has in self._places:
            if step > has.get(group, 0):
                place.add({f"{group}/{name}": value for name, value in values.items()}, step)

    def close(self, finished: bool) -> None:
        """Write what is left; `finished`: whether the run has come to its end."""
        for place, _ in self._places:
            place.close(finished)
