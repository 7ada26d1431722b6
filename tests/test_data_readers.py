import numpy as np
import pytest
from PIL import Image

from vareid_ext.data import KINDS, load_data
from vareid_ext.data.readers import read_cuhk03

TINY = Image.new("RGB", (4, 8), (10, 200, 30))

MARKET = {
    "bounding_box_train": [
        "0002_c1s1_000451_03.jpg",
        "0002_c2s1_000452_03.jpg",
        "0010_c6s1_000001_01.jpg",
        "Thumbs.db",
    ],
    "query": ["0001_c1s1_001051_00.jpg", "0003_c2s1_001051_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg",
        "-1_c6s4_000401_03.jpg",
        "0000_c3s1_000151_01.jpg",
        "0001_c2s1_001051_00.jpg",
        "0003_c1s1_001051_00.jpg",
        "Thumbs.db",
    ],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0005_c8_f0046182.jpg"],
    "query": ["0002_c1_f0044158.jpg"],
    "bounding_box_test": ["0002_c2_f0044158.jpg", "7140_c4_f0044158.jpg"],
}
CUHK03 = {
    "bounding_box_train": ["0003_c1_21.png", "0003_c2_26.png", "1258_c10_08.png"],
    "query": ["0001_c1_1.png"],
    "bounding_box_test": ["0001_c2_2.png"],
}
MSMT17 = {
    "train/0000": ["0000_000_01_0303morning_0008_0.jpg", "0000_001_14_0303noon_0008_1.jpg"],
    "train/0001": ["0001_000_03_0303morning_0008_0.jpg"],
    "test/0000": ["0000_000_01_0113morning_0021_0.jpg", "0000_001_15_0113morning_0021_0.jpg"],
}
MSMT17_LISTS = {
    "list_train.txt": "0000/0000_000_01_0303morning_0008_0.jpg 0\n0001/0001_000_03_0303morning_0008_0.jpg 1\n",
    "list_val.txt": "0000/0000_001_14_0303noon_0008_1.jpg 0\n",
    "list_query.txt": "0000/0000_000_01_0113morning_0021_0.jpg 0\n",
    "list_gallery.txt": "0000/0000_001_15_0113morning_0021_0.jpg 0\n\n",
}


def write(folder, layout, lists=None):
    for name, files in layout.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            if file.endswith("db"):
                (folder / name / file).write_bytes(b"not an image")
            else:
                TINY.save(folder / name / file)
    for name, text in (lists or {}).items():
        (folder / name).write_text(text)
    return folder


def load(kind, root, **options):
    return load_data(kind, root, progress=False, **options)


def names(images):
    return [path.rsplit("/", 1)[1] for path in images.paths]


@pytest.mark.parametrize("inside", ["", "Market-1501-v15.09.15", "market1501"])
def test_market1501(tmp_path, inside):
    write(tmp_path / inside, MARKET)
    data = load("market1501", tmp_path)
    assert names(data.train) == MARKET["bounding_box_train"][:3]
    assert data.train.identity.tolist() == [0, 0, 1]
    assert data.identity_names == ("0002", "0010")
    assert data.train.camera.tolist() == [1, 2, 6]
    assert data.query.identity.tolist() == [1, 3]
    # Junk (-1) is gone, the distractor (0) is in the gallery.
    assert data.gallery.identity.tolist() == [0, 1, 3]
    assert data.gallery.camera.tolist() == [3, 2, 1]
    assert set(data.train.viewpoint.tolist()) == {-1}
    assert data.train.load(0).size == (4, 8)
    assert "0 of 3 training images have viewpoint labels" in data.summary()
    assert data.subclass_mask().all()


def test_dukemtmc(tmp_path):
    write(tmp_path / "DukeMTMC-reID", DUKE)
    data = load("dukemtmc-reid", tmp_path)
    assert data.identity_names == ("0001", "0005")
    assert data.train.camera.tolist() == [2, 8]
    assert data.query.identity.tolist() == [2]
    assert data.gallery.identity.tolist() == [2, 7140]


