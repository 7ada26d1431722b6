"""The methods, and what the trainer does for all of them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_train import SMALL, assert_same_state, interrupt_at, start
from tests.tiny import BACKBONE, batch_of, method_of, tiny
from vareid_ext.cli import train
from vareid_ext.files.checkpoint import load_checkpoint
from vareid_ext.losses import smoothed_viewpoint_cross_entropy
from vareid_ext.methods import METHODS, About, Method, Term, TrainingClasses, TwoBranch
from vareid_ext.models import Backbone, GeneralizedMeanPooling, ModelConfig
from vareid_ext.training.command_line import parse, recipe_names
from vareid_ext.training.config import Config, OptimizerConfig
from vareid_ext.training.optimizers import build_optimizer, set_learning_rate, set_training_mode, train_only
from vareid_ext.training.state import check_method


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(train, "draw_figures", lambda *args: None)


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_no_setting_of_a_method_takes_the_short_name_of_another_section(name):
    """`--pooling` would be refused as ambiguous, whatever the method."""
    sections = [getattr(Config(), field.name) for field in fields(Config) if field.name != "method"]
    taken = {field.name for section in sections if is_dataclass(section) for field in fields(section)}
    assert not taken & {field.name for field in fields(METHODS[name].Config)} - {"name"}


def test_recipes_of_published_data_sets_claim_what_their_method_claims():
    folder = resources.files("vareid_ext.recipes")
    for recipe in recipe_names():
        if recipe.startswith(("market1501-", "dukemtmc-")):
            head = folder.joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
            method = parse([f"--recipe={recipe}", "--root=."]).config.method.name
            claims = re.findall(r"Claim: (.*?)[.;]", head)
            assert claims == [METHODS[method].about.claim], recipe


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    about = METHODS[name].about
    assert about.title
    assert about.paper
    for scores in (about.published, about.measured):
        for recipe, (mean_ap, rank1) in scores.items():
            assert recipe in recipe_names()
            assert parse([f"--recipe={recipe}", "--root=."]).config.method.name == name
            assert 1 < mean_ap <= rank1 < 100, "percent"
    if "viewpoint" in METHODS[name].inputs_with(METHODS[name].Config()):
        assert "viewpoint" in about.needs
    always = METHODS[name].inputs_with(METHODS[name].Config())
    needs = about.needs.split("; ") if about.needs else []
    if "viewpoint" not in always and "viewpoint_aware" in METHODS[name].Config.__dataclass_fields__:
        assert needs.pop() == "viewpoint labels in training with viewpoint_aware"
    assert len(needs) == bool(always)
    if always:
        assert needs[0].endswith(" in training and at test" if METHODS[name].test_inputs else " in training")


@pytest.mark.parametrize("name", METHODS)
def test_a_pooling_that_a_method_does_not_use_is_refused(name):
    config = parse([f"--method={name}", "--pooling=gem"]).config
    stage = {"stage": "layer4"} if name == "mgn" else {}
    method = method_of(name, model=config.model, **stage)
    uses = any(isinstance(part, GeneralizedMeanPooling) for part in method.modules())
    assert uses == (not METHODS[name].own_pooling)
    if not uses:
        with pytest.raises(ValueError, match=rf"model.pooling: 'gem' was given; method '{name}' .* 'avg' is allowed"):
            check_method(config)


def test_the_page_of_results_has_the_measured_scores():
    page = (Path(__file__).resolve().parents[1] / "docs" / "results.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", page, re.MULTILINE))
    measured = {recipe: scores for kind in METHODS.values() for recipe, scores in kind.about.measured.items()}
    del measured["synthetic"]  # the default run has a section of its own
    expected = {recipe: f"{mean_ap} / {rank1}" for recipe, (mean_ap, rank1) in measured.items()}
    assert {f"synthetic-{name}": row for name, row in rows.items()} == expected


def test_a_claim_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="claim: 'reproduced' was given; allowed are 'reproduces', "):
        About(title="A", paper="B", claim="reproduced")


def two_branch(mask=None, **settings):
    torch.manual_seed(0)
    mask = torch.ones(5, 3, dtype=torch.bool) if mask is None else mask
    classes = TrainingClasses(len(mask), 3, mask)
    return TwoBranch(TwoBranch.Config(**settings), ModelConfig("resnet10t", BACKBONE, pretrained=False), classes)


def test_a_backbone_cut_before_a_stage_is_the_same_network():
    whole, cut = (Backbone("resnet10t", options=BACKBONE).eval() for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    tails = cut.split_off("layer4", copies=2).eval()
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        for tail in tails:
            torch.testing.assert_close(tail(cut(images)), whole(images), rtol=0, atol=0)
    first, second = (next(tail.parameters()) for tail in tails)
    assert first is not second
    with pytest.raises(ValueError, match=r"stage: 'layer9' was given; allowed are bn1, .*layer4"):
        whole.split_off("layer9", copies=2)
    with pytest.raises(ValueError, match="not its stages one after the other"):
        Backbone("convnext_atto", last_stride=2).split_off("norm_pre", copies=2)


def dense_target(identity, viewpoint, mask, other_views, all_pairs):
    """The target as the logs print it: shares for the pair, the identity's other views, and all pairs alike."""
    target = mask.double() * all_pairs / mask.sum()
    others = [v for v in range(mask.shape[1]) if mask[identity, v] and v != viewpoint]
    if viewpoint < 0:
        for v in others:
            target[identity, v] += (1 - all_pairs) / len(others)
        return target
    target[identity, viewpoint] += 1 - other_views - all_pairs + (0 if others else other_views)
    for v in others:
        target[identity, v] += other_views / len(others)
    return target


