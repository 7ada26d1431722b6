import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vareid_ext.data import ReidDataset, SyntheticSettings, build_transform, collate, load_data, read_manifest
from vareid_ext.data.viewpoint_classes import (
    PERSON,
    ViewpointClasses,
    checked_classes,
    declared_classes,
    found_classes,
    mirrored_viewpoints,
)
from vareid_ext.files.features import FeatureFileError, Features, read_features

SETTINGS = SyntheticSettings(
    identities_train=3, identities_test=2, images_per_identity=6, distractors=1, height=32, width=16
)
VEHICLE = ViewpointClasses(("front", "rear", "left", "right"), {"front_left": ("front", "left")})


def labelled(tmp_path, views, name="manifest.csv"):
    """A manifest with an image of each view in every split, and its images."""
    rows = ["path,identity,viewpoint,split"]
    for split in ("train", "query", "gallery"):
        for number, view in enumerate(views):
            path = f"{split}{number}.png"
            Image.new("RGB", (16, 32), (number, 0, 0)).save(tmp_path / path)
            rows.append(f"{path},{number % 2},{view},{split}")
    (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    ("label", "number", "weights"),
    [
        # As the paper's authors trained, and as its supplement shares ambiguous labels.
        ("front", 0, (1, 0, 0)), ("front_side", 0, (0.5, 0.5, 0)), ("side", 1, (0, 1, 0)),
        ("back_side", 2, (0, 0.5, 0.5)), ("back", 2, (0, 0, 1)), ("noise", 1, (1 / 3, 1 / 3, 1 / 3)),
        ("front:0.7 side:0.3", 0, (0.7, 0.3, 0)), ("side:1", 1, (0, 1, 0)), ("front:.5 back:.5", 0, (0.5, 0, 0.5)),
        ("back:0.501 side:0.5", 2, (0, 0.5 / 1.001, 0.501 / 1.001)),
    ],
)  # fmt: skip
def test_labels_of_people(label, number, weights):
    assert PERSON.number(label) == number
    assert PERSON.weights(label) == pytest.approx(weights, abs=1e-12)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("rear", "'rear' was given; allowed are front, side, back, front_side, back_side, noise"),
        ("front:0.5", "must be 0 to 1 and sum to 1"),
        ("front:2 side:-1", "must be 0 to 1 and sum to 1"),
        ("front:x side:1", "must be 0 to 1 and sum to 1"),
        ("front:nan side:1", "must be 0 to 1 and sum to 1"),
        ("front:0.5 front:0.5", "with 'front' twice"),
        ("front:0.5 rear:0.5", "with 'rear'; allowed are front, side, back"),
        ("front:0.5 side", "allowed are front, side, back"),
    ],
)
def test_labels_that_mean_nothing(label, said):
    with pytest.raises(ValueError, match=said):
        PERSON.number(label)


@given(st.integers(2, 24), st.floats(0, 360, exclude_max=True))
def test_an_angle_is_shared_by_the_two_nearest_viewpoints(bins, degrees):
    classes = ViewpointClasses.of_angles(bins)
    weights = np.array(classes.weights(repr(degrees)))
    assert weights.sum() == pytest.approx(1)
    middles = np.arange(bins) * 360 / bins
    away = np.abs((middles - degrees + 180) % 360 - 180)
    expected = np.clip(1 - away / (360 / bins), 0, None)
    np.testing.assert_allclose(weights, expected, atol=1e-9)
    assert away[classes.number(repr(degrees))] == pytest.approx(away.min(), abs=1e-9)


@pytest.mark.parametrize("degrees", ["360", "-0.1", "nan", "inf", "front", "1:2", "1e3"])
def test_angles_outside_the_circle_are_refused(degrees):
    with pytest.raises(ValueError, match="allowed are degrees from 0 to below 360"):
        ViewpointClasses.of_angles(8).weights(degrees)


