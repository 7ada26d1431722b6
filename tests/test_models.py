from __future__ import annotations

import dataclasses
import math
import re

import pytest
import timm
import torch
from torch import nn

from tests.tiny import batch_of, tiny
from vareid_ext.files.checkpoint import save_checkpoint
from vareid_ext.files.weights import load_backbone_weights, load_method_weights
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.methods.va_reid import STRIPES
from vareid_ext.models import Backbone, GeneralizedMeanPooling, backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "efficientnet_b0", "legacy_seresnext26_32x4d"])
def test_last_stride_1_doubles_the_map_and_changes_no_weight(name):
    torch.manual_seed(0)
    plain = Backbone(name, last_stride=2).eval()
    wide = Backbone(name, last_stride=1).eval()
    wide.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 128, 64)
    with torch.no_grad():
        assert plain(images).shape[2:] == (4, 2)
        assert wide(images).shape[2:] == (8, 4)
    dilations = {m.dilation for m in wide.modules() if isinstance(m, nn.Conv2d)}
    assert dilations == {(1, 1)}


def test_last_stride_1_is_the_strides_of_the_last_stage_and_nothing_else():
    torch.manual_seed(0)
    model = Backbone("resnet18", last_stride=1).eval()
    by_hand = timm.create_model("resnet18", num_classes=0, global_pool="").eval()
    by_hand.layer4[0].conv1.stride = (1, 1)
    by_hand.layer4[0].downsample[0].stride = (1, 1)
    by_hand.load_state_dict(model.trunk.state_dict())
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), by_hand(images), rtol=0, atol=0)


def test_feature_is_the_neck_of_the_pooled_map():
    model = tiny().train()
    images = torch.rand(6, 3, 64, 32)
    (feature,) = model.features(batch_of(images))
    pooled = model.backbone(images).mean((2, 3))
    expected = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)
    assert model.backbone.channels == 16
    assert not model.neck.bias.requires_grad
    assert model.neck.weight.requires_grad


@pytest.mark.parametrize("local", [False, True])
def test_retrieval_features_are_the_concatenation_of_length_1(local):
    model = tiny(local=local).eval()
    batch = batch_of(torch.rand(3, 3, 64, 32))
    with torch.no_grad():
        feature, parts = model.embed(batch), model.features(batch)
    assert len(parts) == (1 + sum(STRIPES) if local else 1)
    joined = torch.cat(parts, 1)
    assert feature.shape == (3, 16 + (4 * sum(STRIPES) if local else 0))
    torch.testing.assert_close(feature, joined / joined.norm(dim=1, keepdim=True))


def test_features_can_be_of_length_1_by_part_or_left_and_of_mirrored_images_too():
    model = tiny(local=True).eval()
    images = torch.rand(3, 3, 64, 32)
    with torch.no_grad():
        parts, mirrored = model.features(batch_of(images)), model.features(batch_of(images.flip(3)))
        whole = model.embed(batch_of(images), normalize="none")
        by_part = model.embed(batch_of(images), normalize="parts")
        both = model.embed(batch_of(images), flip=True)
    torch.testing.assert_close(whole, torch.cat(parts, 1))
    torch.testing.assert_close(by_part, torch.cat([p / p.norm(dim=1, keepdim=True) for p in parts], 1))
    added = torch.cat([a + b for a, b in zip(parts, mirrored, strict=True)], 1)
    torch.testing.assert_close(both, added / added.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match=r"flip: .*joints"):
        model.embed(dataclasses.replace(batch_of(images), extras={"joints": torch.zeros(3, 14, 3)}), flip=True)


def test_generalised_mean_pooling():
    pool = GeneralizedMeanPooling()
    x = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(pool(x), (x.double() ** 3).mean((2, 3)).pow(1 / 3).float())
    with torch.no_grad():
        pool.p.fill_(1.0)
    torch.testing.assert_close(pool(x), x.mean((2, 3)))
    pool(x).sum().backward()
    assert pool.p.grad is not None
    assert torch.isfinite(pool(torch.zeros(1, 2, 3, 3, dtype=torch.float16))).all()


def test_input_norm_takes_a_colour_cast_away():
    model = tiny(input_norm=True).eval()
    images = torch.rand(4, 3, 64, 32)
    scale, shift = torch.tensor([0.5, 1.5, 0.8]).view(1, 3, 1, 1), torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    variance, mean = torch.var_mean(images, (2, 3), correction=0, keepdim=True)
    plain = (images - mean) / (variance + 1e-3).sqrt()
    torch.testing.assert_close(model.backbone.input_norm(images), plain)
    torch.testing.assert_close(model.backbone.input_norm(images * scale + shift), plain, rtol=0.05, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images), model.backbone.trunk(plain))


