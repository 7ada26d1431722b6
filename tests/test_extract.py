"""vareid extract: features of images in files, and commands that go on where they were stopped."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import vareid_ext
from _vareid_cli import run
from tests.test_train import SMALL
from vareid_ext.cli import extract
from vareid_ext.data import ViewpointClasses, write_manifest
from vareid_ext.data.body_maps import group_classes
from vareid_ext.trained import TrainedModel
from vareid_ext.training.program import load_run_data


@pytest.fixture(scope="module")
def model(trained_run):
    return vareid_ext.load(trained_run, "cpu")


@pytest.fixture(scope="module")
def data(model):
    return load_run_data(model.config)


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory):
    """A folder of 20 images, some of them deeper, and files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more" / "deep").mkdir(parents=True)
    for i in range(20):
        data.query.load(i).save(folder / ("more/deep" if i % 3 == 0 else "") / f"{i:02}.png")
    (folder / "notes.md").write_text("no image")
    (folder / "._00.png").write_bytes(b"an operating system's")
    return folder


@pytest.fixture(scope="module")
def paths(photos):
    return sorted(str(path) for path in photos.rglob("[!.]*.png"))


def call(*arguments):
    how = [] if "--merge" in arguments else ["--workers", "0", "--device", "cpu"]
    return run(["extract", *map(str, arguments), "--quiet", *how])


def content(path):
    with np.load(path) as file:
        return dict(file)


def test_a_folder_is_searched_to_its_depth(trained_run, model, photos, paths, tmp_path, capsys):
    assert call(trained_run, photos, "--output", tmp_path / "f.npz") == 0
    found = content(tmp_path / "f.npz")
    assert list(found) == ["feature", "path"]  # nothing is known of the images
    assert found["path"].tolist() == paths
    np.testing.assert_allclose(found["feature"], model.embed(paths), atol=1e-6)
    assert f"features [20, {model.feature_dim}]" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_inputs_beside_the_images_lie_as_the_images_do(photos, paths, tmp_path, capsys):
    arguments = ["--method=spreid", "--epochs=0", "--baselines=false", "--workers=0", "--quiet"]
    assert run(["train", *SMALL, *arguments, "--output", str(tmp_path / "run")]) == 0
    masks, rng = {}, np.random.default_rng(0)
    for path in paths:
        masks[path] = rng.integers(0, 20, (9, 5))
        file = tmp_path / "masks" / Path(path).relative_to(photos).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, masks[path])
    output = ["--output", tmp_path / "f.npz"]
    assert call(tmp_path / "run", photos, "--parsing", tmp_path / "masks", *output) == 0
    model = vareid_ext.load(tmp_path / "run", "cpu")
    expected = model.embed(paths, extras={"parsing": [group_classes(masks[path]) for path in paths]})
    np.testing.assert_allclose(content(tmp_path / "f.npz")["feature"], expected, atol=1e-6)
    file.unlink()
    capsys.readouterr()
    assert call(tmp_path / "run", photos, "--parsing", tmp_path / "masks", *output) == 2
    assert f"parsing: 1 of 20 images have none in {tmp_path / 'masks'}, such as {paths[-1]}" in capsys.readouterr().err
    assert call(tmp_path / "run", photos, "--parsing", tmp_path / "masks", "--missing=neutral", *output) == 0
    assert "1 of 20 images have no parsing" in capsys.readouterr().out
    assert call(tmp_path / "run", photos, *output) == 2
    assert "parsing: nothing was given; method 'spreid' needs --parsing, which is a folder" in capsys.readouterr().err


