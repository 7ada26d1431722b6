"""Short runs of the whole program, and the pieces of it that can be checked against a closed form."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import random
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vareid_ext
from vareid_ext.cli import figures, train
from vareid_ext.data import READERS, SyntheticSettings, synthetic_data, write_manifest
from vareid_ext.files import atomic
from vareid_ext.files.checkpoint import load_checkpoint, save_checkpoint
from vareid_ext.training import program, run
from vareid_ext.training.console import TrainingBar
from vareid_ext.training.run import Run
from vareid_ext.training.run_folder import RunFolder
from vareid_ext.training.signals import RunInterruptedError

METRIC_NAMES = ("mAP", "mINP", "rank1", "rank5", "rank10")

SMALL = [
    "--synthetic-identities=8", "--synthetic-test-identities=4", "--data.synthetic.distractors=2",
    "--synthetic-images=12", "--data.synthetic.height=32", "--data.synthetic.width=16", "--height=32", "--width=16",
    "--pad=2", "--model.backbone_options={channels: [8, 8, 8, 8], stem_width: 8}", "--sampler.identities=4",
    "--sampler.instances=2", "--batches-per-epoch=4", "--epochs=2", "--evaluation.every=1", "--log-every=1",
    "--tensorboard=false", "--threads=1", "--ranking-queries=2",
]  # fmt: skip


STAGED = [option for option in SMALL if not option.startswith("--epochs")]
"""The same for a run in stages, which have their own epochs."""


def start(output, *arguments):
    small = STAGED if any(argument.startswith("--stages") for argument in arguments) else SMALL
    return train.main([*small, "--output", str(output), *arguments])


def status(call, *arguments):
    """The exit status of a program, returned or raised."""
    try:
        return call(*arguments)
    except SystemExit as end:
        return end.code


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def rendered_once():
    """Every run here uses one of few synthetic sets: render each of them once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "synthetic", functools.lru_cache(synthetic_data))
        yield


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(train, "draw_figures", lambda *args: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed, with everything on that has a state."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert start(output, "--ema-decay=0.9", "--tensorboard=true", "--local") == 0
    return output


def test_the_run_folder(finished, capsys):
    metrics = json.loads((finished / "metrics.json").read_text())
    for name in ("raw_pixels", "colour_histogram", "untrained", "trained", "reranked"):
        assert set(metrics[name]) == set(METRIC_NAMES)
        assert all(0 <= value <= 1 for value in metrics[name].values())
    assert metrics["seconds"] > 0
    views = metrics["by_query_viewpoint"]["trained"]
    mean = sum(v["mAP"] * v["queries"] for v in views.values()) / sum(v["queries"] for v in views.values())
    assert mean == pytest.approx(metrics["trained"]["mAP"], rel=1e-9)
    for picture in ("curves.png", "ranking.png"):
        with Image.open(finished / picture) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    assert any((finished / "tensorboard").iterdir())
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert not [path for path in finished.iterdir() if path.name.endswith(".tmp")]


def test_the_log_has_every_step_and_evaluation(finished):
    entries = log_of(finished)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    for entry in steps:
        loss = entry["loss"]
        assert set(loss) == {"total", "identity", "viewpoint", "regularizer", "stripes", "triplet"}
        # A term is logged as what it adds.
        assert loss["total"] == pytest.approx(sum(loss.values()) - loss["total"], rel=1e-5)
    assert [entry["epoch"] for entry in entries if "mAP" in entry] == [1, 2]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert entries[-1]["mAP"] == metrics["trained"]["mAP"]


def test_checkpoints_hold_the_centres_and_the_best_weights(finished):
    last, best = load_checkpoint(finished / "last.pt"), load_checkpoint(finished / "best.pt")
    assert last["progress"]["step"] == 8
    assert last["method"]["loss.identity_centers"].shape == (8, 8)
    assert last["method"]["loss.viewpoint_centers"].shape == (8, 3, 8)
    evaluations = last["progress"]["evaluations"]
    assert best["progress"]["evaluations"][-1]["mAP"] == max(entry["mAP"] for entry in evaluations)
    # The optimizer knows the centres too: one state for each trained tensor.
    buffers = ("running", "num_batches", "mask")
    trained = [key for key in last["method"] if not any(word in key for word in buffers)]
    assert len(last["optimizer"]["state"]) == len(trained) - 1  # less the neck's shift, which is not trained


def interrupt_at(monkeypatch, step, number):
    update = TrainingBar.update
    counted = []

    def update_and_signal(self, *arguments):
        update(self, *arguments)
        counted.append(1)
        if len(counted) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainingBar, "update", update_and_signal)


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_state(one, other):
    """The last checkpoints of two runs are bit-identical, but for the time that the runs took; returns one of them."""
    states = [load_checkpoint(folder / "last.pt") for folder in (one, other)]
    for state in states:
        state["progress"].pop("seconds")
    assert_same(*states)
    return states[0]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGTERM), (4, signal.SIGINT), (7, signal.SIGINT)])
