"""vareid views: the pictures of PN-GAN's generator as files, and their reader."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vareid_ext
from _vareid_cli import run
from tests.test_train import SMALL
from vareid_ext.cli import views
from vareid_ext.data import ReidDataset, build_transform, collate, load_data, write_manifest
from vareid_ext.data.extra_files import ExtraFiles
from vareid_ext.files.checkpoint import load_checkpoint, save_checkpoint
from vareid_ext.training.command_line import parse
from vareid_ext.training.program import load_run_data

GENERATOR = ["--method=pngan-generated", "--generator-width=4", "--generator-blocks=1", "--embed-dim=8", "--epochs=0",
             "--height=64", "--width=56", "--baselines=false", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator") / "run"
    assert run(["train", *SMALL, *GENERATOR, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    data = load_run_data(parse(SMALL).config, progress=False)
    return write_manifest(data, tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def drawn(generator, manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "views"
    assert call(generator, manifest, "--output", folder) == 0
    return folder


@pytest.fixture
def photos(manifest, tmp_path):
    """A folder of three images, one of them deeper."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        shutil.copy(manifest.parent / "query" / f"{number:06}.png", folder / name)
    return folder


def call(*arguments):
    return run(["views", *map(str, arguments), "--quiet", "--workers", "0", "--device", "cpu"])


def test_pngan_reads_what_the_generator_draws(generator, manifest, drawn):
    files, every = ExtraFiles(views=str(drawn)), ["views"]
    data = load_data("manifest", manifest, extras=files, train_extras=every, test_extras=every, progress=False)
    model = vareid_ext.load(generator, "cpu")
    how = model.preprocessing
    transform = build_transform(how.height, how.width, train=False, mean=how.mean, std=how.std)
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (how.mean, how.std))
    for images in data.splits.values():
        batch = collate([ReidDataset(replace(images, extras={}), transform)[i] for i in (0, len(images) - 1)])
        with torch.inference_mode():
            pictures = (255 * (model.method.pictures(batch) * std + mean)).clamp(0, 255)
        assert pictures.std() > 10
        for picture, index in zip(pictures, batch.index.tolist(), strict=True):
            found = images.load_extras(index, 32, 16)["views"]
            torch.testing.assert_close(found.float(), picture, atol=0.501, rtol=0)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def test_a_command_goes_on_where_it_was(generator, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "views"

    def stop(pictures, files):
        if "c_to_1" in files[0].name:
            raise KeyboardInterrupt
        write(pictures, files)

    write = views._write
    with monkeypatch.context() as patch:
        patch.setattr(views, "_write", stop)
        assert call(generator, photos, "--output", output, "--batch-size", "2") == 130
    error = capsys.readouterr().err
    assert "2 of 3 images are done; the same command goes on there" in error
    (output / "b_to_8.png").unlink()
    (output / f".b_to_8.png.{'0' * 8}.{'0' * 8}.part").write_bytes(b"another machine's")
    before = times(output)
    assert call(generator, photos, "--output", output) == 0
    assert "eight views of each of 3 images\n1 of them by an earlier start" in capsys.readouterr().out
    after = times(output)
    assert len(after) == 24
    kept = {path for path in before if before[path] == after[path]}
    assert kept == {output / f"a_to_{k}.png" for k in range(1, 9)}
    # Further images may follow, and those that are there stay.
    shutil.copy(photos / "a.png", photos / "d.png")
    assert call(generator, photos, "--output", output) == 0
    assert {path: time for path, time in times(output).items() if path in after} == after
    assert len(times(output)) == 32


@pytest.mark.parametrize(
    ("stages", "stage", "evaluated", "undone"),
    [(3, 0, [], 1), (3, 1, [2], 2), (3, 2, [2, 4], None), (2, 1, [2], 2), (2, 1, [2, 4], None)],
)
def test_a_generator_whose_training_is_not_done_draws_nothing(
    generator, photos, tmp_path, capsys, stages, stage, evaluated, undone
):
    """Stages of the generator, of a part of it and of the networks; the epochs after which the run was evaluated."""
    state = load_checkpoint(generator / "last.pt")
    parts = (["generator", "discriminator"], ["discriminator", "generator.layers"], ["photograph", "generated"])
    state["config"]["stages"] = [{"epochs": 2, "train": train} for train in parts[:stages]]
    state["progress"] |= {"stage": stage, "evaluations": [{"epoch": epoch} for epoch in evaluated]}
    save_checkpoint(tmp_path / "last.pt", state)
    assert call(tmp_path / "last.pt", photos, "--output", tmp_path / "views") == (2 if undone else 0)
    if undone:
        error = capsys.readouterr().err
        assert f"stage {undone} of {stages}, which trains the generator, is not done; vareid train --resume" in error
        assert not (tmp_path / "views").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(generator, trained_run, photos, tmp_path, capsys):
    def refused(*arguments, output=tmp_path / "views"):
        assert call(*arguments, "--output", output) == 2
        return capsys.readouterr().err

    assert "RUN: a run of method 'va-reid' was given; one of 'pngan-generated' is needed" in refused(
        trained_run, photos
    )
    assert "lies in" in refused(generator, photos, output=photos / "views")
    (tmp_path / "list.txt").write_text(f"photos/a.png\n{Path(__file__).parents[1]}/x.png\n")
    assert "x.png lies outside" in refused(generator, tmp_path / "list.txt")
    shutil.copy(photos / "a.png", photos / "a.jpg")
    assert "whose views would have the same names" in refused(generator, photos)
    (photos / "a.jpg").write_bytes(b"")
    (photos / "a.png").unlink()
    assert not (tmp_path / "views").exists()
    assert "1 unreadable images (--skip-bad-images goes on without the images)" in refused(generator, photos)
    assert not times(tmp_path / "views")
    assert "holds something else; choose another folder" in refused(generator, photos, output=photos.parent)
    (tmp_path / "views" / "generator").write_text("another")
    assert "holds views by another generator" in refused(generator, photos)
