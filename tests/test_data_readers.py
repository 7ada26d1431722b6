import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vareid_ext.data import READERS, load_data
from vareid_ext.training.command_line import parse

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
            if not file.endswith((".jpg", ".png", ".gif", ".pgm", ".jfif", ".JPEG", ".tga")):
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
    (note,) = data.notes
    assert "2 junk" in note
    assert note in data.summary()


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
    assert not data.same_people  # 0 is somebody else in training


@pytest.mark.parametrize("line", ["0000/0000_000_01_x_0.jpg", "0000/picture.jpg 0", "0000/0000_000_01_x.jpg one"])
def test_msmt17_names_a_bad_line(tmp_path, line):
    write(tmp_path, MSMT17, MSMT17_LISTS | {"list_query.txt": f"{MSMT17_LISTS['list_query.txt']}{line}\n"})
    with pytest.raises(ValueError, match=r"list_query\.txt, line 2"):
        load("msmt17", tmp_path)


def test_msmt17_without_image_folders(tmp_path):
    write(tmp_path, {}, MSMT17_LISTS)
    with pytest.raises(FileNotFoundError, match="holds neither train nor mask_train_v2"):
        load("msmt17", tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind not in ("synthetic", "manifest", "auto")])
def test_a_wrong_path_shows_what_was_expected_and_found(tmp_path, kind):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").write_bytes(b"")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(FileNotFoundError) as caught:
        load(kind, tmp_path)
    message = str(caught.value)
    own = {"msmt17": "list_train.txt", "veri776": "image_train", "ltcc": "094_1_c9_015833.png", "prcc": "test/C/"}
    own |= {"prcc-same-clothes": "test/C/", **{f"vehicleid-{n}": f"test_list_{n}.txt" for n in (800, 1600, 2400)}}
    own |= {kind: "Cam2_day_2519_320.jpg" for kind in READERS if kind.startswith("cargo")}
    own |= {kind: "exp1_aerial_to_cctv.txt" for kind in READERS if kind.startswith("ag-reid")}
    expected = "vehicle_info.txt" if kind.startswith("veri-wild") else own.get(kind, "bounding_box_train")
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
    with pytest.raises(FileNotFoundError, match=f"{split} has no images"):
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
    data = load("market1501", root, viewpoint_file=labels)
    assert data.train.viewpoint.tolist() == [0, 2, -1]
    assert data.train.viewpoint_name == ("front_side", "back", "")
    assert data.train.viewpoint_weight is None
    assert data.query.viewpoint.tolist() == [1, -1]
    assert data.subclass_mask().tolist() == [[True, False, True], [True, True, True]]
    assert "2 of 3 training images have viewpoint labels" in data.summary()

    soft = load("market1501", root, viewpoint_file=labels, viewpoint_labels="soft")
    np.testing.assert_allclose(soft.train.viewpoint_weight, [[0.5, 0.5, 0], [0, 0, 1], [1 / 3] * 3])
    assert soft.subclass_mask().tolist() == [[True, True, True], [True, True, True]]
    assert soft.query.viewpoint_weight is None
    assert "2 of 3 training images have soft viewpoint labels" in soft.summary()


LAYOUTS = {"market1501": MARKET, "dukemtmc-reid": DUKE, "cuhk03-np-labeled": CUHK03, "cuhk03-np-detected": CUHK03}