def test_features_are_float32_under_mixed_precision():
    model = tiny(local=True, pooling="gem")
    with torch.autocast("cpu", torch.bfloat16):
        batch = batch_of(torch.rand(4, 3, 64, 32))
        parts, terms = model.features(batch), model(batch)
    assert all(part.dtype == torch.float32 for part in [*parts, *(term.value for term in terms.values())])


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "checkpoint", "safetensors"])
def test_weights_come_from_a_local_file(tmp_path, wrapped):
    torch.manual_seed(1)
    source = tiny()
    weights = source.backbone.trunk.state_dict()
    path = tmp_path / ("weights.safetensors" if wrapped == "safetensors" else "weights.pth")
    if wrapped == "safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    elif wrapped == "plain":
        torch.save({**weights, "fc.weight": torch.zeros(1000, 16)}, path)
    elif wrapped == "state_dict":
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    else:
        torch.save({"model": weights}, path)
    torch.manual_seed(2)
    loaded = tiny()
    load_backbone_weights(loaded.backbone.trunk, str(path))
    for key, value in loaded.backbone.trunk.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_weights_that_do_not_fit_are_errors(tmp_path):
    model = tiny()
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        load_backbone_weights(model.backbone.trunk, str(path))
    weights = dict(model.backbone.trunk.state_dict())
    del weights["conv1.0.weight"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"1 of \d+ entries .* conv1\.0\.weight"):
        load_backbone_weights(model.backbone.trunk, str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="list"):
        load_backbone_weights(model.backbone.trunk, str(path))
    for change in (torch.Tensor.to_sparse, lambda value: value.to("meta"), lambda value: value * math.nan):
        weights["conv1.0.weight"] = change(torch.ones_like(model.backbone.trunk.conv1[0].weight))
        torch.save(weights, path)
        with pytest.raises(ValueError, match=r"1 of \d+ entries .* conv1\.0\.weight"):
            load_backbone_weights(model.backbone.trunk, str(path))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_that_cannot_be_read_are_errors(tmp_path, name):
    path = tmp_path / name
    torch.save(tiny().backbone.trunk.state_dict(), path)
    for content in (b"", b"not a file of weights", path.read_bytes()[:2000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights: .*{name}.* cannot be read: ."):
            load_backbone_weights(tiny().backbone.trunk, str(path))


def test_weights_that_are_no_tensors_are_errors(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(dict.fromkeys(tiny().backbone.trunk.state_dict(), 0), path)
    with pytest.raises(ValueError, match="does not fit the network"):
        load_backbone_weights(tiny().backbone.trunk, str(path))


@pytest.mark.parametrize("options", [{"foo": 1}, {"num_classes": 3}, {"channels": 3}])
def test_options_that_the_backbone_does_not_take_are_errors(options):
    with pytest.raises(ValueError, match=r"backbone_options: .*resnet10t"):
        Backbone("resnet10t", options=options)


class Unreachable:
    """An HTTP client in a place without a network."""

    def head(self, url, **options):
        raise ConnectionError("no route to host")


def test_a_failed_download_says_what_to_do_and_is_not_tried_for_a_minute(monkeypatch, tmp_path):
    hub = backbone.huggingface_hub
    asked = []

    def create(name, **options):
        asked.append(hub.constants.HF_HUB_OFFLINE)
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "get_session", Unreachable)
    monkeypatch.setattr(backbone.timm, "create_model", create)
    with pytest.raises(OSError, match=r"resnet18.*no route to host.*--weights FILE.*pretrained=false"):
        Backbone("resnet18", pretrained=True)
    assert asked == [True]
    assert not hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("name", "options", "pretrained"),
    [
        ("resnet18.no_such_weights", {}, False),
        ("botnet50ts_256", {}, True),
        ("resnet10t", {"block": 3}, False),
        ("resnet10t", {"layers": 0}, False),
        ("resnet10t", {"act_layer": "foo"}, False),
        ("resnet10t", {"channels": [8, -8, 8, 8]}, False),
        ("resnet10t", {"output_stride": 7}, False),
        ("resnet10t", {"in_chans": 1}, False),
        ("resnet10t", {"features_only": True}, False),
        ("resnet10t", {"checkpoint_path": "no/such/file.pth"}, False),
    ],
)
def test_what_timm_cannot_build_is_an_error_of_one_line(monkeypatch, name, options, pretrained):
    monkeypatch.setattr(backbone.huggingface_hub, "get_session", Unreachable)
    with pytest.raises(ValueError, match="backbone") as error:
        Backbone(name, options=options, pretrained=pretrained)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "prefix", ["", "base.", "model.", "_orig_mod.", "module.", "backbone.", "module._orig_mod.model."]
)
@pytest.mark.parametrize("counters", ["scalar", "missing", "one element"])
def test_backbone_weights_of_other_programs_are_taken(tmp_path, prefix, counters):
    torch.manual_seed(1)
    weights = {**tiny().backbone.trunk.state_dict(), "fc.weight": torch.zeros(5, 16)}
    for key in [key for key in weights if key.endswith("num_batches_tracked")]:
        if counters == "missing":
            del weights[key]
        elif counters == "one element":
            weights[key] = torch.tensor([7])
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / "weights.pth")
    torch.manual_seed(2)
    loaded = tiny()
    assert load_backbone_weights(loaded.backbone.trunk, str(tmp_path / "weights.pth")) == (f"{prefix}fc.weight",)
    for key, value in loaded.backbone.trunk.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, weights[key]), key
        elif counters == "one element":
            assert value.item() == 7


