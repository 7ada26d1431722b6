"""Readers of people from the air and from the ground, and from known angles, on small made-up trees."""

import math

import numpy as np
import pytest

from tests.test_data_vehicles import load, write
from vareid_ext.data.viewpoint_classes import ViewpointClasses
from vareid_ext.metrics import evaluate_ranking


@pytest.fixture
def cargo(tmp_path):
    return write(
        tmp_path / "CARGO",
        "train/Cam1/Cam1_day_12_1.jpg", "train/Cam13/Cam13_night_12_2.jpg", "train/Cam6/Cam6_day_3_1.jpg",
        "query/Cam5/Cam5_day_2519_320.jpg", "query/Cam6/Cam6_day_2519_9.jpg", "query/Cam13/Cam13_night_7_1.jpg",
        "gallery/Cam1/Cam1_day_2519_1.jpg", "gallery/Cam1/Cam1_day_7_1.jpg", "gallery/Cam7/Cam7_day_2519_1.jpg",
        "gallery/Cam6/Cam6_day_2519_2.jpg", "gallery/Cam9/Cam9_night_7_3.jpg",
    )  # fmt: skip


def test_cargo(cargo, tmp_path):
    (cargo / "query" / "Cam2").mkdir()  # of a camera without queries
    (cargo / "gallery" / "list.txt").write_text("x")
    for kind, root in (("cargo", cargo), ("auto", tmp_path)):
        data = load(kind, root)
        assert data.identity_names == ("3", "12")
        assert data.train.camera.tolist() == [1, 13, 6]
        assert data.query.camera.tolist() == [13, 5, 6]
        assert data.query.identity.tolist() == [7, 2519, 2519]
        assert data.query.columns["platform"].tolist() == [2, 1, 2]
        assert data.notes[-1] == "1 entries that are not read as images left out: gallery/list.txt"
    write(cargo, "gallery/Cam1/Cam1_2519.jpg")
    with pytest.raises(ValueError, match=r"Cam1_2519.jpg must begin with Cam<camera>_<word>_<identity>, numbers"):
        load("cargo", cargo)


def test_the_protocols_of_cargo_train_on_the_same_and_test_on_platforms(cargo):
    everything = load("cargo", cargo)
    for kind, cameras in (("cargo-a-a", range(1, 6)), ("cargo-g-g", range(6, 14))):
        data = load(kind, cargo)
        assert data.name == kind
        assert data.train.paths == everything.train.paths
        for ours, whole in ((data.query, everything.query), (data.gallery, everything.gallery)):
            assert set(ours.camera.tolist()) <= set(cameras)
            assert len(ours) == sum(camera in cameras for camera in whole.camera)
    across = load("cargo-a-g", cargo)
    assert across.train.camera.tolist() == everything.train.camera.tolist()
    assert across.query.paths == everything.query.paths
    assert across.query.camera.tolist() == across.query.columns["platform"].tolist() == [2, 1, 2]
    # The usual rule there is the rule of the platform on all images: matches on the other platform, all others stay.
    distance = np.array([[float((q * 5 + g * 3) % 7) for g in range(5)] for q in range(3)])
    sides = "query", "gallery"
    values = {
        name: [[getattr(getattr(data, side), label) for side in sides] for label in ("identity", "camera")]
        for name, data in (("across", across), ("all", everything))
    }
    platform = tuple(getattr(everything, side).columns["platform"] for side in sides)
    (q, g), cameras = values["across"]
    expected = evaluate_ranking(
        distance, q, g, *values["all"][1], exclude="identity&platform", columns={"platform": platform}
    )
    assert evaluate_ranking(distance, q, g, *cameras).as_dict() == expected.as_dict()


def test_cargo_of_another_layout_shows_what_is_expected(tmp_path):
    root = write(tmp_path / "set", "train/anna/1.jpg", "train/bert/1.jpg", "query/c/1.jpg", "gallery/c/2.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)CARGO: expected\nCARGO/\n  train/    Cam1/Cam1_day.*no train/Cam1"
    ):
        load("cargo", root)
    assert load("auto", root).notes[0].startswith("read as folders train, query and gallery")


LISTS = {
    "exp1_aerial_to_cctv": "query/P0001T02140A1/P0001T02140A1C0F91.jpg\n"
    "gallery/P0001T02140A1/P0001T02140A1C3F31.jpg\n\n",
    "exp5_wearable_to_aerial": "query\\P0001T02140A1\\P0001T02140A1C2F5.jpg\r\n"
    "gallery/P0001T02140A1/P0001T02140A1C0F61.jpg\n",
}


@pytest.fixture
def drone(tmp_path):
    return write(
        tmp_path / "AG-ReID.v2",
        "train_all/P0001T04041A0/P0001T04041A0C0F31.jpg", "train_all/P0001T04041A2/P0001T04041A2C3F61.jpg",
        "train_all/P0001T04041A0/P0001T04041A0C2F7.jpg", "query/P0001T02140A1/P0001T02140A1C0F91.jpg",
        "query/P0001T02140A1/P0001T02140A1C2F5.jpg", "gallery/P0001T02140A1/P0001T02140A1C3F31.jpg",
        "gallery/P0001T02140A1/P0001T02140A1C0F61.jpg", **LISTS,
    )  # fmt: skip


