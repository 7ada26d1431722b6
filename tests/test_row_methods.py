"""PCB, PCB + RPP, MGN, HPM and Pyramid: methods of rows of the feature map."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from _vareid_cli import run
from tests.test_train import SMALL, STAGED
from tests.tiny import BACKBONE, batch_of
from vareid_ext.cli import train
from vareid_ext.methods import METHODS, TrainingClasses
from vareid_ext.methods.pyramid import DynamicTraining
from vareid_ext.models import Backbone, ModelConfig
from vareid_ext.training.command_line import parse
from vareid_ext.training.optimizers import set_training_mode, train_only

TINY = {
    "pcb": {"rows": 2, "dim": 4},
    "pcb-rpp": {"rows": 2, "dim": 4, "group": 4},
    "mgn": {"dim": 4, "stage": "layer4"},
    "hpm": {"rows": (1, 2), "dim": 4},
    "pyramid": {"rows": 3, "dim": 4},
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(train, "draw_figures", lambda *args: None)


def tiny(name, **settings):
    torch.manual_seed(0)
    method = METHODS[name]
    classes = TrainingClasses(5, 3, torch.ones(5, 3, dtype=torch.bool))
    model = ModelConfig("resnet10t", BACKBONE, pretrained=False)
    return method(method.Config(**{**TINY[name], **settings}), model, classes)


IMAGES = torch.rand(8, 3, 96, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("recipe", "without_heads", "with_heads", "parts", "length"),
    [
        ("market1501-pcb", 24_032_832, 24_032_832 + 6 * 257 * 751, 6, 2048),
        ("market1501-pcb-rpp", 24_032_832 + 1_542, 24_034_374 + 6 * 257 * 751, 6, 2048),
        ("market1501-mgn", 68_807_744, 68_807_744 + (3 * 2048 + 5 * 256) * 751, 8, 256),
        ("market1501-hpm", 31_380_032, 31_380_032 + 15 * 256 * 751, 15, 256),
        ("market1501-pyramid", 48_013_248, 48_013_248 + 21 * 129 * 751, 21, 128),
    ],
)
def test_published_networks_have_their_parameters_and_features(recipe, without_heads, with_heads, parts, length):
    config = parse([f"--recipe={recipe}", "--root=.", "--model.pretrained=false"]).config
    classes = TrainingClasses(751, 3, torch.ones(751, 3, dtype=torch.bool))
    # Cutting a network computes with it, which the meta device cannot.
    with torch.device("cpu" if config.method.name == "mgn" else "meta"):
        method = METHODS[config.method.name](config.method, config.model, classes).eval()
    sizes = {name: p.numel() for name, p in method.named_parameters()}
    assert sum(sizes.values()) == with_heads
    assert sum(n for name, n in sizes.items() if not name.startswith(method.heads)) == without_heads
    method.to_empty(device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = method.features(batch_of(torch.zeros(2, 3, config.data.height, config.data.width)))
    assert [tuple(f.shape) for f in features] == [(2, length)] * parts


def test_va_reid_has_its_published_size_and_centers_of_pairs_that_do_not_occur():
    """52.64 M, with centers of the 2,048 pairs of identity and viewpoint that occur in Market-1501."""
    config = parse(["--recipe=market1501-va-reid", "--root=.", "--model.pretrained=false"]).config
    with torch.device("meta"):
        classes = TrainingClasses(751, 3, torch.ones(751, 3, dtype=torch.bool, device="cpu"))
        method = METHODS["va-reid"](config.method, config.model, classes)
    size = sum(p.numel() for p in method.parameters())
    assert size - (751 * 3 - 2048) * method.backbone.channels == 52_642_864


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_trained_and_losses_begin_as_guessing_does(name):
    method = tiny(name).train()
    method.at_epoch(0)
    for name, p in method.named_parameters():
        if not p.any() and name.endswith("weight"):  # timm's residual branches begin with a scale of 0
            torch.nn.init.ones_(p)
    terms = method(batch_of(IMAGES))
    assert terms["identity"].value.item() == pytest.approx(math.log(5), abs=0.02)
    sum(term.weight * term.value for term in terms.values()).backward()
    assert {n for n, p in method.named_parameters() if p.grad is None} == set()
    still = {n for n, p in method.named_parameters() if not p.grad.any()}
    # A bias before a batch norm has no effect.
    assert still <= {n for n in dict(method.named_parameters()) if "reduce" in n and n.endswith("bias")}


@pytest.mark.parametrize(("name", "whole"), [("mgn", 0), ("hpm", 0), ("pyramid", -1)])
def test_the_viewpoint_aware_loss_of_the_whole_map_can_be_added(name, whole):
    plain, aware = tiny(name).eval(), tiny(name, viewpoint_aware=True).eval()
    aware.load_state_dict(plain.state_dict(), strict=False)
    batch = batch_of(IMAGES)
    terms, added = plain(batch), aware(batch)
    assert set(added) - set(terms) == {"global identity", "viewpoint", "regularizer"}
    for term, value in terms.items():
        torch.testing.assert_close(added[term].value, value.value)
    feature = aware.features(batch)[whole]
    for term, value in aware.aware(feature, batch).items():
        torch.testing.assert_close(added[term].value, value.value)


@pytest.mark.parametrize("name", TINY)
def test_the_sum_or_mean_of_the_heads_losses(name):
    """PCB, HPM and Pyramid add the losses of their heads, MGN takes their mean."""
    method = tiny(name).eval()
    batch = batch_of(IMAGES)
    term = method(batch)["identity"]
    if name == "mgn":
        assert term.weight == 1
        return
    features = method.parts(method.pooled(batch)) if name.startswith("pcb") else method.features(batch)
    losses = [F.cross_entropy(head(x), batch.identity) for head, x in zip(method.parts.head, features, strict=True)]
    torch.testing.assert_close(term.weight * term.value, sum(losses))


def test_pcb_is_tested_by_the_pooled_rows_or_by_the_reduced_ones():
    method = tiny("pcb").eval()
    x = method.backbone(IMAGES)
    halves = [x[:, :, :3].mean((2, 3)), x[:, :, 3:].mean((2, 3))]
    for part, expected in zip(method.features(batch_of(IMAGES)), halves, strict=True):
        torch.testing.assert_close(part, expected)
    reduced = tiny("pcb", test_feature="reduced").eval().features(batch_of(IMAGES))
    for part, half in zip(reduced, halves, strict=True):
        expected = F.linear(half, method.parts.reduce[0].weight).relu() / (1 + 1e-5) ** 0.5
        torch.testing.assert_close(part, expected)
    assert method.features(batch_of(IMAGES[:0]))[0].shape == (0, 16)


def rpp(refined):
    method = tiny("pcb-rpp").eval()
    for parameter in method.classifier.parameters():
        parameter.requires_grad_(refined)
    method.at_epoch(0)
    return method


def test_parts_are_equal_rows_until_their_classifier_is_trained():
    pcb, before, after = tiny("pcb").eval(), rpp(False), rpp(True)
    batch = batch_of(IMAGES)
    for method in (before, after):
        method.backbone.load_state_dict(pcb.backbone.state_dict())
    torch.testing.assert_close(before.pooled(batch), pcb.pooled(batch))
    assert not torch.allclose(after.pooled(batch), pcb.pooled(batch))
    for parameter in after.classifier.parameters():
        parameter.requires_grad_(False)
    after.at_epoch(1)
    assert after.refined  # a later stage that leaves the classifier alone keeps the parts


def test_parts_that_share_every_position_alike_are_the_mean_of_the_map():
    method = rpp(True)
    torch.nn.init.zeros_(method.classifier.conv.weight)
    pooled = method.pooled(batch_of(IMAGES))
    expected = method.backbone(IMAGES).mean((2, 3))
    for part in pooled.unbind(1):
        torch.testing.assert_close(part, expected)


def test_refined_parts_against_a_loop():
    method = rpp(True)
    x = method.backbone(IMAGES).double()
    conv = method.classifier.conv.double()
    groups = torch.stack([x[:, i : i + 4].mean(1) for i in range(0, 16, 4)], 1)
    scores = F.conv2d(groups - groups.mean((2, 3), keepdim=True), conv.weight, conv.bias).exp()
    shares = scores / scores.sum(1, keepdim=True)
    expected = torch.stack([(2 * shares[:, i, None] * x).mean((2, 3)) for i in range(2)], 1)
    conv.float()
    torch.testing.assert_close(method.pooled(batch_of(IMAGES)), expected.float())
    with pytest.raises(ValueError, match=r"method\.group: 5 was given; allowed are divisors of the 16 channels"):
        tiny("pcb-rpp", group=5)


def test_the_stages_of_refined_pooling_train_what_the_paper_says():
    stages = parse(["--recipe=market1501-pcb-rpp", "--root=."]).config.resolved_stages
    assert [stage.optimizer.epochs for stage in stages] == [20, 5, 25]
    method = tiny("pcb-rpp")
    trainable = {name for name, _ in method.named_parameters()}
    trained = ({"backbone", "parts"}, {"classifier"}, {"backbone", "parts", "classifier"})
    for stage, parts in zip(stages, trained, strict=True):
        train_only(method, trainable, stage.train)
        set_training_mode(method, stage.train)
        method.at_epoch(0)
        method.zero_grad(set_to_none=True)
        sum(term.weight * term.value for term in method(batch_of(IMAGES)).values()).backward()
        assert {n.split(".")[0] for n, p in method.named_parameters() if p.grad is not None and p.grad.any()} == parts
        frozen = [p for n, p in method.named_parameters() if n.split(".")[0] not in parts]
        assert all(p.grad is None for p in frozen)


def test_hpm_adds_means_and_maxima_of_a_pyramid_of_rows():
    method = tiny("hpm").eval()
    x = method.backbone(IMAGES)
    for part, (begin, end) in enumerate([(0, 6), (0, 3), (3, 6)]):
        rows = x[:, :, begin:end].flatten(2)
        reduced = F.linear(rows.mean(2) + rows.amax(2), method.parts.reduce[part].weight)
        expected = reduced.relu() / (1 + 1e-5) ** 0.5
        torch.testing.assert_close(method.features(batch_of(IMAGES))[part], expected)
    for settings in ({"rows": ()}, {"rows": (0,)}, {"rows": (2, -1)}, {"rows": (2, 1), "viewpoint_aware": True}):
        with pytest.raises(ValueError, match=r"method\.rows"):
            tiny("hpm", **settings)


def focal(p):
    return -((1 - p) ** 2) * math.log(p)


def test_the_dynamic_training_of_pyramid_on_a_sequence_of_losses():
    rule = DynamicTraining(0.16)
    averages = [0.0, 0.0]
    for losses, wanted in [
        ((8.0, 4.0), True),  # the first step
        ((8.0, 4.0), True),  # the averages still rise
        ((0.0, 0.0), True),  # both fall alike
        ((0.0, 2.8), False),  # the identity loss much faster
        ((5.0, 0.1), True),  # the triplet loss alone
        ((9.0, 5.0), True),  # neither
        ((0.0, 5.0), False),  # the identity loss alone
    ]:
        after = [0.25 * loss + 0.75 * k for loss, k in zip(losses, averages, strict=True)]
        identity, triplet = (focal(min(a, b) / b if b else 0.5) for a, b in zip(after, averages, strict=True))
        assert (identity == 0 or triplet / identity >= 0.16) == wanted, losses
        assert bool(rule(*map(torch.tensor, losses))) == wanted, losses
        averages = after
        torch.testing.assert_close(rule.averages, torch.tensor(averages))


def test_a_step_without_the_triplet_terms_has_no_gradient_of_them():
    method = tiny("pyramid", dropout=0.0).train()
    batch = batch_of(IMAGES)
    gradients = {}
    for threshold in (0.0, 1e4):  # the triplet terms always, never
        method.dynamic.threshold = threshold
        method.dynamic.averages.fill_(1e3)  # both losses fall
        method.zero_grad(set_to_none=True)
        terms = method(batch)
        sum(term.weight * term.value for term in terms.values()).backward()
        gradients[threshold] = method.parts.reduce[0].weight.grad.clone()
        assert (terms["triplet"].value.item() > 0) == (threshold == 0)
    method.zero_grad(set_to_none=True)
    identity = method(batch)["identity"]
    (identity.weight * identity.value).backward()
    torch.testing.assert_close(gradients[1e4], method.parts.reduce[0].weight.grad)
    assert not torch.allclose(gradients[0.0], gradients[1e4])


def test_the_branches_of_mgn_begin_alike_and_differ_in_their_last_stride():
    method = tiny("mgn").eval()
    first, *others = [branch.state_dict() for branch in method.branches]
    assert all(torch.equal(other[key], value) for other in others for key, value in first.items())
    shared = method.backbone(IMAGES)
    maps = [branch(shared) for branch in method.branches]
    assert [tuple(x.shape[2:]) for x in maps] == [(3, 1), (6, 2), (6, 2)]
    rows = [(0, 0, 3), (1, 0, 6), (2, 0, 6), (1, 0, 3), (1, 3, 6), (2, 0, 2), (2, 2, 4), (2, 4, 6)]
    for part, (branch, begin, end) in enumerate(rows):
        pooled = maps[branch][:, :, begin:end].flatten(2).max(2).values
        torch.testing.assert_close(method.features(batch_of(IMAGES))[part], method.embed_part[part](pooled))


@pytest.mark.parametrize("heads", ["pooled", "reduced"])
def test_mgn_classifies_its_global_parts_before_or_after_they_are_reduced(heads):
    method = tiny("mgn", global_heads=heads).eval()
    assert [head.in_features for head in method.head] == [16 if heads == "pooled" else 4] * 3 + [4] * 5
    assert all(head.bias is None for head in method.head)
    pooled, reduced = method._parts(batch_of(IMAGES))
    batch = batch_of(IMAGES)
    classified = [*(pooled if heads == "pooled" else reduced)[:3], *reduced[3:]]
    losses = [F.cross_entropy(head(x), batch.identity) for head, x in zip(method.head, classified, strict=True)]
    torch.testing.assert_close(method(batch)["identity"].value, torch.stack(losses).mean())


def test_a_network_is_cut_before_a_block_too():
    whole, cut = (Backbone("resnet18").eval() for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    (tail,) = cut.split_off("layer3.1", copies=1)
    assert [*tail._modules] == ["layer3", "layer4"]
    assert [*tail.layer3._modules] == ["1"]
    assert [*cut.trunk.layer3._modules] == ["0"]
    images = IMAGES[:1]
    with torch.no_grad():
        torch.testing.assert_close(tail.eval()(cut(images)), whole(images), rtol=0, atol=0)
    for stage in ("layer3.0", "layer3.2", "layer3.", "conv1.1"):
        with pytest.raises(ValueError, match=rf"stage: '{stage}' was given; .*layer4\.1"):
            whole.split_off(stage, copies=1)


def arguments_of(name):
    own = [f"--method.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in TINY[name].items()]
    small = STAGED if name == "pcb-rpp" else SMALL
    return [*small, f"--recipe=synthetic-{name}", *own, "--height=96", "--baselines=false"]


@pytest.mark.parametrize("name", TINY)
def test_features_are_exported(tmp_path, name):
    pytest.importorskip("onnxruntime")
    output = tmp_path / "run"
    assert train.main([*arguments_of(name), "--epochs=0", "--stages=[]", "--output", str(output)]) == 0
    assert run(["export", str(output), "--onnx", str(tmp_path / "m.onnx"), "--quiet"]) == 0


@pytest.mark.parametrize("name", TINY)
def test_a_height_that_the_rows_do_not_divide_is_named_before_the_data_is_read(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("vareid_ext.training.program.load_run_data", lambda *args, **options: 1 / 0)
    output = tmp_path / "run"
    assert train.main([*arguments_of(name), "--height=80", "--output", str(output)]) == 2
    assert "data.height, data.width: 80, 16 were given; rows: " in capsys.readouterr().err
    assert not output.exists()
