"""Models to share: what is written is what is loaded, as a whole or not at all; and folders that are no models."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import vareid_ext
from _vareid_cli import run
from tests.test_train import start
from vareid_ext.cli import train
from vareid_ext.files import atomic, pretrained
from vareid_ext.files.weights import load_backbone_weights, load_method_weights
from vareid_ext.models import Backbone
from vareid_ext.training.program import load_run_data


@pytest.fixture(scope="module")
def model(trained_run):
    return vareid_ext.load(trained_run, "cpu")


@pytest.fixture(scope="module")
def shared(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nested" / "mine"
    model.save_pretrained(folder, license="cc-by-4.0", data_license="rendered, no rights reserved")
    return folder


@pytest.fixture
def copied(shared, tmp_path):
    """A folder that a test may spoil."""
    return Path(shutil.copytree(shared, tmp_path / "copied"))


def changed(folder, **entries):
    """The folder, its description with other entries; section__key is in a section, ... is left out."""
    path = folder / "config.json"
    found = json.loads(path.read_text())
    for name, value in entries.items():
        *sections, key = name.split("__")
        section = found
        for part in sections:
            section = section[part]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    path.write_text(json.dumps(found))
    return folder


def test_a_saved_model_is_the_model_of_the_run_bit_for_bit(model, shared, trained_run):
    loaded = vareid_ext.load(shared, "cpu")
    assert not loaded.method.training
    state = model.method.state_dict()
    assert state.keys() == loaded.method.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.method.state_dict().items())
    images = load_run_data(loaded.config).query  # rendered as for the run
    assert torch.equal(loaded.features(images).feature, model.features(images).feature)
    assert loaded.preprocessing == model.preprocessing
    assert loaded.origin.identity_names == model.origin.identity_names
    assert loaded.origin.metrics == json.loads((trained_run / "metrics.json").read_text())
    assert (loaded.progress, loaded.feature_dim) == (model.progress, model.feature_dim)


def test_the_folder_holds_no_pickle_and_no_path_of_this_machine(shared, trained_run):
    assert sorted(path.name for path in shared.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in shared.parent.iterdir()] == ["mine"]
    assert len({path.stat().st_mode & 0o777 for path in shared.iterdir()}) == 1
    for path in shared.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())
    description = json.loads((shared / "config.json").read_text())
    assert description["version"] == vareid_ext.__version__
    assert description["config"]["model"]["backbone"] == "resnet10t"
    assert description["num_viewpoints"] == 3
    assert len(description["identity_names"]) == 8


def test_files_are_named_without_their_folders(model, tmp_path):
    data = replace(model.config.data, kind="market1501", root="/home/me/Market-1501", viewpoint_file="/data/v.pkl")
    config = replace(model.config, data=data)
    other = vareid_ext.load(model.checkpoint, "cpu")
    other.config = config
    other.save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "config.json").read_text()
    assert '"Market-1501"' in text
    assert '"v.pkl"' in text
    assert "/home" not in text
    assert "/data" not in text
    assert vareid_ext.load(tmp_path / "m", "cpu").config.data.kind == "market1501"


def test_the_card_has_the_hubs_header_and_says_what_is_not_known(model, shared, tmp_path):
    text = (shared / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "vareid_ext")
    header = yaml.safe_load(text.split("---\n")[1])
    results = header["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in results[0]["metrics"]}
    metrics = model.origin.metrics
    assert values["mAP, % (as trained)"] == pytest.approx(100 * metrics["trained"]["mAP"], abs=0.005)
    assert values["rank1, % (k-reciprocal re-ranking)"] == pytest.approx(100 * metrics["reranked"]["rank1"], abs=0.005)
    assert "rendered, no rights reserved" in card.text
    model.save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    assert "| licence of the training data | unknown |" in text
    vareid_ext.load(shared, "cpu").save_pretrained(tmp_path / "again")  # what was said once is kept
    for name in ("README.md", "config.json"):
        again = (tmp_path / "again" / name).read_text()
        assert again.replace("again", "mine") == (shared / name).read_text()


def test_weights_of_an_earlier_epoch_have_their_own_metrics(trained_run, tmp_path):
    state = torch.load(trained_run / "last.pt", weights_only=True)
    first, last = state["progress"]["evaluations"]
    assert first["step"] < last["step"] == state["progress"]["step"]
    for name in ("metrics.json", "best.pt"):
        shutil.copy(trained_run / name, tmp_path)

    def metrics_at(step):
        torch.save(state | {"progress": state["progress"] | {"step": step}}, tmp_path / "x.pt")
        return vareid_ext.load(tmp_path / "x.pt", "cpu").origin.metrics

    names = ("mAP", "mINP", "rank1", "rank5", "rank10")
    assert metrics_at(first["step"]) == {"trained": {name: first[name] for name in names}}
    assert "reranked" in metrics_at(last["step"])
    assert metrics_at(1) == {}


def test_changed_preprocessing_is_saved(model, tmp_path):
    other = vareid_ext.load(model.checkpoint, "cpu")
    other.preprocessing = replace(other.preprocessing, height=48, flip=True)
    other.save_pretrained(tmp_path / "m")
    loaded = vareid_ext.load(tmp_path / "m", "cpu")
    assert loaded.preprocessing == other.preprocessing
    image = Image.new("RGB", (16, 32), (90, 20, 200))
    assert torch.equal(loaded.embed(image), other.embed(image))


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(model, copied, tmp_path):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(FileExistsError, match=r"copied' holds 'README.md' already; overwrite=True"):
        model.save_pretrained(copied)
    (copied / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds 'notes.txt', which is no part of a model"):
            model.save_pretrained(copied, overwrite=overwrite)
    assert before.items() <= {path.name: path.read_bytes() for path in copied.iterdir()}.items()
    (copied / "notes.txt").unlink()
    changed(copied, num_viewpoints=-1)
    model.save_pretrained(copied, overwrite=True)
    assert vareid_ext.load(copied, "cpu").step == model.step
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert vareid_ext.load(tmp_path / "empty", "cpu").step == model.step
    with pytest.raises(NotADirectoryError, match="is a file; a folder is needed"):
        model.save_pretrained(copied / "README.md")
    assert sorted(os.listdir(tmp_path)) == ["copied", "empty"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("place", ["weights", "rename"])
def test_a_model_that_cannot_be_written_leaves_what_was_there(model, copied, tmp_path, monkeypatch, existing, place):
    if not existing:
        shutil.rmtree(copied)
    before = {path.name: path.read_bytes() for path in copied.iterdir()} if existing else None
    rename = os.rename

    def full(*arguments, **options):
        raise pretrained.SafetensorError("I/O error: No space left on device")

    def stopped(source, target):
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    if place == "weights":
        monkeypatch.setattr(pretrained, "save_file", full)
    else:
        monkeypatch.setattr(atomic.os, "rename", stopped)
    with pytest.raises(OSError, match=r"copied"):
        model.save_pretrained(copied, overwrite=True)
    assert (os.listdir(tmp_path) == ["copied"]) == existing
    if existing:
        assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_ctrl_c_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---- folders that are no models --------------------------------------------------------------------------------------


def spoil_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    signed(folder)


def signed(folder):
    """The folder, its description made to fit the weights."""
    changed(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def cut(folder, name, count):
    path = folder / name
    path.write_bytes(path.read_bytes()[:count])
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


KEY = "backbone.trunk.conv1.0.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: cut(f, "model.safetensors", -100), r"model.safetensors' is not the file that .*config.json' was"),
        (lambda f: cut(f, "model.safetensors", 0), r"model.safetensors' is not the file that .*config.json' was"),
        (lambda f: signed(cut(f, "model.safetensors", -100)), r"model.safetensors' cannot be loaded: "),
        (lambda f: flip_a_bit(f / "model.safetensors"), r"model.safetensors' is not the file that .* copy or download"),
        (lambda f: cut(f, "config.json", 200), r"config.json' is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config.json' is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 200_000), r"config.json' is not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), r"config.json' is of another program"),
        (lambda f: (f / "config.json").write_text("[1]"), r"config.json' is of another program"),
        (lambda f: changed(f, format=2, version="9.1"), r"has format 2 of vareid_ext 9.1; this is .* reads format 1"),
        (lambda f: changed(f, config=None), r"config.json': config: null was given; an object of data, sampler, .* is"),
        (lambda f: changed(f, config={}), r"config.json': config.data: nothing was given; an object is needed"),
        (lambda f: changed(f, config__run=...), r"config.json': config.run: nothing was given; an object is needed"),
        (lambda f: changed(f, config__heads={}), r"config.json': config.heads was given; allowed are config.data, c"),
        (lambda f: changed(f, config__model__pooling=...), r"config.json': config: model.pooling: nothing was given"),
        (lambda f: changed(f, config__model__poling="avg"), r"config: there is no field 'model.poling'; did you mean"),
        (lambda f: changed(f, config__model__last_stride="x"), r"config.json': config: .*model.last_stride"),
        (lambda f: changed(f, config__method__name="unet"), r"config.json': config: method.name: 'unet' was given"),
        (lambda f: changed(f, preprocessing={}), r"preprocessing.height: nothing was given; a whole number from 1 on"),
        (lambda f: changed(f, preprocessing__height="128"), r'preprocessing.height: "128" was given; a whole number'),
        (lambda f: changed(f, preprocessing__height=True), r"preprocessing.height: true was given; a whole number"),
        (lambda f: changed(f, preprocessing__flip=3), r"preprocessing.flip: 3 was given; true or false is needed"),
        (
            lambda f: changed(f, preprocessing__std=[1, "2"]),
            r"preprocessing.std: \[1, \"2\"\] was given; a list of num",
        ),
        (lambda f: changed(f, preprocessing__std=[0, 0, 0]), r"config.json': config: .*std"),
        (lambda f: changed(f, preprocessing__normalize="half"), r"config.json': config: .*normalize"),
        (lambda f: changed(f, preprocessing__colour="bgr"), r"preprocessing.colour was given; allowed are preprocess"),
        (lambda f: changed(f, identity_names=7), r"config.json': identity_names: 7 was given; a list of texts is need"),
        (lambda f: changed(f, num_viewpoints=-1), r"config.json': num_viewpoints: -1 was given; a whole number from 1"),
        (lambda f: changed(f, progress={}), r"config.json': progress.step: nothing was given; a whole number from 0"),
        (lambda f: changed(f, progress__evaluations=[5]), r"progress.evaluations: \[5\] was given; a list of objects"),
        (lambda f: changed(f, metrics=5), r"config.json': metrics: 5 was given; an object of numbers"),
        (lambda f: changed(f, metrics__trained={"mAP": "high"}), r"config.json': metrics: .* was given; an object of"),
        (lambda f: changed(f, training_data=None), r"training_data: null was given; an object of name, license is"),
        (lambda f: changed(f, license=...), r"config.json': license: nothing was given; a text or null is needed"),
        (lambda f: changed(f, sha256="0"), r'config.json\': sha256: "0" was given; a text of 64 hex'),
        (lambda f: changed(f, sha256=...), r"config.json': sha256: nothing was given; a text of 64 hex"),
        (lambda f: changed(f, model_type="bert"), r"config.json': model_type was given; allowed are library, format"),
        (lambda f: changed(f, identity_names=["a"]), r"model.safetensors' cannot be loaded: .*size mismatch"),
        (lambda f: spoil_weights(f, lambda w: w.pop(KEY)), rf"cannot be loaded: .*Missing key.*{KEY}"),
        (lambda f: spoil_weights(f, lambda w: w.update(x=torch.ones(1))), r"cannot be loaded: .*Unexpected key.*x"),
    ],
)
def test_a_damaged_foreign_or_newer_folder_is_refused(copied, spoil, message):
    spoil(copied)
    with pytest.raises(ValueError, match=message) as error:
        vareid_ext.load(copied, "cpu")
    assert "\n" not in str(error.value)


def test_fields_that_came_after_a_model_was_written_have_their_defaults(copied, model):
    changed(copied, version="0.0.9", config__run__compile=...)
    assert vareid_ext.load(copied, "cpu").config == model.config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"copied' holds no {name}"):
        vareid_ext.load(copied, "cpu")


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_downloaded_without_what_else_lies_there(shared, model, monkeypatch):
    asked = []

    def snapshot(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(shared)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for name in ("hf://me/market-1.0", "hf://me/market-1.0@v1", "hf://me/m@refs/pr/1"):
        assert vareid_ext.load(name, "cpu").step == model.step
    files = ["config.json", "model.safetensors"]
    assert asked == [("me/market-1.0", None, files), ("me/market-1.0", "v1", files), ("me/m", "refs/pr/1", files)]


@pytest.mark.parametrize("name", ["hf://", "hf://me", "hf://me/a/b", "hf://me/m@", "hf:///m", "hf://me /m"])
def test_a_name_that_is_none_of_the_hub_is_refused(name):
    with pytest.raises(ValueError, match=r"was given; a model of the Hub is hf://owner/name"):
        vareid_ext.load(name, "cpu")


def hub_error(kind, cause=None):
    """An error as the Hub's library raises it, whatever its version wants to know."""
    error = kind.__new__(kind)
    Exception.__init__(error, "some\nlong text")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("kind", "cause", "message"),
    [
        ("GatedRepoError", None, "its owner must give you access first"),
        ("RepositoryNotFoundError", None, "the Hub has no such model, or it is private"),
        ("RevisionNotFoundError", None, "the model has no revision 'v1'"),
        ("LocalEntryNotFoundError", ConnectionError("no route to host"), r"cannot be reached.*\(no route to host\)"),
    ],
)
def test_what_the_hub_says_no_to_is_said_in_a_line(monkeypatch, kind, cause, message):
    def fail(*arguments, **options):
        raise hub_error(getattr(huggingface_hub.errors, kind), cause)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=f"hf://me/m@v1: .*{message}") as error:
        vareid_ext.load("hf://me/m@v1", "cpu")
    assert "\n" not in str(error.value)


