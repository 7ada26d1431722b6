import os
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from vareid_ext.data import ImageList, ReidData
from vareid_ext.data.types import MAX_PIXELS, is_litter, open_image


def make_list(identity, viewpoint=None, camera=None, weight=None):
    count = len(identity)
    return ImageList(
        paths=tuple(f"{index}.jpg" for index in range(count)),
        identity=np.array(identity, dtype=np.int64),
        camera=np.array([1] * count if camera is None else camera, dtype=np.int64),
        viewpoint=np.array([-1] * count if viewpoint is None else viewpoint, dtype=np.int64),
        viewpoint_name=("",) * count,
        viewpoint_weight=weight,
    )


def test_select_keeps_rows_together():
    images = make_list([5, 6, 7, 8], [0, 1, 2, -1], [1, 2, 3, 4], np.eye(4, 3, dtype=np.float32))
    chosen = images.select([3, 0, 0])
    assert chosen.paths == ("3.jpg", "0.jpg", "0.jpg")
    assert chosen.identity.tolist() == [8, 5, 5]
    assert chosen.camera.tolist() == [4, 1, 1]
    assert chosen.viewpoint.tolist() == [-1, 0, 0]
    assert chosen.viewpoint_weight.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert images.select(np.array([False, True, False, True])).identity.tolist() == [6, 8]
    assert len(images.select([])) == 0


def test_arrays_are_read_only_copies():
    identity = np.array([1, 2])
    images = make_list(identity)
    identity[0] = 9
    assert images.identity.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        images.identity[0] = 3


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [([4], IndexError, r"\[0, 4\)"), ([-1], IndexError, "indices"), ([True, False], ValueError, r"\(4,\)")],
)
def test_select_refuses(indices, error, message):
    with pytest.raises(error, match=message):
        make_list([0, 0, 0, 0]).select(np.array(indices))


def test_load_refuses_an_index_outside():
    for index in (-1, 2):
        with pytest.raises(IndexError, match="index"):
            make_list([0, 1]).load(index)


@pytest.mark.parametrize("field", ["identity", "camera", "viewpoint", "viewpoint_name", "viewpoint_weight"])
def test_lengths_must_agree(field):
    columns = dict.fromkeys(("identity", "camera", "viewpoint"), np.zeros(2, dtype=np.int64))
    columns |= {"viewpoint_name": ("", ""), "viewpoint_weight": np.full((2, 3), 1 / 3)}
    ImageList(paths=("a", "b"), **columns)
    columns[field] = columns[field][:1]
    with pytest.raises(ValueError, match=field):
        ImageList(paths=("a", "b"), **columns)


@pytest.mark.parametrize("field", ["identity", "camera", "viewpoint"])
@pytest.mark.parametrize(
    "values",
    [[1, 2**63], [1, 2**70], np.array([1, 2**63], dtype=np.uint64), [0, 1.5], [0, np.nan], [0, 1e30], ["a", "b"],
     [None, 1]],
    ids=str,
)  # fmt: skip
def test_labels_that_64_bits_cannot_hold_are_refused(field, values):
    columns = dict.fromkeys(("identity", "camera", "viewpoint"), (0, 1)) | {"viewpoint_name": ("", "")}
    assert ImageList(paths=("a", "b"), **(columns | {field: [0.0, 2.0]})).identity.dtype == np.int64
    with pytest.raises(ValueError, match=field):
        ImageList(paths=("a", "b"), **(columns | {field: values}))


def test_open_image_converts_and_names_bad_files(tmp_path):
    Image.new("L", (3, 5), 7).save(tmp_path / "grey.png")
    image = open_image(str(tmp_path / "grey.png"))
    assert image.mode == "RGB"
    assert image.size == (3, 5)
    assert np.asarray(image).tolist() == [[[7, 7, 7]] * 3] * 5

    turned = Image.new("RGB", (3, 5))
    exif = turned.getexif()
    exif[0x0112] = 6  # the orientation tag: a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg")).size == (5, 3)

    Image.effect_noise((64, 64), 60).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    png = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "chunk.png").write_bytes(png[:40] + b"\xff" * 20)
    for name in ("cut.jpg", "text.png", "empty.png", "chunk.png", "missing.jpg"):
        with pytest.raises(OSError, match=name):
            open_image(str(tmp_path / name))


def test_sixteen_bit_grey_keeps_its_contrast(tmp_path):
    """As infrared cameras store it; clipped at 255 it would be white."""
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "deep.tif")
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32)).save(tmp_path / "shallow.tif")
    for name, expected in (("deep.png", [0, 0, 1, 128, 255]), ("deep.tif", [0, 0, 1, 128, 255])):
        assert np.asarray(open_image(str(tmp_path / name)))[0].tolist() == [[value] * 3 for value in expected]
    assert np.asarray(open_image(str(tmp_path / "shallow.tif")))[0, :, 1].tolist() == [0, 7, 255]
    # Pillow's releases differ in the mode they read it as.
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint16)).save(tmp_path / "shallow.png")
    assert np.asarray(open_image(str(tmp_path / "shallow.png")))[0, :, 1].tolist() == [0, 7, 255]