def test_ag_reid_v2(drone, tmp_path):
    (drone / "qut_attribute_v8.mat").write_text("x")  # attributes, which are not read
    for kind, root in (("ag-reid-v2", drone), ("auto", tmp_path)):
        data = load(kind, root)
        assert data.identity_names == ("P0001T04041A0", "P0001T04041A2")  # the same number, but another day or altitude
        assert data.train.camera.tolist() == [0, 2, 3]
        assert data.query.identity.tolist() == [1021401] * 2
        assert data.query.camera.tolist() == [0, 2]
        assert sorted(data.gallery.camera.tolist()) == [0, 3]


@pytest.mark.parametrize("place", ["here", "above"])
def test_the_protocols_of_ag_reid_v2_are_its_lists(drone, place):
    if place == "above":
        for name in LISTS:
            (drone / f"{name}.txt").rename(drone.parent / f"{name}.txt")
    for kind, query, gallery in (("aerial-to-cctv", 0, 3), ("wearable-to-aerial", 2, 0)):
        data = load(f"ag-reid-v2-{kind}", drone)
        assert (data.query.camera.tolist(), data.gallery.camera.tolist()) == ([query], [gallery])
        assert data.train.paths == load("ag-reid-v2", drone).train.paths
    with pytest.raises(FileNotFoundError, match=r"(?s)AG-ReID.v2/\n  train_all/.*holds no exp4_cctv_to_aerial\.txt"):
        load("ag-reid-v2-cctv-to-aerial", drone)


@pytest.mark.parametrize("line", ["train_all/P0001T04041A0/P0001T04041A0C0F31.jpg", "query/1.jpg", "query"])
def test_a_bad_line_of_a_protocol_is_named(drone, line):
    write(drone, exp1_aerial_to_cctv=LISTS["exp1_aerial_to_cctv"] + line)
    with pytest.raises(
        ValueError, match=r"exp1_aerial_to_cctv\.txt, line 4: expected query/\.\.\. or gallery/\.\.\. and <iden"
    ):
        load("ag-reid-v2-aerial-to-cctv", drone)
    write(drone, exp1_aerial_to_cctv=LISTS["exp1_aerial_to_cctv"].replace("P0001T02140A1C0", "P0002T02140A1C0"))
    with pytest.raises(FileNotFoundError, match="holds none of the images of exp1_aerial_to_cctv"):
        load("ag-reid-v2-aerial-to-cctv", drone)


@pytest.fixture
def personx(tmp_path):
    images = [
        f"{background}/{folder}/{identity}_c{background}s1_{number:02d}.jpg"
        for background in (4, 5)
        for folder, identity, numbers in (
            ("bounding_box_train", "0004", (1, 10, 19, 36)), ("bounding_box_train", "0006", (28,)),
            ("query", "0001", (14,)), ("bounding_box_test", "0001", (1, 36)),
        )
        for number in numbers
    ]  # fmt: skip
    return write(tmp_path / "PersonX_v1", *images)


def test_personx_knows_the_angles(personx, tmp_path):
    data = load("personx-45", tmp_path)
    assert data.identity_names == ("0004", "0006")
    assert data.train.camera.tolist() == [4] * 5 + [5] * 5
    # From the left over the front to the right; 36 is 10 degrees short of the left again; 28 is the back.
    assert data.train.viewpoint_name[:5] == ("270", "0", "90", "260", "180")
    assert data.classes == ViewpointClasses.of_angles(8)
    assert [data.classes.names[view] for view in data.train.viewpoint[:5]] == ["270°", "0°", "90°", "270°", "180°"]
    assert data.query.viewpoint_name == ("40", "40")
    assert not data.train.columns
    # The face of the mirrored picture looks to the other side.
    for label in data.train.viewpoint_name:
        x, mirrored = (math.sin(math.radians(angle)) for angle in (float(label), 360 - float(label)))
        assert x == pytest.approx(-mirrored)


@pytest.mark.parametrize("kind", ["personx-45", "auto"])
def test_personx_takes_the_bins_that_are_declared(personx, kind):
    data = load(kind, personx, viewpoints=ViewpointClasses.of_angles(12), viewpoint_labels="soft")
    assert data.num_viewpoints == 12
    assert data.train.viewpoint_weight[3] == pytest.approx([0] * 8 + [1 / 3, 2 / 3, 0, 0])
    with pytest.raises(ValueError, match=r"viewpoints: front, back were given; personx-45 has its own, 0°, 45°"):
        load("personx-45", personx, viewpoints=ViewpointClasses(("front", "back")))


def test_personx_names_what_does_not_fit(personx):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)PersonX_v1/\n  4/  \(a background\).*5/  6/\n.*no 6/bounding_box_tr"
    ):
        load("personx-456", personx)
    write(personx, "4/query/0001_c4s1_37.jpg")
    with pytest.raises(
        ValueError, match=r"viewpoint 37 was given in the name of .*0001_c4s1_37.jpg; allowed are 1 to 36"
    ):
        load("personx-45", personx)
    write(personx, "4/query/0001_c4.jpg")
    with pytest.raises(ValueError, match=r"0001_c4.jpg must begin with <identity>_c<camera>s1_<viewpoint>, numbers"):
        load("personx-45", personx)