@pytest.mark.parametrize("setting", ["labeled", "detected"])
def test_cuhk03(tmp_path, setting):
    write(tmp_path / "cuhk03-np" / setting, CUHK03)
    for root in (tmp_path, tmp_path / "cuhk03-np"):
        data = load(f"cuhk03-np-{setting}", root)
        assert data.name == f"cuhk03-np-{setting}"
        assert data.identity_names == ("0003", "1258")
        assert data.train.camera.tolist() == [1, 2, 10]
        assert len(data.query) == len(data.gallery) == 1
    other = "detected" if setting == "labeled" else "labeled"
    with pytest.raises(FileNotFoundError, match=f"no {other}/query"):
        load(f"cuhk03-np-{other}", tmp_path)


def test_cuhk03_setting_is_checked(tmp_path):
    with pytest.raises(ValueError, match="labeled or detected"):
        read_cuhk03(tmp_path, "manual")


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17(tmp_path, train, test):
    layout = {key.replace("train", train).replace("test", test): files for key, files in MSMT17.items()}
    write(tmp_path / "MSMT17_V1", layout, MSMT17_LISTS)
    data = load("msmt17", tmp_path)
    # The validation list belongs to the training split.
    assert len(data.train) == 3
    assert data.train.identity.tolist() == [0, 1, 0]
    assert data.identity_names == ("0", "1")
    assert data.train.camera.tolist() == [1, 3, 14]
    assert data.query.identity.tolist() == data.gallery.identity.tolist() == [0]
    assert data.gallery.camera.tolist() == [15]


@pytest.mark.parametrize("line", ["0000/0000_000_01_x_0.jpg", "0000/picture.jpg 0", "0000/0000_000_01_x.jpg one"])
def test_msmt17_names_a_bad_line(tmp_path, line):
    write(tmp_path, MSMT17, MSMT17_LISTS | {"list_query.txt": f"{MSMT17_LISTS['list_query.txt']}{line}\n"})
    with pytest.raises(ValueError, match=r"list_query\.txt, line 2"):
        load("msmt17", tmp_path)


def test_msmt17_without_image_folders(tmp_path):
    write(tmp_path, {}, MSMT17_LISTS)
    with pytest.raises(FileNotFoundError, match="holds neither train nor mask_train_v2"):
        load("msmt17", tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("synthetic", "manifest")])
def test_a_wrong_path_shows_what_was_expected_and_found(tmp_path, kind):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").write_bytes(b"")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(FileNotFoundError) as caught:
        load(kind, tmp_path)
    message = str(caught.value)
    expected = "list_train.txt" if kind == "msmt17" else "bounding_box_train"
    for part in (expected, "found instead", str(tmp_path), "holiday/  beach.jpg", "note.txt"):
        assert part in message
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere/deep; .* holds:\n(.*\n)*  holiday"):
        load(kind, tmp_path / "nowhere" / "deep")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load(kind, tmp_path / "note.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\(nothing\)"):
        load(kind, tmp_path / "empty")


def test_a_half_unpacked_data_set_names_what_is_missing(tmp_path):
    write(tmp_path / "Market-1501-v15.09.15", {"bounding_box_train": MARKET["bounding_box_train"]})
    with pytest.raises(FileNotFoundError, match="holds no query, no bounding_box_test, but"):
        load("market1501", tmp_path)


def test_a_stray_image_name_is_an_error(tmp_path):
    write(tmp_path, MARKET | {"query": [*MARKET["query"], "person.jpg"]})
    with pytest.raises(ValueError, match=r"person\.jpg must begin with"):
        load("market1501", tmp_path)


