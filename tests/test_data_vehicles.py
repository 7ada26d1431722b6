"""Readers of vehicles, and of people who change their clothes, on small made-up trees."""

import pytest
from PIL import Image

from vareid_ext.data import DivisionSettings, load_data
from vareid_ext.data.readers.layout import ImageEntry, build_data
from vareid_ext.data.readers.veri776 import ORIENTATIONS

POINTS = " ".join(["-1"] * 40)


def write(root, *paths, **lists):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8), (len(path), 20, 30)).save(root / path)
    for name, text in lists.items():
        (root / name.replace("__", "/")).with_suffix(".txt").write_text(text)
    return root


def load(kind, root, **options):
    return load_data(kind, root, progress=False, **options)


@pytest.fixture
def veri(tmp_path):
    return write(
        tmp_path / "VeRi",
        "image_train/0001_c001_00016450_0.jpg", "image_train/0001_c020_00016470_0.jpg", "image_train/0005_c002_0_0.jpg",
        "image_query/0002_c002_00030600_0.jpg", "image_test/0002_c002_00030600_0.jpg", "image_test/0002_c003_1_0.jpg",
    )  # fmt: skip


def test_veri_776(veri, tmp_path):
    write(
        veri,
        keypoint_train=f"VeRi/image_train/0001_c001_00016450_0.jpg {POINTS} 3\n\n"
        f"image_train\\0005_c002_0_0.jpg {POINTS} 7\n",
        keypoint_test=f"/data/image_test/0002_c003_1_0.jpg {POINTS} 0\ngone.jpg {POINTS} 1\n",
    )
    for kind, root in (("veri776", veri), ("auto", tmp_path)):
        data = load(kind, root)
        assert data.classes.names == ORIENTATIONS
        assert data.identity_names == ("0001", "0005")
        assert data.train.camera.tolist() == [1, 20, 2]
        assert data.train.viewpoint_name == ("left_front", "", "right_rear")
        assert data.train.viewpoint.tolist() == [3, -1, 7]
        assert data.gallery.viewpoint.tolist() == [-1, 0]
        assert data.query.identity.tolist() == [2]
        assert "1 viewpoints that belong to no image left out: gone.jpg" in data.notes


def test_an_image_of_a_query_is_once_in_the_gallery():
    entries = {split: [ImageEntry(f"{path}.jpg", "1", 1) for path in paths] for split, paths in
               (("train", "a"), ("query", "b"), ("gallery", "bc"))}  # fmt: skip
    assert len(build_data("made up", entries).gallery) == 2
    entries["gallery"].append(entries["gallery"][0]._replace(camera=1))
    with pytest.raises(ValueError, match=r"b\.jpg is given twice, in gallery"):
        build_data("made up", entries)


def test_veri_776_without_orientations(veri):
    data = load("veri776", veri)
    assert data.num_train_viewpoints_known == 0
    assert data.num_viewpoints == 8


@pytest.mark.parametrize(
    "line", [f"a.jpg {POINTS} 8", f"a.jpg {POINTS} -1", f"a.jpg {POINTS}", "a.jpg 3", f"{POINTS} 3"]
)
def test_veri_776_names_a_bad_line(veri, line):
    write(veri, keypoint_train=f"image_train/0001_c001_00016450_0.jpg {POINTS} 3\n{line}\n")
    with pytest.raises(
        ValueError, match=r"keypoint_train\.txt, line 2: expected an image, 40 coordinates and an orient"
    ):
        load("veri776", veri)


def test_veri_776_with_two_orientations_of_an_image(veri):
    write(veri, keypoint_train=f"a.jpg {POINTS} 3\na.jpg {POINTS} 4\n")
    with pytest.raises(ValueError, match=r"line 2: 'a.jpg' has another orientation before"):
        load("veri776", veri)


@pytest.fixture
def wild(tmp_path):
    root = tmp_path / "VERI-Wild"
    (root / "train_test_split").mkdir(parents=True)
    vehicles = [("00001", "000001"), ("00001", "000002"), ("00002", "000003"), ("00007", "000004"), ("00007", "000005")]
    lists = {
        "vehicle_info": "id/image;Camera ID;Time;Model;Type;Color\n"
        + "".join(f"{v}/{i};{n + 10};2018-03-11 07:03:21;;;\n" for n, (v, i) in enumerate(vehicles)),
        "train_list": "00001/000001.jpg\n00001/000002.jpg 0\n00002/000003.jpg\n",
        "test_3000_query": "00007/000004.jpg\n",
        "test_3000": "00007/000005.jpg\n\n",
    }
    write(root, *(f"images/{v}/{i}.jpg" for v, i in vehicles))
    return write(root, **{f"train_test_split__{name}": text for name, text in lists.items()})


def test_veri_wild(wild, tmp_path):
    data = load("veri-wild-3000", tmp_path)
    assert data.identity_names == ("00001", "00002")
    assert data.train.camera.tolist() == [10, 11, 12]
    assert (data.query.camera.tolist(), data.gallery.camera.tolist()) == ([13], [14])
    assert data.query.identity.tolist() == data.gallery.identity.tolist() == [7]
    with pytest.raises(FileNotFoundError, match=r"holds no train_test_split/test_5000_query\.txt"):
        load("veri-wild-5000", wild)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("vehicle_info", "00009/9", r"vehicle_info\.txt, line 7: expected <vehicle>/<image>;<camera>"),
        ("train_list", "picture.jpg", r"train_list\.txt, line 4: expected <vehicle>/<image>"),
        ("test_3000", "00007/000099.jpg", r"test_3000\.txt, line 3: vehicle_info\.txt has no camera of"),
    ],
)
def test_veri_wild_names_a_bad_line(wild, name, line, said):
    path = wild / "train_test_split" / f"{name}.txt"
    path.write_text(path.read_text().rstrip("\n") + f"\n{'' if name != 'test_3000' else chr(10)}{line}\n")
    with pytest.raises(ValueError, match=said):
        load("veri-wild-3000", wild)


