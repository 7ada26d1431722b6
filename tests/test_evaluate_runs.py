"""vareid evaluate RUN: the run's own numbers again, those on another data set, and several runs side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest

from _vareid_cli import run
from vareid_ext import evaluate_features
from vareid_ext.data import DivisionSettings, load_data, write_manifest
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


def places_of(data):
    """The test images of a data set, each as its list and its place there."""
    return [(images, number) for images in (data.query, data.gallery) for number in range(len(images))]


def save_as(data, root, names):
    """The test images of a data set under other names."""
    for (images, number), name in zip(places_of(data), names, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images.load(number).save(root / name, format="PNG")


def test_a_drawn_gallery_of_a_run_is_a_loop_of_evaluations(trained_run, data, tmp_path, capsys):
    identity = [images.identity[number] for images, number in places_of(data)]
    (tmp_path / "train_test_split").mkdir()
    numbers = [(7 * place + 3) % 50 for place in range(50)]  # the list is in another order than the files
    save_as(data, tmp_path, [f"image/{number:07d}.jpg" for number in numbers])
    lines = "".join(f"{number:07d} {person}\n" for number, person in zip(numbers, identity, strict=True))
    (tmp_path / "image" / "0000050.jpg").write_bytes((tmp_path / "image" / "0000000.jpg").read_bytes())
    for name, text in (("train_list", "0000050 900\n"), ("test_list_800", lines)):
        (tmp_path / "train_test_split" / f"{name}.txt").write_text(text)
    options = ["--data", "vehicleid-800", "--root", tmp_path, "--protocol", "drawn-gallery", "--rerank"]
    found = evaluate(capsys, trained_run, *options, "--repeats", 3)
    model, runs = load_trained(trained_run, "cpu"), {"original": [], "reranked": []}
    for seed in range(3):
        drawn = load_data("vehicleid-800", tmp_path, division=DivisionSettings(seed=seed), progress=False)
        query, gallery = model.features(drawn.query), model.features(drawn.gallery)
        for name, rerank in (("original", False), ("reranked", True)):
            labels = query.identity, gallery.identity, query.camera, gallery.camera
            runs[name].append(evaluate_features(query.feature, gallery.feature, *labels, rerank=rerank))
    for name, of_draws in runs.items():
        assert found[name]["repeats"] == 3
        for metric in ("mAP", "mINP", "rank1", "rank5"):
            values = [run.as_dict()[metric] for run in of_draws]
            assert found[name][metric] == pytest.approx(np.mean(values), abs=1e-9)
            assert found[name]["std"][metric] == pytest.approx(np.std(values), abs=1e-9)
    # The same out of a file of features, whatever their order.
    images = np.random.default_rng(0).permutation(50)
    model.features(drawn.query).save(tmp_path / "query.npz")
    model.features(drawn.gallery).save(tmp_path / "gallery.npz")
    sides = [np.load(tmp_path / f"{side}.npz") for side in ("query", "gallery")]
    names = ("feature", "identity", "camera", "path")
    np.savez(tmp_path / "all.npz", **{name: np.concatenate([side[name] for side in sides])[images] for name in names})
    capsys.readouterr()
    arguments = ["--features", str(tmp_path / "all.npz"), "--protocol", "drawn-gallery", "--repeats", "3", "--json"]
    assert run(["evaluate", *arguments, "--quiet"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert from_file["original"]["mAP"] == pytest.approx(found["original"]["mAP"], abs=1e-9)


def test_one_run_under_all_protocols_of_a_data_set(trained_run, data, tmp_path, monkeypatch, capsys):
    labels = [
        (images.identity[i], images.camera[i]) for images in (data.query, data.gallery) for i in range(len(images))
    ]
    camera = {c: number for number, c in enumerate(sorted({c for _, c in labels}), start=4)}  # both platforms
    names = [
        f"{'query' if i < len(data.query) else 'gallery'}/Cam{camera[c]}/Cam{camera[c]}_day_{person}_{i}.jpg"
        for i, (person, c) in enumerate(labels)
    ]
    save_as(data, tmp_path, names)
    save_as(data, tmp_path, [f"train/Cam1/Cam1_day_{i % 2}_{i}.jpg" for i in range(len(labels))])
    kinds = ["cargo-a-a", "cargo", "cargo-g-g", "cargo-a-g"]
    alone = {kind: evaluate(capsys, trained_run, "--data", kind, "--root", tmp_path)["original"] for kind in kinds}
    made = []
    features = TrainedModel.features

    def counted(model, images, **options):
        made.extend(images.paths)
        return features(model, images, **options)

    monkeypatch.setattr(TrainedModel, "features", counted)
    found = evaluate(capsys, trained_run, "--data", ",".join(kinds), "--root", tmp_path)
    assert list(found) == [f"{kind} original" for kind in kinds]
    assert sorted(made) == sorted(str(tmp_path / name) for name in names)
    for kind in kinds:
        assert found[f"{kind} original"]["num_queries"] == alone[kind]["num_queries"]
        assert found[f"{kind} original"]["mAP"] == pytest.approx(alone[kind]["mAP"], abs=1e-6)
    assert len({round(result["mAP"], 6) for result in alone.values()}) == 4


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
        (["{run}", "--data", "cargo,cargo-b", "--root", "{tmp}"], "kind: 'cargo-b' was given; allowed are synthetic, "),
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


def test_images_to_measure_on_need_no_training_images(trained_run, data, metrics, tmp_path, capsys):
    manifest = write_manifest(data, tmp_path / "set")
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(line for line in lines if ",train" not in line))
    found = evaluate(capsys, trained_run, "--data", "manifest", "--root", manifest)
    assert found["original"]["mAP"] == pytest.approx(metrics["trained"]["mAP"], abs=1e-6)
