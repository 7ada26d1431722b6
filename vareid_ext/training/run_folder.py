"""The run folder: what a run leaves behind and a resumed run finds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import PIL
import timm
import torch
import torchvision

import vareid_ext
from vareid_ext import _native
from vareid_ext.files.atomic import atomic_file, naming, remove_unfinished


class RunFolder:
    """The files of one run.

    Nothing is written before :meth:`create`.

    Args:
        path: the folder.
        resume: go on with the run it holds; otherwise it must hold no file that a run writes.
        config_text: the new run's config.yaml. A folder with no more than this very file, and environment.json, is that
            of the same run, ended before its first step, and is taken.
        command: the command line, for config.yaml.

    Raises:
        FileExistsError: the folder holds a run, or files that one would overwrite, and `resume` is off.
        NotADirectoryError, PermissionError: there can be no folder of that path, or nothing be written to it.
        FileNotFoundError: the folder holds no run and `resume` is on.
    """

    def __init__(self, path: Path, *, resume: bool, config_text: str = "", command: str = "") -> None:
        self._command = command
        self._name_files(path)
        self.logged: dict[str, int] = {}
        """the last step that log.jsonl held of each group of values when the run was resumed"""
        if resume and not self.last.is_file():
            raise FileNotFoundError(f"resume: {str(path)!r} holds no checkpoint to go on from (there is no last.pt)")
        self._check_that_it_can_be_written()
        if not resume:
            self.check_that_nothing_is_lost(config_text)

    def _name_files(self, path: Path) -> None:
        self.path = path
        self.config, self.environment = path / "config.yaml", path / "environment.json"
        self.log, self.metrics = path / "log.jsonl", path / "metrics.json"
        self.last, self.best = path / "last.pt", path / "best.pt"
        self.rankings = path / "rankings.json"
        self.curves, self.ranking = path / "curves.png", path / "ranking.png"
        self.query_features, self.gallery_features = path / "query.npz", path / "gallery.npz"
        self.non_finite_batch = path / "non_finite_batch.pt"
        self.tensorboard, self.wandb = path / "tensorboard", path / "wandb"
        self.loggers = path / "loggers.json"

    @classmethod
    def forget(cls, path: Path) -> None:
        """Remove what a run that ended before it saved anything has left in a folder, but config.yaml."""
        folder = cls.__new__(cls)
        folder._name_files(path)
        for file in set(folder._files()) - {folder.config}:
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Remove half-written files that a killed run has left."""
        for path in self._files():
            remove_unfinished(path)

    def _files(self) -> list[Path]:
        return [value for value in vars(self).values() if isinstance(value, Path) and value != self.path]

    def _check_that_it_can_be_written(self) -> None:
        place = next(p for p in (self.path, *self.path.absolute().parents) if os.path.lexists(p))
        if not place.is_dir():
            raise NotADirectoryError(f"output: {str(self.path)!r} was given, but {str(place)!r} is not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"output: {str(self.path)!r} was given, but {str(place)!r} cannot be written to")

    def check_that_nothing_is_lost(self, config_text: str) -> None:
        """FileExistsError where a new run of this configuration would overwrite something."""
        if self.last.exists():
            raise FileExistsError(
                f"output: {str(self.path)!r} holds a run already; go on with it by --resume {self.path}, or choose "
                "another folder"
            )
        if self.log.exists():
            raise FileExistsError(
                f"output: {str(self.path)!r} holds the log of a run that ended before it saved anything; remove the "
                "folder or choose another"
            )
        found = [path for path in self._files() if path.exists()]
        # A run that ended before its first step has left these two; the same run may start again.
        if set(found) <= {self.config, self.environment} and self.config.is_file():
            found = [] if self._read_config()[1] == config_text else [self.config]
        if found:
            raise FileExistsError(
                f"output: {str(self.path)!r} holds {found[0].name} already, which a run would overwrite; "
                "choose another folder"
            )

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file of the folder atomically."""
        with atomic_file(path) as file:
            file.write(text.encode())

    def write_config(self, text: str) -> None:
        """Write config.yaml where it holds something else, under the command that began the run and those since."""
        commands, before = self._read_config()
        if before != text:
            self.write_text(self.config, f"{commands}# {self._command}\n{text}")

    def _read_config(self) -> tuple[str, str]:
        """config.yaml, the comments that it begins with by themselves; empty where it does not exist."""
        lines = (
            self.config.read_text(encoding="utf-8", errors="replace").splitlines(True) if self.config.exists() else []
        )
        count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        return "".join(lines[:count]), "".join(lines[count:])

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file of the folder atomically."""
        self.write_text(path, json.dumps(value, indent=2) + "\n")

    def append_log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl."""
        with naming(self.log), open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; none where it does not exist. A last line that was not finished is left out.

        Raises:
            ValueError: a line is not JSON, or not an entry with its step.
        """
        if not self.log.is_file():
            return []
        try:
            *lines, _ = self.log.read_text(encoding="utf-8").split("\n")
            entries = [json.loads(line) for line in lines if line]
        except ValueError as error:
            raise ValueError(f"log: {str(self.log)!r} holds a line that is not JSON: {error}") from error
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError(f"log: {str(self.log)!r} holds a line without a step: {json.dumps(entry)[:80]}")
        return entries

    def rewind_log(self, step: int, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Keep the lines of log.jsonl that a resumed run will not write again.

        Args:
            step: steps that the checkpoint has done.
            evaluations: those the checkpoint knows of.
        """
        entries = self.read_log()
        for e in entries:
            for group in ("loss", "optimizer") if "loss" in e else ("metrics",):
                self.logged[group] = max(e["step"], self.logged.get(group, 0))
        kept = [e for e in entries if (e["step"] <= step if "loss" in e else e in evaluations)]
        self.write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in kept))


def _numbered(path: Path) -> Iterator[Path]:
    """The path, then the same with -2, -3 and so on before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def unused_path(path: Path) -> Path:
    """The path, with a number behind its name where that exists."""
    return next(p for p in _numbered(path) if not os.path.lexists(p))


def default_folder(name: str) -> Path:
    """Make runs/<name>-<date and time>, with a number behind it where another run has just taken the name."""
    for path in _numbered(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("never reached: the numbers do not end")


def begun_by(path: Path, launch: str | None) -> bool:
    """Whether a launch, of :func:`environment`, has begun or gone on with the run in a folder."""
    try:
        found = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return launch is not None and isinstance(found, dict) and found.get("launch") == launch


def environment(device: torch.device, command: str, processes: int = 1, launch: str | None = None) -> dict[str, Any]:
    """What a result depends on besides the configuration: versions, device, threads, backends, the command line.

    Args:
        device: where the first process computes.
        command: the command line.
        processes: that train together.
        launch: what started them, None for a process that was started by itself.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "vareid_ext": vareid_ext.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "launch": launch,
        "backends": vareid_ext.backends(),
        "backend": _native.unavailable_reason(device) or "native",
    }