def write_as(kind, folder, layout):
    setting = kind.rpartition("-")[2] if kind.startswith("cuhk03") else ""
    write(folder / setting, layout)
    return folder / setting


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_usual_image_suffix_is_taken(tmp_path, kind):
    more = [f"0100_c1_{place}{suffix}" for place, suffix in enumerate((".gif", ".pgm", ".jfif", ".JPEG", ".tga"))]
    base = write_as(kind, tmp_path, LAYOUTS[kind] | {"bounding_box_train": more})
    data = load(kind, tmp_path)
    assert names(data.train) == sorted(more)
    assert data.identity_names == ("0100",)
    assert (base / "bounding_box_train").is_dir()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_not_taken_is_counted_and_named(tmp_path, kind):
    base = write_as(kind, tmp_path, LAYOUTS[kind])
    before = load(kind, tmp_path)
    for file in ("._0002_c1s1_000451_03.jpg", ".DS_Store", "desktop.ini", "thumbs.DB"):
        (base / "query" / file).write_bytes(b"")
    (base / "query" / "__MACOSX").mkdir()
    assert load(kind, tmp_path).notes == before.notes
    for file in ("0001_c1_7.heic", "0001_c1_8.svg", "0001_c1_9"):
        (base / "query" / file).write_bytes(b"")
    (base / "bounding_box_test" / "0001").mkdir()
    data = load(kind, tmp_path)
    assert len(data.query) == len(before.query)
    (note,) = set(data.notes) - set(before.notes)
    assert all(part in note for part in ("4", "0001_c1_7.heic", "0001_c1_8.svg", "0001_c1_9"))
    assert note in data.summary()


def test_names_that_are_no_unicode_can_be_printed(tmp_path):
    write(tmp_path, MARKET)
    (tmp_path / "query" / os.fsdecode(b"\xff\xfe.heic")).write_bytes(b"")
    assert b"ff\\udcfe.heic" in load("market1501", tmp_path).summary().encode()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("inside", ["0001/0001_c1s1_001051_00.jpg", "0001_c1s1_001051_00.heic"])
def test_a_folder_of_anything_else_shows_the_usual_tree_and_itself(tmp_path, kind, inside):
    base = write_as(kind, tmp_path, LAYOUTS[kind] | {"query": []})
    (base / "query" / inside).parent.mkdir(exist_ok=True)
    (base / "query" / inside).write_bytes(b"")
    with pytest.raises(FileNotFoundError) as caught:
        load(kind, tmp_path)
    for part in (str(base / "query"), os.path.basename(inside), "bounding_box_test", "found instead"):
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [f"{2**63}_c1_0.jpg", f"{10**30}_c1_0.jpg", f"0001_c{2**63}_0.jpg", f"0001_c{'1' * 200}_0.jpg", "-2_c1_0.jpg",
     "\N{ARABIC-INDIC DIGIT TWO}_c1_0.jpg", "0001_c\N{SUPERSCRIPT TWO}_0.jpg", "_c1_0.jpg"],
)  # fmt: skip
def test_numbers_in_file_names_have_64_bits(tmp_path, kind, name):
    write_as(kind, tmp_path, LAYOUTS[kind] | {"bounding_box_test": ["999999999999999999_c999999999999999999_0.jpg"]})
    data = load(kind, tmp_path)
    assert data.gallery.identity.tolist() == data.gallery.camera.tolist() == [10**18 - 1]
    base = write_as(kind, tmp_path / "other", LAYOUTS[kind] | {"query": [name]})
    with pytest.raises(ValueError, match=r"query.*_c"):
        load(kind, tmp_path / "other")
    assert base.is_dir()


def test_msmt17_lists_may_come_from_any_editor(tmp_path):
    root = write(tmp_path, MSMT17, MSMT17_LISTS)
    expected = load("msmt17", root)
    for name, text in MSMT17_LISTS.items():
        changed = text.replace("0000/", "0000\\", 1).replace(" ", "  \t").replace("\n", " \r\n")
        (root / name).write_bytes(b"\xef\xbb\xbf" + changed.encode())
    data = load("msmt17", root)
    for split in ("train", "query", "gallery"):
        old, new = getattr(expected, split), getattr(data, split)
        assert new.paths == old.paths
        assert new.identity.tolist() == old.identity.tolist()
        assert new.camera.tolist() == old.camera.tolist()


@pytest.mark.parametrize(
    "line",
    [f"0000/0000_000_01_x_0.jpg {10**30}", f"0000/0000_000_{10**30}_x_0.jpg 0", "0000/0000_000_01_x_0.jpg -1",
     "0000/0000_000_01_x_0.jpg \N{SUPERSCRIPT TWO}", "7"],
)  # fmt: skip
def test_msmt17_numbers_have_64_bits(tmp_path, line):
    write(tmp_path, MSMT17, MSMT17_LISTS | {"list_query.txt": f"{MSMT17_LISTS['list_query.txt']}{line}\n"})
    with pytest.raises(ValueError, match=r"list_query\.txt, line 2"):
        load("msmt17", tmp_path)


