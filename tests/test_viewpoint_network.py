"""The network of vareid label-viewpoints: what it learns, its probabilities, its file, and the command around it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from _vareid_cli import run
from vareid_ext.models.viewpoint_network import ViewpointNetwork, load_viewpoint_network, save_viewpoint_network
from vareid_ext.training.viewpoint_network import (
    fit_temperature,
    split_people,
    train_viewpoint_network,
    viewpoint_probabilities,
)

NAMES = ("left", "right", "back")


def pictures_of(view: np.ndarray, seed: int = 0) -> torch.Tensor:
    """Noise, brighter on the left (0) or the right (1), or below (2)."""
    pictures = np.random.default_rng(seed).integers(0, 90, (len(view), 3, 64, 32))
    pictures[view == 0, :, :, :14] += 120
    pictures[view == 1, :, :, 18:] += 120
    pictures[view == 2, :, 40:] += 120
    return torch.from_numpy(pictures.astype(np.uint8))


@pytest.fixture(scope="module")
def network() -> ViewpointNetwork:
    view = np.arange(192) % 3
    held_out = np.arange(192) % 8 == 0
    return train_viewpoint_network(pictures_of(view), view, held_out, NAMES, epochs=12, progress=False)


def test_it_learns_and_left_and_right_are_exchanged_where_a_picture_is_mirrored(network):
    view = np.arange(60) % 3
    pictures = pictures_of(view, seed=1)
    probability = viewpoint_probabilities(network, pictures)
    assert (probability.argmax(axis=1) == view).mean() > 0.95
    np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-9)
    mirrored = viewpoint_probabilities(network, pictures.flip(3))
    np.testing.assert_allclose(mirrored[:, [1, 0, 2]], probability, atol=1e-5)


def test_training_is_the_same_twice_and_leaves_the_random_numbers():
    view = np.arange(160) % 3
    held_out = np.arange(160) % 5 == 0
    torch.manual_seed(5)
    expected = torch.rand(3)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(train_viewpoint_network(pictures_of(view), view, held_out, NAMES, epochs=1, progress=False))
        assert torch.equal(torch.rand(3), expected)
    for one, other in zip(*(network.state_dict().values() for network in found), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_the_labels(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20_000, 3, generator=generator)
    label = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, label) == pytest.approx(temperature, rel=0.05)
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(0.05, rel=1e-3)


def test_no_person_is_in_two_parts():
    identity = np.random.default_rng(0).integers(0, 40, 500) * 7
    parts = split_people(identity)
    assert np.array_equal(sum(part.astype(int) for part in parts), np.ones(500))
    people = [set(identity[part]) for part in parts]
    assert [len(of_part) for of_part in people] == [32, 4, 4]
    assert len(set.union(*people)) == 40
    assert [int(part.sum()) for part in split_people(np.array([4, 9, 5, 5]))].count(1) >= 2
    with pytest.raises(ValueError, match="2 people were given; three are needed"):
        split_people(np.array([1, 2, 2]))


def test_a_file_gives_back_the_network(network, tmp_path):
    path = tmp_path / "views.safetensors"
    save_viewpoint_network(network, path)
    loaded = load_viewpoint_network(str(path))
    assert loaded.names == NAMES
    pictures = pictures_of(np.arange(9) % 3)
    np.testing.assert_array_equal(viewpoint_probabilities(loaded, pictures), viewpoint_probabilities(network, pictures))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-100], b"no safetensors"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a file that vareid label-viewpoints --train has written"):
            load_viewpoint_network(str(path))
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"has written: no network of viewpoints"):
        load_viewpoint_network(str(path))
    with pytest.raises(FileNotFoundError, match="gone is no file"):
        load_viewpoint_network(str(tmp_path / "gone"))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Twelve people, twelve pictures each, and a query and a gallery of one."""
    view = np.arange(144) % 3
    lines = ["path,identity,camera,viewpoint,split"]
    for number, (picture, v) in enumerate(zip(pictures_of(view), view, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,p{number // 12},{number % 2},{NAMES[v]},train")
    for split in ("query", "gallery"):
        Image.new("RGB", (8, 16)).save(tmp_path / f"{split}.png")
        lines.append(f"{split}.png,x,{len(split) % 2},,{split}")
    path = tmp_path / "people.csv"
    path.write_text("\n".join(lines))
    return path


def label(*arguments) -> int:
    return run(["label-viewpoints", *map(str, arguments), "--quiet"])


def test_train_then_label(manifest, tmp_path, capsys):
    model, output = tmp_path / "views.safetensors", tmp_path / "labels.csv"
    assert label(manifest, "--train", "--model", model, "--epochs", 15, "--device", "cpu", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["measured"]["held_out"]["images"] == 12
    assert said["measured"]["held_out"]["classes"] == sorted(NAMES)
    assert said["measured"]["held_out"]["accuracy"] > 0.9
    assert label(manifest, "--model", model, "--output", output, "--device", "cpu", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == 146
    assert said["measured"]["known"]["accuracy"] > 0.9
    with output.open() as file:
        found = {row["path"]: row for row in csv.DictReader(file)}
    assert set(found) == {*(f"{n}.png" for n in range(144)), "query.png", "gallery.png"}
    for row in found.values():
        if row["viewpoint"] != "-1":
            shares = dict(share.split(":") for share in row["viewpoint"].split())
            assert max(map(float, shares.values())) == pytest.approx(float(row["confidence"]), abs=2e-3)
        else:
            assert float(row["confidence"]) < 0.5


def test_all_people_of_a_manifest_without_splits_are_learned_from_or_held_out(manifest, tmp_path, capsys):
    lines = [line.rpartition(",")[0] for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(lines[:-2]))
    model = tmp_path / "views.safetensors"
    assert label(manifest, "--train", "--model", model, "--epochs", 1, "--device", "cpu", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["measured"]["held_out"]["images"]) == (120, 12)


def test_options_that_do_not_fit_are_named(manifest, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert label(*arguments) == 2
        return capsys.readouterr().err

    model, output = tmp_path / "views.safetensors", tmp_path / "labels.csv"
    assert "--keypoints, --model: one of the two is needed" in refused(manifest, "--output", output)
    assert "--output: nothing was given" in refused(manifest, "--model", model)
    assert "--model: nothing was given" in refused(manifest, "--train")
    assert "labels.csv was given, which does not go with --train" in refused(
        manifest, "--train", "--model", model, "--output", output
    )
    assert "--fit: x.csv was given, which goes with --keypoints" in refused(
        manifest, "--model", model, "--output", output, "--fit", "x.csv"
    )
    assert "--epochs: 0 was given" in refused(manifest, "--train", "--model", model, "--epochs", 0)
    assert "suffix '.pt'" in refused(manifest, "--train", "--model", tmp_path / "views.pt")
    assert "--train needs a manifest (.csv) or --data" in refused(tmp_path, "--train", "--model", model)
    assert "views.safetensors is no file" in refused(manifest, "--model", model, "--output", output)
    text = manifest.read_text()
    for name in NAMES:
        text = text.replace(f",{name},train", ",,train")
    manifest.write_text(text)
    assert "none of the 144 images of split train has a viewpoint" in refused(manifest, "--train", "--model", model)
    assert not model.exists()
    assert not output.exists()
