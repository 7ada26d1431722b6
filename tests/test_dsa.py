"""DSA-reID: the guide, the regions that the network finds itself, and what is left of it at test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import batch_of, method_of, without_gradient, without_heads
from vareid_ext.data import SURFACE_PAIRS
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.models import ModelConfig
from vareid_ext.models.guide import GROUPS, Guide


def small(**settings):
    return method_of("dsa", **{"dim": 8, "part_size": 16, **settings})


def guided(count=10, height=64, width=32):
    """A batch with DensePose's maps, in which every part is seen somewhere; U and V are multiples of 17."""
    torch.manual_seed(1)
    batch = batch_of(torch.rand(count, 3, height, width))
    iuv = torch.cat(
        [torch.randint(0, 25, (count, 1, height, width)), 17 * torch.randint(0, 16, (count, 2, height, width))], 1
    )
    iuv[:, 1:] *= iuv[:, :1] > 0
    return replace(batch, extras={"iuv": iuv.to(torch.uint8)})


def test_the_groups_hold_every_part_once_and_both_sides_of_each():
    assert sorted(part for group in GROUPS for part in group) == list(range(1, 25))
    for pair in SURFACE_PAIRS:
        assert any(set(pair) <= set(group) for group in GROUPS)


def test_the_guide_is_a_mean_of_the_parts_that_are_seen():
    guide, batch = Guide(8, 16).eval(), guided(2)
    iuv = batch.extras["iuv"].clone()
    iuv[0, 0][(iuv[0, 0] == 1) | (iuv[0, 0] == 23)] = 0  # no front, half of the head
    with torch.no_grad():
        found = guide(batch.image, iuv)
        head_alone = torch.where(iuv == 24, iuv, 0)[:, :1]
        alone = guide(batch.image, torch.cat([head_alone, iuv[:, 1:]], 1))
    assert found.shape == (2, 8, 8)
    assert (found[0, 1] == 0).all()
    assert (found[1, 1] != 0).any()
    torch.testing.assert_close(found[0, 0], alone[0, 0])
    assert not torch.allclose(found[1, 0], alone[1, 0])
    assert (alone[:, 1:] == 0).all()
    with torch.no_grad():
        assert (guide(batch.image, torch.zeros_like(iuv)) == 0).all()


def test_the_guide_of_a_mirrored_image_sees_its_parts_mirrored():
    guide, batch = Guide(8, 16).eval(), guided(2)
    seen = []
    guide.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unflatten(0, (2, 24))))
    for images in (batch, batch.mirrored()):
        with torch.no_grad():
            guide(images.image, images.extras["iuv"])
    exchanged = list(range(24))
    for a, b in SURFACE_PAIRS:
        exchanged[a - 1], exchanged[b - 1] = b - 1, a - 1
    torch.testing.assert_close(seen[1], seen[0][:, exchanged].flip(4))


def test_the_loss_is_of_image_guide_and_their_sum():
    method, batch = small(), guided()
    with torch.no_grad():
        for weight in method.stream_heads.parameters():
            weight.normal_()
    whole, regions = method._image_features(batch)
    guide = method.guide(batch.image, batch.extras["iuv"])
    streams = {
        "image": (whole, regions),
        "guide": (method.guide_whole(guide.flatten(1)), guide),
        "fused": (whole + method.guide_whole(guide.flatten(1)), regions + guide),
    }
    terms = method(batch)
    assert len(terms) == 9
    for name, (feature, parts) in streams.items():
        logits = feature @ method.stream_heads[name].whole.weight.T
        values = {
            "identity": torch.nn.functional.cross_entropy(logits, batch.identity),
            "triplet": batch_hard_triplet(feature, batch.identity, margin=0.3),
            "regions": sum(
                torch.nn.functional.cross_entropy(parts[:, i] @ head.weight.T, batch.identity) / 8
                for i, head in enumerate(method.stream_heads[name].regions)
            ),
        }
        for term, value in values.items():
            torch.testing.assert_close(terms[f"{name} {term}"].value, value, rtol=1e-4, atol=1e-5)


def test_everything_is_trained_and_the_guide_is_gone_at_test():
    method, batch = small(), guided()
    assert not without_gradient(method, batch)
    method.eval()
    image_only = replace(batch, extras={})
    assert method.embed(image_only, flip=True).shape == (10, 16 + 8 * 8)
    with torch.no_grad():
        method.masks.weight.zero_()
        method.masks.bias.zero_()
        x = method.branches[1](method.backbone(batch.image))
        wanted = [embed(x.mean((2, 3))) for embed in method.regions]
        # Masks that are the same everywhere are the average.
        torch.testing.assert_close(method.features(image_only)[1:], wanted)


def test_the_size_at_the_published_setting():
    method = method_of("dsa", 751, ModelConfig("resnet50", pretrained=False))
    layer4 = 14_964_736
    trunk = 25_557_032 - 2_049_000 + layer4  # one more copy of layer4
    regions = 8 * (2048 * 256 + 2 * 256)
    assert without_heads(method) == trunk + (2048 * 8 + 8) + regions
    with torch.no_grad():
        shared = method.backbone(torch.zeros(1, 3, 256, 128))
        assert method.branches[0](shared).shape == (1, 2048, 16, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 12}, "method.dim: 12 was given; allowed are multiples of 8"),
        ({"part_size": 4}, "method.part_size: 4 was given"),
        ({"triplet_margin": -1}, "method.triplet_margin: -1 was given"),
        ({"stage": "layer9"}, "stage: 'layer9' was given"),
    ],
)
def test_settings_outside_what_is_allowed_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        small(**settings)
