import os
import pickle
import posixpath
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vareid_ext.data import (
    ImageList,
    ReidData,
    ViewpointLabels,
    label_images,
    load_data,
    read_viewpoint_labels,
    with_soft_labels,
)
from vareid_ext.data.plain_pickle import load_label_table
from vareid_ext.data.viewpoint_classes import PERSON

TABLE = {
    "0002_c1s1_000451_03.jpg": (0, "front"),
    "0002_c1s1_000551_01.jpg": (0, "front_side"),
    "0007_c2s1_000451_03.jpg": (1, "side"),
    "0007_c2s1_000452_03.jpg": (1, "noise"),
    "0007_c3s1_000451_03.jpg": (2, "back_side"),
    "0010_c1s1_000451_03.jpg": (2, "back"),
}


def images_of(names, identity=None, viewpoint_name=None):
    count = len(names)
    return ImageList(
        paths=tuple(os.path.join("folder", name) for name in names),
        identity=np.zeros(count, dtype=np.int64) if identity is None else np.array(identity),
        camera=np.ones(count, dtype=np.int64),
        viewpoint=np.full(count, -1),
        viewpoint_name=("",) * count if viewpoint_name is None else viewpoint_name,
    )


@pytest.fixture
def written(tmp_path):
    def write(content, name="labels.pkl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_reads_the_same(protocol):
    assert load_label_table(pickle.dumps(TABLE, protocol)) == TABLE
    assert load_label_table(pickle.dumps({}, protocol)) == {}
    shared = (2, "back")
    assert load_label_table(pickle.dumps({"a": shared, "b": shared}, protocol)) == {"a": shared, "b": shared}
    many = {f"{number}.jpg": (number % 300 - 5, "größe") for number in range(2500)}
    assert load_label_table(pickle.dumps(many, protocol)) == many


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["value", "key", "label", "whole"])
def test_a_hostile_pickle_runs_nothing(tmp_path, written, protocol, place):
    ran = tmp_path / "ran"
    bad = Hostile(os.mkdir, str(ran))
    table = {"value": {"a.jpg": bad}, "key": {bad: (0, "front")}, "label": {"a.jpg": (bad, "front")}, "whole": bad}[
        place
    ]
    data = pickle.dumps(table, protocol)
    with pytest.raises(ValueError, match=r"labels\.pkl"):
        read_viewpoint_labels(written(data))
    assert not ran.exists()
    # The same bytes do run in Python's own reader, so the pickle really was hostile.
    pickle.loads(data)
    assert ran.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00ac__builtin__\nlen\nu.",
        b"\x80\x02P1\n.",
        b"\x80\x02}\x82\x01.",
        b"(i__main__\nX\n.",
        b"\x80\x05\x97.",
    ],
)
def test_instructions_beyond_plain_data_are_refused(written, data):
    with pytest.raises(ValueError, match=r"labels\.pkl.*byte \d+"):
        read_viewpoint_labels(written(data))


def test_cut_short_or_damaged_pickles(written):
    whole = pickle.dumps(TABLE, 3)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=r"labels\.pkl"):
            read_viewpoint_labels(written(whole[:end]))


def test_memory_bombs_are_refused_at_once(written):
    bombs = [
        b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"x.",  # a string of 4 EiB
        b"\x80\x02X\xff\xff\xff\xff.",  # a string of 4 GiB
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo entry at 4 billion; harmless here: an empty table
        b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"}.",  # a frame of 4 EiB; harmless here as well
    ]
    for bomb in bombs[:2]:
        with pytest.raises(ValueError, match=r"labels\.pkl"):
            read_viewpoint_labels(written(bomb))
    for bomb in bombs[2:]:
        assert len(read_viewpoint_labels(written(bomb))) == 0
    # Tuples that hold the last one twice, 60 deep: hashing or printing the value would never end.
    laughs = b"\x80\x02}(K\x00X\x01\x00\x00\x00a\x86q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x00s."
    with pytest.raises(ValueError, match=r"labels\.pkl"):
        read_viewpoint_labels(written(laughs))


