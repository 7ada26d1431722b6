"""vareid evaluate RUN: the run's own numbers again, those on another data set, and several runs side by side."""

from __future__ import annotations

import json

import pytest

from _vareid_cli import run
from vareid_ext import evaluate_features
from vareid_ext.data import write_manifest
from vareid_ext.files.checkpoint import load_checkpoint, save_checkpoint
from vareid_ext.trained import TrainedModel, load_trained
from vareid_ext.training.program import load_run_data


@pytest.fixture(scope="module")
def metrics(trained_run):
    return json.loads((trained_run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def data(trained_run):
    return load_run_data(load_trained(trained_run, "cpu").config)


def evaluate(capsys, *arguments):
    capsys.readouterr()
    options = ["--json", "--quiet", "--device", "cpu", "--workers", "0"]
    assert run(["evaluate", *map(str, arguments), *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_evaluated_as_at_its_end(trained_run, metrics, capsys):
    found = evaluate(capsys, trained_run, "--rerank")
    assert list(found) == ["original", "reranked"]
    for name, of_run in (("original", "trained"), ("reranked", "reranked")):
        assert {key: found[name][key] for key in metrics[of_run]} == metrics[of_run]


def test_re_ranking_is_the_runs_unless_another_is_asked_for(trained_run, tmp_path, capsys):
    state = load_checkpoint(trained_run / "last.pt")
    state["config"]["evaluation"].update(k1=3, k2=2, lambda_value=0.6)
    save_checkpoint(tmp_path / "other.pt", state)
    of_run = evaluate(capsys, tmp_path / "other.pt", "--rerank")
    given = ["--k1", "3", "--k2", "2", "--lambda-value", "0.6"]
    assert of_run == evaluate(capsys, trained_run, "--rerank", *given)
    assert of_run != evaluate(capsys, trained_run, "--rerank")
    assert evaluate(capsys, tmp_path / "other.pt", "--rerank", "--k1", "20", "--k2", "6", "--lambda-value", "0.3") == (
        evaluate(capsys, trained_run, "--rerank")
    )


def test_a_run_is_evaluated_on_another_data_set(trained_run, data, metrics, tmp_path, capsys):
    """The same images again, out of files."""
    manifest = write_manifest(data, tmp_path / "set")
    found = evaluate(capsys, trained_run, "--data", "manifest", "--root", manifest)
    assert found["original"]["mAP"] == pytest.approx(metrics["trained"]["mAP"], abs=1e-6)
    (next((tmp_path / "set").rglob("*.png"))).write_bytes(b"no image")
    arguments = ["evaluate", str(trained_run), "--data", "manifest", "--root", str(manifest), "--quiet"]
    assert run(arguments) == 2
    assert "unreadable" in capsys.readouterr().err
    assert run([*arguments, "--skip-bad-images"]) == 0


def test_runs_stand_side_by_side(trained_run, metrics, tmp_path, capsys):
    first, second = str(trained_run), str(trained_run / "best.pt")
    output = tmp_path / "metrics.json"
    found = evaluate(capsys, first, second, "--rerank", "--output", output)
    assert list(found) == [f"{name} {what}" for name in (first, second) for what in ("original", "reranked")]
    assert found == json.loads(output.read_text())
    assert found[f"{first} original"]["mAP"] == metrics["trained"]["mAP"]
    assert run(["evaluate", first, second, "--quiet", "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert text.index(f"{first} original") < text.index(f"{second} original")
    assert f"last.pt: step {load_trained(first, 'cpu').step}; 24 query and 26 gallery images of synthetic" in text


def test_viewpoint_protocols_hold_for_runs_too(trained_run, capsys):
    found = evaluate(capsys, trained_run, "--protocol", "cross-viewpoint", "--no-cameras")
    assert list(found) == ["original front", "original side", "original back"]
    assert sum(result["num_queries"] for result in found.values()) == 24 + 26


def test_cameras_can_be_left_out_of_account(trained_run, data, metrics, capsys):
    model = load_trained(trained_run, "cpu")
    query, gallery = model.features(data.query), model.features(data.gallery)
    expected = evaluate_features(query.feature, gallery.feature, query.identity, gallery.identity)
    assert evaluate(capsys, trained_run, "--no-cameras")["original"]["mAP"] == pytest.approx(expected.mAP, abs=1e-9)
    assert expected.mAP != metrics["trained"]["mAP"]


def test_mirrored_images_and_lower_precision_change_the_numbers_a_little(trained_run, metrics, capsys):
    for options in (["--flip"], ["--precision", "bf16"]):
        found = evaluate(capsys, trained_run, *options)["original"]["mAP"]
        assert found != metrics["trained"]["mAP"]
        assert found == pytest.approx(metrics["trained"]["mAP"], abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN, --features: none was given; one of the two is needed"),
        (["{run}", "--features", "q.npz"], "RUN, --features: both were given"),
        (["{run}", "{run}"], "small was given twice"),
        (["q.npz", "g.npz"], "q.npz was given; files of features go behind --features"),
        (["{run}", "--query-key", "x"], "--query-key: is for feature files, but runs were given"),
        (["--features", "q.npz", "--data", "market1501"], "--data: is for runs, but feature files were given"),
        (["--features", "q.npz", "--precision", "bf16"], "--precision: is for runs"),
        (["{run}", "--data", "marked1501"], "marked1501"),
        (["{run}", "--data", "market1501"], "root: nothing was given"),
        (["{run}", "--data", "market1501", "--root", "{tmp}"], "{tmp}"),
        (["{tmp}"], "holds no checkpoint"),
        (["{run}", "--rerank", "--k1", "0"], "k1: 0 was given"),
        (["{run}", "--output", "x.txt"], "suffix '.txt'"),
        (["{run}", "--workers", "-1"], "--workers: -1 was given"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(trained_run, tmp_path, capsys, arguments, message):
    places = {"run": trained_run, "tmp": tmp_path}
    assert run(["evaluate", *(argument.format(**places) for argument in arguments), "--quiet"]) == 2
    assert message.format(**places) in capsys.readouterr().err


def test_a_missing_run_stops_all_before_any_is_measured(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainedModel, "features", lambda *arguments, **options: pytest.fail("it was measured"))
    assert run(["evaluate", str(trained_run), str(tmp_path / "none"), "--quiet"]) == 2
    assert "none" in capsys.readouterr().err
