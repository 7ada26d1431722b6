import dataclasses
import os
import threading

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from vareid_ext.data import SyntheticSettings, load_data, read_manifest, synthetic_data, write_manifest

GOOD = """path,identity,camera,viewpoint,split
images/a.png,anna,north,front,train
images/b.png,anna,south,,train
images/c.png,Bert,north,back_side,train
images/d.png,cleo,,side,query
images/e.png,cleo,south,noise,gallery
images/f.png,anna,north,back,gallery
"""


def write(tmp_path, text, name="list.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_manifest_is_read_as_written(tmp_path):
    (tmp_path / "images").mkdir()
    for place, name in enumerate("abcdef"):
        Image.new("RGB", (3, 6), (place, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    data = load_data("manifest", write(tmp_path, GOOD), progress=False)
    # Relative paths start at the CSV file, not at the working directory.
    assert [np.asarray(data.train.load(index))[0, 0, 0] for index in range(3)] == [0, 1, 2]
    assert data.identity_names == ("Bert", "anna")
    assert data.train.identity.tolist() == [1, 1, 0]
    assert data.train.camera.tolist() == [1, 2, 1]
    assert data.train.viewpoint.tolist() == [0, -1, 2]
    assert data.train.viewpoint_name == ("front", "", "back_side")
    assert data.query.camera.tolist() == [-1]
    assert data.query.viewpoint.tolist() == data.gallery.viewpoint.tolist()[:1] == [1]
    # The same text is the same person in query and gallery.
    assert data.query.identity.tolist() == data.gallery.identity.tolist()[:1]
    assert data.gallery.identity[0] != data.gallery.identity[1]
    assert load_data("manifest", tmp_path / "list.csv", viewpoint_labels="soft", progress=False).train.viewpoint_weight[
        2
    ].tolist() == [0, 0.5, 0.5]


def test_integers_keep_their_numbers_and_junk_is_dropped(tmp_path):
    rows = ["train,a,0,12", "train,b,7,3", "query,c,7,20", "gallery,d,3,20", "gallery,e,3,-1", "gallery,f,3,0"]
    text = "\n".join(["split,path,camera,identity", *rows])
    data = read_manifest(write(tmp_path, text))
    assert data.identity_names == ("3", "12")
    assert data.train.identity.tolist() == [1, 0]
    assert data.train.camera.tolist() == [0, 7]
    assert data.query.identity.tolist() == [20]
    assert data.gallery.identity.tolist() == [20, 0]
    assert data.query.viewpoint.tolist() == [-1]


UNKNOWN_SPELLINGS = ("", "-1", "-1.0", "-01", "nan", "NaN", "None", "null", "NA", "n/a", "unknown", "?")


@pytest.mark.parametrize("named", [True, False])
def test_an_unknown_camera_is_no_camera_among_numbers_or_names(tmp_path, named):
    cameras = ["c2", "c7", *UNKNOWN_SPELLINGS] if named else ["2", "7", *UNKNOWN_SPELLINGS]
    text = "path,identity,camera,split\nq.png,1,,query\ng.png,1,-1,gallery\n"
    text += "".join(f"{place}.png,1,{camera},train\n" for place, camera in enumerate(cameras))
    data = read_manifest(write(tmp_path, text))
    known = [1, 2] if named else [2, 7]
    assert data.train.camera.tolist() == known + [-1] * len(UNKNOWN_SPELLINGS)
    assert data.query.camera.tolist() == data.gallery.camera.tolist() == [-1]


def test_further_columns_are_numbered_as_cameras_are_and_written_back(tmp_path):
    rows = ["a,1,train,red,4", "b,1,train,,9", "c,2,query,blue,-1", "d,2,gallery,red,4", "e,-1,gallery,x,1"]
    for row in rows:
        Image.new("RGB", (3, 6)).save(tmp_path / f"{row[0]}.png")
    text = "\n".join(["path,identity,split,column_clothes,column_day", *(row.replace(",", ".png,", 1) for row in rows)])
    data = load_data("manifest", write(tmp_path, text), progress=False)
    again = load_data("manifest", write_manifest(data, tmp_path / "out"), progress=False)
    for found in (data, again):
        clothes, day = (
            [images.columns[name].tolist() for images in found.splits.values()] for name in ("clothes", "day")
        )
        assert clothes == [[2, -1], [1], [2]]  # by their texts, blue and red; then by their numbers
        assert day == [[4, 9], [-1], [4]]
    assert "column clothes with 2 values" in data.summary()
    assert "column day with 2 values" in data.summary()
    assert data.train.select([1]).columns["day"].tolist() == [9]


def test_an_unknown_viewpoint_is_spelled_as_an_unknown_camera_is(tmp_path):
    text = "path,identity,viewpoint,split\nq.png,1,,query\ng.png,1,back,gallery\n"
    text += "".join(f"{place}.png,1,{view},train\n" for place, view in enumerate(("side", *UNKNOWN_SPELLINGS)))
    data = read_manifest(write(tmp_path, text))
    assert data.train.viewpoint.tolist() == [1] + [-1] * len(UNKNOWN_SPELLINGS)


def test_negative_numbers_are_names(tmp_path):
    text = "path,identity,camera,split\na,5,-2,train\nb,7,3,train\nc,-4,3,query\nd,-4,-2,gallery\n"
    data = read_manifest(write(tmp_path, text))
    for values in (data.train.camera, data.gallery.camera, data.query.identity):
        assert (values > 0).all()
    assert data.train.camera[0] == data.gallery.camera[0] != data.query.camera[0]
    assert data.query.identity.tolist() == data.gallery.identity.tolist()


@pytest.mark.parametrize("large", [str(2**63), str(2**64), "1" + "0" * 30, "9" * 4000])
def test_numbers_beyond_64_bits_are_names(tmp_path, large):
    rows = [f"a,{large},{large},train", "b,2,5,train", f"c,{large},{large},query", f"d,{large},5,gallery"]
    data = read_manifest(write(tmp_path, "\n".join(["path,identity,camera,split", *rows])))
    assert data.num_identities == 2
    assert data.query.identity.tolist() == data.gallery.identity.tolist()
    assert data.train.camera[0] == data.query.camera[0] != data.gallery.camera[0] == data.train.camera[1]


def test_junk_is_counted_in_every_split_and_spelling(tmp_path):
    rows = ["a,1,train", "b,-1,train", "c,1,query", "d,-1,query", "e,1,gallery", "f,-1.0,gallery"]
    data = read_manifest(write(tmp_path, "\n".join(["path,identity,split", *rows])))
    assert data.identity_names == ("1",)
    assert len(data.train) == len(data.query) == len(data.gallery) == 1
    (note,) = data.notes
    assert all(name in note for name in ("3", "b", "d", "f"))
    assert note in data.summary()


def test_files_of_operating_systems_in_a_manifest_are_no_images(tmp_path):
    rows = ["images/._a.jpg,train", "__MACOSX/images/a.jpg,train", "images\\._b.jpg,query", "Thumbs.db,gallery"]
    rows += ["a.jpg,train", ".hidden.jpg,query", "b.jpg,gallery"]
    text = "path,split,identity\n" + "".join(f"{row},1\n" for row in rows)
    data = read_manifest(write(tmp_path, text))
    assert [len(images) for images in (data.train, data.query, data.gallery)] == [1, 1, 1]
    (note,) = data.notes
    assert "4" in note
    assert "images/._a.jpg" in note


def test_backslashes_separate_folders_unless_a_file_is_named_so(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4), 10).save(tmp_path / "images" / "a.png")
    Image.new("L", (4, 4), 20).save(tmp_path / "images\\b.png")
    rows = "images\\a.png,1,train\nimages\\b.png,1,query\nc.png,1,gallery\n"
    data = read_manifest(write(tmp_path, "path,identity,split\n" + rows))
    assert [images.load(0).getpixel((0, 0))[0] for images in (data.train, data.query)] == [10, 20]


def within_ten_seconds(function):
    """Run `function` in a thread that may hang; its result."""
    tqdm.set_lock(threading.RLock())  # a signal in another test may have left this thread's bars locked out
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(10)
    assert results, "it hangs"
    return results[0]


def test_a_pipe_in_a_manifest_is_an_unreadable_image(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "abcdef":
        Image.new("RGB", (3, 6)).save(tmp_path / "images" / f"{name}.png")
    pipe = tmp_path / "images" / "c.png"
    pipe.unlink()
    os.mkfifo(pipe)
    path = write(tmp_path, GOOD.replace("images/b.png", "/dev/zero"))
    data = within_ten_seconds(lambda: load_data("manifest", path, skip_bad_images=True, progress=False))
    assert data.skipped == ("/dev/zero", str(pipe))
    assert len(data.train) == 1


def test_a_pipe_is_no_manifest(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(FileNotFoundError, match=r"pipe\.csv"):
        read_manifest(tmp_path / "pipe.csv")


def test_a_file_name_does_not_become_unique_because_an_image_is_bad(tmp_path):
    """A label of a bare name, meant for the one or the other, must not go to what is left."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("RGB", (3, 6)).save(tmp_path / folder / "1.png")
    (tmp_path / "a" / "1.png").write_bytes(b"")
    (tmp_path / "views.csv").write_text("path,viewpoint\n1.png,front\n")
    Image.new("RGB", (3, 6)).save(tmp_path / "2.png")
    Image.new("RGB", (3, 6)).save(tmp_path / "3.png")
    path = write(tmp_path, "path,identity,split\na/1.png,1,train\nb/1.png,2,train\n2.png,1,query\n3.png,1,gallery\n")
    options = {"viewpoint_file": tmp_path / "views.csv", "skip_bad_images": True, "progress": False}
    data = load_data("manifest", path, **options)
    assert data.train.paths == (str(tmp_path / "b" / "1.png"),)
    assert data.train.viewpoint.tolist() == [-1]
    assert any("1.png" in note for note in data.notes)


def test_viewpoint_labels_go_by_the_paths_of_the_manifest(tmp_path):
    rows = "by/anna/001.jpg,anna,train\nby/bert/001.jpg,bert,train\nc/2.jpg,c,query\nd/2.jpg,c,gallery\n"
    (tmp_path / "elsewhere").mkdir()
    labels = write(tmp_path / "elsewhere", "path,viewpoint\nby\\anna\\001.jpg,front\nd/2.jpg,back\n", "views.csv")
    path = write(tmp_path, "path,identity,split\n" + rows)
    data = load_data("manifest", path, viewpoint_file=labels, check_images=False)
    assert data.train.viewpoint.tolist() == [0, -1]
    assert data.query.viewpoint.tolist() == [-1]
    assert data.gallery.viewpoint.tolist() == [2]


def test_absolute_paths_blank_lines_and_a_byte_order_mark(tmp_path):
    text = f"\ufeffpath, identity ,split\r\n{tmp_path}/x/a.png,1,train\r\n\r\nb.png,2,query\r\nb2.png,2,gallery\r\n"
    data = read_manifest(write(tmp_path, text))
    assert data.train.paths == (f"{tmp_path}/x/a.png",)
    assert data.query.paths == (f"{tmp_path}/b.png",)
    assert set(data.train.camera.tolist()) == {-1}


@pytest.mark.parametrize("begin", ["\n \n", "sep=;\r\n", '"sep=;"\n', "\ufeff\n"])
def test_what_stands_before_the_names_of_the_columns(tmp_path, begin):
    data = read_manifest(write(tmp_path, begin + "Path;IDENTITY;split\na,1;1;train\nb;2;query\nc;2;gallery\n"))
    assert data.train.paths == (str(tmp_path / "a,1"),)
    assert data.gallery.identity.tolist() == [2]


HEAD = "path,identity,split\na,1,train\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: missing column path, identity; columns are path, identity and optionally split, camera"),
        (
            "path,identity,split,clothes\na,1,train,2",
            r"line 1: unknown column 'clothes'; .* and column_NAME for further",
        ),
        ("path,identity,split,column_camera\na,1,train,2", "line 1: columns: 'camera' was given; allowed are names"),
        ("path,identity,split,column_\na,1,train,2", "line 1: columns: '' was given"),
        ("path,identity,split,colour\n", "line 1: unknown column 'colour'"),
        ("path,path,identity,split\n", "line 1: column 'path' is given twice"),
        (HEAD + "b,1,test\n", "line 3: split must be one of train, query, gallery, got 'test'"),
        (HEAD + "\na,1,query\n", "line 4: path 'a' was already given in line 2"),
        (HEAD + "x/../a,1,query\n", "line 3: path 'x/../a' was already given in line 2"),
        (HEAD + "b,1\n", "line 3: 2 cells"),
        (HEAD + "b,1,query,\n", "line 3: 4 cells"),
        (HEAD + f"{'b' * 5000},1,query\n", "line 3: path"),
        (HEAD + "x/../b\0,1,query\n", "list.csv"),
        (HEAD + "c\\b,1,query\nc/b,2,query\n", "line 4: path"),
        (HEAD + "b,,query\n", "line 3: identity is empty"),
        (HEAD + "b,NaN,query\n", "line 3: identity 'NaN' was given, which names nobody"),
        (HEAD + "b,2,query\nc,01,gallery\n", "line 4: identity '01' was given, but '1' in line 2; a number is written"),
        ("path,identity,camera\na,1,02\nb,1,\nc,1,2\n", "line 4: camera '2' was given, but '02' in line 2"),
        ("path,identity,column_clothes\na,1,1.0\nc,1,1\n", "line 3: column_clothes '1' was given, but '1.0' in line 2"),
        (HEAD + ",1,query\n", "line 3: path is empty"),
        (
            "path,identity,split,viewpoint\na,1,train,noise\nb,1,query,above\n",
            "line 3: viewpoint 'above' was given beside names out of front, side",
        ),
        (HEAD + '"b,1,query\nc,1,gallery\n', "line 3: not a readable CSV file: .*; is a quote open"),
        (
            b"path,identity,split\n\xff\xfe\x00,1,train\n",
            "line 2: it is not text in UTF-8; allowed is UTF-8, and UTF-16",
        ),
        (HEAD.encode() + "Bücher,1,query\n".encode("latin-1"), "line 3: it is not text in UTF-8; allowed"),
        (HEAD.encode("utf-16-le"), "line 1: it is not text in UTF-8; allowed is UTF-8, and UTF-16 with a byte order"),
        ("\nsep=;\npath;identity;colour\n", "line 3: unknown column 'colour'"),
        (
            "path,identity,viewpoint\na,1,Front\nb,1,front\n",
            "line 3: viewpoint 'front' was given, but 'Front' in manifest .*list.csv, line 2",
        ),
        (HEAD, "the query split has no images"),
        (HEAD + "b,1,query\n", "the gallery split has no images"),
        ("path,identity,split\nb,1,query\nc,1,gallery\n", "the train split has no images"),
    ],
)
def test_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_manifest(write(tmp_path, text))


def test_a_path_through_a_link_is_the_file_that_the_system_finds(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere" / "inner", tmp_path / "folder"
    elsewhere.mkdir(parents=True)
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    for place, colour in ((elsewhere.parent, 10), (folder, 20)):
        Image.new("L", (4, 4), colour).save(place / "a.png")
    rows = "link/../a.png,1,train\na.png,1,query\nlink/../inner/b.png,1,gallery\n"
    data = read_manifest(write(folder, "path,identity,split\n" + rows))
    assert [images.load(0).getpixel((0, 0))[0] for images in (data.train, data.query)] == [10, 20]


def test_a_missing_manifest(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)path,identity,camera,viewpoint,split.*nothing\.csv does not exist"
    ):
        read_manifest(tmp_path / "nothing.csv")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_manifest(tmp_path)


def test_missing_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)6 unreadable images.*images/a\.png.*images/f\.png"):
        load_data("manifest", write(tmp_path, GOOD), progress=False)


def partition(images):
    """Which images show the same person, whatever the numbers."""
    return (images.identity[:, None] == images.identity[None, :]).tolist()


def test_a_written_data_set_reads_back(tmp_path):
    data = synthetic_data(SyntheticSettings(3, 2, 5, 2, 2, 48, 24))
    path = write_manifest(data, tmp_path / "new" / "set")
    assert path == tmp_path / "new" / "set" / "manifest.csv"
    back = load_data("manifest", path, progress=False)
    assert back.identity_names == ("train-0000", "train-0001", "train-0002")
    for split in ("train", "query", "gallery"):
        old, new = getattr(data, split), getattr(back, split)
        assert partition(new) == partition(old)
        assert new.camera.tolist() == old.camera.tolist()
        assert new.viewpoint_name == old.viewpoint_name
        assert new.viewpoint.tolist() == old.viewpoint.tolist()
        for index in range(len(old)):
            assert np.array_equal(np.asarray(new.load(index)), np.asarray(old.load(index)))
    across = back.query.identity[:, None] == back.gallery.identity[None, :]
    assert np.array_equal(across, data.query.identity[:, None] == data.gallery.identity[None, :])
    with pytest.raises(FileExistsError, match="must not exist"):
        write_manifest(data, tmp_path / "new" / "set")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 6)).save(tmp_path / "images" / "a.png")
    data = load_data("manifest", write(tmp_path, GOOD), check_images=False)
    with pytest.raises(OSError, match=r"b\.png"):
        write_manifest(data, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "list.csv"]


def test_splits_that_are_not_needed_may_be_empty(tmp_path):
    path = write(tmp_path, "path,identity,split\nb,9,gallery\nc,7,query\nd,-1,gallery\n")
    for needed in (("query", "gallery"), ("gallery",), ()):
        data = read_manifest(path, needed=needed)
        assert (data.query.identity.tolist(), data.gallery.identity.tolist(), len(data.train)) == ([7], [9], 0)
        assert data.notes == ("1 junk images (identity -1) left out: d",)
    with pytest.raises(ValueError, match="the train split has no images"):
        load_data("manifest", path, check_images=False)
    for i, name in enumerate("bc"):
        Image.new("RGB", (3, 6), (i, 0, 0)).save(tmp_path / name, "png")
    (tmp_path / "b").write_bytes(b"no image")
    with pytest.raises(ValueError, match="every image of the gallery split is unreadable"):
        load_data("manifest", path, needed=("query",), skip_bad_images=True, progress=False)


@pytest.mark.parametrize("kind", ["manifest", "auto"])
def test_a_manifest_that_need_not_be_divided_is_all_gallery(tmp_path, kind):
    path = write(tmp_path, "path,identity\nb,bert\na,anna\n")
    data = load_data(kind, path, needed=(), check_images=False)
    assert [data.gallery.names["identity"][n] for n in data.gallery.identity] == ["bert", "anna"]
    assert not len(data.train) + len(data.query)
    with pytest.raises(ValueError, match="images of 2 identities were found; 3 are needed"):
        load_data(kind, path, needed=("gallery",), check_images=False)
    with pytest.raises(ValueError, match="has no images"):
        load_data(kind, write(tmp_path, "path,identity\nb,-1\n"), needed=(), check_images=False)


@pytest.mark.parametrize(("anna", "bert"), [("anna", "bert"), ("70", "8")])
def test_training_images_have_the_identities_of_the_others_again(tmp_path, anna, bert):
    text = f"path,identity,split\na,{bert},train\nb,{anna},train\nc,{anna},query\nd,{bert},gallery\n"
    data = read_manifest(write(tmp_path, text))
    own = data.with_own_identities()
    assert own.identity[0] == data.gallery.identity[0] != data.query.identity[0] == own.identity[1]
    assert own.names == data.query.names
    numbers = dataclasses.replace(data.query, names={})
    coded = dataclasses.replace(data, query=numbers, identity_names=("P1A", "P2A")).with_own_identities()
    assert coded.called("identity").tolist() == [("P1A", "P2A")[n] for n in data.train.identity]