def test_another_programs_model_of_the_hub_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: str(tmp_path))
    with pytest.raises(ValueError, match="is of another program"):
        vareid_ext.load("hf://me/bert", "cpu")


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_a_run_is_exported_and_used_by_the_commands(trained_run, tmp_path, capsys):
    folder = tmp_path / "m"
    export = ["export", str(trained_run), "--pretrained", str(folder), "--quiet"]
    assert run([*export, "--license", "mit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pretrained"]["license"] == "mit"
    assert vareid_ext.load(folder, "cpu").origin.license == "mit"
    assert run(export) == 2
    assert re.search(r"holds 'README.md' already; .*--overwrite", capsys.readouterr().err)
    assert run([*export, "--overwrite"]) == 0
    values = []
    for what in (trained_run, folder):
        capsys.readouterr()
        assert run(["evaluate", str(what), "--device=cpu", "--json", "--quiet"]) == 0
        values.append(json.loads(capsys.readouterr().out))
    assert values[0] == values[1]


@pytest.mark.parametrize("form", ["{}", "{}/model.safetensors"])
def test_training_begins_with_a_shared_model_as_with_the_run(shared, trained_run, tmp_path, monkeypatch, form):
    monkeypatch.setattr(train, "draw_figures", lambda *args: None)
    arguments = ["--local", "--epochs=0", "--baselines=false", f"--weights={form.format(shared)}"]
    assert start(tmp_path / "again", *arguments) == 0
    scores = [json.loads((run / "metrics.json").read_text())["trained"] for run in (trained_run, tmp_path / "again")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"copied' was given, which holds no last.pt and no model.saf"),
        (lambda f: cut(f, "model.safetensors", -100), r"'.*model.safetensors' cannot be read: .* is not the file that"),
        (lambda f: cut(f, "config.json", 200), r"model.safetensors' cannot be read: .*config.json' is not JSON"),
        (lambda f: changed(f, config__model__pooling="max"), r"was trained with model.pooling 'max'; 'avg' was given"),
    ],
)
def test_training_does_not_begin_with_a_damaged_or_another_model(copied, tmp_path, capsys, spoil, message):
    spoil(copied)
    assert start(tmp_path / "run", "--local", f"--weights={copied}") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_parts_that_share_a_tensor_are_both_filled(copied):
    def tied():
        module = nn.ModuleDict({name: nn.Linear(3, 2) for name in "abc"})
        module["b"].weight = module["a"].weight
        return module

    source, target = tied(), tied()
    pretrained.write_pretrained(copied.with_name("tied"), source, {}, "")
    shutil.copy(copied.with_name("tied") / "model.safetensors", copied)
    signed(copied)
    assert load_method_weights(target, str(copied), heads=(), settings={})
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_weights_of_another_program_beside_its_own_description_are_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t"}')
    trunk = Backbone("resnet10t").trunk
    save_file({name: value + 1 for name, value in trunk.state_dict().items()}, tmp_path / "model.safetensors")
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    load_backbone_weights(trunk, str(tmp_path))
    assert all(torch.equal(value, before[key] + 1) for key, value in trunk.state_dict().items())
