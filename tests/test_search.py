"""vareid index and vareid search: galleries of images and of features, that grow and are searched."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import vareid_ext
from _vareid_cli import run
from tests.factories import people
from vareid_ext import GalleryIndex, k_reciprocal_rerank
from vareid_ext.cli import extract, search
from vareid_ext.data import SyntheticSettings, load_data, write_manifest
from vareid_ext.data.readers import synthetic
from vareid_ext.training.program import load_run_data

SIZE = {"identities_train": 2, "identities_test": 2, "images_per_identity": 4, "distractors": 1}
QUIET = ("--quiet", "--workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def data(trained_run):
    return load_run_data(vareid_ext.load(trained_run, "cpu").config)


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        data.gallery.load(i).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def built(trained_run, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "gallery.index"
    assert run(["index", str(trained_run), str(photos), "--output", str(folder), *QUIET]) == 0
    return folder


@pytest.fixture
def feature_files(tmp_path):
    """Query and gallery in files, with cameras, and as arrays."""
    query, gallery, query_identity, gallery_identity, query_camera, gallery_camera = people(0, 5, 60)
    np.savez(tmp_path / "query.npz", feature=query, identity=query_identity, camera=query_camera)
    np.savez(tmp_path / "gallery.npz", feature=gallery, identity=gallery_identity, camera=gallery_camera)
    return query, gallery, query_camera, gallery_camera


def call(*arguments):
    return run([*map(str, arguments), *QUIET])


def answer(capsys, *arguments):
    """What a command prints as JSON."""
    capsys.readouterr()
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert call(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("rerank", [False, True])
def test_an_image_finds_what_its_feature_finds(built, trained_run, photos, capsys, rerank):
    paths = [str(photos / "03.png"), str(photos / "11.png")]
    found = answer(capsys, "search", built, *paths, "--topk=7", *(["--rerank"] if rerank else []))
    index, feature = GalleryIndex(built), vareid_ext.load(trained_run, "cpu").embed(paths)
    assert found["images"] == len(index) == 24
    distance, row = index.search(feature, topk=7, rerank=rerank)
    for i, query in enumerate(found["queries"]):
        assert query["query"] == paths[i]
        assert [f["row"] for f in query["results"]] == row[i].tolist()
        np.testing.assert_allclose([f["distance"] for f in query["results"]], distance[i], atol=1e-5)
        assert [f["path"] for f in query["results"]] == [str(photos / f"{r:02}.png") for r in row[i].tolist()]
        if not rerank:
            assert query["results"][0]["path"] == paths[i]  # itself


def test_what_is_printed(built, photos, capsys):
    assert call("search", built, photos / "03.png", "--topk=3", "--threshold=0.5") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == str(photos / "03.png")
    assert lines[1].split() == ["rank", "distance", "same", "row", "path"]
    assert lines[3].split()[0] == "1"
    assert lines[3].split()[2:] == ["yes", "3", str(photos / "03.png")]


def test_features_are_searched_as_reranking_ranks_them(feature_files, tmp_path, capsys):
    query, gallery, *_ = feature_files
    made = answer(
        capsys, "index", "--features", tmp_path / "gallery.npz", "--output", tmp_path / "g", "--k1=9", "--k2=3"
    )
    assert made["images"] == made["added"] == 60
    found = answer(capsys, "search", tmp_path / "g", "--features", tmp_path / "query.npz", "--rerank", "--topk=100")
    for i, one in enumerate(found["queries"]):
        expected = k_reciprocal_rerank(query[i : i + 1], gallery, k1=9, k2=3, topk=60)
        assert [f["row"] for f in one["results"]] == expected[1][0].tolist()
        np.testing.assert_allclose([f["distance"] for f in one["results"]], expected[0][0], atol=1e-6)
    assert found["distance"] == "k-reciprocal"
    assert found["queries"][0]["query"].endswith("query.npz[0]")


def test_cameras_are_left_out(feature_files, tmp_path, capsys):
    *_, query_camera, gallery_camera = feature_files
    assert call("index", "--features", tmp_path / "gallery.npz", "--output", tmp_path / "g") == 0
    asked = ("search", tmp_path / "g", "--features", tmp_path / "query.npz", "--topk=60", "--rerank")
    whole = answer(capsys, *asked)["queries"]
    own = answer(capsys, *asked, "--exclude-own-camera")["queries"]
    two = answer(capsys, *asked, "--exclude-camera", 0, 2)["queries"]
    for i in range(5):
        kept = [f for f in whole[i]["results"] if f["camera"] != query_camera[i]]
        assert own[i]["results"] == kept
        assert two[i]["results"] == [f for f in whole[i]["results"] if f["camera"] == 1]
    capsys.readouterr()
    assert call(*asked, "--exclude-camera", 0, 2) == 0
    assert f"of the excluded cameras: {(gallery_camera != 1).sum()} of 60 images" in capsys.readouterr().out
    assert call(*asked, "--exclude-camera", 0, 1, 2) == 0
    assert "query.npz[0]: every image is excluded" in capsys.readouterr().out


def test_cameras_that_are_not_known(feature_files, tmp_path, capsys):
    query, gallery, _, camera = feature_files
    np.savez(tmp_path / "none.npz", feature=gallery)
    np.savez(tmp_path / "some.npz", feature=gallery, camera=np.where(np.arange(60) < 7, -1, camera))
    np.savez(tmp_path / "asked.npz", feature=query, camera=[0, -1, -1, 0, 1])
    np.savez(tmp_path / "nobody.npz", feature=query)
    for name in ("none", "some"):
        assert call("index", "--features", tmp_path / f"{name}.npz", "--output", tmp_path / name) == 0
    none, some = (("search", tmp_path / name, "--features") for name in ("none", "some"))
    for option in (["--exclude-camera", 1], ["--exclude-own-camera"]):
        error = error_of(capsys, *none, tmp_path / "asked.npz", *option)
        assert f"{option[0]}: the index knows the camera of none of its images" in error
    assert "the camera of none of the queries" in error_of(
        capsys, *some, tmp_path / "nobody.npz", "--exclude-own-camera"
    )
    assert call(*some, tmp_path / "asked.npz", "--exclude-own-camera") == 0
    out = capsys.readouterr().out
    assert "queries of unknown camera, for which no camera is excluded: 2 of 5" in out
    assert "images of unknown camera, which stay in: 7 of 60" in out


def test_thresholds_say_yes_no_and_unsure(feature_files, tmp_path, capsys):
    assert call("index", "--features", tmp_path / "gallery.npz", "--output", tmp_path / "g") == 0
    asked = ("search", tmp_path / "g", "--features", tmp_path / "query.npz", "--topk=60")
    distances = [f["distance"] for f in answer(capsys, *asked)["queries"][0]["results"]]
    assert "same" not in answer(capsys, *asked)["queries"][0]["results"][0]
    low, high = distances[10], distances[30]  # the bounds themselves are within
    same = [f["same"] for f in answer(capsys, *asked, "--threshold", low, high)["queries"][0]["results"]]
    assert same == ["yes"] * 11 + ["unsure"] * 20 + ["no"] * 29
    same = [f["same"] for f in answer(capsys, *asked, "--threshold", low)["queries"][0]["results"]]
    assert same == ["yes"] * 11 + ["no"] * 49


@pytest.mark.parametrize("bounds", [["2", "1"], ["1", "2", "3"], ["nan"]])
def test_thresholds_that_make_no_sense(feature_files, tmp_path, capsys, bounds):
    asked = ("search", tmp_path / "g", "--features", tmp_path / "query.npz")
    assert f"--threshold: {' '.join(str(float(b)) for b in bounds)} was given" in error_of(
        capsys, *asked, "--threshold", *bounds
    )


def test_adding_gives_the_index_of_all_and_leaves_out_what_is_there(trained_run, photos, built, tmp_path, capsys):
    (tmp_path / "some").mkdir()
    for i in range(24):
        if i % 3:
            shutil.copy(photos / f"{i:02}.png", tmp_path / "some")
    output = ("--output", tmp_path / "g")
    assert answer(capsys, "index", trained_run, tmp_path / "some", *output)["added"] == 16
    assert "holds an index already; add to it" in error_of(capsys, "index", trained_run, photos, *output)
    for i in range(0, 24, 3):
        shutil.copy(photos / f"{i:02}.png", tmp_path / "some")
    said = answer(capsys, "index", trained_run, tmp_path / "some", *output, "--add")
    assert (said["images"], said["added"], said["known"]) == (24, 8, 16)
    assert call("index", trained_run, tmp_path / "some", *output, "--add") == 0
    assert "0 of 24 images are new; the others were there" in capsys.readouterr().out
    grown, whole = GalleryIndex(tmp_path / "g"), GalleryIndex(built)
    order = [int(grown.path(i)[-6:-4]) for i in range(24)]
    assert sorted(order) == list(range(24))
    np.testing.assert_allclose(grown.feature, whole.feature[order], atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g", "some"]


def test_features_are_added_too(feature_files, tmp_path, capsys):
    query, gallery, *_ = feature_files
    for name, rows in (("a", slice(0, 40)), ("b", slice(40, 60))):
        np.savez(tmp_path / f"{name}.npz", feature=gallery[rows], path=[f"{i}.jpg" for i in range(60)[rows]])
    assert call("index", "--features", tmp_path / "a.npz", "--output", tmp_path / "g") == 0
    assert answer(capsys, "index", "--features", tmp_path / "b.npz", "--output", tmp_path / "g", "--add")["added"] == 20
    row = GalleryIndex(tmp_path / "g").search(query[:1])[1]
    assert torch.equal(row, k_reciprocal_rerank(query[:1], gallery, topk=10)[1])


def test_an_interrupted_extraction_goes_on(trained_run, photos, built, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extract, "_PART", 5)
    command = ("index", trained_run, photos, "--output", tmp_path / "g", "--batch-size=5")

    def interrupted(self, feature, add=extract.Parts.add):
        add(self, feature)
        if self.done >= 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract.Parts, "add", interrupted)
        assert call(*command) == 130
    assert not (tmp_path / "g").exists()
    capsys.readouterr()
    assert call(*command) == 0
    assert "10 of them by an earlier start" in capsys.readouterr().out
    np.testing.assert_allclose(GalleryIndex(tmp_path / "g").feature, GalleryIndex(built).feature, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_another_model_is_refused(built, trained_run, photos, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "other")
    checkpoint = torch.load(tmp_path / "other" / "last.pt", weights_only=True)
    used = checkpoint["average"] or checkpoint["method"]
    used[next(key for key, value in used.items() if value.is_floating_point())] += 1
    torch.save(checkpoint, tmp_path / "other" / "last.pt")
    shutil.copytree(built, tmp_path / "g")
    error = error_of(capsys, "search", built, photos / "01.png", "--run", tmp_path / "other")
    assert "has other weights than" in error
    assert "features of two models cannot be compared" in error
    assert "has other weights" in error_of(
        capsys, "index", tmp_path / "other", photos, "--output", tmp_path / "g", "--add"
    )
    flipped = error_of(capsys, "index", trained_run, photos, "--output", tmp_path / "g", "--add", "--flip")
    assert f"--flip: the index {tmp_path / 'g'} was made without the mirrored images' features; leave --flip" in flipped
    path = tmp_path / "g" / "index.json"
    path.write_text(path.read_text().replace('"mean": ', '"mean": [9], "was": '))
    error = error_of(capsys, "search", tmp_path / "g", photos / "01.png")
    assert "last.pt reads images with mean [" in error
    assert "was made with [9]; make another index" in error
    assert "--k1: 3 was given, but" in error_of(
        capsys, "index", trained_run, photos, "--output", tmp_path / "g", "--add", "--k1=3"
    )


def test_a_run_that_has_moved(built, trained_run, photos, tmp_path, capsys):
    shutil.copytree(built, tmp_path / "g")
    path = tmp_path / "g" / "index.json"
    path.write_text(path.read_text().replace(str(trained_run), str(tmp_path / "gone")))
    error = error_of(capsys, "search", tmp_path / "g", photos / "01.png")
    assert "gone/last.pt does not exist; it made the index; where it has moved, --run says where" in error
    found = answer(capsys, "search", tmp_path / "g", photos / "01.png", "--run", trained_run)
    assert found["queries"][0]["results"][0]["row"] == 1


def test_features_of_another_size_or_of_no_known_model(built, feature_files, photos, tmp_path, capsys):
    error = error_of(capsys, "search", built, "--features", tmp_path / "query.npz")
    assert "query: features of 16 elements were given, but the index's have" in error
    assert call("index", "--features", tmp_path / "gallery.npz", "--output", tmp_path / "g") == 0
    error = error_of(capsys, "search", tmp_path / "g", photos / "01.png")
    assert "--run: is needed, as the index was made of a file of features" in error
    assert "--strip: the index does not know the paths" in error_of(
        capsys, "search", tmp_path / "g", "--features", tmp_path / "query.npz", "--strip", tmp_path / "s.png"
    )


def test_a_strip_shows_queries_and_what_is_found(built, photos, tmp_path, capsys):
    queries = [photos / "03.png", photos / "04.png"]
    command = ("search", built, *queries, "--topk=4", "--threshold", "0.01", "0.5", "--strip", tmp_path / "s.png")
    assert call(*command) == 0
    assert str(tmp_path / "s.png") in capsys.readouterr().out
    with Image.open(tmp_path / "s.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == [0x2A, 0x9D, 0x55]).all(1).any()  # a green frame: each finds itself
    assert (pixels == [0xD9, 0x8A, 0x1F]).all(1).any() or (pixels == [0xD1, 0x39, 0x3D]).all(1).any()


def test_pictures_that_have_moved_are_placeholders_and_counted(trained_run, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    assert call("index", trained_run, tmp_path / "photos", "--output", tmp_path / "g") == 0
    for i in (5, 6):
        (tmp_path / "photos" / f"{i:02}.png").unlink()
    (tmp_path / "photos" / "07.png").write_bytes(b"damaged")
    asked = ("search", tmp_path / "g", photos / "05.png", "--topk=24", "--strip", tmp_path / "s.png")
    whole = answer(capsys, *asked)
    assert sorted(path[-6:] for path in whole["moved"]) == ["05.png", "06.png"]
    assert len(whole["queries"][0]["results"]) == 24
    assert call(*asked) == 0
    out = capsys.readouterr().out
    assert "2 of the images that were found are not where they were, such as" in out
    assert "the first 20 images of each query" in out
    shown = {f["row"] for f in whole["queries"][0]["results"][:20]} & {5, 6, 7}
    assert f"{len(shown)} pictures could not be read and are placeholders: cannot read the image" in out
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_many_queries_in_a_strip_are_cut_and_said(feature_files, tmp_path, capsys, monkeypatch):
    *_, gallery = feature_files[:2]
    np.savez(tmp_path / "g.npz", feature=gallery, path=[f"{i}.jpg" for i in range(60)])
    assert call("index", "--features", tmp_path / "g.npz", "--output", tmp_path / "g") == 0
    monkeypatch.setattr(search, "STRIP_QUERIES", 2)
    capsys.readouterr()
    asked = ("search", tmp_path / "g", "--features", tmp_path / "query.npz", "--topk=3")
    assert call(*asked, "--strip", tmp_path / "s.png") == 0
    out = capsys.readouterr().out
    assert "the first 2 of 5 queries" in out
    assert "pictures could not be read and are placeholders" in out


def test_a_manifest_brings_cameras(trained_run, data, tmp_path, capsys):
    manifest = write_manifest(data, tmp_path / "set")
    arguments = ("index", trained_run, manifest, "--split", "gallery", "--output", tmp_path / "g")
    assert answer(capsys, *arguments)["images"] == len(data.gallery)
    np.testing.assert_array_equal(GalleryIndex(tmp_path / "g").labels.camera, data.gallery.camera)
    asked = ("search", tmp_path / "g", manifest, "--split", "query", "--exclude-own-camera", "--topk=5")
    for camera, query in zip(data.query.camera, answer(capsys, *asked)["queries"], strict=True):
        assert query["results"]
        assert all(f["camera"] != camera for f in query["results"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "--output", "g"], "RUN IMAGES, --features: none was given; one of the two is needed"),
        (["index", "run", "--output", "g"], "IMAGES: nothing was given; a folder, an image, a list (.txt)"),
        (["index", "run", "x", "--data=synthetic", "--output", "g"], "IMAGES: x was given, but --data synthetic draws"),
        (["index", "--features", "f.npz", "--split=query", "--output", "g"], "--split: is for images, but --features"),
        (["search", "g", "--features", "f.npz", "--skip-bad-images"], "--skip-bad-images: is for images"),
        (["search", "g", "x.jpg", "--data=synthetic"], "QUERY: x.jpg was given, but --data synthetic draws its images"),
        (["search", "g", "--data=market1501"], "QUERY: nothing was given; a folder"),
        (["index", "run", "images", "--features", "f.npz", "--output", "g"], "one of the two is needed"),
        (["index", "run", "images", "--key", "x", "--output", "g"], "--key: is for --features, which was not given"),
        (["index", "--features", "f.npz", "--output", "no/g"], "no/g: the folder"),
        (["index", "--features", "f.npz", "--output", "g", "--add"], "index: 'g' is no folder"),
        (["index", "--features", "f.npz", "--output", "g", "--k1=0"], "k1: 0 was given"),
        (["search", "g"], "QUERY, --features: none was given; one of the two is needed"),
        (["search", "g", "a.jpg", "--features", "f.npz"], "QUERY, --features: both were given; one of the two"),
        (["search", "g", "--features", "f.npz", "--run", "r"], "--run: is for images"),
        (["search", "g", "a.jpg"], "index: 'g' is no folder"),
        (["search", "g", "a.jpg", "--topk=0"], "--topk: 0 was given"),
        (["search", "g", "a.jpg", "--lambda-value=2"], "--lambda-value: 2.0 was given without --rerank"),
        (["search", "g", "a.jpg", "--lambda-value=2", "--rerank"], "lambda_value: 2.0 was given"),
        (["search", "g", "a.jpg", "--strip=s.gif"], "suffix '.gif' was given; allowed are .png"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_of(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_shared_model_and_its_run_are_one_model(trained_run, photos, tmp_path, capsys):
    vareid_ext.load(trained_run, "cpu").save_pretrained(tmp_path / "shared")
    capsys.readouterr()
    assert call("index", tmp_path / "shared", photos, "--output", tmp_path / "g") == 0
    query = photos / "03.png"
    of_shared = answer(capsys, "search", tmp_path / "g", query, "--topk=5")
    of_run = answer(capsys, "search", tmp_path / "g", query, "--topk=5", "--run", trained_run)
    assert of_shared["queries"] == of_run["queries"]
    assert of_shared["notes"] == []


def test_the_same_pictures_are_known_whatever_their_paths_are_relative_to(
    trained_run, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(photos.parent)
    assert call("extract", trained_run, photos.name, "--output", tmp_path / "f.npz") == 0
    assert call("index", "--features", tmp_path / "f.npz", "--output", tmp_path / "g") == 0
    assert answer(capsys, "index", trained_run, photos, "--output", tmp_path / "g", "--add")["added"] == 0
    (tmp_path / "list.txt").write_text(f"{photos}/01.png\n{photos}/02.png\n{photos}/01.png\n")
    found = answer(capsys, "index", trained_run, tmp_path / "list.txt", "--output", tmp_path / "twice")
    assert (found["images"], found["known"]) == (2, 1)


def test_features_without_paths_may_have_been_there(feature_files, tmp_path, capsys):
    command = ["index", "--features", tmp_path / "gallery.npz", "--output", tmp_path / "g"]
    assert answer(capsys, *command)["images"] == 60
    again = answer(capsys, *command, "--add")
    assert again["images"] == 120
    assert any("whether some of them were there already is not known" in note for note in again["notes"])


def manifest(photos, path, *rows):
    """A table of the first photos: identity, camera, and clothes, of which an index knows nothing."""
    lines = [f"{photos}/{i:02}.png,{who},{camera},{'blue' if i % 2 else 'red'}" for i, who, camera in rows]
    path.write_text("\n".join(["path,identity,camera,column_clothes", *lines]))
    return path


def test_people_and_cameras_keep_their_names(trained_run, photos, tmp_path, capsys):
    """By name, as the numbers of two manifests' names are not the same people."""
    first = manifest(photos, tmp_path / "a.csv", (0, "bert", "hall"), (1, "anna", "door"))
    second = manifest(photos, tmp_path / "b.csv", (2, "anna", "hall"), (3, "cleo", ""))
    assert call("extract", trained_run, second, "--output", tmp_path / "b.npz") == 0
    capsys.readouterr()
    assert call("index", trained_run, first, "--output", tmp_path / "g") == 0
    shutil.copytree(tmp_path / "g", tmp_path / "of-file")
    assert answer(capsys, "index", trained_run, second, "--output", tmp_path / "g", "--add")["notes"] == []
    assert call("index", "--features", tmp_path / "b.npz", "--output", tmp_path / "of-file", "--add") == 0
    for name in ("g", "of-file"):
        found = answer(capsys, "search", tmp_path / name, photos / "02.png")["queries"][0]["results"]
        known = {f["path"][-6:-4]: (f["identity"], f.get("camera")) for f in found}
        assert known == {"00": ("bert", "hall"), "01": ("anna", "door"), "02": ("anna", "hall"), "03": ("cleo", None)}
    assert call("search", tmp_path / "g", photos / "02.png", "--topk=1") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["rank", "distance", "identity", "camera", "row", "path"]
    assert out[3].split()[2:4] == ["anna", "hall"]

    asked = ("search", tmp_path / "g", photos / "02.png", "--exclude-camera")
    said = answer(capsys, *asked, "hall", "roof")
    assert {f["path"][-6:-4] for f in said["queries"][0]["results"]} == {"01", "03"}
    assert "of the excluded cameras: 2 of 4 images" in said["notes"]
    assert "no image is by camera roof; they are by door, hall" in said["notes"]
    queries = manifest(photos, tmp_path / "q.csv", (4, "x", "hall"), (5, "x", "aisle"), (6, "x", ""))
    said = answer(capsys, "search", tmp_path / "g", queries, "--exclude-own-camera")
    of_query = [{f["path"][-6:-4] for f in one["results"]} for one in said["queries"]]
    assert of_query == [{"01", "03"}, {"00", "01", "02", "03"}, {"00", "01", "02", "03"}]
    assert "queries by a camera that no image of the index is by: 1 of 3" in said["notes"]