def test_a_resumed_run_ends_bit_identical(finished, tmp_path, monkeypatch, capsys, step, number):
    output = tmp_path / "interrupted"
    random.random(), np.random.rand(), torch.rand(1)  # what the process drew before a run does not show in it
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, number)
        assert start(output, "--ema-decay=0.9", "--tensorboard=true", "--local") == 128 + number
    assert "--resume" in capsys.readouterr().err
    assert load_checkpoint(output / "last.pt")["progress"]["step"] == step
    assert not (output / "metrics.json").exists()
    # Loading in another process draws from another place of the generators; the result must not notice.
    torch.rand(5)
    assert train.main(["--resume", str(output), "--workers", "1" if step == 3 else "0"]) == 0
    expected, found = (load_checkpoint(folder / "last.pt") for folder in (finished, output))
    for state in (expected, found):
        state["progress"].pop("seconds")
        state["config"]["data"].pop("workers")
    assert_same(expected, found)
    times = {"images_per_second", "seconds"}
    logs = [[{k: v for k, v in entry.items() if k not in times} for entry in log_of(f)] for f in (finished, output)]
    assert logs[0] == logs[1]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (finished, output)]
    assert all(metrics[0][key] == metrics[1][key] for key in metrics[0] if key != "seconds")


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_can_be_evaluated_again(finished, capsys):
    before = load_checkpoint(finished / "last.pt")
    assert train.main(["--resume", str(finished)]) == 0
    after = load_checkpoint(finished / "last.pt")
    assert_same(before["method"], after["method"])
    assert after["progress"]["evaluations"] == before["progress"]["evaluations"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of one epoch of four steps, to be copied and resumed."""
    output = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_figures", lambda *args: None)
        assert start(output, "--epochs=1", "--baselines=false") == 0
    return output


@pytest.fixture
def copied(short, tmp_path):
    return shutil.copytree(short, tmp_path / "copy")


@pytest.mark.usefixtures("no_figures")
def test_a_run_killed_after_its_last_step_ends_bit_identical(finished, tmp_path, monkeypatch):
    output = tmp_path / "killed"

    def killed(*arguments):
        raise RunInterruptedError(signal.SIGTERM, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(program, "conclude", killed)
        assert start(output, "--ema-decay=0.9", "--tensorboard=true", "--local") == 128 + signal.SIGTERM
    assert train.main(["--resume", str(output)]) == 0
    assert_same_state(finished, output)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("average", [False, True])
def test_weights_of_a_run_give_its_metrics_again_or_are_refused(finished, short, tmp_path, capsys, average):
    run = finished if average else short
    options = ["--local"] if average else []
    arguments = ["--epochs=0", "--baselines=false", f"--weights={run / 'last.pt' if average else run}"]
    assert start(tmp_path / "again", *arguments, *options) == 0
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "again")]
    assert metrics[0]["trained"] == pytest.approx(metrics[1]["trained"], rel=1e-9)
    assert metrics[0]["reranked"] == pytest.approx(metrics[1]["reranked"], rel=1e-9)
    for other in ("--last-stride=2", "--pooling=gem", "--input-norm=false", "--stripe-dim=8" if average else "--local"):
        capsys.readouterr()
        assert start(tmp_path / "other", *arguments, *options, other) == 2
        assert str(run) in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_a_relative_data_root_is_resumed_from_anywhere(tmp_path, monkeypatch):
    data = synthetic_data(SyntheticSettings(8, 4, 12, 2, height=32, width=16))
    write_manifest(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    manifest = ["--data.kind=manifest", "--root=data/manifest.csv", "--baselines=false", "--epochs=1"]
    assert start("run", *manifest) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", "../run"]) == 0


@pytest.mark.usefixtures("no_figures")
def test_without_any_viewpoint_only_what_reads_none_is_trained(tmp_path, monkeypatch, capsys):
    data = synthetic_data(SyntheticSettings(8, 4, 12, 2, height=32, width=16))
    manifest = write_manifest(data, tmp_path / "data")
    lines = [line.split(",") for line in manifest.read_text().splitlines()]
    unlabelled = [[*line[:3], "", line[4]] for line in lines[1:]]
    arguments = [f"--root={manifest}", "--data.kind=manifest", "--epochs=0", "--baselines=false"]

    def begun(labels, *more):
        manifest.write_text("\n".join(map(",".join, [lines[0], *labels])))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return start(tmp_path / "run", *arguments, *more)

    for more, hint in (
        ([], "; --use_viewpoint=false --use_regularizer=false does without"),
        (["--use-viewpoint=false"], "; --use_regularizer=false does without"),
        (["--method=srb", "--viewpoint-aware", "--viewpoint-labels=soft"], "; --viewpoint_aware=false does without"),
        (["--method=oscnn", "--viewpoint-aware"], "a manifest may have a column viewpoint\n"),
        (["--method=two-branch"], "a manifest may have a column viewpoint\n"),
    ):
        capsys.readouterr()
        assert begun(unlabelled, *more) == 2
        assert not (tmp_path / "run").exists()
        error = capsys.readouterr().err
        assert "data.viewpoint_file: nothing was given, and no training image has a viewpoint, which method" in error
        assert hint in error
    assert begun(unlabelled, "--use-viewpoint=false", "--use-regularizer=false") == 0
    assert begun(unlabelled, "--method=srb") == 0
    train_line = next(line for line in lines if line[4] == "train")
    one = [train_line, *(line for line in unlabelled if line[0] != train_line[0])]
    capsys.readouterr()
    assert begun(one) == 0
    assert "1 of 96 training images have viewpoint labels" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_run_says_what_it_does_otherwise(copied, capsys):
    assert train.main(["--resume", str(copied)]) == 0
    assert "learning rate" not in capsys.readouterr().out
    assert train.main(["--resume", str(copied), "--epochs=3", "--k1=7"]) == 0
    out = capsys.readouterr().out
    # The cosine of one epoch has ended at the floor; a third of three is at three quarters of the way from it.
    assert "optimizer.epochs: 3" in out
    assert "evaluation.k1: 7" in out
    assert f"{0.002 * (0.01 + 0.99 * 0.75):.3g}" in out
    assert f"{0.002 * 0.01:.3g}" in out


@pytest.mark.usefixtures("no_figures")
def test_the_configuration_keeps_the_command_that_made_it(copied):
    def comments():
        lines = (copied / "config.yaml").read_text().splitlines()
        return [line for line in lines if line.startswith("#")]

    (first,) = comments()
    assert "--epochs=1" in first
    assert "'--model.backbone_options={channels: [8, 8, 8, 8], stem_width: 8}'" in first
    assert train.main(["--resume", str(copied)]) == 0
    assert comments() == [first]
    assert train.main(["--resume", str(copied), "--k1=7"]) == 0
    assert comments()[0] == first
    assert "--k1=7" in comments()[1]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("limit", "name"), [(2_000, "config.yaml"), (20_000, "last.pt"), (None, "log.jsonl")])
def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path, capsys, monkeypatch, limit, name):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is None:
        (tmp_path / "run").mkdir()
        monkeypatch.setattr(RunFolder, "check_that_nothing_is_lost", lambda *arguments: None)
        (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or hard, hard))
        assert start(tmp_path / "run", "--baselines=false", "--workers=0") == 2  # the limit would bind their pipes too
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert name in error.splitlines()[-1]
    assert not (tmp_path / "run" / "last.pt").exists()
    assert [file.name for file in (tmp_path / "run").glob(".*")] == [".lock"]


@pytest.mark.usefixtures("no_figures")
def test_a_signal_while_the_last_checkpoint_is_written_is_one_line(finished, tmp_path, monkeypatch, capsys):
    files = []

    class Interrupted(io.FileIO):
        def write(self, data):
            done = super().write(data)
            if self.name.rpartition("/")[2].startswith(".best.pt"):
                files.append(self.name)
                if len(set(files)) == 2 and files.count(self.name) == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return done

    monkeypatch.setattr(io, "FileIO", Interrupted)
    monkeypatch.setattr(program, "metrics_of", lambda scores: dict.fromkeys(METRIC_NAMES, 0.5))
    monkeypatch.setattr(run, "metrics_of", lambda scores: dict.fromkeys(METRIC_NAMES, 0.5))
    assert start(tmp_path / "run", "--baselines=false") == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "--resume" in error
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 8


@pytest.mark.usefixtures("no_figures")
def test_batches_follow_a_data_set_of_few_identities(tmp_path):
    options = [option for option in SMALL if "sampler" not in option and "batches" not in option]
    arguments = ["--output", str(tmp_path / "run"), "--epochs=1", "--baselines=false", "--sampler.instances=3"]
    assert train.main([*options, *arguments]) == 0
    steps = [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert steps == [1, 2, 3, 4]  # 96 images in batches of 8 identities x 3 images


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_run_keeps_the_options_it_was_given(copied):
    assert train.main(["--resume", str(copied), "--epochs=2", "--weight-decay=0.5"]) == 0
    assert yaml.safe_load((copied / "config.yaml").read_text())["optimizer"]["epochs"] == 2
    (group,) = load_checkpoint(copied / "last.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


@pytest.mark.usefixtures("no_figures")
def test_a_log_that_a_kill_left_behind_is_put_in_order(copied):
    entries = log_of(copied)
    with (copied / "log.jsonl").open("a") as file:
        # Killed after the evaluation was logged and before it was saved, and again in the middle of a line.
        file.write(json.dumps({**entries[-1], "epoch": 7}) + '\n{"step": 4, "ep')
    assert train.main(["--resume", str(copied)]) == 0
    assert log_of(copied) == entries


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_another_optimizer_is_refused_when_a_run_is_resumed(copied, capsys, name):
    assert train.main(["--resume", str(copied), f"--optimizer.name={name}", "--epochs=2"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.name" in error
    assert "adamw" in error


def test_fewer_epochs_than_were_trained_are_refused(copied, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    assert train.main(["--resume", str(copied), "--epochs=0"]) == 2
    assert "optimizer.epochs: 0 was given, which is 0 steps" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "change", [None, {"progress": []}, {"progress": {"speed": 1}}, {"config": {}}, {"random": {}}, {"method": []}]
)
def test_a_checkpoint_of_other_entries_is_refused(copied, capsys, change):
    state = load_checkpoint(copied / "last.pt")
    state.pop("format")
    save_checkpoint(copied / "last.pt", {"method": {}} if change is None else {**state, **change})
    before = (copied / "environment.json").read_bytes()
    assert train.main(["--resume", str(copied)]) == 2
    assert "last.pt" in capsys.readouterr().err
    assert (copied / "environment.json").read_bytes() == before


def test_another_network_is_refused_in_a_few_words(copied, capsys):
    assert train.main(["--resume", str(copied), "--local"]) == 2
    error = capsys.readouterr().err
    assert "last.pt' does not fit the configuration" in error
    assert len(error) < 600


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_run_removes_what_a_killed_one_left(copied):
    left = copied / f"{atomic._prefix(copied / 'last.pt')}0123abcd.part"
    left.write_bytes(b"half")
    assert train.main(["--resume", str(copied)]) == 0
    assert not left.exists()


def test_metrics_are_kept_where_the_figures_cannot_be_drawn(copied, monkeypatch, capsys):
    def full(*arguments):
        raise OSError("disk full")

    (copied / "metrics.json").unlink()
    monkeypatch.setattr(train, "draw_figures", full)
    assert train.main(["--resume", str(copied)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert json.loads((copied / "metrics.json").read_text())["trained"]["mAP"] > 0


@pytest.mark.usefixtures("no_figures")
def test_a_signal_in_an_evaluation_loses_no_epoch(tmp_path, monkeypatch):
    extract = Run.extract

    def extract_and_signal(self, method, what):
        if what == "epoch 1":
            os.kill(os.getpid(), signal.SIGTERM)
        return extract(self, method, what)

    monkeypatch.setattr(Run, "extract", extract_and_signal)
    assert start(tmp_path / "run", "--save-every=50", "--baselines=false") == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 4


def test_a_signal_before_the_first_step_says_that_nothing_was_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "extract", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert start(tmp_path / "run") == 128 + signal.SIGTERM
    assert "before the first step; nothing was lost" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_weights_that_are_not_finite_are_not_saved(copied, capsys, monkeypatch):
    before = (copied / "last.pt").read_bytes()
    step = torch.optim.AdamW.step

    def spoil(self, *arguments, **options):
        step(self, *arguments, **options)
        self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    assert train.main(["--resume", str(copied), "--epochs=2", "--batches-per-epoch=5", "--lr=1"]) == 3
    assert "step 5" in capsys.readouterr().err
    assert (copied / "last.pt").read_bytes() == before
    assert yaml.safe_load((copied / "config.yaml").read_text())["optimizer"]["epochs"] == 1


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "ranking.png", "best.pt"])
def test_files_of_others_are_not_overwritten(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert start(tmp_path) == 2
    assert name in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_ended_before_its_first_step_can_be_started_again(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program, "measure_baselines", interrupted)
        assert start(tmp_path / "run") == 130
    assert start(tmp_path / "run", "--epochs=3") == 2
    assert start(tmp_path / "run") == 0


def test_a_run_folder_is_not_overwritten(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    assert start(finished) == 2
    assert str(finished) in capsys.readouterr().err
    assert (finished / "last.pt").read_bytes() == before


@pytest.mark.usefixtures("no_figures")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, signal.SIGTERM)
        assert start(output, "--optimizer.name=sgd") == 128 + signal.SIGTERM
    before = (output / "last.pt").read_bytes()
    step = torch.optim.SGD.step

    def explode(self, *arguments, **options):
        step(self, *arguments, **options)
        self.param_groups[0]["params"][-1].data.fill_(1e38)  # a centre, finite itself

    monkeypatch.setattr(torch.optim.SGD, "step", explode)
    assert train.main(["--resume", str(output)]) == 3
    assert "non_finite_batch.pt" in capsys.readouterr().err
    assert (output / "last.pt").read_bytes() == before
    batch = load_checkpoint(output / "non_finite_batch.pt")
    assert not math.isfinite(batch["loss"]["total"])
    assert batch["image"].shape == (8, 3, 32, 16)
    data = synthetic_data(SyntheticSettings(8, 4, 12, 2, height=32, width=16))
    for i, path in zip(batch["index"].tolist(), batch["paths"], strict=True):
        assert data.train.paths[i] == path
    assert batch["identity"].tolist() == data.train.identity[batch["index"].numpy()].tolist()
    first = (output / "non_finite_batch.pt").read_bytes()
    assert train.main(["--resume", str(output)]) == 3
    assert "non_finite_batch-2.pt" in capsys.readouterr().err
    assert (output / "non_finite_batch.pt").read_bytes() == first


@pytest.mark.usefixtures("no_figures")
def test_saved_features_give_the_metrics_again(tmp_path):
    output = tmp_path / "run"
    assert start(output, "--epochs=1", "--baselines=false", "--save-features") == 0
    query, gallery = (np.load(output / name, allow_pickle=False) for name in ("query.npz", "gallery.npz"))
    distances = vareid_ext.pairwise_distance(query["feature"], gallery["feature"], metric="sqeuclidean")
    labels = (query["identity"], gallery["identity"], query["camera"], gallery["camera"])
    again = vareid_ext.evaluate_ranking(distances, *labels)
    assert again.as_dict() == pytest.approx(json.loads((output / "metrics.json").read_text())["trained"], rel=1e-9)
    assert set(query["viewpoint"]) <= {0, 1, 2}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("arguments", "parts", "views_move"),
    [
        (["--smoothing=none", "--use-viewpoint=false", "--use-regularizer=false"], {"total", "identity"}, None),
        (["--use-regularizer=false"], {"total", "identity", "viewpoint"}, True),
        (["--use-viewpoint=false"], {"total", "identity", "regularizer"}, True),
        (["--viewpoint-labels=soft", "--mask-missing=false"], {"total", "identity", "viewpoint", "regularizer"}, True),
    ],
)
def test_every_switch_of_the_loss_trains(tmp_path, arguments, parts, views_move):
    output = tmp_path / "run"
    assert start(output, "--epochs=1", "--baselines=false", "--lr=0.01", "--warmup-epochs=0", *arguments) == 0
    steps = [entry for entry in log_of(output) if "loss" in entry]
    assert all(set(entry["loss"]) == parts for entry in steps)
    centers = load_checkpoint(output / "last.pt")["method"]
    assert ("loss.viewpoint_centers" in centers) == (views_move is not None)
    # Far from where they start, a normal distribution of standard deviation 0.001.
    for name in ("loss.identity_centers", "loss.viewpoint_centers"):
        if name in centers:
            assert centers[name].std() > 0.002


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "arguments", [["--precision=bf16", "--channels-last=false"], ["--optimizer.name=adam", "--pooling=gem"]]
)
def test_other_ways_to_run(tmp_path, arguments):
    output = tmp_path / "run"
    assert start(output, "--epochs=1", "--batches-per-epoch=2", "--baselines=false", *arguments) == 0
    assert json.loads((output / "metrics.json").read_text())["trained"]["mAP"] > 0


@pytest.mark.usefixtures("no_figures")
def test_no_epochs_evaluate_the_untrained_network(tmp_path):
    output = tmp_path / "run"
    assert start(output, "--epochs=0", "--baselines=false") == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["trained"] == metrics["untrained"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device=tpu"], "run.device"),
        (["--device=cuda:99"], "run.device"),
        (["--precision=fp16", "--device=cpu"], "run.precision"),
        (["--backbone=resnet10x"], "the nearest are resnet10t"),
        (["--backbone=resnet18.foo_in1k"], "resnet18.foo_in1k"),
        (["--model.backbone_options={block: 3}"], "backbone_options"),
        (["--mean=[123.7, 116.3, 103.5]"], "data.mean"),
        (["--sampler.identities=9"], "sampler.identities: 9 was given; the training split has only 8 identities"),
        (["--recipe=coil20", "--root=no/such.csv"], "no/such.csv"),
    ],
)
def test_a_request_that_cannot_be_met_ends_with_one_line(tmp_path, capsys, arguments, words):
    assert status(start, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert words in error
    assert not (tmp_path / "run").exists()


def test_a_request_that_cannot_be_met_leaves_no_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--recipe=coil20", "--root=no/such.csv"]) == 2
    assert not list(tmp_path.iterdir())


def test_the_figures_of_a_finished_run_are_drawn_again(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("ranking.png", "metrics.json")}
    (run / "ranking.png").unlink()
    (run / "curves.png").unlink()
    assert figures.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{100 * json.loads(before['metrics.json'])['trained']['mAP']:.1f}" in out
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "curves.png").stat().st_size > 10_000
    for name in ("rankings.json", "metrics.json", "log.jsonl"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:-3])
        assert figures.main([str(run)]) == 2
        assert f"{name}: is damaged" in capsys.readouterr().err
        (run / name).write_bytes(whole)
    (run / "rankings.json").unlink()
    assert figures.main([str(run)]) == 2
    assert "rankings.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stages=[{epochs: 1, train: [nope]}]"],
        ["--lr-factors={nope: 0.1}"],
        ["--weights=no/such/file.pth"],
        ["--backbone=resnet10x"],
        ["--method=two-branch", "--method.stage=layer9"],
    ],
)
def test_a_request_of_the_method_is_checked_before_the_data_set_is_read(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(program, "load_run_data", lambda *arguments: pytest.fail("the data set was read"))
    assert status(start, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert any(word in error for word in ("nope", "no/such/file", "resnet10x", "layer9"))