def test_a_file_too_large_is_not_read(written, monkeypatch):
    monkeypatch.setattr("vareid_ext.data.viewpoints._MAX_BYTES", 50)
    with pytest.raises(ValueError, match=r"labels\.pkl.*50"):
        read_viewpoint_labels(written(pickle.dumps(TABLE)))
    # One million images fit into a CSV file.
    assert len(read_viewpoint_labels(written("path,viewpoint\n" + "a.jpg,front\n", "labels.csv"))) == 1


def table_of(rows):
    """A pickle of many distinct short names, written by hand with nothing left out that costs memory."""
    entries = (b"\x8c\x04" + b"%04x" % row + b"\x94K\x00h\x02\x86\x94s" for row in range(1, rows))
    return b"\x80\x04}\x94\x8c\x010\x94K\x00\x8c\x05front\x94\x86s" + b"".join(entries) + b"."


SIZE = 1 << 19


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04" + b"}" * SIZE + b".",
        b"\x80\x04" + b"(" * SIZE + b".",
        b"\x80\x04" + b"M\x00\x02" * (SIZE // 3) + b".",
        b"\x80\x04}" + b"\x94" * SIZE + b".",
        b"\x80\x04}\x94" + b"h\x00" * (SIZE // 2) + b".",
        b"\x80\x04}" + b"K\x00\x940" * (SIZE // 4) + b".",
        b"\x80\x02}" + b"".join(b"r" + number.to_bytes(4, "little") for number in range(SIZE // 5)) + b".",
        b"\x80\x04" + b"(d" * (SIZE // 2) + b".",
        table_of(30_000),
    ],
    ids=["dicts", "marks", "numbers", "stores", "loads", "pops", "numbered stores", "marked dicts", "a good table"],
)
def test_no_pickle_costs_more_memory_than_forty_times_its_length(data):
    tracemalloc.start()
    try:
        load_label_table(data)
    except ValueError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40 * len(data)


def test_a_table_of_the_shortest_entries_is_read():
    table = load_label_table(table_of(30_000))
    assert (len(table), table["752f"]) == (30_000, (0, "front"))


def test_errors_stay_short_whatever_the_file_holds(written):
    long = "a" * 100_000
    files = (
        (pickle.dumps({long: (0, "back")}), "labels.pkl"),
        (pickle.dumps({"a": (0, long)}), "labels.pkl"),
        (pickle.dumps({"a": (1 << 14_000, "back")}, 0), "labels.pkl"),
        (f"path,viewpoint\na.jpg,{long}\n", "labels.csv"),
        (f"path,{long}\n", "labels.csv"),
        (f"path,viewpoint\n{long},back\n{long},back\n", "labels.csv"),
    )
    for content, name in files:
        with pytest.raises(ValueError, match=name) as caught:
            read_viewpoint_labels(written(content, name))
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_give_a_value_error_or_a_table(data):
    try:
        table = load_label_table(data)
    except ValueError:
        return
    assert isinstance(table, dict)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_bytes_give_a_value_error_or_a_table(data):
    whole = bytearray(pickle.dumps(TABLE, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        table = load_label_table(bytes(whole))
    except ValueError:
        return
    for name, (label, view) in table.items():
        assert (type(name), type(label), type(view)) == (str, int, str)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a.jpg": (0, "back")}, r"'a\.jpg' has \(0, 'back'\)"),
        ({"a.jpg": (3, "up")}, "allowed are"),
        ({"a.jpg": "front"}, "str -> str"),
        ({"a.jpg": (0, "front", 1)}, "pair"),
        ({"a.jpg": (True, "side")}, "pair"),
        ({"front": ["a.jpg", "b.jpg"]}, "str -> list"),
        ([("a.jpg", 0)], "one dictionary"),
        ({1: (0, "front")}, "int -> tuple"),
        ("text", "one dictionary"),
    ],
)
def test_other_tables_are_refused(written, table, message):
    for protocol in (2, 3, 4):
        with pytest.raises(ValueError, match=message):
            read_viewpoint_labels(written(pickle.dumps(table, protocol)))


def test_true_is_no_label_in_the_oldest_protocol():
    with pytest.raises(ValueError, match="'a'"):
        load_label_table(pickle.dumps({"a": (True, "side")}, 0))


def test_a_name_given_twice_in_a_pickle_is_an_error(written):
    row = b"X\x01\x00\x00\x00aK\x00X\x05\x00\x00\x00front\x86s"
    assert read_viewpoint_labels(written(b"\x80\x02}" + row + b".")).names == {"a": "front"}
    with pytest.raises(ValueError, match=r"labels\.pkl"):
        read_viewpoint_labels(written(b"\x80\x02}" + row + row + b"."))


def test_csv_labels(written):
    text = "path, viewpoint\r\na.jpg,  front\r\nfolder/b.jpg, back_side \r\n\r\n  \r\n"
    labels = read_viewpoint_labels(written("\ufeff" + text, "labels.csv"))
    assert dict(labels.names) == {"a.jpg": "front", "folder/b.jpg": "back_side"}
    swapped = read_viewpoint_labels(written("viewpoint,path\nnoise,a.jpg\n", "other.csv"))
    assert dict(swapped.names) == {"a.jpg": "noise"}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "line 1"),
        ("path,label\n", "line 1.*label"),
        ("path\n", "line 1.*viewpoint"),
        ("path,viewpoint\na.jpg,noise\nb.jpg,above\n", "line 3.*viewpoint 'above' was given beside names out of front"),
        ("path,viewpoint\na.jpg\n", "line 2"),
        ("path,viewpoint\na.jpg,\n", "line 2.*viewpoint"),
        ("path,viewpoint\na.jpg,front\na.jpg,back\n", "line 3.*'a.jpg'"),
        ("path,viewpoint\nx/a.jpg,front\nx\\a.jpg,front\n", r"line 3.*a\.jpg"),
        ('path,viewpoint\n"a.jpg,front\n', r"labels\.csv"),
        (b"path,viewpoint\n\xff\xfe,front\n", r"labels\.csv"),
    ],
)
def test_csv_errors_name_the_line(written, text, place):
    with pytest.raises(ValueError, match=place):
        read_viewpoint_labels(written(text, "labels.csv"))


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_viewpoint_labels(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"labels\.json"):
        read_viewpoint_labels(tmp_path / "labels.json")
    for name in ("pipe.csv", "pipe.pkl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=name):
            read_viewpoint_labels(tmp_path / name)


def views(labels, paths, root="/data/set"):
    """What the images below `root` are labelled, and which labels were not used."""
    return ViewpointLabels(labels, "labels.csv").find([posixpath.join(root, path) for path in paths], root)


@pytest.mark.parametrize(
    ("labels", "paths", "found"),
    [
        # One person's row is not another one's, whose picture has the same file name.
        ({"by/anna/001.jpg": "front"}, ["by/anna/001.jpg", "by/bert/001.jpg"], ["front", ""]),
        ({"by/anna/001.jpg": "front"}, ["by/bert/001.jpg"], [""]),
        ({"a/1.jpg": "front", "b/1.jpg": "back"}, ["b/1.jpg", "a/1.jpg"], ["back", "front"]),
        # A bare name counts where there is one such image.
        ({"001.jpg": "front", "002.jpg": "side"}, ["a/001.jpg", "b/001.jpg", "b/002.jpg"], ["", "", "side"]),
        ({"1.jpg": "front", "a/1.jpg": "back"}, ["a/1.jpg"], ["back"]),
        # The path relative to the root is meant first of all.
        ({"1.jpg": "front"}, ["a/1.jpg", "1.jpg", "b/1.jpg"], ["", "front", ""]),
        ({"1.jpg": "front", "set/1.jpg": "back"}, ["1.jpg"], ["front"]),
        # From any folder above, absolute, and in other spellings.
        ({"set/a/1.jpg": "side"}, ["a/1.jpg", "b/1.jpg"], ["side", ""]),
        ({"a/1.jpg": "side"}, ["images/a/1.jpg", "images/b/1.jpg"], ["side", ""]),
        ({"/data/set/a/1.jpg": "side"}, ["a/1.jpg", "b/1.jpg"], ["side", ""]),
        ({"a/1.jpg": "side"}, ["./b/../a/1.jpg", "b/1.jpg"], ["side", ""]),
        ({"a/1.jpg": "side"}, ["old/a/1.jpg", "new/a/1.jpg"], ["", ""]),
        # Suffixes do not matter, unless images or labels differ in nothing else.
        ({"1.jpg": "side", "2.png": "back"}, ["1.png", "2.JPG"], ["side", "back"]),
        ({"1.jpg": "side", "1.png": "back"}, ["1.png", "1.jpg"], ["back", "side"]),
        ({"1.jpg": "side", "1.png": "back"}, ["1.webp"], [""]),
        ({"1.jpg": "side"}, ["1.png", "1.jpg"], ["", "side"]),
        ({"1": "side"}, ["1.png"], ["side"]),
        ({"v1.5_a.jpg": "side"}, ["v1.5_b.jpg"], [""]),
        # Doubled suffixes, on either side.
        ({"1.jpg": "side"}, ["1.jpg.jpg"], ["side"]),
        ({"1.jpg.jpg": "side"}, ["1.jpg"], ["side"]),
        ({"1.jpg": "side", "1.jpg.jpg": "side"}, ["1.jpg.jpg"], ["side"]),
        ({}, ["1.jpg"], [""]),
    ],
)  # fmt: skip
def test_a_label_belongs_to_the_image_of_its_path(labels, paths, found):
    assert list(views(labels, paths)[0]) == found


def test_backslashes_are_slashes(written):
    labels = read_viewpoint_labels(written("path,viewpoint\nby\\anna\\1.jpg,front\n.\\2.jpg,back\n", "labels.csv"))
    paths = ["/x/by/anna/1.jpg", "/x/by/bert/1.jpg", "/x/by\\cleo\\2.jpg"]
    assert labels.find(paths, "/x") == (("front", "", "back"), ())


def test_labels_that_were_not_used_are_counted_and_named():
    labels = {"a/1.jpg": "front", "1.jpg": "back", "3.jpg": "side", "2.jpg.jpg": "side", "2.jpg": "side"}
    found, unused = views(labels, ["a/1.jpg", "b/1.jpg", "2.png"])
    assert found == ("front", "", "side")
    assert unused == ("1.jpg", "3.jpg")
    one = images_of(["1.jpg"])
    data = label_images(ReidData("made", one, one, images_of(["2.png"]), ("x",)), ViewpointLabels(labels, "views.csv"))
    (note,) = data.notes
    assert note in data.summary()
    assert all(part in note for part in ("views.csv", "a/1.jpg", "1.jpg", "3.jpg"))


def test_a_label_that_lost_to_another_of_the_same_image_is_not_used():
    found, unused = views({"anna/0.jpg": "front", "anna/0.png": "back"}, ["anna/0.jpg"])
    assert (found, unused) == (("front",), ("anna/0.png",))


def test_labels_from_a_thousand_people_with_equal_file_names_stay_apart():
    names = [*PERSON.names, *PERSON.between]
    paths = [f"{person:04d}/{number}.jpg" for person in range(1000) for number in range(10)]
    labels = {path: names[place * 7 % 6] for place, path in enumerate(paths)}
    found, unused = views(labels, paths)
    assert dict(zip(paths, found, strict=True)) == labels
    assert unused == ()


def test_what_an_image_showed_before_stays_where_the_file_does_not_name_it(written):
    labels = read_viewpoint_labels(written(pickle.dumps(TABLE)))
    names = ["0010_c1s1_000451_03.jpg", "0007_c2s1_000452_03.png", "9.jpg"]
    train = images_of(names, viewpoint_name=("", "front", "front_side"))
    data = label_images(ReidData("made", train, images_of(["7.jpg"]), images_of(["8.jpg"]), ("x",)), labels)
    assert data.train.viewpoint_name == ("back", "noise", "front_side")
    assert data.train.viewpoint.tolist() == [2, 1, 0]
    assert data.query.viewpoint_name == data.gallery.viewpoint_name == ("",)


def test_soft_labels():
    names = ("front", "front_side", "side", "back_side", "back", "noise", "")
    weight = with_soft_labels(images_of("abcdefg", viewpoint_name=names)).viewpoint_weight
    third = np.float32(1 / 3)
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [third] * 3, [third] * 3]
    np.testing.assert_array_equal(weight, np.array(expected, dtype=np.float32))


def test_soft_labels_of_unknown_views_stay_within_the_identity():
    images = images_of("abcd", identity=[3, 3, 3, 8], viewpoint_name=("front", "", "back", ""))
    weight = with_soft_labels(images).viewpoint_weight
    np.testing.assert_allclose(weight[1], [0.5, 0, 0.5])
    np.testing.assert_allclose(weight[3], [1 / 3] * 3)
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-6)


