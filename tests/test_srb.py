"""SRB: its terms, its size, and what the viewpoint-aware loss takes the place of."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import batch_of, method_of, without_gradient, without_heads
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.models import ModelConfig


def test_the_loss_is_what_the_paper_says():
    method, batch = method_of("srb"), batch_of(torch.rand(10, 3, 64, 32))
    with torch.no_grad():
        method.head.weight.normal_()
    centers = method.center.centers.clone()
    pooled = method.pool(method.backbone(batch.image))
    feature = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + method.neck.eps).sqrt()
    target = 0.9 * torch.nn.functional.one_hot(batch.identity, 5) + 0.1 / 5
    wanted = {
        "identity": -(target * (feature @ method.head.weight.T).log_softmax(1)).sum(1).mean(),
        "triplet": batch_hard_triplet(pooled, batch.identity, margin=0.3),
        "center": 0.0005 * (pooled - centers[batch.identity]).square().sum(1).mean(),
    }
    terms = method(batch)
    assert set(terms) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name].weight * terms[name].value, value, rtol=1e-4, atol=1e-6)


def test_the_viewpoint_aware_loss_takes_the_place_of_the_cross_entropy():
    method, batch = method_of("srb", viewpoint_aware=True, center_weight=0), batch_of(torch.rand(10, 3, 64, 32))
    assert set(method(batch)) == {"global identity", "viewpoint", "regularizer", "triplet"}
    assert not without_gradient(method, batch)
    assert without_heads(method) == without_heads(method_of("srb"))


def test_everything_is_trained_and_the_feature_lies_behind_the_neck():
    method, batch = method_of("srb"), batch_of(torch.rand(10, 3, 64, 32))
    assert not without_gradient(method, batch)
    assert not method.neck.bias.requires_grad
    method.eval()
    assert method.embed(batch).shape == (10, 16)
    pooled = method.pool(method.backbone(batch.image))
    torch.testing.assert_close(method.features(batch), [method.neck(pooled)])


@pytest.mark.parametrize(
    ("backbone", "trunk"), [("resnet50", 25_557_032 - 2_049_000), ("legacy_seresnext101_32x4d", 48_955_416 - 2_049_000)]
)
def test_the_published_sizes(backbone, trunk):
    """Of the networks as they are published for ImageNet, without its classifier."""
    with torch.device("meta"):
        method = method_of("srb", 751, ModelConfig(backbone, pretrained=False))
        feature_map = method.backbone(torch.empty(1, 3, 256, 128))
    assert feature_map.shape == (1, 2048, 16, 8)
    assert without_heads(method) == trunk + 2 * 2048  # the neck's scale and its shift, which stays 0
    assert sum(p.numel() for p in method.head.parameters()) == 751 * 2048


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilon": 1.0}, r"method.epsilon: 1.0 was given; allowed are values in \[0, 1\)"),
        ({"triplet_margin": -1}, "method.triplet_margin: -1 was given"),
        ({"center_weight": float("nan")}, "method.center_weight: nan was given"),
        ({"center_rate": 2.0}, "method.center_rate: 2.0 was given"),
    ],
)
def test_settings_outside_what_is_allowed_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        method_of("srb", **settings)