def test_the_smoothed_viewpoint_loss_against_its_dense_target():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]], dtype=torch.bool)
    logits = (torch.randn(6, 4, 3, dtype=torch.float64) * 3).requires_grad_()
    identity, viewpoint = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([1, 0, 2, 1, -1, -1])
    loss = smoothed_viewpoint_cross_entropy(logits, identity, viewpoint, mask=mask)
    targets = torch.stack([dense_target(i, v, mask, 0.3, 0.1) for i, v in zip(identity, viewpoint, strict=True)])
    torch.testing.assert_close(targets.sum((1, 2)), torch.ones(6, dtype=torch.float64))
    log_p = logits.masked_fill(~mask, -torch.inf).flatten(1).log_softmax(1).view(6, 4, 3)
    torch.testing.assert_close(loss, -(targets * log_p.masked_fill(~mask, 0)).sum((1, 2)).mean())
    assert torch.autograd.gradcheck(
        lambda x: smoothed_viewpoint_cross_entropy(x, identity, viewpoint, mask=mask), logits
    )
    known = viewpoint >= 0
    soft = torch.nn.functional.one_hot(viewpoint[known], 3).float()
    same = smoothed_viewpoint_cross_entropy(logits[known], identity[known], soft, mask=mask)
    torch.testing.assert_close(
        same, smoothed_viewpoint_cross_entropy(logits[known], identity[known], viewpoint[known], mask=mask)
    )
    with pytest.raises(ValueError, match="other_views, all_pairs"):
        smoothed_viewpoint_cross_entropy(logits, identity, viewpoint, mask=mask, other_views=0.9)


def test_two_branches_begin_with_the_losses_of_the_published_log():
    """Its first loss on Market-1501 is 14.245 = ln 751 + ln 2048: nothing else is in the total."""
    mask = torch.zeros(751, 3, dtype=torch.bool)
    mask.flatten()[torch.randperm(751 * 3, generator=torch.Generator().manual_seed(0))[:2048]] = True
    mask[~mask.any(1), 0] = True
    terms = two_branch(mask).train()(batch_of(torch.rand(8, 3, 64, 32), identities=751))
    assert set(terms) == {"identity", "viewpoint"}
    assert terms["identity"].value.item() == pytest.approx(math.log(751), abs=0.01)
    assert terms["viewpoint"].value.item() == pytest.approx(math.log(int(mask.sum())), abs=0.01)