def test_labels_that_only_some_have_are_said(trained_run, photos, tmp_path, capsys):
    known = manifest(photos, tmp_path / "a.csv", (0, "4", "hall"), (1, "5", "door"))
    named = manifest(photos, tmp_path / "b.csv", (2, "anna", ""), (3, "5", ""))
    assert call("index", trained_run, known, "--output", tmp_path / "g") == 0
    said = answer(capsys, "index", trained_run, named, "--output", tmp_path / "g", "--add")["notes"]
    assert said == [
        "identity: those that are added have names, the others numbers; a number is the name that is written like it",
        "camera: known of images that were there, of none that are added",
    ]
    assert GalleryIndex(tmp_path / "g").labels.called("identity").tolist() == ["4", "5", "anna", "5"]
    np.savez(tmp_path / "f.npz", feature=np.eye(3, dtype=np.float32))
    np.savez(tmp_path / "h.npz", feature=np.eye(3, dtype=np.float32), viewpoint=[0, 1, 2])
    assert call("index", "--features", tmp_path / "f.npz", "--output", tmp_path / "n") == 0
    said = answer(capsys, "index", "--features", tmp_path / "h.npz", "--output", tmp_path / "n", "--add")["notes"]
    assert "viewpoint: known of images that are added, of none that were there" in said


