"""The ablation's one file of images, its augmentation on the device, and its resumption."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from benchmarks import market_ablation as ablation
from vareid_ext.data import build_transform
from vareid_ext.training.config import DataConfig

TINY = ("--model.backbone=resnet10t", "--model.backbone_options={channels: [8, 8, 8, 16]}", "--data.height=32",
        "--data.width=16", "--sampler.identities=2", "--sampler.instances=2", "--sampler.batches_per_epoch=2",
        "--optimizer.epochs=2", "--run.device=cpu")  # fmt: skip


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Market-1501's layout: smooth images, 3 training people, 2 others, junk and a distractor."""
    root = tmp_path_factory.mktemp("market")
    rng = np.random.default_rng(0)
    names = {
        "bounding_box_train": [f"{p:04d}_c{c}s1_0000{c}1_00.jpg" for p in (2, 7, 11) for c in (1, 2, 3)],
        "query": ["0001_c1s1_000001_00.jpg", "0003_c2s1_000001_00.jpg"],
        "bounding_box_test": ["0001_c2s1_000001_00.jpg", "0003_c1s1_000001_00.jpg", "0000_c1s1_000001_00.jpg",
                              "-1_c1s1_000001_00.jpg"],
    }  # fmt: skip
    for folder, files in names.items():
        (root / folder).mkdir()
        for name in files:
            coarse = Image.fromarray(rng.integers(0, 256, (4, 2, 3), dtype=np.uint8))
            coarse.resize((64, 128), Image.Resampling.BICUBIC).save(root / folder / name, quality=95)
    lines = [f"{name},front" for files in names.values() for name in files]
    (root / "views.csv").write_text("\n".join(["path,viewpoint", *lines]))
    return root


@pytest.fixture(scope="module")
def packed(market: Path) -> Path:
    target = market / "packed.npz"
    assert ablation.main(["pack", str(market), str(target), "--viewpoint-file", str(market / "views.csv")]) == 0
    return target


def test_packed_images_come_back_with_their_labels(market: Path, packed: Path) -> None:
    data, pixels = ablation.unpack(packed, torch.device("cpu"))
    assert [len(pixels[split]) for split in ("train", "query", "gallery")] == [9, 2, 3]  # the junk is left out
    assert data.train.identity.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.num_identities == 3
    assert sorted(data.gallery.identity.tolist()) == [0, 1, 3]
    assert data.query.camera.tolist() == [1, 2]
    assert set(data.train.viewpoint.tolist()) == {0}
    with Image.open(market / "query" / "0003_c2s1_000001_00.jpg") as image:
        expected = np.asarray(image.convert("RGB"), dtype=float).transpose(2, 0, 1)
    error = pixels["query"][1].double().numpy() - expected
    assert np.sqrt((error**2).mean()) < 6


def test_a_file_that_would_be_too_large_is_not_written(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = market / "large.npz"
    assert ablation.main(["pack", str(market), str(target), "--most", "0.001"]) == 2
    assert "quality" in capsys.readouterr().err
    assert not target.exists()


def test_without_augmentation_images_are_those_of_the_trainer(packed: Path) -> None:
    _, pixels = ablation.unpack(packed, torch.device("cpu"))
    config = DataConfig(height=256, width=128, flip=0.0, pad=0, erasing=0.0)
    x = ablation.resized(pixels["train"], config)
    got = ablation.augmented(x, config, torch.Generator())
    torch.testing.assert_close(got, ablation.normalised(x, config), rtol=0, atol=0)
    transform = build_transform(256, 128, train=False)
    for pixel, ours in zip(pixels["train"], got, strict=True):
        theirs = transform(Image.fromarray(pixel.permute(1, 2, 0).numpy()))
        assert float((ours - theirs).abs().max()) < 2.5 / 255 / 0.224  # Pillow rounds to whole numbers twice


def test_images_are_shifted_within_a_black_border_and_flipped() -> None:
    N, H, W, pad = 200, 12, 8, 3
    x = torch.rand(1, 3, H, W).expand(N, -1, -1, -1)
    config = DataConfig(height=16, width=16, flip=0.5, pad=pad, erasing=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    got = ablation.augmented(x, config, torch.Generator().manual_seed(0))
    wide = [functional.pad(image, [pad] * 4) for image in (x[0], x[0].flip(2))]
    places = [(turned, top, left) for turned in (0, 1) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    cut = {place: wide[place[0]][:, place[1] : place[1] + H, place[2] : place[2] + W] for place in places}
    found = [[place for place in places if torch.equal(image, cut[place])] for image in got]
    assert all(len(matches) == 1 for matches in found)
    assert len({matches[0] for matches in found}) > 80  # of 98, in 200 draws


def test_rectangles_of_the_stated_area_are_erased_in_half_of_the_images() -> None:
    N, H, W = 2000, 64, 32
    config = DataConfig(height=H, width=W, flip=0.0, pad=0, erasing=0.5, mean=(0, 0, 0), std=(1, 1, 1))
    got = ablation.augmented(torch.ones(N, 3, H, W), config, torch.Generator().manual_seed(0))
    gone = got[:, 0] == 0
    assert torch.equal(got, got[:, :1].expand_as(got))
    count = gone.sum((1, 2))
    assert 0.45 < float((count > 0).double().mean()) < 0.55
    assert int(count.max()) <= 0.4 * H * W * 1.1
    for mask in gone[count > 0][:200]:  # a rectangle: the product of its rows and columns
        assert int(mask.sum()) == int(mask.any(1).sum()) * int(mask.any(0).sum())
    average = float(count[count > 0].double().mean()) / (H * W)
    assert 0.15 < average < 0.22  # half of 0.02 + 0.4, less what is cut


def test_a_stopped_row_goes_on_to_the_same_result(packed: Path, tmp_path: Path) -> None:
    config = ablation.row_config("market1501-va-reid", "cpu", TINY)
    data, pixels = ablation.unpack(packed, torch.device("cpu"))
    whole = ablation.train_row(config, data, pixels, tmp_path / "whole.pt", time.monotonic() + 1000)
    assert ablation.train_row(config, data, pixels, tmp_path / "parts.pt", 0) is None
    parts = ablation.train_row(config, data, pixels, tmp_path / "parts.pt", 0)
    assert whole is not None
    assert parts is not None
    assert {k: v for k, v in parts.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    weights = [torch.load(tmp_path / name, weights_only=True)["method"] for name in ("whole.pt", "parts.pt")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_rows_leave_a_table_and_are_not_trained_twice(packed: Path, tmp_path: Path) -> None:
    rows = ["market1501-xent", "market1501-va-reid"]
    command = ["train", str(packed), str(tmp_path), "--device", "cpu", "--rows", *rows, *TINY]
    assert ablation.main([*command, "--minutes", "0"]) == 1
    assert json.loads((tmp_path / "results.json").read_text()) == {}
    (tmp_path / "rows" / "market1501-xent.json").write_text(
        '{"mAP": 0.5, "rank-1": 0.25, "re-ranked mAP": 0.75, "re-ranked rank-1": 0.125, "seconds": 7}'
    )
    assert ablation.main([*command, "--minutes", "5"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == set(rows)
    assert 0 < results["market1501-va-reid"]["mAP"] <= 1
    text = (tmp_path / "table.md").read_text()
    assert "| Xent | 50.00 | 25.00 | 75.00 | 12.50 | 7 | 86.30 | 94.31 |" in text
    assert "resnet10t" in text
