"""vareid label-viewpoints: the rule by its closed form, the labels that it writes, and training that reads them."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from _vareid_cli import run
from tests.test_train import SMALL
from vareid_ext.data import SyntheticSettings, read_viewpoint_labels, synthetic_data, write_manifest
from vareid_ext.data.keypoints import read_keypoint_list
from vareid_ext.data.viewpoint_classes import PERSON
from vareid_ext.data.viewpoint_rule import ViewpointRule, fit_rule, frontness
from vareid_ext.metrics.classification import evaluate_classification

NAN = math.nan
HEIGHT = 128


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def joints(rs=None, ls=None, rh=None, lh=None) -> np.ndarray:
    """[14, 3] of a person of whom only the right and left shoulder and hip (x, y) may be seen."""
    person = np.full((14, 3), 7.0)
    person[:, 2] = 0
    for row, place in ((2, rs), (5, ls), (8, rh), (11, lh)):
        if place:
            person[row] = (*place, 0.3)
    return person


def turned(s: float, x: float = 30) -> np.ndarray:
    """A person with this frontness and a torso of 40 pixels."""
    half = s * 40 / 2
    hip = half * 0.6
    return joints((x - half, 30), (x + half, 30), (x - hip, 70), (x + hip, 70))


# ---- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("person", "expected"),
    [
        # T = 70 - 30 = 40; w = 20 / 40, h = 10 / 40
        (joints((20, 30), (40, 30), (25, 70), (35, 70)), (0.5 + 0.25 * 0.25) / 1.15),
        (joints((40, 28), (20, 32), (35, 75), (25, 65)), -(0.5 + 0.25 * 0.25) / 1.15),
        (joints((20, 30), (40, 30)), 20 / (0.3 * HEIGHT)),
        (joints((20, 30), (40, 30), rh=(25, 70)), 20 / (0.3 * HEIGHT)),
        (joints(None, (40, 30), (25, 70), (35, 70)), 1.6 * 10 / (0.3 * HEIGHT)),
        # a torso of 15 pixels, less than 0.12 of 128; upside down; and of 16
        (joints((20, 30), (40, 30), (25, 45), (35, 45)), (20 + 0.25 * 10) / (0.3 * HEIGHT) / 1.15),
        (joints((20, 70), (40, 70), (25, 30), (35, 30)), (20 + 0.25 * 10) / (0.3 * HEIGHT) / 1.15),
        (joints((20, 30), (40, 30), (25, 46), (35, 46)), (20 + 0.25 * 10) / 16 / 1.15),
        (joints((20, 30), None, (25, 70), None), NAN),
        (joints(), NAN),
    ],
)
def test_frontness_is_the_width_of_shoulders_and_hips_in_torsos(person, expected):
    (found,) = frontness(person[None], np.array([HEIGHT]))
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_rule_is_its_formula():
    s = np.array([-3.0, -0.483, -0.2, 0.0, 0.3, 0.543, 1.0, 8.0, NAN])
    expected = []
    for value in s[:-1]:
        front, back = sigmoid(18.3 * (value - 0.543)), sigmoid(18.3 * (-value - 0.483))
        expected.append([0.961 * p + 0.039 / 3 for p in (front, 1 - front - back, back)])
    found = ViewpointRule().probabilities(s)
    np.testing.assert_allclose(found, [*expected, [1 / 3] * 3], atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def drawn(rule: ViewpointRule, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frontness, and viewpoints that are drawn by the rule's probabilities."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(-1.5, 1.5, count)
    return s, (rng.random((count, 1)) > rule.probabilities(s).cumsum(axis=1)).sum(axis=1)


def test_a_fit_finds_the_rule_that_made_the_labels():
    rule = ViewpointRule(slope=9.0, front=0.8, back=-0.2, doubt=0.08)
    s, view = drawn(rule, 8_000)
    found = fit_rule(np.append(s, NAN), np.append(view, 0)).as_dict()
    assert found == pytest.approx(rule.as_dict(), rel=0.15)
    again = fit_rule(s, view, ViewpointRule(30.0, 0.1, -0.1, 0.2)).as_dict()
    assert again == pytest.approx(found, rel=0.03)


def test_a_fit_to_few_or_separable_labels_stays_near_where_it_began():
    start = ViewpointRule()
    for s, view in (
        ([0.9, 0.0, -0.9], [0, 1, 2]),
        ([0.9] * 50 + [0.0] * 50 + [-0.9] * 50, [0] * 50 + [1] * 50 + [2] * 50),
    ):
        rule = fit_rule(np.array(s), np.array(view))
        assert -0.9 < rule.back < 0 < rule.front < 0.9
        assert start.slope / 3 < rule.slope < start.slope * 3
        assert 0 < rule.doubt < start.doubt * 1.01
    assert fit_rule(np.array([NAN]), np.array([0])).as_dict() == pytest.approx(start.as_dict())


def test_accuracy_confusion_and_calibration_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    probability = rng.dirichlet([1, 1, 1], 200)
    truth = rng.integers(0, 3, 200)
    metrics = evaluate_classification(probability, truth, PERSON.names)
    confusion, bins = np.zeros((3, 3), int), {}
    for row, label in zip(probability, truth, strict=True):
        chosen = max(range(3), key=lambda v: row[v])
        confusion[label, chosen] += 1
        bins.setdefault(min(int(row[chosen] * 15), 14), []).append((row[chosen], chosen == label))
    ece = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins.values()) / 200
    assert np.array_equal(metrics.confusion, confusion)
    assert metrics.accuracy == pytest.approx(np.trace(confusion) / 200)
    assert metrics.ece == pytest.approx(ece)
    assert evaluate_classification(np.eye(3), np.arange(3), PERSON.names).ece == pytest.approx(0)
    with pytest.raises(ValueError, match="truth: no images were given"):
        evaluate_classification(np.empty((0, 3)), np.empty(0, int), PERSON.names)


# ---- the command ---------------------------------------------------------------------------------------------------

PEOPLE = {
    "a/front.jpg": 0.9, "a/side.jpg": 0.0, "b/back.jpg": -0.9, "b/between.jpg": 0.542, "b/nobody.jpg": None,
    "front.jpg": 0.7,
}  # fmt: skip


def photograph(path: Path, width: int = 64, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 150)).save(path)


def openpose(person: np.ndarray) -> str:
    """The 14 joints as OpenPose's 18."""
    points = np.zeros((18, 3))
    points[:14] = person
    return json.dumps({"people": [{"pose_keypoints_2d": points.ravel().tolist()}]})