def test_names_are_taken_from_the_data():
    def found(*labels):
        return found_classes([(f"line {i}", label) for i, label in enumerate(labels, 2)])

    assert found() == PERSON
    assert found("back", "noise") == PERSON
    assert found("front:0.5 side:0.5") == PERSON
    assert found("front", "rear", "left", "front").names == ("front", "left", "rear")
    assert found("front", "back", "left:0.5 back:0.5").names == ("back", "front", "left")
    assert found("10", "9", "0").names == ("0", "9", "10")
    with pytest.raises(ValueError, match=r"line 4: viewpoint 'fronnt' was given beside names out of front, side, back"):
        found("front_side", "back", "fronnt")
    with pytest.raises(ValueError, match=r"line 5: viewpoint 'top' was given beside"):
        found("front", "side", "back", "top")
    with pytest.raises(ValueError, match=r"line 38: viewpoint '36' was given, the 37th name; .*--viewpoint-bins"):
        found(*map(str, range(37)))
    with pytest.raises(ValueError, match="line 2: viewpoint 'a,b' was given; names have 1 to 40 characters"):
        found("a,b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ["a", "a"]}, "viewpoints: 'a' was given twice"),
        ({"names": ["a b"]}, "viewpoints: 'a b' was given; names have 1"),
        ({"names": [""]}, "viewpoints: '' was given"),
        ({"names": ["a", "b"], "between": {"ab": ["a", "c"]}}, "viewpoints_between: ab: .* two or more of a, b"),
        ({"names": ["a", "b"], "between": {"ab": ["a"]}}, "viewpoints_between: ab: .* two or more of a, b"),
        ({"names": ["a", "b"], "between": {"a": ["a", "b"]}}, "viewpoints: 'a' was given twice"),
        ({"between": {"ab": ["a", "b"]}}, "viewpoints_between: ab"),
        ({"bins": 8, "names": ["a"]}, "viewpoint_bins: 8 was given beside names"),
        ({"bins": 1}, "viewpoint_bins: 1 was given; allowed are 2 to 360"),
    ],
)
def test_declarations_that_are_wrong(arguments, said):
    with pytest.raises(ValueError, match=said):
        declared_classes(**arguments)


def test_declarations():
    assert declared_classes() is None
    assert declared_classes(("front", "side", "back")) == PERSON
    names, between = ("front", "rear", "left", "right"), {"front_left": ["front", "left"]}
    assert declared_classes(names, between) == VEHICLE
    assert declared_classes(bins=4).names == ("0°", "90°", "180°", "270°")


def test_labels_that_were_not_declared_are_named_with_their_place():
    with pytest.raises(
        ValueError, match=r"line 3: viewpoint 'top' was given; allowed are front, rear, left, right, fr"
    ):
        checked_classes([("line 2", "rear"), ("line 3", "top"), ("line 4", "top")], VEHICLE)