def test_two_branches_train_by_their_own_terms_and_are_found_side_by_side():
    method = two_branch(triplet_weight=1.0, view_weight_drop=2)
    batch = batch_of(torch.rand(10, 3, 64, 32))
    terms = method(batch)
    assert set(terms) == {"identity", "viewpoint", "identity triplet", "viewpoint triplet"}
    terms["identity"].value.backward()
    touched = {name for name, p in method.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in touched if name.startswith("branches.")} == {"0"}
    weights = []
    for epoch in (0, 1, 2):
        method.at_epoch(epoch)
        weights.append(method(batch)["viewpoint"].weight)
    assert weights == [1.0, 1.0, 0.3]
    assert method.eval().embed(batch).shape == (10, 32)


def test_the_two_branch_recipe_trains(tmp_path):
    output = tmp_path / "run"
    arguments = ["--recipe=synthetic-two-branch", "--epochs=1", "--baselines=false", "--triplet-weight=1"]
    assert train.main([*SMALL, *arguments, "--output", str(output)]) == 0
    steps = [entry for entry in log_of(output) if "loss" in entry]
    assert set(steps[0]["loss"]) == {"total", "identity", "viewpoint", "identity triplet", "viewpoint triplet"}
    again = tmp_path / "again"
    arguments = ["--epochs=0", "--baselines=false", f"--weights={output / 'last.pt'}", "--output", str(again)]
    assert train.main([*SMALL, "--recipe=synthetic-two-branch", *arguments]) == 0
    metrics = [json.loads((folder / "metrics.json").read_text())["trained"] for folder in (output, again)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-9)


def test_learning_rates_follow_the_factors_of_the_longest_name():
    method = tiny()
    factors = {"backbone": 0.1, "backbone.trunk.layer4": 0.5}
    optimizer = build_optimizer(OptimizerConfig(lr_factors=factors), method)
    set_learning_rate(optimizer, 2.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        wanted = 1.0 if name.startswith("backbone.trunk.layer4") else 0.2 if name.startswith("backbone") else 2.0
        if parameter.requires_grad:
            assert rate[id(parameter)] == pytest.approx(wanted), name


@pytest.mark.parametrize(
    ("settings", "peer"),
    [
        ({"name": "sgd"}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        ({"name": "sgd", "nesterov": False}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
        ({"name": "adam", "amsgrad": True}, lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01, amsgrad=True)),
        ({"name": "adamw", "amsgrad": True}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01, amsgrad=True)),
    ],
)
def test_optimizers_are_what_they_are_called(settings, peer):
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        build_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.01, **settings), ours),
        peer(theirs.parameters()),
    )
    for scale in (1.0, 0.1, 3.0):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (module(torch.ones(4, 3)) * scale).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_frozen_parts_keep_their_weights_and_statistics():
    method = tiny(local=True)
    trainable = {name for name, p in method.named_parameters() if p.requires_grad}
    train_only(method, trainable, ["neck", "loss"])
    assert {name.split(".")[0] for name, p in method.named_parameters() if p.requires_grad} == {"neck", "loss"}
    assert not method.neck.bias.requires_grad  # which the method itself keeps still
    set_training_mode(method, ["neck", "loss"])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch_of(torch.rand(6, 3, 64, 32)))
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"neck.running_mean", "neck.running_var", "neck.num_batches_tracked"}
    train_only(method, trainable, None)
    assert {name for name, p in method.named_parameters() if p.requires_grad} == trainable


STAGES = (
    "--stages=[{epochs: 1, train: [neck, loss], optimizer: {name: sgd, lr: 0.01}}, "
    "{epochs: 2, sampler: {kind: shuffled, batch_size: 6}, optimizer: {lr_factors: {backbone: 0.1}}}]"
)


