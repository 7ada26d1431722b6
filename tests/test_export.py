"""vareid export: graphs that give the features of the run, for any number of images; or no file."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from _vareid_cli import run
from vareid_ext.cli import export
from vareid_ext.trained import load_trained
from vareid_ext.training.program import load_run_data

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra export",
)


@pytest.fixture(scope="module")
def data(trained_run):
    return load_run_data(load_trained(trained_run, "cpu").config)


@pytest.fixture(scope="module")
def pictures(data):
    return [data.query.load(i) for i in range(len(data.query))]


@pytest.fixture(scope="module")
def photos(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, picture in enumerate(pictures[:3]):
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def expected(trained_run):
    with np.load(trained_run / "query.npz") as file:
        return file["feature"]


def call(*arguments):
    return run(["export", *map(str, arguments), "--quiet"])


def normalised(pictures):
    """float32 [N, 3, H, W] by hand; the images have the run's size, so that nothing is resized."""
    images = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((images - mean[:, None, None]) / std[:, None, None]).astype(np.float32)


@needs_onnx
@pytest.mark.parametrize("image_input", ["float32", "uint8"])
def test_an_onnx_file_gives_the_features_of_the_run(
    trained_run, pictures, photos, expected, tmp_path, capsys, image_input
):
    import onnxruntime

    path = tmp_path / "m.onnx"
    where = [] if image_input == "float32" else ["--images", photos]
    assert call(trained_run, "--onnx", path, "--image-input", image_input, "--json", *where) == 0
    (told,) = json.loads(capsys.readouterr().out).values()
    assert told == json.loads((tmp_path / "m.onnx.json").read_text())
    assert told["checked"]["batches"] == [1, 2, 17]
    assert told["checked"]["max_difference"] <= 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    session = onnxruntime.InferenceSession(str(path))
    images = normalised(pictures) if image_input == "float32" else np.stack([np.asarray(p) for p in pictures])
    assert [*told["images"]["shape"][1:]] == [*images.shape[1:]]
    for n in (1, 2, 5, len(images)):
        (found,) = session.run(["feature"], {"images": images[:n]})
        np.testing.assert_allclose(found, expected[:n], atol=1e-5)


@needs_onnx
def test_the_documented_use_of_an_onnx_file(trained_run, pictures, photos, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    larger = pictures[0].resize((50, 90))
    larger.save(tmp_path / "photos" / "a.jpg")
    arguments = ("--onnx", tmp_path / "mine-uint8.onnx", "--image-input", "uint8", "--images", photos)
    assert call(trained_run, *arguments) == 0
    text = (Path(__file__).resolve().parents[1] / "docs" / "your-model.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in b)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    expected = load_trained(trained_run, "cpu").embed("photos/a.jpg")
    np.testing.assert_allclose(names["feature"], expected, atol=1e-5)


def test_a_program_of_torch_export_gives_the_features_of_the_run(trained_run, pictures, photos, expected, tmp_path):
    assert call(trained_run, "--torch-export", tmp_path / "m.pt2", "--images", photos) == 0
    program = torch.export.load(tmp_path / "m.pt2").module()
    for n in (1, 3):
        with torch.no_grad():
            found = program(torch.from_numpy(normalised(pictures[:n])))
        np.testing.assert_allclose(found, expected[:n], atol=1e-5)


def test_another_size_can_be_asked_for(trained_run, photos, tmp_path):
    assert call(trained_run, "--torch-export", tmp_path / "m.pt2", "--images", photos, "--size", "48x32") == 0
    assert json.loads((tmp_path / "m.pt2.json").read_text())["images"]["shape"] == ["N", 3, 48, 32]
    model = load_trained(trained_run, "cpu")
    model.preprocessing = export.replace(model.preprocessing, height=48, width=32)
    image = Image.open(photos / "0.png").resize((32, 48))
    with torch.no_grad():
        found = torch.export.load(tmp_path / "m.pt2").module()(torch.from_numpy(normalised([image])))
    torch.testing.assert_close(found, model.embed(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_a_file_that_differs_is_not_written(trained_run, photos, tmp_path, monkeypatch, capsys, wrong):
    """Nor is the one that does not."""
    (tmp_path / "m.pt2").write_text("an older file")

    def write(program, path, names):
        path.write_bytes(b"a graph")
        return lambda images: program.module()(images) + wrong

    monkeypatch.setitem(export._WRITERS, "torch_export", write)
    monkeypatch.setitem(
        export._WRITERS, "onnx", lambda program, path, names: path.write_bytes(b"x") and program.module()
    )
    monkeypatch.setattr(export, "_NEEDED", ())
    arguments = ("--onnx", tmp_path / "m.onnx", "--torch-export", tmp_path / "m.pt2", "--images", photos)
    assert call(trained_run, *arguments) == 2
    assert "m.pt2: differs from PyTorch by" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "an older file"


def test_packages_that_are_missing_are_named_with_what_to_type(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "_NEEDED", ("onnx_of_nobody", "json"))
    assert call(trained_run, "--onnx", tmp_path / "m.onnx") == 2
    assert "onnx_of_nobody is not installed; type: pip install 'vareid_ext[export]'" in capsys.readouterr().err


def test_what_cannot_be_exported_says_why(trained_run, photos, tmp_path, monkeypatch, capsys):
    def fails(feature, images):
        raise RuntimeError("no such operator\nmany lines")

    monkeypatch.setattr(export, "_program", fails)
    assert call(trained_run, "--torch-export", tmp_path / "m.pt2", "--images", photos) == 2
    assert capsys.readouterr().err.endswith("method 'va-reid' cannot be exported: no such operator\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "--onnx, --torch-export, --pretrained: none was given"),
        (["{run}", "--onnx", "m.pt"], "suffix '.pt'"),
        (["{run}", "--torch-export", "{tmp}/no/m.pt2"], "does not exist"),
        (["{run}", "--torch-export", "{tmp}/m.pt2", "--size", "256"], "--size: '256' was given"),
        (["{run}", "--torch-export", "{tmp}/m.pt2", "--size", "8x8"], "--size: '8x8' was given"),
        (["{run}", "--torch-export", "{tmp}/m.pt2", "--images", "{tmp}"], "holds no images"),
        (["{tmp}", "--torch-export", "{tmp}/m.pt2"], "holds no checkpoint"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(trained_run, tmp_path, capsys, arguments, message):
    assert call(*(argument.format(run=trained_run, tmp=tmp_path) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