@pytest.mark.parametrize("split", ["bounding_box_train", "query", "bounding_box_test"])
def test_an_empty_split_is_an_error(tmp_path, split):
    write(tmp_path, MARKET | {split: ["Thumbs.db"]})
    with pytest.raises(ValueError, match="has no images"):
        load("market1501", tmp_path)


def test_bad_images_stop_before_training_and_are_named(tmp_path):
    write(tmp_path, MARKET)
    bad = [
        tmp_path / "bounding_box_train" / "0010_c6s1_000001_01.jpg",
        tmp_path / "bounding_box_test" / "0003_c1s1_001051_00.jpg",
    ]
    for file in bad:
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="2 unreadable images") as caught:
        load("market1501", tmp_path)
    assert all(str(file) in str(caught.value) for file in bad)
    assert "0002_c1s1" not in str(caught.value)

    data = load("market1501", tmp_path, skip_bad_images=True)
    assert names(data.train) == MARKET["bounding_box_train"][:2]
    assert data.gallery.identity.tolist() == [0, 1]
    assert len(data.query) == 2
    assert data.skipped == tuple(map(str, bad))
    assert "2 unreadable images left out" in data.summary()
    assert load("market1501", tmp_path, check_images=False).num_identities == 2


def test_identities_stay_without_gaps_when_one_loses_all_its_images(tmp_path):
    write(tmp_path, MARKET)
    for file in (tmp_path / "bounding_box_train").glob("0002*"):
        file.write_bytes(b"")
    data = load("market1501", tmp_path, skip_bad_images=True)
    assert data.identity_names == ("0010",)
    assert data.train.identity.tolist() == [0]


def test_a_split_without_a_readable_image_is_an_error(tmp_path):
    write(tmp_path, MARKET)
    for file in (tmp_path / "query").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="every image of the query split is unreadable"):
        load("market1501", tmp_path, skip_bad_images=True)


def test_many_bad_images_are_not_all_listed(tmp_path):
    files = [f"{number:04d}_c1_0.jpg" for number in range(30)]
    write(tmp_path, DUKE | {"bounding_box_train": files})
    for file in files:
        (tmp_path / "bounding_box_train" / file).write_bytes(b"")
    with pytest.raises(ValueError, match="and 10 more"):
        load("dukemtmc-reid", tmp_path)


def test_viewpoint_labels_are_joined(tmp_path):
    root = write(tmp_path / "data", MARKET)
    labels = tmp_path / "views.csv"
    labels.write_text(
        "path,viewpoint\n0002_c1s1_000451_03.jpg,front_side\n0002_c2s1_000452_03.jpg,back\n"
        "0001_c1s1_001051_00.jpg,side\n"
    )
    data = load("market1501", root, viewpoint_labels=labels)
    assert data.train.viewpoint.tolist() == [0, 2, -1]
    assert data.train.viewpoint_name == ("front_side", "back", "")
    assert data.train.viewpoint_weight is None
    assert data.query.viewpoint.tolist() == [1, -1]
    assert data.subclass_mask().tolist() == [[True, False, True], [True, True, True]]
    assert "2 of 3 training images have viewpoint labels" in data.summary()

    soft = load("market1501", root, viewpoint_labels=labels, viewpoint_mode="soft")
    np.testing.assert_allclose(soft.train.viewpoint_weight, [[0.5, 0.5, 0], [0, 0, 1], [1 / 3] * 3])
    assert soft.subclass_mask().tolist() == [[True, True, True], [True, True, True]]
    assert soft.query.viewpoint_weight is None
    assert "2 of 3 training images have soft viewpoint labels" in soft.summary()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("market", "x"), "kind must be one of synthetic, market1501"),
        (("market1501", None), "root must be the folder"),
        (("manifest", None), "root must be the CSV file"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


def test_viewpoint_mode_is_checked(tmp_path):
    with pytest.raises(ValueError, match="viewpoint_mode must be one of hard, soft"):
        load("market1501", tmp_path, viewpoint_mode="fuzzy")
