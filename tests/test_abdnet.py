"""ABD-Net: its published size, its stages, and its four losses against plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import batch_of, method_of, without_gradient, without_heads
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.models import ModelConfig
from vareid_ext.training.command_line import parse


def images(count=8):
    return batch_of(torch.rand(count, 3, 64, 32, generator=torch.Generator().manual_seed(1)))


def test_the_published_size_and_shapes():
    method = method_of("abdnet", 751, ModelConfig("resnet50", pretrained=False)).eval()
    assert round(without_heads(method) / 1e6, 2) == 66.87
    assert round(sum(p.numel() for p in method.parameters()) / 1e6, 2) == 69.18
    with torch.no_grad():
        shapes = [tuple(part.shape) for part in method.features(batch_of(torch.rand(1, 3, 384, 128)))]
    assert shapes == [(1, 1024)] * 3


def test_the_losses_against_plain_formulas():
    method, batch = method_of("abdnet", dim=16, feature_from=2).eval(), images()
    terms, features = method(batch), method.features(batch)
    heads = [method.head, *method.half_heads]
    target = 0.9 * nn.functional.one_hot(batch.identity, 5) + 0.1 / 5
    losses = [-(target * head(f).log_softmax(1)).sum(1).mean() for head, f in zip(heads, features, strict=True)]
    torch.testing.assert_close(terms["identity"].value, sum(losses) / 3, rtol=1e-4, atol=1e-6)
    triplets = [batch_hard_triplet(f, batch.identity, margin=1.2) for f in features]
    torch.testing.assert_close(terms["triplet"].value, sum(triplets) / 3)
    assert {name: term.weight for name, term in terms.items()} == {"identity": 1, "triplet": 0.1, "OW": 0.01}
    weights = []
    for epoch in (0, 1, 2, 3):
        method.at_epoch(epoch)
        weights += [term.weight for name, term in method(batch).items() if name == "OF"]
    assert weights == [1e-6, 1e-6]  # it is not computed before
    assert "OW" not in method_of("abdnet", dim=16, kernel_weight=0)(batch)


def gap(matrix, share=None):
    values = torch.linalg.eigvalsh(matrix.double() @ matrix.double().mT)
    return values[..., -1] - values[..., 0]


def test_orthogonality_is_of_the_maps_and_kernels_that_it_says(monkeypatch):
    monkeypatch.setattr("vareid_ext.methods.abdnet.spectral_gap", gap)
    method, batch = method_of("abdnet", dim=16, feature_from=0).eval(), images()
    method.at_epoch(0)
    terms = method(batch)
    shallow = method.shallow(method.backbone(batch.image))
    reduced = method.reduce(method.attentive_tail(method.middle(shallow)))
    each = 0.01 * gap(shallow.flatten(2))
    for half in reduced.chunk(2, dim=2):
        maps = [block(half) for block in method.attended]
        each = each + sum(gap(x.flatten(2)) for x in [*maps, method.mix(sum(maps))]) / 2
    torch.testing.assert_close(terms["OF"].value, each.sum() / (len(each) / 32), rtol=1e-4, atol=0)
    first = next(m.weight for m in method.backbone.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(terms["OW"].value.double(), gap(first.flatten(1)) ** 2, rtol=1e-4, atol=0)
    everywhere = method_of("abdnet", dim=16, kernels="all").eval()
    trunk = (everywhere.backbone, everywhere.middle, everywhere.global_tail, everywhere.attentive_tail)
    kernels = [m.weight for part in trunk for m in part.modules() if isinstance(m, nn.Conv2d)]
    wanted = sum(gap(weight.flatten(1)) ** 2 for weight in kernels)
    torch.testing.assert_close(everywhere(batch)["OW"].value.double(), wanted, rtol=1e-4, atol=0)
    assert len(kernels) == len({id(weight) for weight in kernels}) > 10


@pytest.mark.parametrize("recipe", ["market1501-abdnet", "dukemtmc-abdnet", "synthetic-abdnet"])
def test_each_stage_trains_what_it_says(recipe):
    stages = parse(["--recipe", recipe, "--root=x"]).config.resolved_stages
    method, batch = method_of("abdnet", dim=16, feature_from=0), images()
    method.at_epoch(0)
    parts = [stage.train for stage in stages]
    assert {*parts[0], "backbone", "middle", "global_tail", "attentive_tail"} == {
        name for name, module in method.named_children() if any(True for _ in module.parameters())
    }
    assert parts[1] is None
    for trained in parts:
        # A bias before a batch norm changes nothing in training.
        assert not without_gradient(method, batch, trained) - {"shorten.0.0.bias"}


def test_the_halves_see_their_own_half():
    method = method_of("abdnet", dim=16).eval()
    x = torch.rand(1, 16, 4, 2, generator=torch.Generator().manual_seed(1))
    method.attentive_tail, method.reduce = nn.Identity(), nn.Identity()
    method.middle, method.global_tail, method.shallow, method.backbone = (nn.Identity() for _ in range(4))
    before = method.features(batch_of(x))
    x[:, :, 2:] += 1
    after = method.features(batch_of(x))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_the_viewpoint_aware_loss_is_that_of_the_global_feature():
    method, batch = method_of("abdnet", dim=16, viewpoint_aware=True), images()
    terms = method(batch)
    assert set(terms) == {"global identity", "viewpoint", "regularizer", "identity", "triplet", "OW"}
    terms["viewpoint"].value.backward()
    assert all(p.grad is None for p in method.attended.parameters())
    assert not without_gradient(method, batch) - {"shorten.0.0.bias"}


def test_a_height_that_has_no_halves_and_settings_outside_are_named():
    method = method_of("abdnet", dim=16).eval()
    with pytest.raises(ValueError, match=r"rows: 2 was given; allowed are numbers that divide .* 3"):
        method.features(batch_of(torch.rand(1, 3, 48, 32)))
    with pytest.raises(ValueError, match="stage: 'layer7' was given; allowed are"):
        method_of("abdnet", stage="layer7")
    with pytest.raises(ValueError, match=r"method\.dim: 1 was given"):
        method_of("abdnet", dim=1)
    with pytest.raises(ValueError, match=r"method\.epsilon: 1 was given"):
        method_of("abdnet", epsilon=1)
