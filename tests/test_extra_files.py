"""Keypoints, parsing, DensePose and views in files, against what was written into them; how they find their image."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vareid_ext.data import (
    BODY_PAIRS,
    ExtraFiles,
    ImageList,
    ReidDataset,
    SyntheticSettings,
    build_transform,
    collate,
    join_extras,
    load_data,
)
from vareid_ext.data.body_maps import GROUPS, group_classes, group_scores, load_iuv
from vareid_ext.data.keypoints import load_person, to_joints

HEIGHT, WIDTH = 40, 20
SMALL = SyntheticSettings(2, 1, 2, 1, 2, HEIGHT, WIDTH)


def images_of(*paths, loader=lambda _: Image.new("RGB", (WIDTH, HEIGHT))):
    unknown = np.full(len(paths), -1)
    return ImageList(
        identity=unknown, camera=unknown, viewpoint=unknown, paths=paths, viewpoint_name=("",) * len(paths),
        loader=loader,
    )  # fmt: skip


def joined(images, files, name, root=""):
    lists, notes = join_extras({"all": images}, files, {"all": [name]}, root)
    return lists["all"], notes


def loaded(images, name):
    return [np.asarray(images.load_extras(i, HEIGHT, WIDTH)[name]) for i in range(len(images))]


# Names of the joints in every order, as its publication lists them.
NAMES = {
    order: text.split()
    for order, text in {
        "cpm": "head neck rsho relb rwri lsho lelb lwri rhip rkne rank lhip lkne lank",
        "lsp": "rank rkne rhip lhip lkne lank rwri relb rsho lsho lelb lwri neck head",
        "mpii": "rank rkne rhip lhip lkne lank pelvis thorax neck head rwri relb rsho lsho lelb lwri",
        "openpose18": "head neck rsho relb rwri lsho lelb lwri rhip rkne rank lhip lkne lank reye leye rear lear",
        "body25": "head neck rsho relb rwri lsho lelb lwri midhip rhip rkne rank lhip lkne lank "
        "reye leye rear lear ltoe lsmall lheel rtoe rsmall rheel",
        "coco": "head leye reye lear rear lsho rsho lelb relb lwri rwri lhip rhip lkne rkne lank rank",
    }.items()
}
CPM = NAMES["cpm"]


def points_named(names):
    """Each joint at a place that its name alone decides."""
    every = sorted({name for names in NAMES.values() for name in names})
    return np.array([[every.index(name) % 7 + 1, every.index(name) + 1, 0.5] for name in names], np.float32)


@pytest.mark.parametrize("order", NAMES)
def test_joints_are_found_by_their_name_in_every_order(order):
    expected = points_named(CPM)
    if order == "coco":
        expected[1] = [*expected[[2, 5], :2].mean(axis=0), 0.5]
    np.testing.assert_array_equal(to_joints(points_named(NAMES[order]), order), expected)
    if order not in ("cpm", "lsp"):
        np.testing.assert_array_equal(to_joints(points_named(NAMES[order])), expected)


def test_coco_has_no_neck_and_perhaps_no_nose():
    points = points_named(NAMES["coco"])
    points[5, 2], points[0, 2], points[[1, 3], 2] = 0.2, 0, 0  # left shoulder, nose, left eye and ear
    joints = to_joints(points)
    assert joints[1, 2] == np.float32(0.2)
    np.testing.assert_allclose(joints[0], points[[2, 4]].mean(axis=0))
    points[1:5, 2] = 0
    assert to_joints(points)[0].tolist() == [0, 0, 0]
    points[:, 2] = [-0.1, *[1.3] * 16]  # as heat maps give
    assert {*to_joints(points)[2:, 2].tolist()} == {1}


@pytest.mark.parametrize(
    ("count", "order", "message"),
    [
        (14, "auto", "14 keypoints were given; allowed are 16, 17, 18 and 25; 14 may be in the order cpm or lsp"),
        (5, "auto", "5 keypoints were given; allowed are 16"),
        (16, "lsp", "16 keypoints were given; the order lsp has 14"),
    ],
)
def test_orders_that_do_not_fit_are_named(count, order, message):
    with pytest.raises(ValueError, match=message):
        to_joints(np.zeros((count, 3)), order)


def test_of_several_people_the_one_that_is_seen_most_counts():
    people = np.zeros((3, 14, 3), np.float32)
    people[0, :, :] = [50, 5, 1]  # outside
    people[1, :5] = [3, 4, 0.5]
    people[2, :9] = [5, 6, 0.4]
    assert np.array_equal(load_person(people, HEIGHT, WIDTH), people[2])
    with pytest.raises(
        ValueError, match=r"up to x = 50, y = 5 were given; the image has 20 x 40 pixels: .* another size"
    ):
        load_person(people[:1], HEIGHT, WIDTH)
    assert np.array_equal(load_person(people[:1] * [1, 1, 0], HEIGHT, WIDTH), people[0] * [1, 1, 0])  # nothing is seen


def test_keypoints_of_a_list_find_their_images(tmp_path):
    points = points_named(NAMES["coco"])
    people = [
        {"image_id": "query/a.jpg", "keypoints": points.ravel().tolist(), "score": 1.0},
        {"image_id": "b.jpg", "keypoints": (points * 0.5).ravel().tolist()},
        {"image_id": "b.jpg", "keypoints": (points * [1, 1, 0.1]).ravel().tolist()},
    ]
    images = images_of("root/query/a.jpg", "root/test/a.jpg", "root/test/b.jpg")
    coco = {
        "images": [{"id": 7, "file_name": "query/a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{**person, "image_id": 7 + (person["image_id"] == "b.jpg")} for person in people],
    }
    for content in (people, coco):
        (tmp_path / "pose.json").write_text(json.dumps(content))
        files = ExtraFiles(keypoints=str(tmp_path / "pose.json"), missing="neutral")
        found, notes = joined(images, files, "keypoints", "root")
        first, second, third = loaded(found, "keypoints")
        np.testing.assert_array_equal(first, to_joints(points))
        np.testing.assert_array_equal(second, np.zeros((14, 3)))
        np.testing.assert_array_equal(third, to_joints(points * 0.5))
        assert len(notes) == 1
        assert notes[0].startswith("1 of 3 images have no keypoints in ")
        assert found.extras["keypoints"].pairs == BODY_PAIRS
        with pytest.raises(ValueError, match=r"keypoints: 1 of 3 images have none in .*, such as root/test/a.jpg"):
            joined(images, replace(files, missing="error"), "keypoints", "root")


def test_a_file_name_that_fits_images_of_two_splits_is_no_ones(tmp_path):
    person = {"image_id": "a.jpg", "keypoints": points_named(NAMES["coco"]).ravel().tolist()}
    (tmp_path / "pose.json").write_text(json.dumps([person]))
    lists = {"query": images_of("root/query/a.jpg"), "gallery": images_of("root/test/a.jpg")}
    files = ExtraFiles(keypoints=str(tmp_path / "pose.json"))
    with pytest.raises(ValueError, match="2 of 2 images have none"):
        join_extras(lists, files, {"query": ["keypoints"], "gallery": ["keypoints"]}, "root")


def test_openpose_and_arrays_lie_as_the_images_do(tmp_path):
    points = points_named(NAMES["body25"])
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "a_keypoints.json").write_text(
        json.dumps({"people": [{"pose_keypoints_2d": points.ravel().tolist()}]})
    )
    (tmp_path / "query" / "b.json").write_text(json.dumps({"people": []}))
    np.save(tmp_path / "query" / "c.npy", points_named(NAMES["mpii"]))
    # The data set's own folder lies in the root, or is the root.
    for folder in ("root", "root/Market"):
        images = images_of(*(f"{folder}/query/{name}.jpg" for name in "abc"), f"{folder}/test/d.jpg")
        files = ExtraFiles(keypoints=str(tmp_path), missing="neutral")
        found, notes = joined(images, files, "keypoints", "root")
        first, nobody, third, none = loaded(found, "keypoints")
        np.testing.assert_array_equal(first, points_named(CPM))
        np.testing.assert_array_equal(third, points_named(CPM))
        assert not nobody.any()
        assert not none.any()
        assert notes[0].startswith("2 of 4 images have no keypoints")


def test_mmpose_lies_as_the_images_do(tmp_path):
    points = points_named(NAMES["coco"])
    people = [{"keypoints": points[:, :2].tolist(), "keypoint_scores": points[:, 2].tolist(), "bbox_score": 1.0}]
    contents = {"a": people, "b": {"meta_info": {}, "instance_info": people}, "c": []}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    images = images_of(*(f"root/{name}.jpg" for name in contents))
    files = ExtraFiles(keypoints=str(tmp_path), missing="neutral")
    first, second, nobody = loaded(joined(images, files, "keypoints", "root")[0], "keypoints")
    np.testing.assert_array_equal(first, to_joints(points))
    np.testing.assert_array_equal(second, to_joints(points))
    assert not nobody.any()
    people[0]["keypoint_scores"].pop()
    (tmp_path / "a.json").write_text(json.dumps(people))
    with pytest.raises(ValueError, match="keypoints of 'people'"):
        joined(images, files, "keypoints", "root")


@pytest.mark.parametrize("prefix", ["", "data.extras."])
def test_advice_names_the_option_of_the_command(tmp_path, prefix):
    files = ExtraFiles(parsing=str(tmp_path))
    with pytest.raises(ValueError, match=rf"\(--{prefix}missing neutral goes on"):
        join_extras({"all": images_of("root/a.jpg")}, files, {"all": ["parsing"]}, "root", prefix)


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
def test_the_public_joints_of_market_1501(tmp_path, suffix):
    """One column an image in sorted order, junk included: 14 x, then 14 y, counted from 1."""
    rng, paths = np.random.default_rng(0), []
    columns = {}
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        names = ["-1_c1.jpg", "0002_c1.jpg", "0001_c2.jpg.jpg"]
        for name in (*names, "Thumbs.db", "._0002_c1.jpg"):
            (tmp_path / "data" / folder / name).touch()
        paths += [str(tmp_path / "data" / folder / name) for name in names[1:]]
        points = np.concatenate([rng.integers(1, WIDTH + 1, (14, 3)), rng.integers(1, HEIGHT + 1, (14, 3))]).astype(
            float
        )
        columns[folder] = dict(zip(sorted(names), points.T, strict=True))
        if suffix == ".mat":
            savemat = pytest.importorskip("scipy.io").savemat
            savemat(tmp_path / f"market1501_14point_{split}.mat", {"pp": points})
        else:
            np.savez(tmp_path / f"market1501_14point_{split}.npz", pp=points.T)  # as read by other programs
    found, _ = joined(images_of(*paths), ExtraFiles(keypoints=str(tmp_path)), "keypoints", tmp_path / "data")
    for path, joints in zip(paths, loaded(found, "keypoints"), strict=True):
        folder, name = path.split("/")[-2:]
        assert np.array_equal(joints[:, 0], columns[folder][name][:14] - 1)
        assert np.array_equal(joints[:, 1], columns[folder][name][14:] - 1)
        assert (joints[:, 2] == 1).all()
    (tmp_path / "data" / "query" / "0009_c1.jpg").touch()
    with pytest.raises(ValueError, match=r"pp \[28, 3\] was given; \[28, 4\] is needed"):
        joined(images_of(*paths), ExtraFiles(keypoints=str(tmp_path)), "keypoints", tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[3]", "3 was given where an object with 'image_id' is needed"),
        ('"a"', "str was given; a list of people"),
        ('{"images": []}', "'annotations'"),
        ('[{"image_id": 3, "keypoints": []}]', "image_id 3 was given; a file name is needed"),
        ('{"images": null, "annotations": []}', "images: NoneType was given; a list is needed"),
        ('[{"image_id": "a", "keypoints": [1, 2]}]', "keypoints of 'a'"),
        ('[{"image_id": "a", "keypoints": [NaN, 2, 1]}]', "keypoints of 'a'"),
        ('[{"image_id": "a", "keypoints": ["x", 2, 1]}]', "keypoints of 'a'"),
    ],
)
def test_what_is_no_list_of_people_is_named(tmp_path, content, message):
    (tmp_path / "pose.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        joined(images_of("a.jpg"), ExtraFiles(keypoints=str(tmp_path / "pose.json")), "keypoints")


def test_groups_of_classes_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 3, 4))
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    expected = np.stack([
        1 - p[0],
        p[1] + p[2] + p[4] + p[13],
        p[3] + p[5] + p[6] + p[7] + p[10] + p[11] + p[14] + p[15],
        p[9] + p[12] + p[16] + p[17],
        p[8] + p[18] + p[19],
    ])  # fmt: skip
    assert list(GROUPS) == ["foreground", "head", "upper body", "lower body", "shoes"]
    for scores in (logits, p, logits.transpose(1, 2, 0), p.transpose(1, 2, 0)):
        np.testing.assert_allclose(group_scores(scores), expected, atol=1e-6)
    classes = rng.integers(0, 20, (5, 4))
    hard = np.eye(20)[classes].transpose(2, 0, 1)
    np.testing.assert_array_equal(group_classes(classes), group_scores(hard))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((4, 2), 20), "class 20 was given; allowed are those of LIP, 0 to 19"),
        (np.full((4, 2), -1), "class -1 was given"),
        (np.zeros((3, 4, 2), np.uint8), r"uint8 \[3, 4, 2\] was given; allowed is a class for every pixel"),
        (np.zeros((4, 2)), r"float64 \[4, 2\] was given; allowed are scores \[20, H, W\]"),
        (np.full((20, 4, 2), np.nan), "infinite or undefined scores"),
    ],
)
def test_maps_that_are_no_parsing_name_image_and_value(tmp_path, value, message):
    np.save(tmp_path / "a.npy", value)
    found, _ = joined(images_of("a.jpg"), ExtraFiles(parsing=str(tmp_path)), "parsing")
    with pytest.raises(ValueError, match=f"parsing of a.jpg: {message}"):
        found.load_extras(0, HEIGHT, WIDTH)


def test_parsing_is_read_from_palettes_and_scores_and_may_be_neutral(tmp_path):
    classes = np.random.default_rng(0).integers(0, 20, (8, 4), dtype=np.uint8)
    picture = Image.fromarray(classes).convert("P")
    picture.putpalette(range(60))
    picture.putdata(classes.ravel().tolist())
    picture.save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.eye(20, dtype=np.float32)[classes])
    files = ExtraFiles(parsing=str(tmp_path), missing="neutral")
    found, _ = joined(images_of("a.jpg", "b.jpg", "c.jpg"), files, "parsing")
    first, second, neutral = loaded(found, "parsing")
    np.testing.assert_array_equal(first, group_classes(classes))
    np.testing.assert_array_equal(second, first)
    dataset = ReidDataset(found, build_transform(HEIGHT, WIDTH, train=False))
    batch = collate([dataset[i] for i in range(3)])
    assert batch.extras["parsing"].shape == (3, 5, HEIGHT, WIDTH)
    assert batch.extras["parsing"][2].mean((1, 2)).tolist() == [1, 0, 0, 0, 0]
    assert neutral.shape == (5, 1, 1)


def test_densepose_pictures_are_read_in_either_order(tmp_path):
    rng = np.random.default_rng(0)
    iuv = np.concatenate([rng.integers(0, 25, (1, 8, 4)), rng.integers(0, 256, (2, 8, 4))]).astype(np.uint8)
    for name, order in (("a_IUV.png", [2, 1, 0]), ("b.png", [0, 1, 2])):
        Image.fromarray(iuv[order].transpose(1, 2, 0).copy()).save(tmp_path / name)
    np.save(tmp_path / "c.npy", iuv)
    files = ExtraFiles(iuv=str(tmp_path), missing="neutral")
    found, _ = joined(images_of("a.jpg", "b.jpg", "c.jpg", "d.jpg"), files, "iuv")
    *three, neutral = loaded(found, "iuv")
    for value in three:
        np.testing.assert_array_equal(value, iuv)
    assert not neutral.any()
    Image.fromarray(np.full((8, 4, 3), 25, np.uint8)).save(tmp_path / "a_IUV.png")
    with pytest.raises(ValueError, match=r"iuv of a.jpg: .*part 25 was given; allowed are parts from 0 to 24"):
        found.load_extras(0, 8, 4)
    Image.fromarray(iuv[0]).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"uint8 \[8, 4\] was given"):
        load_iuv(tmp_path / "grey.png")


def test_views_are_eight_pictures_beside_each_other(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 4, 3), dtype=np.uint8)
    for k, view in enumerate(pixels, start=1):
        Image.fromarray(view).save(tmp_path / f"a_to_{k}.png")
    found, _ = joined(images_of("a.jpg"), ExtraFiles(views=str(tmp_path)), "views")
    np.testing.assert_array_equal(loaded(found, "views")[0], pixels.transpose(0, 3, 1, 2))
    Image.new("RGB", (9, 9)).save(tmp_path / "a_to_3.png")
    with pytest.raises(ValueError, match="eight RGB pictures of one size"):
        found.load_extras(0, HEIGHT, WIDTH)
    (tmp_path / "a_to_3.png").unlink()
    with pytest.raises(ValueError, match="views: 1 of 1 images have none"):
        joined(images_of("a.jpg"), ExtraFiles(views=str(tmp_path)), "views")


def people_file(tmp_path, scale, sizes=None):
    """Twelve people, whose joints reach from the head at a tenth of the image to the ankles at nine tenths."""
    rng = np.random.default_rng(0)
    entries, images = [], []
    for i in range(12):
        y = np.linspace(0.1, 0.9, 17) * HEIGHT
        x = rng.uniform(0.2, 0.8, 17) * WIDTH
        points = np.stack([x * scale[0], y * scale[1], np.ones(17)], 1)
        entries.append({"image_id": i, "keypoints": points.ravel().tolist()})
        images.append({"id": i, "file_name": f"{i}.jpg", **(sizes or {})})
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": entries}))
    return ExtraFiles(keypoints=str(tmp_path / "coco.json"))


@pytest.mark.parametrize("scale", [(0.5, 0.5), (1 / WIDTH, 1 / HEIGHT), (1.3, 1.3), (3.2, 3.2), (1, 1.6)])
def test_keypoints_of_images_of_another_size_are_noticed_in_many(tmp_path, scale):
    images = images_of(*(f"{i}.jpg" for i in range(12)))
    with pytest.raises(
        ValueError, match=r"keypoints: in 12 images .*\d+% of the height: they belong to .* another size"
    ):
        joined(images, people_file(tmp_path, scale), "keypoints")
    assert len(joined(images, people_file(tmp_path, (1, 1)), "keypoints")[0]) == 12
    assert len(joined(images, people_file(tmp_path, (0.9, 1.1)), "keypoints")[0]) == 12


def test_a_stated_size_is_compared_with_that_of_the_image(tmp_path):
    images = images_of(*(f"{i}.jpg" for i in range(12)))
    found, _ = joined(images, people_file(tmp_path, (1, 1), {"width": WIDTH, "height": HEIGHT}), "keypoints")
    assert loaded(found, "keypoints")[3].shape == (14, 3)
    found, _ = joined(images, people_file(tmp_path, (1, 1), {"width": WIDTH, "height": HEIGHT + 1}), "keypoints")
    with pytest.raises(
        ValueError, match="keypoints of an image of 20 x 41 pixels were given; the image has 20 x 40 pix"
    ):
        found.load_extras(3, HEIGHT, WIDTH)


@pytest.fixture
def manifest(tmp_path):
    """Four photographs, two of them for training, with a parsing of each."""
    rows = ["path,identity,camera,split"]
    for i, split in enumerate(("train", "train", "query", "gallery")):
        Image.new("RGB", (WIDTH, HEIGHT), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i // 2},{i},{split}")
        (tmp_path / "masks").mkdir(exist_ok=True)
        np.save(tmp_path / "masks" / f"{i}.npy", np.full((2, 2), i))
    (tmp_path / "list.csv").write_text("\n".join(rows))
    return tmp_path


def test_a_data_set_comes_with_the_extras_that_are_wanted(manifest):
    files = ExtraFiles(parsing=str(manifest / "masks"))
    root = manifest / "list.csv"

    def load(files=files, **wanted):
        return load_data("manifest", root, extras=files, progress=False, **wanted)

    data = load(train_extras=["parsing"])
    assert [list(images.extras) for images in data.splits.values()] == [["parsing"], [], []]
    np.testing.assert_array_equal(loaded(data.train, "parsing")[1], group_classes(np.ones((2, 2), int)))
    assert [
        list(images.extras) for images in load(train_extras=["parsing"], test_extras=["parsing"]).splits.values()
    ] == [["parsing"]] * 3
    assert load().notes == ("parsing are given, but the method does not read them",)
    with pytest.raises(ValueError, match=r"data.extras.iuv: nothing was given; .*--data.extras.iuv, .*DensePose"):
        load(train_extras=["iuv"])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; a folder of LIP class maps"):
        load(ExtraFiles(parsing="nowhere"), train_extras=["parsing"])
    # An extra that cannot be used is found before training, and its image is left out where that is wanted.
    np.save(manifest / "masks" / "0.npy", np.full((2, 2), 77))
    with pytest.raises(ValueError, match=r": 1 unreadable parsing \(skip.*\n.*parsing of .*0.png: class 77"):
        load(train_extras=["parsing"])
    skipped = load(train_extras=["parsing"], skip_bad_images=True)
    assert len(skipped.train) == 1
    assert "1 images with unreadable files (image, parsing) left out" in skipped.summary()
    (manifest / "0.png").write_bytes(b"")
    np.save(manifest / "masks" / "1.npy", np.full((2, 2), 77))
    with pytest.raises(ValueError, match=r": 1 unreadable images, 1 unreadable parsing \(skip"):
        load(train_extras=["parsing"])


def test_files_replace_what_the_synthetic_set_renders(tmp_path):
    data = load_data("synthetic", synthetic=SMALL, train_extras=["keypoints"], progress=False)
    people = [{"image_id": path, "keypoints": np.full((17, 3), 5.0).ravel().tolist()} for path in data.train.paths]
    (tmp_path / "pose.json").write_text(json.dumps(people))
    files = ExtraFiles(keypoints=str(tmp_path / "pose.json"))
    other = load_data("synthetic", synthetic=SMALL, extras=files, train_extras=["keypoints", "iuv"], progress=False)
    assert (loaded(other.train, "keypoints")[0] == [5, 5, 1]).all()
    assert not (loaded(data.train, "keypoints")[0] == [5, 5, 1]).all()
    assert loaded(other.train, "iuv")[0].shape == (3, HEIGHT, WIDTH)