def test_ltcc(tmp_path):
    root = write(
        tmp_path / "LTCC_ReID",
        "train/094_1_c9_015833.png", "train/094_2_c9_015834.png", "train/001_1_c12_000001.png",
        "query/000_1_c11_013367.png", "test/000_1_c10_013368.png", "test/000_3_c11_013369.png",
    )  # fmt: skip
    data = load("ltcc", root)
    assert data.identity_names == ("001", "094")
    assert data.train.columns["clothes"].tolist() == [1, 1, 2]
    assert data.train.camera.tolist() == [12, 9, 9]
    assert data.gallery.columns["clothes"].tolist() == [1, 3]
    write(root, "query/0001_c1.png")
    with pytest.raises(ValueError, match=r"0001_c1.png must begin with <identity>_<clothes>_c<camera>, numbers"):
        load("ltcc", root)


def test_prcc(tmp_path):
    root = write(
        tmp_path / "prcc" / "rgb",
        "train/001/A_cropped_rgb001.jpg", "train/001/C_cropped_rgb001.jpg", "train/004/B_cropped_rgb001.jpg",
        "train/004/D_cropped_rgb001.jpg", "val/001/A_cropped_rgb002.jpg", "test/A/002/cropped_rgb001.jpg",
        "test/A/003/cropped_rgb001.jpg", "test/B/002/cropped_rgb001.jpg", "test/C/003/cropped_rgb001.jpg",
    )  # fmt: skip
    data = load("prcc", tmp_path)
    assert data.identity_names == ("001", "004")
    assert (data.train.camera.tolist(), data.train.columns["clothes"].tolist()) == ([1, 3, 2], [1, 2, 1])
    assert (data.query.identity.tolist(), data.query.columns["clothes"].tolist()) == ([3], [2])
    assert data.gallery.identity.tolist() == [2, 3]
    assert "train/004/D_cropped_rgb001.jpg" in data.notes[0]
    same = load("prcc-same-clothes", root)
    assert (same.query.identity.tolist(), same.query.camera.tolist(), same.query.columns["clothes"].tolist()) == (
        [2], [2], [1],
    )  # fmt: skip


def test_vehicleid(tmp_path):
    root = tmp_path / "VehicleID_V1.0"
    (root / "train_test_split").mkdir(parents=True)
    write(root, *(f"image/{n:07d}.jpg" for n in range(1, 10)))
    test = [(4, 7), (5, 7), (6, 7), (7, 9), (8, 9), (9, 11)]
    write(
        root,
        train_test_split__train_list="0000001 15\n0000002 15\n0000003 2\n\n",
        train_test_split__test_list_800="".join(f"{image:07d} {vehicle}\n" for image, vehicle in test),
    )
    drawn = set()
    for seed in range(20):
        data = load("vehicleid-800", root, division=DivisionSettings(seed=seed))
        assert sorted(data.gallery.identity.tolist()) == [7, 9, 11]
        assert sorted(data.query.identity.tolist()) == [7, 7, 9]
        assert sorted(path[-11:-4] for path in (*data.query.paths, *data.gallery.paths)) == [
            f"{image:07d}" for image, _ in test
        ]
        drawn.add(data.gallery.paths)
    assert len(drawn) == 6  # all ways to draw one of three and one of two
    assert load("vehicleid-800", root).gallery.paths == load("vehicleid-800", root).gallery.paths
    assert load("auto", tmp_path, division=DivisionSettings(seed=19)).gallery.paths == data.gallery.paths
    assert data.identity_names == ("2", "15")
    write(root, train_test_split__test_list_800="0000004 7\n0000005\n")
    with pytest.raises(ValueError, match=r"test_list_800\.txt, line 2: expected an image and its vehicle"):
        load("vehicleid-800", root)


def test_lists_that_are_no_text_are_named(wild, veri):
    (wild / "train_test_split" / "test_3000.txt").write_bytes(b"00007/000005.jpg\n\xff\n")
    with pytest.raises(ValueError, match=r"VERI-Wild .*test_3000\.txt, line \d+: it is not text in UTF-8"):
        load("veri-wild-3000", wild)
    (veri / "keypoint_train.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"VeRi-776: .*keypoint_train\.txt, line \d+: it is not text in UTF-8"):
        load("veri776", veri)


def test_an_image_in_a_list_twice(tmp_path):
    (tmp_path / "train_test_split").mkdir()
    write(
        tmp_path,
        *(f"image/000000{n}.jpg" for n in range(1, 5)),
        train_test_split__train_list="0000001 1\n0000002 2\n",
        train_test_split__test_list_800="0000003 3\n0000004 3\n0000003 4\n",
    )
    with pytest.raises(ValueError, match=r"vehicleid-800: the image .*0000003\.jpg is given twice, in \w+ \(identity "):
        load("vehicleid-800", tmp_path)


def test_a_query_may_be_in_the_gallery_under_its_camera_and_no_other(tmp_path):
    query = [ImageEntry("q.jpg", "3", 1)]
    entries = {"train": [ImageEntry("a.jpg", "1", 1)], "query": query, "gallery": [*query, ImageEntry("g.jpg", "3", 2)]}
    assert len(build_data("made", entries).gallery) == 2
    for again in (query[0]._replace(camera=2), query[0]._replace(identity="4"), ImageEntry("a.jpg", "3", 1)):
        with pytest.raises(ValueError, match=rf"made: the image {again.path} is given twice, in .* and in gallery"):
            build_data("made", {**entries, "gallery": [again]})
