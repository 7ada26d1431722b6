import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

from vareid_ext.data import DivisionSettings, load_data
from vareid_ext.data.readers.dividing import divide
from vareid_ext.data.readers.layout import ImageEntry

NUMBERS = itertools.count()


def image(path, colour=None):
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = next(NUMBERS) if colour is None else colour
    pixels = np.random.default_rng(number).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def load(root, **options):
    return load_data("auto", root, progress=False, **options)


def names(images, root):
    return [path.removeprefix(f"{root}/") for path in images.paths]


def check(data):
    """What holds of every division."""
    test = set(data.query.identity.tolist()) | set(data.gallery.identity.tolist())
    assert test
    assert not {*data.train.paths} & {*data.query.paths, *data.gallery.paths}
    for identity, camera in zip(data.query.identity, data.query.camera, strict=True):
        same = data.gallery.identity == identity
        other = (data.gallery.camera != camera) | (camera == -1)
        assert (same & other).any(), "a query has nothing to find"


def test_identity_folders(tmp_path):
    for person, count in (("anna", 3), ("bert", 2), ("cleo", 4), ("dora", 1), ("emil/2024", 2), ("finn", 3)):
        for number in range(count):
            image(tmp_path / person / f"{number}.jpg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "anna" / "._0.jpg").write_text("x")
    data = load(tmp_path)
    check(data)
    assert sum(map(len, data.splits.values())) == 15
    assert len(data.identity_names) == 3
    assert len(data.query) == len(set(data.query.identity.tolist()) & set(data.gallery.identity.tolist()))
    assert (data.train.camera == -1).all()
    assert data.notes[0] == "read as a folder that is not divided"
    assert "1 entries that are not read as images left out: notes.txt" in data.notes
    assert data.notes[-2:] == (
        "divided by identity: 3 to train on, 3 to test on (share 0.5, seed 0), one query for each identity",
        "1 identities have one image; nobody could find them, so they are trained on",
    )
    assert "dora" in data.identity_names
    again, other = load(tmp_path), load(tmp_path, division=DivisionSettings(seed=1))
    assert again.query.paths == data.query.paths
    assert any(getattr(other, split).paths != images.paths for split, images in data.splits.items())
    assert len(load(tmp_path, division=DivisionSettings(test=0)).identity_names) == 5
    assert len(load(tmp_path, division=DivisionSettings(test=1)).identity_names) == 2


def test_named_images_with_cameras(tmp_path):
    for identity in range(1, 9):
        for camera in range(1, 4):
            for number in range(2):
                image(tmp_path / f"{identity:04d}_c{camera}s1_{number}.png")
    image(tmp_path / "-1_c1s1_0.png")
    image(tmp_path / "portrait.png")
    data = load(tmp_path)
    check(data)
    assert (len(data.train), len(data.query), len(data.gallery)) == (24, 12, 12)
    assert sorted(data.query.camera.tolist()) == [1] * 4 + [2] * 4 + [3] * 4
    assert set(data.query.identity.tolist()) <= set(range(1, 9))
    assert any("junk images (identity -1) left out: -1_c1s1_0.png" in note for note in data.notes)
    assert any("left out: portrait.png" in note for note in data.notes)


def test_folders_of_splits(tmp_path):
    for split, person in (
        ("train", "anna"),
        ("train", "bert"),
        ("query", "cleo"),
        ("gallery", "cleo"),
        ("gallery", "0"),
    ):
        image(tmp_path / split / person / "x_c2_1.jpg")
    data = load(tmp_path)
    assert names(data.train, tmp_path) == ["train/anna/x_c2_1.jpg", "train/bert/x_c2_1.jpg"]
    assert data.query.identity[0] in data.gallery.identity
    assert data.gallery.camera.tolist() == [2, 2]
    assert not any("divided" in note for note in data.notes)


def test_known_data_sets_are_recognised(tmp_path):
    for folder, name in (("bounding_box_train", "1_c1_0"), ("query", "2_c1_0"), ("bounding_box_test", "2_c2_0")):
        image(tmp_path / "Market-1501" / folder / f"{name}.jpg")
    for root in (tmp_path, tmp_path / "Market-1501"):
        data = load(root)
        assert data.name == "market1501"
        assert data.notes[0] == "read as it is unpacked (--data.kind market1501)"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_tables_as_programs_write_them(tmp_path, separator, encoding):
    rows = [("path", "identity", "camera")]
    for identity, camera, number in itertools.product(("Ännä", "bert", "cleo", "dora"), ("a,b", "c"), range(2)):
        image(tmp_path / f"{identity}{camera}{number}.png")
        rows.append((f"{identity}{camera}{number}.png", identity, camera))
    text = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "list.tsv").write_bytes((mark + text).encode(encoding))
    data = load(tmp_path / "list.tsv")
    check(data)
    assert (len(data.train), len(data.query), len(data.gallery)) == (8, 4, 4)
    assert set(data.train.camera.tolist()) == {1, 2}


