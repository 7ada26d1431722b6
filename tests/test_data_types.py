import numpy as np
import pytest
from PIL import Image

from vareid_ext.data import ImageList, ReidData
from vareid_ext.data.types import open_image


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
    ImageList(("a", "b"), **columns)
    columns[field] = columns[field][:1]
    with pytest.raises(ValueError, match=field):
        ImageList(("a", "b"), **columns)


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
    assert lines[1].split() == ["train", "5", "2", "2", "1", "1", "2", "1"]
    assert lines[3].split() == ["gallery", "2", "2", "1", "0", "0", "0", "2"]
    assert "4 of 5 training images have viewpoint labels" in lines[4]