def test_stages_train_what_they_say_and_resume_bit_identical(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [STAGES, "--baselines=false", "--save-every=1"]
    assert start(whole, *arguments) == 0
    assert start(tmp_path / "none", "--epochs=0", "--baselines=false") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, 15)  # the last step of the first stage
        assert start(parts, *arguments) == 128 + 15
    begun, untrained = (load_checkpoint(folder / "last.pt") for folder in (parts, tmp_path / "none"))
    assert begun["progress"]["stage"] == 0
    for key, value in begun["method"].items():
        if key.startswith("backbone"):
            assert torch.equal(value, untrained["method"][key]), key
    assert not torch.equal(begun["method"]["neck.weight"], untrained["method"]["neck.weight"])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, 15)  # within the second
        assert train.main(["--resume", str(parts)]) == 128 + 15
    assert train.main(["--resume", str(parts)]) == 0
    expected = assert_same_state(whole, parts)
    assert expected["progress"]["stage"] == 1
    assert not torch.equal(
        expected["method"]["backbone.trunk.conv1.0.weight"], begun["method"]["backbone.trunk.conv1.0.weight"]
    )
    rates = [round(entry["lr"], 6) for entry in log_of(whole) if "loss" in entry]
    assert rates[0] == pytest.approx(0.01 * 0.1)  # each stage warms up by itself
    assert rates[4] == pytest.approx(0.002 * 0.1)


def test_the_optimizer_of_a_stage_cannot_change_when_it_is_resumed(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 15)
        assert start(tmp_path, "--stages=[{epochs: 1, optimizer: {name: sgd}}, {epochs: 1}]") == 128 + 15
    resume = ["--resume", str(tmp_path)]
    for stages in ("[{epochs: 1}, {epochs: 1, optimizer: {name: sgd}}]", "[]"):
        assert train.main([*resume, "--stages", stages]) == 2
        assert "optimizer.name: 'adamw' was given; the run was trained by 'sgd'" in capsys.readouterr().err
    assert train.main([*resume, "--optimizer.name=adam"]) == 0  # of the second stage, which has not begun


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages=[{epochs: 1, train: [nick]}]"], "stages[0].train: 'nick' was given; the method has the parts"),
        (
            ["--stages=[{epochs: 1, train: [pool]}]"],
            "stages[0].train: pool was given; a part with parameters is",
        ),
        (["--lr-factors={nick: 0.1}"], "optimizer.lr_factors: 'nick'"),
    ],
)
def test_parts_that_the_method_does_not_have_are_named(tmp_path, capsys, arguments, words):
    assert start(tmp_path / "run", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "field"),
    [*((name, "stage") for name in ("two-branch", "pdc", "mgn", "abdnet", "pgr", "dsa")), ("abdnet", "shallow_stage")],
)
def test_a_stage_of_the_backbone_that_does_not_exist_is_named_as_the_setting_it_is(name, field):
    with pytest.raises(ValueError, match=rf"^method\.{field}: 'layer9' was given; allowed are .*layer2"):
        method_of(name, **{field: "layer9"})


def test_a_stage_that_is_over_cannot_be_changed(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, 15)
        assert start(tmp_path, "--stages=[{epochs: 1}, {epochs: 2}]") == 128 + 15
    resume = ["--resume", str(tmp_path)]
    for stages in ("[{epochs: 2}, {epochs: 4}]", "[{epochs: 1, sampler: {batches_per_epoch: 3}}, {epochs: 2}]"):
        assert train.main([*resume, "--stages", stages]) == 2
        assert "stages[0]: other epochs or batches were given" in capsys.readouterr().err
    assert train.main([*resume, "--stages=[{epochs: 1}, {epochs: 3}]"]) == 0
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["step"] == 16


def test_an_input_that_the_images_do_not_come_with_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(METHODS["va-reid"], "inputs", ("viewpoint", "depth"))
    assert start(tmp_path / "run") == 2
    assert "method.name: 'va-reid' reads 'depth', which the images do not come with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extras_are_rendered_for_methods_that_read_them_and_named_where_they_are_not_given(
    tmp_path, monkeypatch, capsys
):
    seen = []
    forward, embed = METHODS["va-reid"].forward, METHODS["va-reid"].embed

    def spy(call):
        return lambda method, batch, **options: seen.append({*batch.extras}) or call(method, batch, **options)

    monkeypatch.setattr(METHODS["va-reid"], "inputs", ("viewpoint", "keypoints", "iuv"))
    monkeypatch.setattr(METHODS["va-reid"], "test_inputs", ("keypoints",))
    monkeypatch.setattr(METHODS["va-reid"], "forward", spy(forward))
    monkeypatch.setattr(METHODS["va-reid"], "embed", spy(embed))
    assert start(tmp_path / "run", "--evaluation.flip=true", "--baselines=false", "--epochs=1") == 0
    assert {frozenset(names) for names in seen} == {frozenset({"keypoints", "iuv"}), frozenset({"keypoints"})}
    assert start(tmp_path / "other", "--data.kind=market1501", f"--root={tmp_path}") == 2
    told = capsys.readouterr().err
    assert "data.extras.keypoints: nothing was given; the method needs --data.extras.keypoints, which is a JSON" in told
    assert not (tmp_path / "other").exists()