def entries(**cameras):
    """Of each identity, images by these cameras."""
    return [
        ImageEntry(f"{identity}{number}", identity, camera)
        for identity, seen in cameras.items()
        for number, camera in enumerate(seen)
    ]


def test_a_query_always_leaves_something_to_find():
    images = entries(a=[1, 2], b=[1, 2, 3], c=[1, 1, 2], d=[1, 1], e=[1], f=[1, -1], g=[1, 1, 2, 2], h=[-1, -1])
    seen = set()
    for seed in range(40):
        splits, notes = divide("made", images, DivisionSettings(test=0.7, seed=seed))
        assert sorted(e.path for part in splits.values() for e in part) == sorted(e.path for e in images)
        assert not {e.identity for e in splits["train"]} & {e.identity for e in [*splits["query"], *splits["gallery"]]}
        for query in splits["query"]:
            same = [e for e in splits["gallery"] if e.identity == query.identity]
            assert any(e.camera != query.camera for e in same)
            seen.add(query.identity)
        assert {e.identity for e in splits["gallery"]} == {e.identity for e in splits["query"]}
        assert notes[-1].startswith("4 identities were seen by one camera alone")
    assert seen == {"a", "b", "c", "g"}


def test_one_camera_is_no_camera():
    splits, notes = divide("made", entries(a=[5, 5], b=[5, 5], c=[5, 5]), DivisionSettings())
    assert [len(splits[split]) for split in ("train", "query", "gallery")] == [4, 1, 1]
    assert {e.camera for part in splits.values() for e in part} == {-1}
    assert any("one camera" in note for note in notes)


def test_queries_of_each_viewpoint_where_cameras_are_not_known():
    images = [
        ImageEntry(f"{i}{view}{n}", str(i), viewpoint=view)
        for i in range(4) for view in ("front", "back") for n in range(2)
    ]  # fmt: skip
    splits, notes = divide("made", images, DivisionSettings())
    assert sorted((e.identity, e.viewpoint) for e in splits["query"]) == sorted(
        {(e.identity, e.viewpoint) for e in splits["gallery"]}
    )
    assert notes[0].endswith("one query for each identity and viewpoint")


@pytest.mark.parametrize(
    ("cameras", "said"),
    [
        ({"a": [1, 2], "b": [1, 2]}, "images of 2 identities were found; 3 are needed"),
        ({}, "images of 0 identities were found"),
        ({"a": [1], "b": [2], "c": [1]}, "no identity has images by two cameras"),
        ({"a": [-1], "b": [-1], "c": [-1]}, "no identity has two images"),
    ],
)
def test_too_little_to_divide(cameras, said):
    with pytest.raises(ValueError, match=f"made: {said}"):
        divide("made", entries(**cameras), DivisionSettings())


@pytest.mark.parametrize("what", ["nothing", "empty", "text", "unnamed"])
def test_what_is_no_data_set_is_told_what_would_be(tmp_path, what):
    root = tmp_path / "set"
    if what != "nothing":
        root.mkdir()
    if what == "text":
        (root / "a.txt").write_text("x")
    if what == "unnamed":
        image(root / "portrait.png")
    with pytest.raises(FileNotFoundError, match=r"(?s)allowed are\n.*manifest.*identity folders.*named images"):
        load(root)


def test_shares_and_seeds_out_of_range():
    for settings in ({"test": 1.5}, {"test": float("nan")}, {"seed": -1}):
        with pytest.raises(ValueError, match=rf"data.division.{next(iter(settings))}: .* allowed are values from 0 to"):
            DivisionSettings(**settings)
    with pytest.raises(ValueError, match=r"root: 'x' was given, but kind synthetic reads no files; kind auto does"):
        load_data("synthetic", "x")


def test_an_unreadable_image_is_found_as_in_any_data_set(tmp_path):
    for person in "abcd":
        for number in range(2):
            image(tmp_path / person / f"{number}.png")
    shutil.copy(__file__, tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match=r"(?s)1 unreadable images .*a/0.png"):
        load(tmp_path)


