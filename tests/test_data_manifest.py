import numpy as np
import pytest
from PIL import Image

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
    assert load_data("manifest", tmp_path / "list.csv", viewpoint_mode="soft", progress=False).train.viewpoint_weight[
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


def test_numbers_that_look_alike_stay_apart(tmp_path):
    text = "path,identity,split\na,7,train\nb,007,train\nc,7,query\nd,007,gallery\n"
    data = read_manifest(write(tmp_path, text))
    assert data.num_identities == 2
    assert data.query.identity[0] != data.gallery.identity[0]


def test_absolute_paths_blank_lines_and_a_byte_order_mark(tmp_path):
    text = f"\ufeffpath, identity ,split\r\n{tmp_path}/x/a.png,1,train\r\n\r\nb.png,2,query\r\nb2.png,2,gallery\r\n"
    data = read_manifest(write(tmp_path, text))
    assert data.train.paths == (f"{tmp_path}/x/a.png",)
    assert data.query.paths == (f"{tmp_path}/b.png",)
    assert set(data.train.camera.tolist()) == {-1}


HEAD = "path,identity,split\na,1,train\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: missing column path, identity, split"),
        ("path,identity\n", "line 1: missing column split; columns are path, identity, split and optionally camera"),
        ("path,identity,split,colour\n", "line 1: unknown column 'colour'"),
        ("path,path,identity,split\n", "line 1: column 'path' is given twice"),
        (HEAD + "b,1,test\n", "line 3: split must be one of train, query, gallery, got 'test'"),
        (HEAD + "\na,1,query\n", "line 4: path 'a' was already given in line 2"),
        (HEAD + "x/../a,1,query\n", "line 3: path 'x/../a' was already given in line 2"),
        (HEAD + "b,1\n", "line 3: expected 3 cells"),
        (HEAD + "b,1,query,\n", "line 3: expected 3 cells"),
        (HEAD + "b,,query\n", "line 3: identity is empty"),
        (HEAD + ",1,query\n", "line 3: path is empty"),
        ("path,identity,split,viewpoint\na,1,train,above\n", "line 2: viewpoint must be empty or one of front"),
        (HEAD + '"b,1,query\n', "not a readable CSV"),
        (b"path,identity,split\n\xff\xfe\x00,1,train\n", "not a readable CSV"),
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