@pytest.fixture
def photos(tmp_path):
    """Photographs, and OpenPose's files of all but one."""
    for name, s in PEOPLE.items():
        photograph(tmp_path / "photos" / name)
        if s is not None:
            file = tmp_path / "pose" / name.replace(".jpg", "_keypoints.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(openpose(turned(s)))
    return tmp_path / "photos"


def label(*arguments) -> int:
    return run(["label-viewpoints", *map(str, arguments), "--quiet"])


def rows(path: Path) -> dict[str, tuple[str, float]]:
    with path.open() as file:
        return {row["path"]: (row["viewpoint"], float(row["confidence"])) for row in csv.DictReader(file)}


def test_labels_are_the_rules_probabilities(photos, tmp_path, capsys):
    output, sheet = tmp_path / "labels.csv", tmp_path / "sheet.png"
    options = ("--keypoints", tmp_path / "pose", "--output", output)
    assert label(photos, *options, "--contact-sheet", sheet, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["viewpoints"] == {"front": 2, "side": 1, "back": 1}
    assert said["unknown"] == 2
    assert said["images"] == 6
    assert said["measured"] == {}
    found = rows(output)
    assert set(found) == set(PEOPLE)
    assert found["b/nobody.jpg"] == ("-1", 0)
    for name, s in PEOPLE.items():
        if s is None:
            continue
        expected = ViewpointRule().probabilities(np.array([s]))[0]
        viewpoint, confidence = found[name]
        assert confidence == pytest.approx(expected.max(), abs=6e-4)
        if name == "b/between.jpg":
            assert viewpoint == "-1"
            continue
        assert PERSON.weights(viewpoint) == pytest.approx(expected, abs=2e-3)
        assert sum(float(share.partition(":")[2]) for share in viewpoint.split()) == pytest.approx(1, abs=1e-9)
    with Image.open(sheet) as picture:
        assert picture.size == (6 + 2 * 70, 6 + 4 * 162)
    assert label(photos, *options, "--hard", "--min-confidence", 0) == 0
    assert {name: view for name, (view, _) in rows(output).items()} == {
        "a/front.jpg": "front", "a/side.jpg": "side", "b/back.jpg": "back", "b/between.jpg": "side",
        "b/nobody.jpg": "-1", "front.jpg": "front",
    }  # fmt: skip
    labels = read_viewpoint_labels(output)
    views, unused = labels.find([str(photos / name) for name in PEOPLE], photos)
    assert views == ("front", "side", "back", "side", "", "front")
    assert unused == ()


@pytest.mark.parametrize("form", ["alphapose", "coco"])
def test_the_formats_of_one_file_give_the_same_labels(photos, tmp_path, form):
    places = {6: 2, 5: 5, 12: 8, 11: 11}  # COCO's shoulders and hips
    people = []
    for number, (name, s) in enumerate(PEOPLE.items()):
        points = np.zeros((17, 3))
        for coco, own in places.items() if s is not None else ():
            points[coco] = turned(s)[own]
        image = name if form == "alphapose" else number
        people.append({"image_id": image, "keypoints": points.ravel().tolist(), "score": 1.0})
    images = [{"id": n, "file_name": name, "width": 64, "height": HEIGHT} for n, name in enumerate(PEOPLE)]
    file = tmp_path / "pose.json"
    file.write_text(json.dumps(people if form == "alphapose" else {"images": images, "annotations": people}))
    outputs = [tmp_path / "labels.csv", tmp_path / "other.csv"]
    for keypoints, output in zip((tmp_path / "pose", file), outputs, strict=True):
        assert label(photos, "--keypoints", keypoints, "--output", output) == 0
    assert outputs[0].read_text() == outputs[1].read_text()


@pytest.mark.parametrize(
    ("images", "annotated", "message"),
    [
        ([(1, "a.jpg"), (1, "b.jpg")], 1, "id 1 was given to two images, 'a.jpg' and 'b.jpg'"),
        ([(1, "a.jpg"), ("1", "a.jpg")], 1, "file_name 'a.jpg' was given to two images, of id 1 and \"1\""),
        ([(1, "a.jpg")], 2, "image_id 2 was given; its images have no such id"),
        ([(1, "a.jpg")], [1], "image_id [1] was given; its images have no such id"),
        ([(1, 5)], 1, "file_name 5 was given; a text is needed"),
    ],
)
def test_images_of_coco_that_are_two_or_none_are_named(tmp_path, images, annotated, message):
    file = tmp_path / "coco.json"
    content = {
        "images": [{"id": number, "file_name": name} for number, name in images],
        "annotations": [{"image_id": annotated, "keypoints": [1.0] * 51}],
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {message}")):
        read_keypoint_list(file, "auto")


def test_images_without_keypoints_and_keypoints_without_images_are_counted(photos, tmp_path, capsys):
    nothing = np.zeros((18, 3)).ravel().tolist()
    people = [{"image_id": name, "keypoints": nothing} for name in ("a/front.jpg", "gone.jpg", "b/gone.jpg")]
    (tmp_path / "pose.json").write_text(json.dumps(people))
    assert label(photos, "--keypoints", tmp_path / "pose.json", "--output", tmp_path / "labels.csv") == 0
    said = capsys.readouterr().out
    assert "of the unknown 5 have no keypoints, 1 neither both shoulders nor both hips, 0 a confidence below" in said
    assert f"2 keypoints in {tmp_path}/pose.json that fit no image here, or several, left out: gone.jpg, b/go" in said


def many(tmp_path: Path, rule: ViewpointRule, count: int) -> np.ndarray:
    """Photographs 0.jpg, 1.jpg, ... with keypoints in pose.json, and their viewpoints, drawn by a rule."""
    s, view = drawn(rule, count)
    people = []
    for number, value in enumerate(s):
        photograph(tmp_path / "photos" / f"{number}.jpg", 80)
        points = np.zeros((18, 3))
        points[:14] = turned(value, x=40)
        people.append({"image_id": f"{number}.jpg", "keypoints": points.ravel().tolist()})
    (tmp_path / "pose.json").write_text(json.dumps(people))
    return view


def test_fit_adjusts_the_rule_and_is_measured_on_images_it_has_not_seen(tmp_path, capsys):
    rule = ViewpointRule(slope=12.0, front=0.9, back=-0.9, doubt=0.03)  # shoulders that look wider than usual
    view = many(tmp_path, rule, 240)
    known = [f"{n}.jpg,{PERSON.names[v]}\n" for n, v in enumerate(view)]
    (tmp_path / "labelled.csv").write_text("path,viewpoint\n" + "".join(known[:160]) + "elsewhere.jpg,side\n")
    (tmp_path / "true.csv").write_text("path,viewpoint\n" + "".join(known))
    options = (
        tmp_path / "photos", "--keypoints", tmp_path / "pose.json", "--output", tmp_path / "labels.csv",
        "--viewpoint-file", tmp_path / "true.csv", "--min-confidence", 0, "--json",
    )  # fmt: skip
    assert label(*options) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["measured"]["known"]["images"] == 240
    assert before["rule"] == ViewpointRule().as_dict()
    assert label(*options, "--fit", tmp_path / "labelled.csv") == 0
    after = json.loads(capsys.readouterr().out)
    assert after["rule"]["front"] == pytest.approx(0.9, abs=0.1)
    assert after["measured"]["fit"]["images"] == 160
    assert after["measured"]["known"]["images"] == 80
    for measured in after["measured"].values():
        assert measured["accuracy"] > before["measured"]["known"]["accuracy"] + 0.05
    assert any("1 labels that fit no image" in note and "elsewhere.jpg" in note for note in after["notes"])


def test_training_reads_the_labels(tmp_path, capsys):
    """A synthetic set, from the renderer's exact keypoints, which are its true viewpoints but for the bounds."""
    size = {"identities_train": 6, "identities_test": 3, "images_per_identity": 6, "distractors": 1}
    data = synthetic_data(SyntheticSettings(**size, height=64, width=32), extras=("keypoints",))
    manifest = write_manifest(data, tmp_path / "people")
    for split, images in data.splits.items():
        for index in range(len(images)):
            points = np.zeros((18, 3))
            points[:14] = images.load_extras(index, 64, 32)["keypoints"].numpy()
            file = tmp_path / "pose" / split / f"{index:06d}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"people": [{"pose_keypoints_2d": points.ravel().tolist()}]}))
    output = tmp_path / "labels.csv"
    assert label(manifest, "--keypoints", tmp_path / "pose", "--output", output, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["measured"]["known"]["accuracy"] > 0.7
    assert sum(said["viewpoints"].values()) > 40
    text = manifest.read_text().splitlines()
    bare = [",".join([*line.split(",")[:3], "", line.split(",")[4]]) for line in text[1:]]
    manifest.write_text("\n".join([text[0], *bare]))
    assert run([
        "train", *SMALL, "--data.kind=manifest", f"--root={manifest}", f"--viewpoint-file={output}", "--epochs=1",
        "--viewpoint-labels=soft", "--batches-per-epoch=2", "--baselines=false", "--device=cpu", "--workers=0",
        f"--output={tmp_path / 'run'}",
    ]) == 0  # fmt: skip
    assert "training images have soft viewpoint labels" in capsys.readouterr().out


# ---- bad input -----------------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    assert label(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("vareid label-viewpoints: error: ")
    return said


def test_what_cannot_be_done_is_said_before_anything_is_written(photos, tmp_path, capsys):
    output = tmp_path / "labels.csv"
    pose = ("--keypoints", tmp_path / "pose", "--output", output)
    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in refused(capsys, tmp_path / "empty", *pose)
    none = refused(capsys, photos, "--keypoints", tmp_path / "empty", "--output", output)
    assert "--keypoints: none of the 6 images, such as" in none
    assert "gone does not exist" in refused(capsys, photos, "--keypoints", tmp_path / "gone", "--output", output)
    assert "--min-confidence: 1.5 was given" in refused(capsys, photos, *pose, "--min-confidence", 1.5)
    assert "suffix '.txt'" in refused(capsys, photos, *pose[:3], tmp_path / "labels.txt")
    (tmp_path / "twice.txt").write_text("photos/front.jpg\nphotos/../photos/front.jpg\n")
    assert "IMAGES: photos/front.jpg was given twice" in refused(capsys, tmp_path / "twice.txt", *pose)
    wrong = tmp_path / "wrong.csv"
    for option in ("--fit", "--viewpoint-file"):
        wrong.write_text("path,viewpoint\nfront.jpg,front\na/side.jpg,sideways\n")
        assert "wrong.csv, line 3: viewpoint 'sideways' was given; allowed are front, side" in refused(
            capsys, photos, *pose, option, wrong
        )
        wrong.write_text("path,viewpoint\nfront.jpg,front\nb/back.jpg\n")
        assert "wrong.csv, line 3: 1 cells were given" in refused(capsys, photos, *pose, option, wrong)
        wrong.write_text("path,viewpoint\nother.jpg,front\n")
        assert "wrong.csv: none of its 1 labels fits an image" in refused(capsys, photos, *pose, option, wrong)
    wrong.write_text("path,viewpoint\na/front.jpg,front\nb/back.jpg,back\nb/nobody.jpg,side\n")
    assert "has no image labelled side with both shoulders or both hips" in refused(
        capsys, photos, *pose, "--fit", wrong
    )
    assert not output.exists()


def test_keypoints_of_images_of_another_size_are_an_error(photos, tmp_path, capsys):
    for file in (tmp_path / "pose").rglob("*.json"):
        file.write_text(openpose(turned(0.7, x=700)))
    said = refused(capsys, photos, "--keypoints", tmp_path / "pose", "--output", tmp_path / "labels.csv")
    assert "they belong to an image of another size" in said
    stated = {
        "images": [{"id": 1, "file_name": "a/front.jpg", "width": 640, "height": 480}],
        "annotations": [{"image_id": 1, "keypoints": [30.0] * 51}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(stated))
    said = refused(capsys, photos, "--keypoints", tmp_path / "coco.json", "--output", tmp_path / "labels.csv")
    assert "keypoints of an image of 640 x 480 pixels were given; the image has 64 x 128 pixels" in said


def test_images_that_cannot_be_read_are_named_or_left_out(photos, tmp_path, capsys):
    (photos / "a" / "side.jpg").write_bytes(b"no image")
    output = tmp_path / "labels.csv"
    assert "side.jpg" in refused(capsys, photos, "--keypoints", tmp_path / "pose", "--output", output)
    assert label(photos, "--keypoints", tmp_path / "pose", "--output", output, "--skip-bad-images") == 0
    assert "1 images with unreadable files" in capsys.readouterr().out
    assert set(rows(output)) == set(PEOPLE) - {"a/side.jpg"}