def test_folders_that_need_not_be_divided_are_all_gallery(tmp_path):
    for name in ("bert", "anna"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    data = load_data("auto", tmp_path, needed=(), check_images=False, progress=False)
    assert [data.gallery.names["identity"][n] for n in data.gallery.identity] == ["anna", "bert"]


def people(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def unchecked(root, **options):
    return load(root, check_images=False, **options)


def test_split_names_match_without_case(tmp_path):
    people(tmp_path, "Train/a/1.jpg", "Train/b/1.jpg", "QUERY/c/1.jpg", "gallery/c/2.jpg")
    data = unchecked(tmp_path)
    assert data.identity_names == ("a", "b")
    assert names(data.gallery, tmp_path) == ["gallery/c/2.jpg"]


@pytest.mark.parametrize(
    "folders",
    [("train", "val", "test"), ("train", "query", "Test"), ("bounding_box_train", "bounding_box_test", "gt_bbox")],
)
def test_some_parts_of_a_data_set_are_not_people(tmp_path, folders):
    for folder in folders:
        people(tmp_path / folder, "1.jpg", "2.jpg")
    for needed in (("train", "query", "gallery"), ()):
        with pytest.raises(ValueError, match=rf"the folders {', '.join(sorted(folders))} are some parts of a data set"):
            unchecked(tmp_path, needed=needed)


def test_one_odd_name_does_not_make_another_kind_of_a_data_set(tmp_path):
    of_split = {"train": 3, "query": 4, "gallery": 4}
    people(tmp_path, *(f"{split}/Cam{c}/Cam{c}_day_{i}_{c}.jpg" for split, i in of_split.items() for c in (1, 6)))
    assert unchecked(tmp_path).identity_names == ("3",)
    (tmp_path / "query/Cam6/Cam6_day_4_6.jpg").unlink()
    (tmp_path / "query/Cam1/Cam1_day_4_1.jpg").rename(tmp_path / "query/Cam1/x.jpg")  # the one name of its folder
    for needed in (("train", "query", "gallery"), ()):
        with pytest.raises(ValueError, match=r"CARGO: the name of .*x\.jpg must begin with"):
            unchecked(tmp_path, needed=needed)


def test_a_known_data_set_with_other_names_is_not_taken_for_it(tmp_path):
    people(tmp_path, "train/0001_c1s1_0.jpg", "query/0002_c1s1_0.jpg", "test/0000_c0s1_0.jpg")
    with pytest.raises(ValueError, match=r"(?s)folders query, test, train are.*LTCC: the name of .*0001_c1s1_0\.jpg"):
        unchecked(tmp_path)


@pytest.mark.parametrize("split", ["", "train/"])
def test_folders_of_folders_are_not_people(tmp_path, split):
    people(tmp_path, *(f"{split}{day}/{person}/1.jpg" for day, person in (("mon", "anna"), ("tue", "bert"))))
    people(tmp_path, *("query/c/1.jpg", "gallery/c/2.jpg") if split else ())
    with pytest.raises(ValueError, match=r"its folders hold no images, but folders of them, such as mon/anna"):
        unchecked(tmp_path)


def test_distractors_among_named_images_are_gallery_alone(tmp_path):
    people(tmp_path, *(f"{i:04d}_c{camera}s1_0.jpg" for i in range(5) for camera in (1, 2)), "-1_c1s1_0.jpg")
    data = unchecked(tmp_path, division=DivisionSettings(test=0))
    where = {s: [p for p in names(images, tmp_path) if p.startswith("0000")] for s, images in data.splits.items()}
    assert where == {"train": [], "query": [], "gallery": ["0000_c1s1_0.jpg", "0000_c2s1_0.jpg"]}
    assert data.notes[-1] == "2 images of identity 0000 are distractors: gallery alone"


def test_cameras_of_some_images_are_said_to_be_dropped(tmp_path):
    people(tmp_path, *(f"{person}/1_c{camera}.jpg" for person in "abc" for camera in (1, 2)), "a/3.jpg")
    data = unchecked(tmp_path)
    assert (data.train.camera == -1).all()
    assert "no cameras: 1 of 7 images have no _c<camera> in their names, such as a/3.jpg" in data.notes


def test_a_loop_of_links_is_read_once(tmp_path):
    people(tmp_path, *(f"set/{person}/{number}.jpg" for person in "abc" for number in range(2)), "more/1.jpg")
    for name, target in (("a/up", ".."), ("b/a", "../a"), ("c/more", "../../more"), ("c/again", "../../more")):
        (tmp_path / "set" / name).symlink_to(target)
    data = unchecked(tmp_path / "set")
    assert sum(map(len, data.splits.values())) == 7
    assert any("3 entries that are not read as images left out: a/up (a link to" in note for note in data.notes)
