"""Rules of exclusion on command lines and in a run's configuration, against the functions with the same labels."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from _vareid_cli import run
from tests.test_feature_files import images
from tests.test_train import SMALL
from vareid_ext import evaluate_cross_viewpoint, evaluate_features, load
from vareid_ext._labels import Labels
from vareid_ext.data import SyntheticSettings, synthetic_data, write_manifest
from vareid_ext.files.features import Features
from vareid_ext.metrics import evaluate_by_group, verify_features

RULE = "identity&camera | identity&clothes"


@pytest.fixture
def sides(tmp_path):
    """Two .npz files and what is in them, with clothes."""
    found = []
    for side, seed, n in (("q", 0, 24), ("g", 1, 80)):
        arrays = images(seed, n)
        arrays["clothes"] = np.random.default_rng(seed + 5).integers(-1, 3, n)
        np.savez(tmp_path / f"{side}.npz", **arrays)
        found.append(arrays)
    return [str(tmp_path / "q.npz"), str(tmp_path / "g.npz")], *found


def call(capsys, command, *arguments, status=0):
    """What is written as JSON and as text, or the error."""
    capsys.readouterr()
    assert run([command, *map(str, arguments), "--json"]) == status, capsys.readouterr().err
    out, err = capsys.readouterr()
    return (json.loads(out), err) if status == 0 else err


def labels_of(query, gallery, *columns):
    pairs = {name: (query[name], gallery[name]) for name in columns}
    labels = (query["feature"], gallery["feature"], query["identity"], gallery["identity"], query["camera"])
    return (*labels, gallery["camera"]), pairs


def test_files_are_evaluated_under_the_rule_and_the_tables_say_so(sides, capsys):
    files, query, gallery = sides
    arrays, columns = labels_of(query, gallery, "clothes")
    rule = {"exclude": RULE, "columns": columns}
    found, text = call(
        capsys, "evaluate", "--features", *files, "--exclude", f" {RULE}", "--verification", "--by", "camera"
    )
    assert found["original"]["mAP"] == evaluate_features(*arrays, **rule).mAP
    assert found["original"]["mAP"] != evaluate_features(*arrays).mAP
    assert found["original"]["verification"]["eer"] == verify_features(*arrays, **rule).eer
    cells = evaluate_by_group(*arrays, **rule, query_group=query["camera"], gallery_group=gallery["camera"])
    assert found["original"]["by_camera"] == cells.as_dict()
    assert found["original"]["exclude"] == RULE
    assert f"images are left out by the rule {RULE}" in text
    for usual in ([], ["--exclude", "camera&identity"]):
        found, text = call(capsys, "evaluate", "--features", *files, *usual)
        assert found["original"]["mAP"] == evaluate_features(*arrays).mAP
        assert "exclude" not in found["original"]
        assert "rule" not in text
    found, text = call(capsys, "evaluate", "--features", *files, "--exclude", "none")
    assert found["original"]["mAP"] == evaluate_features(*arrays, exclude="none").mAP
    assert "images are left out by the rule none" in text
    found, _ = call(capsys, "evaluate", "--features", *files, "--exclude", "identity&viewpoint", "--rerank")
    arrays, columns = labels_of(query, gallery, "viewpoint")
    expected = evaluate_features(*arrays, exclude="identity&viewpoint", columns=columns, rerank=True)
    assert found["reranked"]["mAP"] == pytest.approx(expected.mAP, abs=1e-9)


def test_viewpoint_protocols_take_the_rule(sides, capsys):
    files, query, gallery = sides
    found, text = call(capsys, "evaluate", "--features", *files, "--protocol", "cross-viewpoint", "--exclude", RULE)
    both = {name: np.concatenate([query[name], gallery[name]]) for name in query}
    expected = evaluate_cross_viewpoint(
        both["feature"], both["identity"], both["viewpoint"], both["camera"], exclude=RULE,
        columns={"clothes": both["clothes"]},
    )  # fmt: skip
    assert [found[f"original {name}"]["mAP"] for name in ("front", "side", "back")] == [
        m.mAP for m in expected.values()
    ]
    assert f"the rule {RULE}" in text


def test_a_column_may_have_another_key_or_a_file_of_its_own(sides, tmp_path, capsys):
    files, query, gallery = sides
    np.savez(tmp_path / "q2.npz", **{"suit" if name == "clothes" else name: v for name, v in query.items()})
    np.savez(tmp_path / "g2.npz", **{name: v for name, v in gallery.items() if name != "clothes"})
    np.savetxt(tmp_path / "clothes.txt", gallery["clothes"], fmt="%d")
    arguments = ["--features", tmp_path / "q2.npz", tmp_path / "g2.npz", "--exclude", RULE]
    own = ["--query-column", "clothes=suit", "--gallery-column", f"clothes={tmp_path / 'clothes.txt'}"]
    found, text = call(capsys, "evaluate", *arguments, *own)
    assert found == call(capsys, "evaluate", "--features", *files, "--exclude", RULE)[0]
    assert "clothes: suit" in text
    error = call(capsys, "evaluate", *arguments, status=2)
    assert (
        f"--query-column: clothes=SOURCE is needed, as --exclude names it and {tmp_path / 'q2.npz'} holds none" in error
    )


def test_columns_of_two_files_are_compared_by_their_names(tmp_path, capsys):
    """The numbers are those of each file: red is 1 in the one and 2 in the other."""
    generator = np.random.default_rng(3)
    sides = []
    for name, colours, count in (("q", ("blue", "red"), 12), ("g", ("blue", "green", "red"), 40)):
        number, identity = generator.integers(0, len(colours), count), generator.integers(0, 3, count)
        feature = generator.standard_normal((count, 4)).astype(np.float32)
        texts = np.array(colours)[number]
        images = Labels(identity, [-1] * count, [-1] * count, columns={"clothes": number}, names={"clothes": colours})
        Features.of(torch.from_numpy(feature), images).save(tmp_path / f"{name}.npz")
        sides.append((feature, identity, texts))
    arguments = ["--features", tmp_path / "q.npz", tmp_path / "g.npz", "--exclude", "identity&clothes"]
    table = tmp_path / "queries.csv"
    call(capsys, "evaluate", *arguments, "--per-query", table)
    (_, who, worn), (_, identity, texts) = sides
    expected = [int(((identity == i) & (texts != t)).sum()) for i, t in zip(who, worn, strict=True)]
    with table.open(newline="") as file:
        assert [int(row["matches"]) for row in csv.DictReader(file)] == expected


def test_the_same_images_in_two_files_share_a_column_and_find_themselves_where_the_rule_lets_them(
    sides, tmp_path, capsys
):
    _, query, _ = sides
    np.savez(tmp_path / "a.npz", **query)
    np.savez(tmp_path / "b.npz", **{name: v for name, v in query.items() if name != "clothes"})
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    _, text = call(capsys, "evaluate", "--features", *files, "--exclude", "identity&clothes")
    assert f"{(query['clothes'] == -1).sum()} of 24 find themselves" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude", "identity camera"], "--exclude: 'identity camera' was given; allowed are 'none' and names"),
        (["--exclude", "identity&day"], "--query-column: day=SOURCE is needed, as --exclude names it"),
        (["--exclude", RULE, "--no-cameras"], "--exclude: identity&camera | identity&clothes names the camera, but"),
        (["--query-column", "clothes=x"], "--query-column: clothes was given; allowed are columns that --exclude"),
        (["--exclude", RULE, "--query-column", "clothes"], "'clothes' was given; NAME=SOURCE is needed"),
        (["--exclude", "blank"], "--exclude: 'blank' was given, but no query image has a known blank; allowed are "
         "'none' and terms of identity, camera"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["evaluate", "compare", "report"])
def test_a_rule_that_cannot_be_followed_is_named(sides, tmp_path, capsys, command, arguments, message):
    files, query, gallery = sides
    for file, arrays in zip(files, (query, gallery), strict=True):
        np.savez(file, **arrays, blank=np.full(len(arrays["identity"]), -1))
    inputs = ["--features", *files]
    if command == "compare":
        np.savez(tmp_path / "other.npz", **gallery, blank=np.full(80, -1))
        inputs += ["--features", files[0], tmp_path / "other.npz"]
    if command == "report":
        inputs += ["--output", tmp_path / "page.html"]
    assert message in call(capsys, command, *inputs, *arguments, status=2)
    assert not (tmp_path / "page.html").exists()


def test_compare_and_report_take_the_rule_and_say_it(sides, tmp_path, capsys):
    files, query, gallery = sides
    np.savez(tmp_path / "other.npz", **{**gallery, "feature": gallery["feature"] + 1})
    two = ["--features", *files, "--features", files[0], tmp_path / "other.npz", "--resamples", "20"]
    arrays, columns = labels_of(query, gallery, "clothes")
    expected = evaluate_features(*arrays, exclude=RULE, columns=columns).mAP
    found, text = call(capsys, "compare", *two, "--exclude", RULE)
    assert found["metrics"][" ".join(files)]["mAP"] == expected
    assert found["exclude"] == RULE
    assert f"images are left out by the rule {RULE}" in text
    assert "exclude" not in call(capsys, "compare", *two)[0]
    page = tmp_path / "page.html"
    found, _ = call(capsys, "report", *two, "--exclude", RULE, "--output", page, "--queries", 3)
    assert found["metrics"][" ".join(files)]["mAP"] == expected
    assert "the rule identity&amp;camera | identity&amp;clothes" in page.read_text()
    assert "left out: identity&amp;camera | identity&amp;clothes" in page.read_text()
    call(capsys, "report", *two, "--output", page, "--queries", 3, "--force")
    assert "identity&amp;" not in page.read_text()


@pytest.fixture(scope="module")
def dressed(tmp_path_factory):
    """A data set in which people change their clothes, and a run of no epochs on it under a rule."""
    folder = tmp_path_factory.mktemp("dressed")
    data = synthetic_data(SyntheticSettings(8, 4, 12, 2, height=32, width=16))
    rng = np.random.default_rng(0)
    clothed = {
        split: dataclasses.replace(found, columns={"clothes": rng.integers(0, 2, len(found))})
        for split, found in data.splits.items()
    }
    manifest = write_manifest(dataclasses.replace(data, **clothed), folder / "set")
    arguments = [*SMALL, "--data.kind=manifest", f"--root={manifest}", "--epochs=0", "--workers=0", "--quiet"]
    done = [*arguments, f"--evaluation.exclude={RULE}", "--save-features", "--output", str(folder / "run")]
    assert run(["train", *done]) == 0
    return folder, arguments


def test_a_run_is_measured_under_its_rule_and_so_is_what_is_made_of_it(dressed, tmp_path, capsys):
    folder, arguments = dressed
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    query, gallery = ({**np.load(folder / "run" / f"{side}.npz")} for side in ("query", "gallery"))
    for side in (query, gallery):
        side["clothes"] = side["column_clothes"]
    arrays, columns = labels_of(query, gallery, "clothes")
    expected = evaluate_features(*arrays, exclude=RULE, columns=columns).mAP
    assert metrics["trained"]["mAP"] == pytest.approx(expected, abs=1e-12)
    assert metrics["trained"]["mAP"] != evaluate_features(*arrays).mAP
    device = ["--device", "cpu", "--workers", "0", "--quiet"]
    found, _ = call(capsys, "evaluate", folder / "run", *device)
    assert found["original"]["mAP"] == pytest.approx(expected, abs=1e-6)
    assert found["original"]["exclude"] == RULE
    found, _ = call(capsys, "evaluate", folder / "run", "--exclude", "identity&camera", *device)
    assert found["original"]["mAP"] == pytest.approx(evaluate_features(*arrays).mAP, abs=1e-6)
    capsys.readouterr()
    assert run(["figures", str(folder / "run")]) == 0
    assert f"images are left out by the rule {RULE}" in capsys.readouterr().out
    load(folder / "run", "cpu").save_pretrained(tmp_path / "shared", license="mit")
    assert "by the rule identity&camera \\| identity&clothes |" in (tmp_path / "shared" / "README.md").read_text()
    assert run(["train", *arguments, "--output", str(tmp_path / "plain")]) == 0
    error = call(capsys, "compare", folder / "run", tmp_path / "plain", *device, status=2)
    assert (
        f"--exclude: {folder / 'run'} leaves out by {RULE}, {tmp_path / 'plain'} leaves out by identity&camera; "
        in error
    )
    call(capsys, "compare", folder / "run", tmp_path / "plain", "--exclude", "none", "--resamples", 10, *device)


def test_a_run_whose_data_lack_what_its_rule_names_does_not_begin(dressed, tmp_path, capsys):
    _, arguments = dressed
    for rule, message in (
        ("identity&day", "evaluation.exclude: 'identity&day' was given, but no query image has a known day; allowed "
         "are 'none' and terms of identity, camera, viewpoint, clothes"),
        ("identity+day", "evaluation.exclude: 'identity+day' was given; allowed are 'none' and names"),
    ):  # fmt: skip
        capsys.readouterr()
        assert run(["train", *arguments, f"--evaluation.exclude={rule}", "--output", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
