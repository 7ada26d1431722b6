"""SPReID and the pooling over masks that it stands on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import batch_of, method_of, without_gradient, without_heads
from vareid_ext.models import ModelConfig
from vareid_ext.models.masks import pool_masks


def parsed(count=6, height=64, width=32):
    """A batch with a random parsing of each image."""
    batch = batch_of(torch.rand(count, 3, height, width))
    return replace(batch, extras={"parsing": torch.rand(count, 5, height, width)})


def test_a_region_is_the_weighted_mean_of_what_its_mask_covers():
    torch.manual_seed(0)
    x, masks = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.rand(2, 6, 5, 4, dtype=torch.float64)
    masks[:, 1], masks[:, 2], masks[0, 3] = 1, 7, 0
    found = pool_masks(x, masks)
    assert found.shape == (2, 6, 3)
    for n in range(2):
        for p in range(6):
            weights = masks[n, p]
            wanted = (x[n] * weights).sum((1, 2)) / weights.sum() if weights.any() else torch.zeros(3)
            torch.testing.assert_close(found[n, p], wanted.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[:, 1], x.mean((2, 3)).float())
    torch.testing.assert_close(found[:, 1], found[:, 2])  # of whatever size a constant is
    assert pool_masks(x[:0], masks[:0]).shape == (0, 6, 3)


def test_a_feature_map_is_brought_to_the_size_of_the_masks():
    rows = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 3)
    masks = torch.zeros(1, 1, 8, 6)
    masks[..., 4, :] = 1
    # The fifth of eight rows lies a quarter beyond the middle of the third of four.
    torch.testing.assert_close(pool_masks(rows, masks), torch.full((1, 1, 1), 1.75))


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"got \[2, 3, 4, 4\], \[1, 5, 4, 4\]"):
        pool_masks(torch.ones(2, 3, 4, 4), torch.ones(1, 5, 4, 4))


def test_the_published_size():
    """Inception-v3 of 21.79 million parameters without its classifier; 5 + 1 vectors of 2,048 become 3."""
    with torch.device("meta"):
        method = method_of("spreid", 751, ModelConfig("inception_v3", pretrained=False, last_stride=2))
        feature_map = method.backbone(torch.empty(1, 3, 512, 170))
    assert feature_map.shape == (1, 2048, 14, 3)
    assert without_heads(method) == 21_785_568
    assert method.head.weight.shape == (751, 6144)


@pytest.mark.parametrize("foreground", [True, False])
def test_the_feature_is_foreground_largest_region_and_whole(foreground):
    method = method_of("spreid", foreground=foreground, map_height=4, map_width=2).eval()
    batch = parsed()
    with torch.no_grad():
        x = method.backbone(batch.image)  # 4 x 2 as the maps are
        masks = batch.extras["parsing"].unflatten(3, (2, 16)).unflatten(2, (4, 16)).mean((3, 5))
        parts = [(x * masks[:, p : p + 1]).sum((2, 3)) / masks[:, p : p + 1].sum((2, 3)) for p in range(5)]
        wanted = [parts[0], torch.stack(parts[1:]).amax(0), x.mean((2, 3))]
        torch.testing.assert_close(method.features(batch), wanted[0 if foreground else 1 :])
        everything = replace(batch, extras={"parsing": torch.ones(6, 5, 64, 32)})
        for part in method.features(everything):
            torch.testing.assert_close(part, x.mean((2, 3)))
    assert method.embed(batch).shape == (6, (48 if foreground else 32))


def test_it_is_trained_by_one_cross_entropy():
    method, batch = method_of("spreid"), parsed()
    terms = method(batch)
    logits = torch.cat(method.features(batch), 1) @ method.head.weight.T + method.head.bias
    torch.testing.assert_close(terms["identity"].value, torch.nn.functional.cross_entropy(logits, batch.identity))
    assert not without_gradient(method, batch)
    assert set(terms) == {"identity"}


def test_map_sizes_outside_what_is_allowed_are_named():
    with pytest.raises(ValueError, match=r"method.map_height: 0 was given; allowed are values from 1 to 1,024"):
        method_of("spreid", map_height=0)