def published(name):
    """A file of the authors' published labels, in a folder beside or in the checkout; the test skips without it."""
    root = Path(__file__).resolve().parents[1]
    for shared in (root.parent / "shared", root / "shared", root.parent.parent / "shared"):
        if (shared / "data" / name).exists():
            return shared / "data" / name
    pytest.skip(f"{name} is not here")


@pytest.mark.parametrize(("name", "count"), [("market", 29438), ("duke", 16522), ("cuhk03", 7365)])
def test_published_labels(name, count):
    assert len(read_viewpoint_labels(published(f"va-reid-labels/{name}_image_map_direction.pkl"))) == count


def test_published_market_labels_join_images_with_doubled_suffixes(tmp_path):
    """Unpacked, identity 1488 has 6 query and 13 gallery images named .jpg.jpg, besides those of no person."""
    path = published("va-reid-labels/market_image_map_direction.pkl")
    names = read_viewpoint_labels(path).names
    query = {name for name in names if name.endswith("_00.jpg.jpg")}
    gallery = {name for name in names if name.endswith(".jpg.jpg")} - query
    for folder, inside in (
        ("bounding_box_train", {"0002_c1s1_000451_03.jpg"}),
        ("query", query),
        ("bounding_box_test", gallery | {"0000_c6s3_094992_01.jpg.jpg", "-1_c4s6_022316_11.jpg.jpg"}),
    ):
        (tmp_path / folder).mkdir()
        for name in inside:
            (tmp_path / folder / name).touch()
    data = load_data("market1501", tmp_path, viewpoint_file=path, check_images=False, progress=False)
    assert (len(query), len(gallery)) == (6, 13)
    for images, inside in ((data.query, query), (data.gallery, gallery)):
        found = dict(zip(map(os.path.basename, images.paths), images.viewpoint_name, strict=True))
        assert {name: view for name, view in found.items() if view} == {name: names[name] for name in inside}
        # Both spellings agree in the published file.
        assert all(names[name] == names[name.removesuffix(".jpg")] for name in inside)


def test_published_market_labels_join_the_training_split(tmp_path):
    path = published("va-reid-labels/market_image_map_direction.pkl")
    identities = set(published("market1501_train_identities.txt").read_text().split())
    folders = {name: tmp_path / name for name in ("bounding_box_train", "query", "bounding_box_test")}
    for folder in folders.values():
        folder.mkdir()
    for name in read_viewpoint_labels(path).names:
        if name[:4] in identities and not name.endswith(".jpg.jpg"):
            (folders["bounding_box_train"] / name).touch()
    for folder in ("query", "bounding_box_test"):
        (folders[folder] / "0001_c1s1_001051_00.jpg").touch()
    data = load_data("market1501", tmp_path, viewpoint_file=path, check_images=False, progress=False)
    assert len(data.train) == 12936
    assert data.num_identities == 751
    assert np.unique(data.train.camera).tolist() == [1, 2, 3, 4, 5, 6]
    assert np.bincount(data.train.viewpoint).tolist() == [5387, 3032, 4517]
    assert data.subclass_mask().sum() == 2048
    assert "12,936 of 12,936 training images have viewpoint labels" in data.summary()