def test_an_msmt17_list_that_is_no_text_or_no_file_is_named(tmp_path):
    write(tmp_path, MSMT17, MSMT17_LISTS)
    (tmp_path / "list_val.txt").write_bytes(b"\xff\xfe0\0")
    with pytest.raises(ValueError, match=r"list_val\.txt"):
        load("msmt17", tmp_path)
    (tmp_path / "list_val.txt").unlink()
    os.mkfifo(tmp_path / "list_val.txt")
    with pytest.raises(FileNotFoundError, match=r"list_val\.txt"):
        load("msmt17", tmp_path)


def test_msmt17_files_of_operating_systems_are_no_images(tmp_path):
    more = f"0000/._0000_000_01_0113morning_0021_0.jpg 0\n{MSMT17_LISTS['list_query.txt']}"
    data = load("msmt17", write(tmp_path, MSMT17, MSMT17_LISTS | {"list_query.txt": more}))
    assert len(data.query) == 1
    (note,) = data.notes
    assert "0000/._0000_000_01_0113morning_0021_0.jpg" in note


def test_msmt17_images_of_another_layout_show_the_usual_tree(tmp_path):
    flat = {"train": MSMT17["train/0000"] + MSMT17["train/0001"], "test": MSMT17["test/0000"]}
    write(tmp_path, flat, MSMT17_LISTS)
    with pytest.raises(FileNotFoundError) as caught:
        load("msmt17", tmp_path)
    for part in ("MSMT17_V1/", str(tmp_path / "train"), MSMT17["train/0000"][0], "list_train.txt"):
        assert part in str(caught.value)


def test_a_pipe_among_the_images_is_unreadable(tmp_path):
    write(tmp_path, MARKET)
    os.mkfifo(tmp_path / "query" / "0009_c1s1_000001_00.jpg")
    with pytest.raises(ValueError, match=r"0009_c1s1_000001_00\.jpg"):
        load("market1501", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("market", "x"), "kind: 'market' was given; allowed are synthetic, market1501"),
        (("market1501", None), "root: nothing was given; kind market1501 needs"),
        (("manifest", None), "root: nothing was given; kind manifest needs"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


def test_viewpoint_labels_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"viewpoint_labels: .fuzzy. was given; allowed are hard, soft"):
        load("market1501", tmp_path, viewpoint_labels="fuzzy")


def documented_reader():
    """`read_flat` of docs/extending.md."""
    section = (Path(__file__).parents[1] / "docs" / "extending.md").read_text().partition("## A reader\n")[2]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names["read_flat"]


def test_a_new_reader_is_one_function_and_one_line(tmp_path, monkeypatch, capsys):
    for name in ("train-7-1", "train-9-2", "query-3-1", "gallery-3-2"):
        TINY.save(tmp_path / f"{name}.jpg")
    with pytest.raises(ValueError, match=r"data\.kind: 'flat' was given; allowed are synthetic, .*manifest"):
        parse(["--data.kind=flat", f"--root={tmp_path}"])
    monkeypatch.setitem(READERS, "flat", documented_reader())

    data = load("flat", tmp_path)
    assert data.identity_names == ("7", "9")
    assert data.train.camera.tolist() == [1, 2]
    assert data.query.viewpoint.tolist() == [-1]
    (tmp_path / "train-7-3.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1 unreadable images"):
        load("flat", tmp_path)

    assert parse(["--data.kind=flat", f"--root={tmp_path}"]).config.data.kind == "flat"
    with pytest.raises(ValueError, match=r"data\.root: nothing was given; data\.kind flat needs"):
        parse(["--data.kind=flat"])
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "auto, flat" in " ".join(capsys.readouterr().out.split())