def test_floating_point_images_keep_their_contrast(tmp_path):
    """In 0..1, as matrices are often stored, and in the ranges of 8 and 16 bits; Pillow would clip them."""
    for name, values, expected in (
        ("one.tif", [0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ("resized.tif", [0, 0.25, 0.5, 1.01], [0, 64, 128, 255]),
        ("half.tif", [0, 0.1, 0.2, 0.5], [0, 26, 51, 128]),
        ("eight.tif", [0, 1, 127.6, 255], [0, 1, 128, 255]),
        ("sixteen.tif", [0, 255.9, 32768, 65535], [0, 0, 128, 255]),
    ):
        Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / name)
        assert np.asarray(open_image(str(tmp_path / name)))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 70000.0])
def test_values_that_are_no_grey_values_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, 1, value]], dtype=np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(OSError, match=r"odd\.tif"):
        open_image(str(tmp_path / "odd.tif"))
    if value == 70000:
        Image.fromarray(np.array([[0, 1, 70000]], dtype=np.int32)).save(tmp_path / "wide.tif")
        with pytest.raises(OSError, match=r"wide\.tif"):
            open_image(str(tmp_path / "wide.tif"))


def flat_png(path, width, height):
    """A black one-bit picture of any size; a row takes a byte per thousand."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore:Image size")
def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    flat_png(tmp_path / "most.png", 100, 120)
    flat_png(tmp_path / "bomb.png", 13000, 13000)
    flat_png(tmp_path / "just.png", MAX_PIXELS // 1000 + 1, 1000)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    for name in ("bomb.png", "just.png"):
        with pytest.raises(OSError, match=rf"{name}.*{MAX_PIXELS:,}"):
            open_image(str(tmp_path / name))
    monkeypatch.undo()
    monkeypatch.setattr("vareid_ext.data.types.MAX_PIXELS", 12_000)
    assert open_image(str(tmp_path / "most.png")).size == (100, 120)


def test_only_regular_files_are_opened_as_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for path in (str(tmp_path / "pipe.jpg"), str(tmp_path / "folder.jpg"), "/dev/zero", "zero\0byte.jpg"):
        with pytest.raises(OSError, match=path):
            open_image(path)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.jpg", format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("started"))
    with pytest.raises(OSError, match=r"picture\.jpg"):
        open_image(str(tmp_path / "picture.jpg"))


@pytest.mark.parametrize(
    ("path", "litter"),
    [("._a.jpg", True), ("x/._a.jpg", True), ("x\\._a.jpg", True), ("x/.DS_Store", True), ("Thumbs.db", True),
     ("__MACOSX", True), ("x/__MACOSX/y/a.jpg", True), ("desktop.ini", True), ("a.jpg", False), (".a.jpg", False),
     ("._x/a.jpg", False), ("a._b.jpg", False)],
)  # fmt: skip
def test_files_of_operating_systems_are_known(path, litter):
    assert is_litter(path) == litter


@pytest.mark.parametrize("error", [NotImplementedError("pixel format 0"), IndexError(), MemoryError()])
def test_whatever_a_decoder_fails_with_names_the_file(tmp_path, monkeypatch, error):
    """A damaged .dds file, for one, makes Pillow raise NotImplementedError."""

    def fail(path):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=rf"odd\.dds: ({type(error).__name__}|pixel format 0)"):
        open_image(str(tmp_path / "odd.dds"))


def make_data(train, names=("a", "b")):
    return ReidData("made", train, make_list([1]), make_list([1, 2]), names)


def test_subclass_mask_hard():
    # Identity 0 has front and back, identity 1 nothing known: then every viewpoint is possible.
    data = make_data(make_list([0, 0, 0, 1, 1], [0, 2, 2, -1, -1]))
    assert data.subclass_mask().tolist() == [[True, False, True], [True, True, True]]
    assert data.num_identities == 2
    assert data.num_train_viewpoints_known == 3


def test_subclass_mask_soft_counts_every_weight_above_zero():
    weight = np.array([[0.5, 0.5, 0], [0, 0, 1]], dtype=np.float32)
    data = make_data(make_list([0, 1], [0, 2], weight=weight))
    assert data.subclass_mask().tolist() == [[True, True, False], [False, False, True]]


def test_identities_must_have_no_gaps():
    with pytest.raises(ValueError, match="without gaps"):
        make_data(make_list([0, 2]))
    with pytest.raises(ValueError, match="without gaps"):
        make_data(make_list([0, 0]))


def test_summary_counts():
    data = make_data(make_list([0, 0, 0, 1, 1], [0, 2, 2, -1, 1], [1, 2, 2, -1, 1]))
    lines = data.summary().splitlines()
    assert lines[0].split() == ["split", "images", "identities", "cameras", "front", "side", "back", "unknown"]
    assert lines[2].split() == ["train", "5", "2", "2", "1", "1", "2", "1"]
    assert lines[4].split() == ["gallery", "2", "2", "1", "0", "0", "0", "2"]
    assert "4 of 5 training images have viewpoint labels" in lines[5]