def test_queries_that_cannot_be_read_do_not_stop_the_others(built, photos, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    queries = [photos / "03.png", tmp_path / "bad.png", tmp_path / "gone.jpg", photos / "05.png"]
    error = error_of(capsys, "search", built, *queries)
    assert "2 unreadable images (--skip-bad-images goes on without the images)" in error
    assert "bad.png" in error
    assert "gone.jpg" in error
    found = answer(capsys, "search", built, *queries, "--skip-bad-images", "--topk=1")
    assert found["skipped"] == [str(tmp_path / "bad.png"), str(tmp_path / "gone.jpg")]
    assert [one["results"][0]["row"] for one in found["queries"]] == [3, 5]
    assert any(note.startswith("2 unreadable images left out") for note in found["notes"])
    assert "QUERY: nowhere does not exist" in error_of(capsys, "search", built, "nowhere", "--skip-bad-images")
    error = error_of(capsys, "search", built, *queries[1:3], "--skip-bad-images")
    assert "none of the 2 images can be read" in error


def test_a_file_of_both_sides_gives_each_its_own(feature_files, tmp_path, capsys):
    query, gallery, *_ = feature_files
    np.savez(tmp_path / "both.npz", query_feature=query, gallery_feature=gallery)
    assert call("index", "--features", tmp_path / "both.npz", "--output", tmp_path / "g") == 0
    found = answer(capsys, "search", tmp_path / "g", "--features", tmp_path / "both.npz")["queries"]
    assert [[f["row"] for f in one["results"]] for one in found] == (
        GalleryIndex(tmp_path / "g").search(query, rerank=False)[1].tolist()
    )
    np.savez(tmp_path / "flat.npz", feature=query.reshape(-1))
    assert "flat.npz: query features: shape" in error_of(
        capsys, "search", tmp_path / "g", "--features", tmp_path / "flat.npz"
    )


def test_rendered_images_need_no_argument(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "SyntheticSettings", partial(SyntheticSettings, **SIZE))
    data = ("--data=synthetic", "--split")
    made = answer(capsys, "index", trained_run, *data, "gallery", "--output", tmp_path / "g")
    assert made["images"] == len(load_data("synthetic", progress=False).gallery)
    found = answer(capsys, "search", tmp_path / "g", *data, "query", "--topk=1")["queries"]
    assert len(found) == len(load_data("synthetic", progress=False).query)
    assert found[0]["query"].startswith("synthetic/test/")
    assert call("extract", trained_run, *data, "query", "--output", tmp_path / "f.npz") == 0
    assert len(np.load(tmp_path / "f.npz")["feature"]) == len(found)
