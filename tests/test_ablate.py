"""`vareid ablate`: which runs the rows need, that it goes on after anything, and what it makes of the runs."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.test_train import SMALL, interrupt_at
from vareid_ext.cli import ablate
from vareid_ext.data import READERS, synthetic_data
from vareid_ext.methods import METHODS
from vareid_ext.report import comparison_table
from vareid_ext.training import program
from vareid_ext.training.ablation import TABLE_2, Row, plan, results, rows_of_losses, rows_of_methods
from vareid_ext.training.command_line import parse
from vareid_ext.training.config import Config

RUNS = ["xent", "lsr", "adaptive", "adaptive-viewpoint", "adaptive-regularizer", "va-reid", "va-reid-local"]
SMALLER = [*(option for option in SMALL if "evaluation.every" not in option), "--batches-per-epoch=2"]


@pytest.fixture(scope="module", autouse=True)
def rendered_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "synthetic", functools.lru_cache(synthetic_data))
        yield


def start(output, *arguments):
    return ablate.main([*SMALLER, "--output", str(output), *arguments])


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows_in(output):
    return {row["title"]: row for row in json.loads((output / "ablation.json").read_text())}


def without_seconds(values):
    return {name: value for name, value in values.items() if name != "seconds"}


def test_the_rows_are_the_recipes_of_the_data_set():
    rows = {row.run: row for row in rows_of_losses(parse(["--recipe=market1501-va-reid", "--root=x"]).config)}
    assert list(rows) == RUNS
    for name, row in rows.items():
        assert row.config == parse([f"--recipe=market1501-{name}", "--root=x"]).config, name


def test_the_published_scores_are_those_of_the_method_too():
    published = METHODS["va-reid"].about.published
    for line in TABLE_2:
        for dataset in ("market1501", "dukemtmc"):
            recipe = f"{dataset}-{line.run}"
            if line.ranking == "trained" and recipe in published:
                assert published[recipe] == getattr(line, dataset)
    rows = rows_of_losses(parse(["--recipe=dukemtmc-va-reid", "--root=x"]).config)
    assert [row.published for row in rows] == [line.dukemtmc for line in TABLE_2]
    assert all(row.published is None for row in rows_of_losses(Config()))


def test_nine_rows_of_seven_runs(tmp_path, capsys):
    output = tmp_path / "ablation"
    assert start(output, "--seeds=1", "--epochs=1", "--json", "--quiet") == 0
    printed = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == sorted(f"{run}-0" for run in RUNS)
    rows = rows_in(output)
    assert list(rows.values()) == printed["rows"]
    assert [line.title for line in TABLE_2] == list(rows)
    for line in TABLE_2:
        folder = output / f"{line.run}-0"
        assert rows[line.title]["mean"] == pytest.approx(metrics_of(folder)[line.ranking])
        assert rows[line.title]["published"] is None
    losses = {run: json.loads((output / f"{run}-0" / "log.jsonl").read_text().splitlines()[0])["loss"] for run in RUNS}
    for run, loss in losses.items():
        assert ("viewpoint" in loss) == (run in ("adaptive-viewpoint", "va-reid", "va-reid-local"))
        assert ("regularizer" in loss) == (run in ("adaptive-regularizer", "va-reid", "va-reid-local"))
        assert ("triplet" in loss) == (run == "va-reid-local")
    assert losses["xent"]["identity"] != losses["lsr"]["identity"]
    with Image.open(output / "ablation.png") as image:
        assert image.width > 500


def test_methods_beside_each_other_by_the_recipes_of_the_data_set(tmp_path, capsys):
    output = tmp_path / "methods"
    assert start(output, "--methods=va-reid,two-branch", "--seeds=2", "--epochs=1") == 0
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == [
        "two-branch-0", "two-branch-1", "va-reid-0", "va-reid-1",
    ]  # fmt: skip
    assert (
        parse(["--resume", str(output / "two-branch-1")]).config.method
        == parse(["--recipe=synthetic-two-branch"]).config.method
    )
    first, second = (metrics_of(output / f"two-branch-{seed}")["trained"]["mAP"] for seed in (0, 1))
    row = rows_in(output)["two-branch"]
    assert row["mean"]["mAP"] == pytest.approx((first + second) / 2)
    assert row["std"]["mAP"] == pytest.approx(abs(first - second) / math.sqrt(2))
    text = capsys.readouterr().out
    assert f"{50 * (first + second):.2f} \u00b1 {100 * abs(first - second) / math.sqrt(2):.2f}" in text
    arguments = ["--recipe=market1501-va-reid", "--root=x"]
    (row,) = rows_of_methods(arguments, ["two-branch"])
    assert row.published == METHODS["two-branch"].about.published["market1501-two-branch"]
    assert row.config == parse(["--recipe=market1501-two-branch", "--root=x"]).config
    rows = rows_of_methods(["--config", str(own_configuration(tmp_path))], ["va-reid", "two-branch"])
    assert [type(row.config.method) for row in rows] == [METHODS[name].Config for name in ("va-reid", "two-branch")]
    assert {row.config.optimizer.epochs for row in rows} == {7}
    assert {row.published for row in rows} == {None}


def test_methods_see_the_images_of_the_recipe_that_is_named():
    rows = rows_of_methods(["--recipe=synthetic-sides", "--synthetic-seed=5"], ["va-reid", "pcb"])
    assert [(row.config.data.synthetic.outfits, row.config.data.synthetic.seed) for row in rows] == [(4, 5)] * 2
    assert [row.config.data.erasing for row in rows] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("kind", "recipe"), [("market1501", "market1501-srb"), ("dukemtmc-reid", "dukemtmc-srb"), ("msmt17", None)]
)
def test_the_data_set_chooses_the_recipes_of_methods(kind, recipe):
    arguments = [f"--data.kind={kind}", "--root=x"]
    (row,) = rows_of_methods(arguments, ["srb"])
    assert row.config == parse([*arguments, f"--recipe={recipe}" if recipe else "--method=srb"]).config
    assert row.published == METHODS["srb"].about.published.get(recipe)


def own_configuration(folder):
    """Of a data set that has no recipe of any method."""
    file = folder / "mine.yaml"
    file.write_text("base: own-images\ndata: {root: mine.csv}\noptimizer: {epochs: 7}\n")
    return file


def test_the_table_puts_the_published_scores_beside_ours(tmp_path):
    rows = [Row("A", "a", Config(), published=(50.0, 60.0)), Row("B", "b", Config(), "reranked")]
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        for run in "ab"[: 2 - seed]:
            (tmp_path / f"{run}-{seed}").mkdir()
            scores = {"mAP": value, "rank1": value + 0.1}
            content = {"trained": scores, "reranked": {name: v + 0.1 for name, v in scores.items()}}
            (tmp_path / f"{run}-{seed}" / "metrics.json").write_text(json.dumps(content))
    found = results([*rows, Row("C", "c", Config())], range(3), tmp_path)
    assert found[0]["runs"][1] == {"mAP": 0.6, "rank1": 0.7}
    assert found[0]["std"]["mAP"] == pytest.approx(math.sqrt(0.005))
    assert found[1]["std"] == {"mAP": None, "rank1": None}
    lines = comparison_table(found).splitlines()[2:]
    assert lines[0].split() == ["A", "2", "55.00", "\u00b1", "7.07", "65.00", "\u00b1", "7.07", "50.00", "60.00"]
    assert lines[1].split() == ["B", "1", "60.00", "70.00"]
    assert lines[2].split() == ["C", "0"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("ablation") / "whole"
    assert start(output, "--methods=va-reid,two-branch", "--seeds=1") == 0
    return output


def test_an_interrupted_one_goes_on_and_leaves_what_is_done(undisturbed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "parts"
    arguments = ["--methods=va-reid,two-branch", "--seeds=1"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, 15)  # in the second run, of four steps each
        assert start(output, *arguments) == 143
    assert f"{output / 'two-branch-0'}: interrupted; the same command goes on" in capsys.readouterr().err
    assert list(rows_in(output)["two-branch"]["runs"]) == []
    assert (output / "ablation.png").is_file()
    begun, run = [], program.run
    monkeypatch.setattr(program, "run", lambda request: begun.append(request) or run(request))
    assert start(output, *arguments) == 0
    assert [(request.output.name, request.resume) for request in begun] == [("two-branch-0", True)]
    assert start(output, *arguments) == 0
    assert len(begun) == 1
    for name in ("va-reid-0", "two-branch-0"):
        assert without_seconds(metrics_of(output / name)) == without_seconds(metrics_of(undisturbed / name))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(undisturbed, tmp_path):
    output = tmp_path / "parts"
    shutil.copytree(undisturbed, output)
    for name in ("last.pt", "best.pt", "metrics.json"):
        (output / "two-branch-0" / name).unlink()
    log = output / "two-branch-0" / "log.jsonl"
    log.write_text(log.read_text()[:20])
    shutil.copytree(output / "two-branch-0", output / "two-branch-0.abandoned")  # and once more, while it removed that
    assert start(output, "--methods=va-reid,two-branch", "--seeds=1") == 0
    assert not (output / "two-branch-0.abandoned").exists()
    found, expected = (metrics_of(place / "two-branch-0") for place in (output, undisturbed))
    assert without_seconds(found) == without_seconds(expected)


def test_a_killed_one_goes_on_from_its_last_checkpoint(tmp_path):
    arguments = ["--methods=two-branch", "--seeds=1", "--epochs=40", "--evaluation.every=0"]
    output, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "vareid_ext", "ablate", *SMALLER, *arguments, "--output", str(output), "--quiet"]
    checkpoint = output / "two-branch-0" / "last.pt"
    with subprocess.Popen(command) as process:
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (output / "two-branch-0" / "metrics.json").exists(), "it was too fast to be killed"
    for place in (output, whole):
        assert start(place, *arguments) == 0
    found, expected = (metrics_of(place / "two-branch-0") for place in (output, whole))
    assert without_seconds(found) == without_seconds(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds=0"], "--seeds: 0 was given; allowed are values from 1 on"),
        (["--seed=1"], "--seed: not taken here; the seeds are 0, 1 and so on"),
        (["--run.seed", "1"], "--run.seed: not taken here"),
        (["--resume=x"], "--resume: not taken here; the same command"),
        (["--method.local"], "--method.local: not taken here; the rows differ in it"),
        (["--use-viewpoint=false"], "--use-viewpoint: not taken here; the rows differ in it"),
        (["--method=two-branch"], "method.name: 'two-branch' was given; the losses of 'va-reid' are compared"),
        (["--methods=va-reid,two-brunch"], "--methods: 'two-brunch' was given; did you mean 'two-branch'?"),
        (["--methods=va-reid,va-reid"], "--methods: va-reid, va-reid was given; each may be given once"),
        (["--methods=srb,pcb", "--method=mgn"], "--method: not taken here; --methods has all of them"),
        (
            ["--methods=pcb,mgn", "--alpha=0.1"],
            "method.alpha: was given; none of pcb, mgn has such a setting",
        ),
        (["--methods=srb,zzqqxx"], "--methods: 'zzqqxx' was given; known are va-reid, two-branch, srb"),
        (["--epoch=3"], "--epoch: there is no such option; did you mean"),
        (["--methods=two-branch,pcb-rpp"], "optimizer.epochs: 2 was given; synthetic-pcb-rpp trains in stages, each"),
        (
            ["--methods=two-branch,mgn", "--lr-factors={nope: 1}"],
            "two-branch-0: optimizer.lr_factors: 'nope' was given",
        ),
        (["--methods=two-branch,mgn", "--seeds=2"], "mgn-0: data.height, data.width: 32, 16 were given; rows: "),
        (
            [
                "--methods=two-branch,pie",
                "--recipe=market1501-va-reid",
                "--root=x",
                "--stages=[]",
                "--backbone=resnet10t",
            ],
            "pie-0: data.extras.keypoints: nothing was given; the method needs --data.extras.keypoints",
        ),
    ],
)
def test_what_cannot_be_met_is_named_before_anything_runs(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(program, "load_run_data", lambda *a, **k: None)
    assert start(tmp_path / "none", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("root", ["nowhere", "empty"])
def test_a_data_set_that_is_not_there_is_said_before_anything_is_made(tmp_path, capsys, monkeypatch, root):
    monkeypatch.setattr(program, "check", lambda *a, **k: pytest.fail("work was done"))
    (tmp_path / "empty").mkdir()
    assert start(tmp_path / "none", "--recipe=market1501-va-reid", f"--root={tmp_path / root}") == 2
    assert root in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_setting_of_a_method_holds_for_those_that_have_it(tmp_path, monkeypatch, capsys):
    configs = {}
    monkeypatch.setattr(
        ablate, "finish_run", lambda config, folder, command: configs.update({folder.name: config.method})
    )
    methods = ["--methods=srb,two-branch,oscnn", "--seeds=1", "--viewpoint-aware", "--method.label-epochs", "3"]
    assert start(tmp_path, *methods) == 0
    assert configs["srb-0"].viewpoint_aware
    assert (configs["oscnn-0"].viewpoint_aware, configs["oscnn-0"].label_epochs) == (True, 3)
    assert configs["two-branch-0"] == METHODS["two-branch"].Config()
    lines = capsys.readouterr().out.splitlines()
    for note in (
        "method.viewpoint_aware: not a setting of two-branch",
        "method.label_epochs: not a setting of srb, two-branch",
    ):
        assert lines.count(note) == 2  # before the runs and below the table


def test_blanks_between_methods_do_not_count(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(ablate, "finish_run", lambda config, folder, command: folders.append(folder.name))
    assert start(tmp_path, "--methods=two-branch, va-reid", "--seeds=1") == 0
    assert folders == ["two-branch-0", "va-reid-0"]


def test_a_run_is_checked_once_for_all_seeds_and_not_when_it_is_finished(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(program, "check", lambda config, resume: checked.append((config.method.name, resume)))
    rows = rows_of_methods([], ["two-branch", "va-reid"])
    for name in ("two-branch-0", "two-branch-1", "two-branch-2", "va-reid-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").touch()
    (tmp_path / "va-reid-1").mkdir()
    (tmp_path / "va-reid-1" / "last.pt").touch()
    assert len(plan(rows, range(3), tmp_path)) == 6
    assert checked == [("va-reid", True)]


def test_runs_of_another_configuration_are_not_mixed_in(undisturbed, capsys):
    assert start(undisturbed, "--methods=va-reid", "--seeds=2", "--lr=0.5") == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.5 was given; " in error
    assert "va-reid-0 holds a run with 0.002: choose another --output" in error
    assert not (undisturbed / "va-reid-1").exists()