def test_a_manifest_brings_its_own_viewpoints(tmp_path):
    views = ["rear", "left", "", "front", "rear"]
    data = load_data("manifest", labelled(tmp_path, views), viewpoint_labels="soft", progress=False)
    assert data.classes.names == data.query.viewpoints == ("front", "left", "rear")
    assert data.query.viewpoint.tolist() == [2, 1, -1, 0, 2]
    # Images 0, 2, 4 are of one identity, seen from the rear alone; 1 and 3 of another.
    expected = [[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(data.train.viewpoint_weight, expected)
    assert data.subclass_mask().tolist() == [[False, False, True], [True, True, False]]
    assert data.summary().splitlines()[0].split() == [
        "split", "images", "identities", "cameras", "front", "left", "rear", "unknown",
    ]  # fmt: skip


def test_declared_viewpoints_of_a_manifest(tmp_path):
    path = labelled(tmp_path, ["rear", "front_left", "left:0.75 right:0.25"])
    data = load_data("manifest", path, viewpoints=VEHICLE, viewpoint_labels="soft", progress=False)
    assert data.num_viewpoints == 4
    assert data.train.viewpoint.tolist() == [1, 0, 2]
    expected = [[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0.75, 0.25]]
    np.testing.assert_array_equal(data.train.viewpoint_weight, expected)
    with pytest.raises(ValueError, match=r"manifest.csv, line 3: viewpoint 'front_left' was given; allowed are front"):
        read_manifest(path, viewpoints=ViewpointClasses(VEHICLE.names))
    angles = labelled(tmp_path, ["0", "44.9", "360"], "angles.csv")
    with pytest.raises(ValueError, match=r"angles.csv, line 4: viewpoint '360' was given; allowed are degrees from 0"):
        read_manifest(angles, viewpoints=ViewpointClasses.of_angles(8))


def test_a_label_file_and_a_manifest_agree_on_viewpoints(tmp_path):
    path, file = labelled(tmp_path, ["rear", "left", ""]), tmp_path / "labels.csv"

    def labelled_by(text, **options):
        file.write_text(f"path,viewpoint,confidence\n{text}")
        return load_data("manifest", path, viewpoint_file=file, check_images=False, progress=False, **options)

    data = labelled_by("train2.png,left,0.9\ntrain0.png,-1,0.3\n")
    assert data.train.viewpoint_name == ("rear", "left", "left")
    assert data.classes.names == ("left", "rear")
    data = labelled_by("train2.png,top,1\n", viewpoints=ViewpointClasses(("top", "rear", "left")))
    assert data.train.viewpoint.tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match=r"labels.csv: its viewpoints \(top\) are not those of .* \(left, rear\)"):
        labelled_by("train2.png,top,1\n")
    with pytest.raises(ValueError, match=r"labels\.csv, line 2: viewpoint 'front:2' was given; the weights must be"):
        labelled_by("train2.png,front:2,1\n")


def test_viewpoints_of_a_data_set_that_has_others_are_refused():
    with pytest.raises(
        ValueError, match="viewpoints: front, rear, left, right were given; synthetic has its own, front"
    ):
        load_data("synthetic", viewpoints=VEHICLE, synthetic=SETTINGS, progress=False)


def test_the_synthetic_set_knows_its_angles():
    angles = load_data(
        "synthetic", viewpoints=ViewpointClasses.of_angles(360), synthetic=SETTINGS, progress=False
    ).train
    named = load_data("synthetic", synthetic=SETTINGS, progress=False).train
    assert angles.paths == named.paths
    turned = np.minimum(angles.viewpoint, 360 - angles.viewpoint)
    # The bounds of the names in the renderer, and a degree of rounding.
    for bound, below in ((28, 0), (118, 1), (180, 2)):
        inside = turned <= bound - 1
        assert (named.viewpoint[inside] <= below).all()


def test_names_of_viewpoints_travel_with_features(tmp_path):
    data = load_data("manifest", labelled(tmp_path, ["rear", "left", "", "front"]), progress=False)
    made = Features.of(torch.randn(4, 3), data.query)
    made.save(tmp_path / "q.npz")
    read = read_features(tmp_path / "q.npz", "query")
    assert read.viewpoints == ("front", "left", "rear")
    assert read.viewpoint.tolist() == [2, 1, -1, 0]
    part = made.select([0, 2])
    part.save(tmp_path / "p.npz")
    read = read_features(tmp_path / "p.npz", "query")
    assert read.viewpoint_classes().tolist() == ["rear", ""]
    same = read.with_viewpoints(("rear", "front"))
    assert (same.viewpoint.tolist(), same.viewpoint_classes().tolist()) == ([0, -1], ["rear", ""])


@pytest.mark.parametrize(
    ("viewpoint", "named", "expected"),
    [
        ([0, 2, -1], None, ("front", "side", "back")),
        ([0, 3], None, ("0", "1", "2", "3")),
        ([0, 2], ["front", "back"], ("front", "side", "back")),
        ([0, 2], ["front", "top"], ("front", "1", "top")),
    ],
)
def test_names_of_viewpoints_in_files(tmp_path, viewpoint, named, expected):
    arrays = {"feature": np.zeros((len(viewpoint), 2), np.float32), "viewpoint": np.array(viewpoint)}
    if named:
        arrays["viewpoint_class"] = np.array(named)
    np.savez(tmp_path / "f.npz", **arrays)
    assert read_features(tmp_path / "f.npz", "query").viewpoints == expected


def test_a_viewpoint_with_two_names_is_refused(tmp_path):
    arrays = {"feature": np.zeros((2, 2), np.float32), "viewpoint": np.array([1, 1])}
    np.savez(tmp_path / "f.npz", **arrays, viewpoint_class=np.array(["a", "b"]))
    with pytest.raises(FeatureFileError, match="query viewpoint_class: a viewpoint has two names"):
        read_features(tmp_path / "f.npz", "query")


def test_what_a_mirror_exchanges():
    assert mirrored_viewpoints(("front", "side", "back")) == (0, 1, 2)
    assert mirrored_viewpoints(("front", "left", "front_left", "front_right", "right")) == (0, 4, 3, 2, 1)
    assert mirrored_viewpoints(("left", "rear")) == (0, 1)
    assert mirrored_viewpoints(("Front", "Left", "RIGHT_rear", "Right", "LEFT_rear")) == (0, 3, 4, 1, 2)
    for bins in range(2, 361):
        found = mirrored_viewpoints(ViewpointClasses.of_angles(bins).names)
        assert found == tuple((bins - number) % bins for number in range(bins))


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_mirrored_images_show_the_other_side(tmp_path, mode):
    path = labelled(tmp_path, ["left", "front", "right:0.75 front:0.25", ""])
    data = load_data("manifest", path, viewpoint_labels=mode, progress=False)
    assert data.classes.names == ("front", "left", "right")
    assert data.subclass_mask().tolist() == [[mode == "soft", True, True], [True, False, False]]
    for flip, left, right in ((0.0, 1, 2), (1.0, 2, 1)):
        dataset = ReidDataset(data.train, build_transform(8, 4, True, flip=flip, pad=1, erasing=1.0))
        seen = collate([dataset[i] for i in range(4)]).viewpoint
        assert type(seen) is torch.Tensor
        if mode == "hard":
            assert seen.tolist() == [left, 0, right, -1]
        else:
            mixed = torch.zeros(3).scatter(0, torch.tensor([0, right]), torch.tensor([0.25, 0.75]))
            torch.testing.assert_close(seen[:3], torch.stack([torch.eye(3)[left], torch.eye(3)[0], mixed]))