def test_an_error_about_weights_shows_what_the_file_holds(tmp_path):
    path = str(tmp_path / "weights.pth")
    for content in ({"encoder.stem": torch.zeros(3, 2)}, {"net": {"conv1": torch.zeros(2)}, "epoch": 3}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"{next(iter(content))}.*") as error:
            load_backbone_weights(tiny().backbone.trunk, path)
        assert "[3, 2]" in str(error.value) or "epoch int" in str(error.value)
    weights = tiny().backbone.trunk.state_dict()
    torch.save({**{f"model.{key}": weights[key] for key in weights}, **weights}, path)
    with pytest.raises(ValueError, match="several networks"):
        load_backbone_weights(tiny().backbone.trunk, path)


def random_checkpoint(path, average, **arguments):
    """A checkpoint of a network whose weights are none that training begins with."""
    source = tiny(**arguments)
    for value in source.state_dict().values():
        value.copy_(torch.rand(value.shape) * 3)
    state, other = source.state_dict(), tiny(**arguments).state_dict()
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in state.items()}}
    entries = {"method": other if average else state, "average": averaged if average else None}
    save_checkpoint(path, {"config": {"model": {}}, **entries})
    return state


@pytest.mark.parametrize("average", [False, True])
def test_a_checkpoint_fills_all_of_a_method_or_is_refused(tmp_path, average):
    same = {"pooling": "gem", "local": True}
    state = random_checkpoint(tmp_path / "last.pt", average, **same)
    path = str(tmp_path / "last.pt")
    loaded = tiny(**same)
    assert load_backbone_weights(loaded.backbone.trunk, path) == ()
    load_method_weights(loaded, path, heads=(), settings={})
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    for other in ({"pooling": "avg"}, {"local": False}, {"identities": 4}, {"stripe_dim": 5}):
        with pytest.raises(ValueError, match=r"weights: .*last\.pt"):
            load_method_weights(tiny(**{**same, **other}), path, heads=(), settings={})
    with pytest.raises(ValueError, match=r"model\.last_stride None; 2 was given"):
        load_method_weights(tiny(**same), path, heads=(), settings={"last_stride": 2})


def test_the_heads_of_other_identities_stay_as_they_are(tmp_path):
    state = random_checkpoint(tmp_path / "last.pt", False, local=True)
    loaded = tiny(local=True, identities=9)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    load_method_weights(loaded, str(tmp_path / "last.pt"), heads=loaded.heads, settings={})
    for key, value in loaded.state_dict().items():
        head = key.startswith(("loss.", "stripes.head."))
        assert torch.equal(value, before[key] if head else state[key]), key


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet18x", {}, "resnet18x"),
        ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("resnet10t", {"last_stride": 3}, "last_stride: 3"),
    ],
)
def test_backbones_that_cannot_be_built_are_errors(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        Backbone(name, **arguments)


def brute_force_triplet(feature, identity, margin):
    losses = []
    for i in range(len(feature)):
        d = [(feature[i] - other).pow(2).sum().sqrt().item() for other in feature]
        positive = max(d[j] for j in range(len(d)) if identity[j] == identity[i])
        negative = min([d[j] for j in range(len(d)) if identity[j] != identity[i]], default=float("inf"))
        losses.append(max(0.0, margin + positive - negative))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("identities", [[0, 0, 1, 1, 2, 2], [0, 1, 2], [5, 5, 5], [3]])
def test_triplet_against_brute_force(identities):
    torch.manual_seed(len(identities))
    feature = torch.randn(len(identities), 4, dtype=torch.float64, requires_grad=True)
    identity = torch.tensor(identities)
    loss = batch_hard_triplet(feature, identity, margin=0.3)
    assert loss.item() == pytest.approx(brute_force_triplet(feature.detach(), identities, 0.3), abs=1e-12)
    loss.backward()
    assert torch.isfinite(feature.grad).all()


def test_triplet_gradient_and_duplicates():
    torch.manual_seed(0)
    feature = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    identity = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda f: batch_hard_triplet(f, identity, margin=5.0), feature)
    same = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(same, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(same.grad).all()
    assert batch_hard_triplet(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).item() == 0
    assert batch_hard_triplet(same.detach().half(), torch.tensor([0, 0, 1, 1])).dtype == torch.float32


def test_triplet_errors():
    with pytest.raises(ValueError, match="identity"):
        batch_hard_triplet(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="margin"):
        batch_hard_triplet(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), margin=-1.0)
