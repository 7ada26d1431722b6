"""The attention blocks against loops over channels and positions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vareid_ext.models.attention import ChannelAttention, HarmoniousAttention, PositionAttention


def a_map(N=2, C=5, H=3, W=2):
    torch.manual_seed(0)
    return torch.randn(N, C, H, W)


@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (1, 1, 1, 1), (3, 4, 1, 7)])
def test_channel_attention_by_a_loop(shape):
    x, block = a_map(*shape), ChannelAttention()
    torch.testing.assert_close(block(x), x)  # gamma is 0 at first
    block.gamma.data.fill_(0.7)
    wanted = x.clone().double()
    for n, rows in enumerate(x.double().flatten(2)):
        for c, row in enumerate(rows):
            products = torch.stack([row @ other for other in rows])
            weights = torch.exp(products.max() - products)
            mixed = sum(w * other for w, other in zip(weights / weights.sum(), rows, strict=True))
            wanted[n, c] += 0.7 * mixed.view(x.shape[2:])
    torch.testing.assert_close(block(x).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 16, 3, 2), (1, 3, 1, 1)])
def test_position_attention_by_a_loop(shape):
    x, block = a_map(*shape), PositionAttention(shape[1])
    torch.testing.assert_close(block(x), x)
    block.gamma.data.fill_(-0.4)
    block, x = block.double(), x.double()
    query, key, value = (part(x).flatten(2) for part in (block.query, block.key, block.value))
    wanted = x.clone().flatten(2)
    for n in range(len(x)):
        for i in range(wanted.shape[2]):
            weights = torch.stack([query[n, :, i] @ key[n, :, j] for j in range(wanted.shape[2])]).softmax(0)
            wanted[n, :, i] -= 0.4 * sum(w * value[n, :, j] for j, w in enumerate(weights))
    torch.testing.assert_close(block(x), wanted.view(x.shape))


def test_channel_attention_computes_in_float32_under_autocast():
    x, block = a_map(), ChannelAttention()
    block.gamma.data.fill_(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x)
    assert torch.equal(found, block(x))


def test_harmonious_attention_is_space_times_channels():
    torch.manual_seed(0)
    block = HarmoniousAttention(32).eval()
    x = torch.randn(3, 32, 6, 4)
    narrow, mix = block.space
    small = F.conv2d(x.mean(1, keepdim=True), narrow[0].weight, narrow[0].bias, stride=2, padding=1)
    small = (small / (1 + narrow[1].eps) ** 0.5).relu()
    space = mix(F.interpolate(small, (6, 4), mode="bilinear", align_corners=True))
    channel = block.channel(x.mean((2, 3), keepdim=True))
    assert space.shape == (3, 1, 6, 4)
    assert channel.shape == (3, 32, 1, 1)
    attended, regions = block(x)
    wanted = block.both(space * channel).sigmoid()
    assert 0.5 <= wanted.min() <= wanted.max() < 1  # a ReLU stands before the sigmoid
    torch.testing.assert_close(attended, wanted * x)
    assert regions.shape == (3, 4, 2)


@pytest.mark.parametrize("regions", [1, 2, 4])
def test_regions_begin_evenly_from_top_to_bottom(regions):
    _, where = HarmoniousAttention(8, regions=regions).eval()(a_map(C=8))
    heights = {1: [0.0], 2: [-0.5, 0.5], 4: [-0.75, -0.25, 0.25, 0.75]}[regions]
    wanted = torch.tensor([[0.0, y] for y in heights]).tanh().expand(2, -1, -1)
    torch.testing.assert_close(where, wanted)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (2, 1)])
def test_harmonious_attention_takes_maps_of_any_size(size):
    attended, _ = HarmoniousAttention(4)(a_map(2, 4, *size))
    assert attended.shape == (2, 4, *size)