class Seen(nn.Module):
    """A loss with a state: the mean feature so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, feature):
        self.mean = self.mean.lerp(feature.detach().mean(0), 0.1)
        return (feature - self.mean).square().mean()


@dataclass(frozen=True)
class PlainConfig:
    """One setting."""

    name: str = "plain"
    """the method"""
    seen_weight: float = 0.5
    """weight of the loss with a state"""


class Plain(Method):
    """The least method: a network, a classifier, and a loss whose state is a buffer."""

    Config = PlainConfig

    def __init__(self, config, model, classes):
        super().__init__()
        self.backbone = Backbone.of(model)
        self.head = nn.Linear(self.backbone.channels, classes.identities)
        self.seen, self.weight = Seen(), config.seen_weight

    def forward(self, batch):
        (feature,) = self.features(batch)
        cross_entropy = nn.functional.cross_entropy(self.head(feature), batch.identity)
        return {"identity": Term(cross_entropy), "seen": Term(self.seen(feature), self.weight)}

    def features(self, batch):
        return [self.backbone(batch.image).float().mean((2, 3))]


def test_a_loss_with_a_state_resumes_bit_identical(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "plain", Plain)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--method=plain", "--baselines=false", "--sampler.kind=shuffled", "--sampler.batch-size=5"]
    arguments += ["--seen-weight=0.25"]
    assert start(whole, *arguments) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, 15)
        assert start(parts, *arguments) == 143
    assert train.main(["--resume", str(parts)]) == 0
    expected = assert_same_state(whole, parts)
    assert expected["method"]["seen.mean"].abs().sum() > 0
    entry = log_of(whole)[0]
    assert entry["loss"]["total"] == pytest.approx(entry["loss"]["identity"] + entry["loss"]["seen"], rel=1e-6)


class Idle(Plain):
    """With a part that no loss depends on."""

    def __init__(self, config, model, classes):
        super().__init__(config, model, classes)
        self.idle = nn.Linear(2, 2)


class Silent(Idle):
    """Without losses where only that part is trained."""

    def forward(self, batch):
        return super().forward(batch) if self.head.weight.requires_grad else {}


@pytest.mark.parametrize("method", [Idle, Silent])
def test_a_stage_that_trains_what_no_loss_depends_on_is_named_and_can_be_mended(tmp_path, monkeypatch, capsys, method):
    monkeypatch.setitem(METHODS, "plain", method)
    stages = "--stages=[{epochs: 1, train: [head]}, {epochs: 1, train: [idle]}]"
    assert start(tmp_path, "--method=plain", "--baselines=false", stages) == 2
    message = "error: stages[1].train: idle was given; no loss of method 'plain' depends on it\n"
    assert capsys.readouterr().err.endswith(message)
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["step"] == 4
    assert train.main(["--resume", str(tmp_path), stages.replace("idle", "idle, head")]) == 0


def test_flip_and_normalisation_of_the_evaluation_are_used(tmp_path):
    arguments = ["--epochs=0", "--baselines=false", "--save-features", "--local"]
    features = {}
    for name, extra in {"whole": [], "parts": ["--normalize=parts"], "flip": ["--flip=true"]}.items():
        extra = [option.replace("--flip", "--evaluation.flip") for option in extra]
        assert start(tmp_path / name, *arguments, *extra) == 0
        features[name] = torch.from_numpy(np.load(tmp_path / name / "query.npz")["feature"])
    norms = {name: value.norm(dim=1) for name, value in features.items()}
    torch.testing.assert_close(norms["whole"], torch.ones_like(norms["whole"]))
    torch.testing.assert_close(norms["parts"], torch.full_like(norms["parts"], math.sqrt(7)))  # 1 + 6 stripes
    assert not torch.allclose(features["flip"], features["whole"])