def test_features_can_be_a_plain_array_with_the_rest_beside_it(trained_run, photos, paths, tmp_path):
    assert call(trained_run, photos, "--output", tmp_path / "f.npz") == 0
    assert call(trained_run, photos, "--output", tmp_path / "g.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "g.npy"), content(tmp_path / "f.npz")["feature"])
    assert np.load(tmp_path / "g.path.npy").tolist() == paths


def test_an_image_and_a_list_of_them_will_do(trained_run, paths, tmp_path):
    assert call(trained_run, paths[3], "--output", tmp_path / "f.npz") == 0
    assert content(tmp_path / "f.npz")["path"].tolist() == [paths[3]]
    for i in range(2):
        shutil.copy(paths[i], tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text(f"1.png\n\n0.png\n{paths[5]}\n")
    assert call(trained_run, tmp_path / "list.txt", "--output", tmp_path / "f.npz") == 0
    assert content(tmp_path / "f.npz")["path"].tolist() == [str(tmp_path / "1.png"), str(tmp_path / "0.png"), paths[5]]


def test_features_of_a_manifest_evaluate_as_the_run_itself(trained_run, data, tmp_path, capsys):
    manifest = write_manifest(data, tmp_path / "set")
    for split in ("query", "gallery"):
        assert call(trained_run, manifest, "--split", split, "--output", tmp_path / f"{split}.npz") == 0
        images = getattr(data, split)
        found = content(tmp_path / f"{split}.npz")
        for label in ("camera", "viewpoint"):
            np.testing.assert_array_equal(found[label], getattr(images, label))
    capsys.readouterr()
    files = [str(tmp_path / f"{split}.npz") for split in ("query", "gallery")]
    assert run(["evaluate", "--features", *files, "--rerank", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((trained_run / "metrics.json").read_text())
    for name, of_run in (("original", "trained"), ("reranked", "reranked")):
        assert found[name]["mAP"] == pytest.approx(expected[of_run]["mAP"], abs=1e-6)


def test_all_of_a_manifest_comes_with_its_people(trained_run, data, tmp_path):
    manifest = write_manifest(data, tmp_path / "set")
    assert call(trained_run, manifest, "--output", tmp_path / "all.npz") == 0
    found = content(tmp_path / "all.npz")
    labels = ["camera", "feature", "identity", "identity_name", "path", "viewpoint", "viewpoint_class"]
    assert sorted(found) == labels
    with manifest.open(newline="") as file:
        assert found["identity_name"].tolist() == [row["identity"] for row in csv.DictReader(file)]
    assert call(trained_run, manifest, "--split=train", "--output", tmp_path / "train.npz") == 0
    train = content(tmp_path / "train.npz")
    assert train["identity"].tolist() == found["identity"][: len(data.train)].tolist()
    assert train["identity_name"].tolist() == found["identity_name"][: len(data.train)].tolist()
    expected = np.concatenate([images.viewpoint for images in (data.train, data.query, data.gallery)])
    np.testing.assert_array_equal(found["viewpoint"], expected)
    assert len(set(found["path"].tolist())) == len(expected)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_further_columns_of_a_manifest_come_along(trained_run, data, tmp_path, suffix):
    """Also where a shard knows none of them; and those of an earlier output go."""
    count = len(data.query)
    clothes = np.where(np.arange(count) < count // 2, -1, np.arange(count) % 3)
    query = dataclasses.replace(data.query, columns={"clothes": clothes})
    manifest = write_manifest(dataclasses.replace(data, query=query), tmp_path / "set")
    shards = [tmp_path / f"{i}{suffix}" for i in (1, 2)]
    for i, shard in enumerate(shards, start=1):
        assert call(trained_run, manifest, "--split", "query", "--output", shard, "--shard", f"{i}/2") == 0
    merged = tmp_path / f"merged{suffix}"
    assert call("--merge", *shards, "--output", merged) == 0
    found = content(merged)["column_clothes"] if suffix == ".npz" else np.load(tmp_path / "merged.column_clothes.npy")
    np.testing.assert_array_equal(found, clothes)
    assert call(trained_run, manifest, "--output", merged) == 0
    every = content(merged)["column_clothes"] if suffix == ".npz" else np.load(tmp_path / "merged.column_clothes.npy")
    first = len(data.train)
    np.testing.assert_array_equal(every[first : first + count], clothes)
    assert (np.delete(every, np.arange(first, first + count)) == -1).all()
    assert call(trained_run, tmp_path / "set" / "query" / "000000.png", "--output", merged) == 0
    assert not list(tmp_path.glob("merged.column_*"))


class Stopped:
    """Batches that end with an exception after some of them."""

    def __init__(self, monkeypatch):
        self.images, self.after, self.error = 0, None, None
        batches = TrainedModel.batches

        def some(model, images, **options):
            for number, feature in enumerate(batches(model, images, **options)):
                if number == self.after:
                    raise self.error
                self.images += len(feature)
                yield feature

        monkeypatch.setattr(TrainedModel, "batches", some)


@pytest.mark.parametrize("setting", [("_PART", 3), ("_SECONDS", 0.0)])
def test_a_command_that_was_killed_has_written_what_it_had(trained_run, photos, tmp_path, monkeypatch, setting):
    monkeypatch.setattr(extract, *setting)
    add, sizes = extract.Parts.add, []

    def killed(parts, feature):
        if parts.done == 9:
            raise SystemExit  # without a chance to write more
        sizes.append(len(feature))
        add(parts, feature)

    monkeypatch.setattr(extract.Parts, "add", killed)
    with pytest.raises(SystemExit):
        call(trained_run, photos, "--batch-size", 3, "--output", tmp_path / "f.npz")
    assert sizes == [3, 3, 3]
    monkeypatch.setattr(extract.Parts, "add", add)
    assert call(trained_run, photos, "--batch-size", 3, "--output", tmp_path / "f.npz") == 0
    assert len(content(tmp_path / "f.npz")["feature"]) == 20


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("the disk is gone"), 2)])
def test_a_command_that_was_stopped_goes_on_where_it_was(
    trained_run, photos, tmp_path, monkeypatch, capsys, suffix, error, status
):
    output = tmp_path / f"f{suffix}"
    output.write_bytes(b"an older result")
    whole = tmp_path / f"whole{suffix}"
    arguments = (trained_run, photos, "--batch-size", 3)
    assert call(*arguments, "--output", whole) == 0
    monkeypatch.setattr(extract, "_PART", 6)
    stopped = Stopped(monkeypatch)
    for stopped.after, stopped.error, done in ((3, error, 9), (1, error, 12)):
        assert call(*arguments, "--output", output) == status
        assert output.read_bytes() == b"an older result"
        if status == 130:
            assert f"{done} of 20 images are done; the same command goes on there" in capsys.readouterr().err
    assert stopped.images == 12
    stopped.after = None
    capsys.readouterr()
    assert call(*arguments, "--output", output) == 0
    assert stopped.images == 20
    assert "12 of them by an earlier start" in capsys.readouterr().out
    assert not (tmp_path / f"f{suffix}.parts").exists()
    if suffix == ".npz":
        output, whole = content(output)["feature"], content(whole)["feature"]
    else:
        output, whole = np.load(output), np.load(whole)
    np.testing.assert_array_equal(output, whole)


def test_what_another_command_has_begun_is_not_gone_on_with(trained_run, photos, tmp_path, monkeypatch, capsys):
    stopped = Stopped(monkeypatch)
    stopped.after, stopped.error = 1, KeyboardInterrupt()
    arguments = (trained_run, photos, "--batch-size", 3, "--output", tmp_path / "f.npz")
    assert call(*arguments) == 130
    for other in (["--flip"], ["--precision", "bf16"], ["--shard", "1/2"]):
        assert call(*arguments, *other) == 2
        assert "f.npz.parts: holds what another command has begun" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_shards_together_are_the_whole(trained_run, photos, tmp_path, suffix):
    def features(path):
        return np.load(path) if suffix == ".npy" else content(path)["feature"]

    assert call(trained_run, photos, "--output", tmp_path / f"whole{suffix}") == 0
    shards = [tmp_path / f"s{i}{suffix}" for i in (1, 2, 3)]
    for i, shard in enumerate(shards, start=1):
        assert call(trained_run, photos, "--output", shard, "--shard", f"{i}/3") == 0
    assert sorted(len(features(shard)) for shard in shards) == [6, 7, 7]
    merged = tmp_path / f"merged{suffix}"
    assert call("--merge", shards[2], shards[0], shards[1], "--output", merged) == 0
    np.testing.assert_allclose(features(merged), features(tmp_path / f"whole{suffix}"), atol=1e-6)
    if suffix == ".npz":
        assert content(merged)["path"].tolist() == content(tmp_path / "whole.npz")["path"].tolist()
        assert list(content(merged)) == ["feature", "path"]


def test_more_shards_than_images_leave_some_empty(trained_run, paths, tmp_path):
    shards = [tmp_path / f"{i}.npz" for i in (1, 2, 3)]
    for i, shard in enumerate(shards, start=1):
        assert call(trained_run, paths[0], "--output", shard, "--shard", f"{i}/3") == 0
    assert call("--merge", *shards, "--output", tmp_path / "all.npz") == 0
    assert content(tmp_path / "all.npz")["path"].tolist() == [paths[0]]


def test_shards_that_do_not_fit_are_refused(trained_run, photos, tmp_path, capsys):
    made = {}
    for name, arguments in {
        "a": ["--shard", "1/2"], "b": ["--shard", "2/2"], "other": ["--shard", "2/2", "--flip"], "whole": [],
        "third": ["--shard", "2/3"],
    }.items():  # fmt: skip
        made[name] = tmp_path / f"{name}.npz"
        assert call(trained_run, photos, "--output", made[name], *arguments) == 0
    for names, message in (
        (["a"], "--merge: shards 2/2 are missing"),
        (["a", "a"], "a.npz: shard 1/2 was given twice"),
        (["a", "other"], "other.npz: is of other images, another model or other options than"),
        (["a", "third"], "third.npz: is of other images"),
        (["a", "whole"], "whole.npz: is no shard"),
        (["a", "nothing"], "nothing.npz: does not exist"),
    ):
        capsys.readouterr()
        assert call("--merge", *[tmp_path / f"{name}.npz" for name in names], "--output", tmp_path / "m.npz") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "m.npz").exists()
    assert call("--merge", made["a"], made["b"], "--output", made["a"]) == 2
    assert "is one of the input files" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_named_and_can_be_left_out(trained_run, photos, tmp_path, capsys):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "01.png").write_bytes(b"no image")
    (folder / "more" / "cut.jpg").write_bytes((folder / "02.png").read_bytes()[:50])
    assert call(trained_run, folder, "--output", tmp_path / "f.npz") == 2
    message = capsys.readouterr().err
    assert "2 unreadable images (--skip-bad-images" in message
    assert str(folder / "01.png") in message
    assert str(folder / "more" / "cut.jpg") in message
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert call(trained_run, folder, "--output", tmp_path / "f.npz", "--skip-bad-images", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 19
    assert found["skipped"] == [str(folder / "01.png"), str(folder / "more" / "cut.jpg")]
    assert len(content(tmp_path / "f.npz")["path"]) == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN, IMAGES: both are needed"),
        (["{run}"], "IMAGES: nothing was given; a folder, an image, a list"),
        (["{run}", "{tmp}/bad", "--data", "synthetic"], "bad was given, but --data synthetic draws its images"),
        (["{run}", "{tmp}/empty"], "empty holds no images"),
        (["{run}", "{tmp}/nowhere"], "nowhere does not exist"),
        (["{run}", "{tmp}/strange.zip"], "strange.zip was given; allowed are"),
        (["{run}", "{tmp}/bad"], "1 unreadable images (--skip-bad-images goes on without the images)"),
        (["{run}", "{tmp}/bad", "--skip-bad-images"], "none of the 1 images can be read"),
        (["{run}", "{tmp}/empty.txt"], "empty.txt holds no images"),
        (["{run}", "{tmp}/bad", "--split", "query"], "--split: 'query' was given, but"),
        (["{run}", "{tmp}/x.csv"], "x.csv"),
        (["{run}", "{tmp}/empty", "--data", "market1501", "--split", "query"], "empty"),
        (["{run}", "{tmp}/bad", "--shard", "3/2"], "--shard: '3/2' was given"),
        (["{run}", "{tmp}/bad", "--precision", "int8"], "--precision"),
        (["{run}", "{tmp}/bad", "--device", "cuda:77"], "device: 'cuda:77' was given"),
        (["{tmp}", "{tmp}/bad"], "holds no checkpoint"),
        (["{run}", "{tmp}/bad", "--merge", "x.npz"], "--merge: takes shards alone, but RUN was given too"),
        (["--flip", "--merge", "x.npz"], "--merge: takes shards alone, but --flip was given too"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(trained_run, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    (tmp_path / "strange.zip").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("\n")
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(run=trained_run, tmp=tmp_path) for argument in arguments]
    assert run(["extract", *arguments, "--output", str(tmp_path / "f.npz"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_network_is_run_as_asked(trained_run, model, paths, tmp_path):
    for arguments, options in (
        ([], {}),
        (["--flip"], {"flip": True}),
        (["--precision", "bf16"], {"precision": "bf16"}),
    ):
        assert call(trained_run, paths[0], "--output", tmp_path / "f.npz", *arguments) == 0
        expected = model.embed(paths[0], **options)
        found = torch.from_numpy(content(tmp_path / "f.npz")["feature"])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_manifest_without_training_images_will_do(trained_run, photos, tmp_path, capsys):
    """Also without splits, and what is left out is said."""
    rows = [f"{photos}/{i:02}.png,{who}" for i, who in ((1, "anna"), (2, "bert"), (4, "anna"), (5, "-1"))]
    (tmp_path / "people.csv").write_text("\n".join(["path,identity", *rows]))
    assert call(trained_run, tmp_path / "people.csv", "--output", tmp_path / "f.npz") == 0
    assert "1 junk images (identity -1) left out" in capsys.readouterr().out
    assert content(tmp_path / "f.npz")["identity_name"].tolist() == ["anna", "bert", "anna"]
    (tmp_path / "test.csv").write_text("\n".join(["path,identity,split", *(f"{row},gallery" for row in rows[:3])]))
    assert call(trained_run, tmp_path / "test.csv", "--split=gallery", "--output", tmp_path / "g.npz") == 0
    assert content(tmp_path / "g.npz")["identity_name"].tolist() == ["anna", "bert", "anna"]
    assert call(trained_run, tmp_path / "test.csv", "--split=query", "--output", tmp_path / "g.npz") == 2
    assert "the query split has no images" in capsys.readouterr().err


def test_a_manifests_viewpoints_are_those_the_run_was_trained_with(photos, tmp_path, capsys):
    angles = (80, 271.5, "", 359, 180, 0)
    rows = [f"{photos}/{i:02}.png,p{i % 3},{angle}" for i, angle in zip((1, 2, 3, 4, 5, 6), angles, strict=True)]
    (tmp_path / "angles.csv").write_text("\n".join(["path,identity,viewpoint", *rows]))
    bins = ViewpointClasses.of_angles(4)
    images, _ = extract.read_images(str(tmp_path / "angles.csv"), None, None, progress=False, viewpoints=bins)
    assert images.viewpoints == bins.names
    assert images.viewpoint.tolist() == [1, 3, -1, 0, 2, 0]
    arguments = ["doctor", str(tmp_path / "angles.csv"), "--quiet", "--json"]
    run([*arguments, "--viewpoint-bins", "4"])
    assert json.loads(capsys.readouterr().out)["viewpoints"] == list(bins.names)
    assert run([*arguments, "--viewpoints", "front,rear"]) == 2
    assert "was given; allowed are front, rear" in capsys.readouterr().err


def test_people_of_numbers_are_kept_where_they_are_the_same_in_all_splits(photos, tmp_path):
    """A manifest is one however it is named; elsewhere it is said that they are left out."""
    shown = ((1, 7, "query"), (2, 8, "gallery"), (4, 7, "gallery"))
    rows = [f"{photos}/{i:02}.png,{who},{split}" for i, who, split in shown]
    (tmp_path / "people.csv").write_text("\n".join(["path,identity,split", *rows]))
    for kind in (None, "manifest", "auto"):
        images, _ = extract.read_images(str(tmp_path / "people.csv"), kind, None, progress=False)
        assert images.identity.tolist() == [7, 8, 7]
    for split, identity in (("train", 3), ("query", 7), ("gallery", 7)):
        (tmp_path / "set" / split / str(identity)).mkdir(parents=True)
        shutil.copy(photos / "01.png", tmp_path / "set" / split / str(identity) / f"{split}.png")
    images, said = extract.read_images(str(tmp_path / "set"), "auto", None, progress=False)
    assert set(images.identity.tolist()) == {-1}
    assert any("identities: left out" in note for note in said)


def test_features_of_two_manifests_are_of_the_same_people_by_name(trained_run, photos, tmp_path, capsys):
    """Their numbers are not: bert is 2 in the one and 1 in the other."""
    for name, rows in (("query", ((1, "anna"), (2, "bert"))), ("gallery", ((4, "bert"), (5, "cleo")))):
        lines = [f"{photos}/{i:02}.png,{who}" for i, who in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,identity", *lines]))
        assert call(trained_run, tmp_path / f"{name}.csv", "--output", tmp_path / f"{name}.npz") == 0
    files = [str(tmp_path / f"{name}.npz") for name in ("query", "gallery")]
    table = tmp_path / "queries.csv"
    assert run(["evaluate", "--features", *files, "--per-query", str(table), "--quiet"]) == 0
    with table.open(newline="") as file:
        assert [int(row["matches"]) for row in csv.DictReader(file)] == [0, 1]
    # Numbers are names as they are written, which is said.
    np.savez(tmp_path / "q.npz", feature=np.eye(2), identity=[1, 2], identity_name=["7", "anna"])
    np.savez(tmp_path / "g.npz", feature=np.eye(2), identity=[2, 7])
    files = [str(tmp_path / f"{name}.npz") for name in "qg"]
    capsys.readouterr()
    assert run(["evaluate", "--features", *files, "--per-query", str(table)]) == 0
    assert "identity: one side has names, the other numbers; a number is the name" in capsys.readouterr().out
    with table.open(newline="") as file:
        assert [int(row["matches"]) for row in csv.DictReader(file)] == [1, 0]
    np.savez(tmp_path / "g.npz", feature=np.eye(2), identity=[2, 8])
    assert run(["evaluate", "--features", *files]) == 2
    said = capsys.readouterr().err
    assert all(file in said for file in files)
    assert "none of the 2 queries has a match" in said
    assert "identity: one side has names" in said
