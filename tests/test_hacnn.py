"""HA-CNN: its published size, its maps, and where it looks."""

from __future__ import annotations

import json

import pytest
import torch

from tests.test_train import start
from tests.tiny import batch_of, method_of, without_gradient, without_heads
from vareid_ext.cli import train
from vareid_ext.methods.hacnn import Streams, inception_a, inception_b, look_at

NARROW = {"widths": (16, 16, 32), "dim": 8}


def test_the_published_size_and_shapes():
    method, batch = method_of("hacnn", 751).eval(), batch_of(torch.rand(1, 3, 160, 64))
    assert without_heads(method) == 2_929_112
    assert sum(p.numel() for p in method.parameters()) == 2_929_112 + 2 * 751 * 513
    maps, regions = [], []
    for attention in method.attention:
        attention.register_forward_hook(lambda module, inputs, outputs: maps.append(tuple(outputs[0].shape)))
    for local in method.local:
        local.register_forward_hook(lambda module, inputs, output: regions.append(tuple(output.shape)))
    with torch.no_grad():
        assert method.embed(batch, normalize="parts").shape == (1, 1024)
    assert maps == [(1, 128, 40, 16), (1, 256, 20, 8), (1, 384, 10, 4)]
    assert regions == [(1, 128, 12, 14)] * 4 + [(1, 256, 6, 7)] * 4 + [(1, 384, 3, 4)] * 4


def test_the_streams_stand_side_by_side():
    x = torch.rand(2, 6, 8, 4)
    for module, size in ((inception_a(6, 32), (8, 4)), (inception_b(6, 32), (4, 2))):
        assert isinstance(module, Streams)
        outputs = [stream(x) for stream in module.eval()]
        assert {tuple(output.shape[2:]) for output in outputs} == {size}
        assert sum(output.shape[1] for output in outputs) == 32
        assert torch.equal(module(x), torch.cat(outputs, dim=1))


def test_a_region_is_a_quarter_as_high_as_the_map_and_as_wide():
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 5), indexing="ij")
    ramp = torch.stack([columns, rows])[None].repeat(2, 1, 1, 1)  # what is seen is where it is
    found = look_at(ramp, torch.tensor([[0.0, 0.0], [0.0, -0.75]]))
    torch.testing.assert_close(found[:, 0], ramp[:, 0])
    torch.testing.assert_close(found[0, 1], rows / 4)
    torch.testing.assert_close(found[1, 1], rows / 4 - 0.75)


def test_everything_is_trained():
    method, batch = method_of("hacnn", **NARROW), batch_of(torch.rand(6, 3, 64, 32))
    terms = method(batch)
    assert set(terms) == {"identity", "regions"}
    assert all(term.weight == 1 for term in terms.values())
    # A bias before a batch norm changes nothing in training.
    biases = {f"{name}.0.bias" for name, module in method.named_modules() if hasattr(module, "0")}
    assert not without_gradient(method, batch) - biases


def test_the_whole_and_the_regions_have_a_loss_each():
    method, batch = method_of("hacnn", **NARROW), batch_of(torch.rand(6, 3, 64, 32))
    for name, other in (("identity", ("local", "region_head")), ("regions", ("head", "embed_whole"))):
        method.zero_grad()
        method(batch)[name].value.backward()
        touched = {n.split(".")[0] for n, p in method.named_parameters() if p.grad is not None}
        assert touched.isdisjoint(other)
        assert "stem" in touched


def test_the_viewpoint_aware_loss_is_that_of_the_whole():
    method, batch = method_of("hacnn", viewpoint_aware=True, **NARROW), batch_of(torch.rand(6, 3, 64, 32))
    terms = method(batch)
    assert set(terms) == {"global identity", "viewpoint", "regularizer", "regions"}
    terms["viewpoint"].value.backward()
    assert all(p.grad is None for p in method.local.parameters())


def test_section_model_has_no_part_in_it(tmp_path, monkeypatch, capsys):
    """Only the checkpoint of a run is a file of weights for it."""
    monkeypatch.setattr(train, "draw_figures", lambda *args: None)
    arguments = ["--method=hacnn", "--widths=[16, 16, 16]", "--dim=8", "--epochs=0", "--baselines=false"]
    assert start(tmp_path / "run", *arguments) == 0
    assert "hacnn, a network of its own, " in capsys.readouterr().out
    assert start(tmp_path / "again", *arguments, f"--weights={tmp_path / 'run' / 'last.pt'}") == 0
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text())["trained"] for run in ("run", "again")]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-9)
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "trunk.pth")
    assert start(tmp_path / "other", *arguments, f"--weights={tmp_path / 'trunk.pth'}") == 2
    assert "method 'hacnn' has a network of its own" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(16, 16), (33, 17)])
def test_images_of_any_size(size):
    method = method_of("hacnn", **NARROW).eval()
    assert method.embed(batch_of(torch.rand(2, 3, *size))).shape == (2, 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": (128, 250, 384)}, r"method.widths: \(128, 250, 384\) was given; allowed are multiples of 16"),
        ({"widths": (0, 16, 16)}, "method.widths"),
        ({"dim": 0}, "method.dim: 0 was given; allowed are values from 1"),
    ],
)
def test_settings_outside_what_is_allowed_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        method_of("hacnn", **settings)
