"""TensorBoard, Weights & Biases and MLflow: a run that was interrupted has each step once, under one name."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
from collections import defaultdict
from types import SimpleNamespace

import pytest

from tests.test_train import log_of, start
from vareid_ext.cli import train
from vareid_ext.training import loggers
from vareid_ext.training.run import Run
from vareid_ext.training.signals import RunInterruptedError

QUIET = ("--baselines=false", "--workers=0", "--save-every=1", "--evaluation.every=1")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(train, "draw_figures", lambda *args: None)


def run_killed_after_seven_steps(output, monkeypatch, *options):
    """A run of 8 steps, 4 an epoch, that ends after step 7 with nothing saved since step 4, and is resumed."""

    def killed(self):
        if self.state.progress.step == 7:
            raise RunInterruptedError(15, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_if_asked", killed)
        assert start(output, *QUIET, *options) == 128 + 15
    assert train.main(["--resume", str(output)]) == 0


def expected(output):
    """What log.jsonl holds, as {name: {step: value}}."""
    values = defaultdict(dict)
    for entry in log_of(output):
        groups = {"loss": entry["loss"], "optimizer": {"lr": entry["lr"]}} if "loss" in entry else {
            "metrics": {name: entry[name] for name in ("mAP", "mINP", "rank1", "rank5", "rank10")}
        }  # fmt: skip
        for group, found in groups.items():
            for name, value in found.items():
                values[f"{group}/{name}"][entry["step"]] = value
    assert set(values["loss/total"]) == set(range(1, 9))
    assert set(values["metrics/mAP"]) == {4, 8}
    return values


def assert_once(points, output):
    """`points` (name, step, value) are what log.jsonl holds, each once and in order."""
    found = defaultdict(dict)
    for name, step, value in points:
        assert step not in found[name], (name, step)
        assert step > max(found[name], default=0)
        found[name][step] = value
    wanted = expected(output)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name


class Recorder:
    """A place in memory."""

    runs: dict = {}  # noqa: RUF012

    def __init__(self, folder, config, run):
        self.run = run or f"run {len(self.runs)}"
        self.points, self.ends = self.runs.setdefault(self.run, ([], []))

    def add(self, values, step):
        self.points.extend((name, step, value) for name, value in values.items())

    def close(self, finished):
        self.ends.append(finished)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Recorder)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    monkeypatch.setattr(Recorder, "runs", {})
    return Recorder


def test_a_run_that_was_killed_and_resumed_has_each_step_once(recorder, tmp_path, monkeypatch):
    run_killed_after_seven_steps(tmp_path / "run", monkeypatch, "--loggers=[wandb]")
    ((points, ends),) = recorder.runs.values()
    assert_once(points, tmp_path / "run")
    assert ends == [False, True]
    assert train.main(["--resume", str(tmp_path / "run")]) == 0  # again, from its end
    ((again, ends),) = recorder.runs.values()
    assert again == points
    assert ends == [False, True, True]


def test_a_place_that_comes_later_begins_where_the_run_goes_on(recorder, tmp_path, monkeypatch):
    run_killed_after_seven_steps(tmp_path / "run", monkeypatch)
    assert not recorder.runs
    assert not (tmp_path / "run" / "loggers.json").exists()
    assert train.main(["--resume", str(tmp_path / "run"), "--loggers=[wandb]", "--epochs=3"]) == 0
    ((points, _),) = recorder.runs.values()
    assert [step for name, step, _ in points if name == "loss/total"] == [9, 10, 11, 12]


def test_steps_that_two_kills_have_left_are_not_written_again(recorder, tmp_path, monkeypatch):
    def killed_at(last):
        def killed(self):
            if self.state.progress.step == last:
                raise RunInterruptedError(15, "killed")

        return killed

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_if_asked", killed_at(7))
        assert start(output, *QUIET, "--loggers=[wandb]") == 143
        patch.setattr(Run, "stop_if_asked", killed_at(5))  # log.jsonl holds less than the place now
        assert train.main(["--resume", str(output)]) == 143
    assert train.main(["--resume", str(output)]) == 0
    ((points, _),) = recorder.runs.values()
    assert_once(points, output)


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["missing", "a folder"])
@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_package_that_is_not_installed_is_named_before_any_work(tmp_path, monkeypatch, capsys, name, spec):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: spec)
    assert start(tmp_path / "run", f"--loggers=[{name}]") == 2
    assert f"run.loggers: {name} was given, which is not installed; type: pip install 'vareid_ext[{name}]'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_all_packages_that_are_not_installed_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert start(tmp_path / "run", "--loggers=[wandb, mlflow]") == 2
    assert "wandb, mlflow was given, which is not installed; type: pip install 'vareid_ext[wandb,mlflow]'" in (
        capsys.readouterr().err
    )


def test_a_place_that_does_not_exist_is_named(tmp_path, capsys):
    assert start(tmp_path / "run", "--loggers=[comet]") == 2
    assert "run.loggers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_used_stops_before_the_first_step(recorder, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        raise RuntimeError("no login\nlong advice")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", refused)
    assert start(tmp_path / "run", *QUIET, "--loggers=[wandb]") == 2
    assert "run.loggers: wandb cannot be used: no login\n" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


# ---- the places themselves -------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_killed_after_seven_steps(tmp_path / "run", monkeypatch, "--tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert_once(points, tmp_path / "run")


def wandb_history(path):
    """The points of an offline file: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the end of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                yield from ((k, items["_step"], v) for k, v in items.items() if not k.startswith("_"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_killed_after_seven_steps(tmp_path / "run", monkeypatch, "--loggers=[wandb]")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # the same run
    assert_once([point for path in files for point in wandb_history(path)], tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_mlflow_with_a_file_as_its_store(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "people")
    run_killed_after_seven_steps(tmp_path / "run", monkeypatch, "--loggers=[mlflow]")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("people").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optimizer.epochs"] == "2"
    points = [(k, m.step, m.value) for k in found.data.metrics for m in client.get_metric_history(found.info.run_id, k)]
    assert_once(points, tmp_path / "run")
    assert all(math.isfinite(value) for _, _, value in points)
