"""The center loss: its value and gradient by loops, its centres as an SGD of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vareid_ext.losses.center import CenterLoss


def of(K=4, D=3, rate=0.5):
    torch.manual_seed(0)
    return CenterLoss(K, D, rate=rate).double(), torch.randn(7, D, dtype=torch.float64, requires_grad=True)


IDENTITY = torch.tensor([0, 2, 2, 1, 0, 0, 2])  # identity 3 is not in the batch


def test_value_and_gradient_by_a_loop():
    loss, feature = of()
    before = loss.centers.clone()
    value = loss(feature, IDENTITY)
    wanted = sum(((f - before[y]) ** 2).sum() for f, y in zip(feature, IDENTITY, strict=True)) / 7
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(v, feature)[0] for v in (value, wanted)))


def test_the_centres_move_as_by_an_sgd_on_the_unweighted_loss():
    loss, feature = of(rate=0.3)
    centers = nn.Parameter(loss.centers.clone())
    optimizer = torch.optim.SGD([centers], 0.3)
    for _ in range(3):
        (0.0005 * loss(feature, IDENTITY)).backward()
        optimizer.zero_grad()
        (feature.detach() - centers[IDENTITY]).square().sum(1).mean().backward()
        optimizer.step()
        torch.testing.assert_close(loss.centers, centers.detach())
    assert not list(loss.parameters())
    assert "centers" in loss.state_dict()


def test_nothing_moves_in_evaluation_and_without_images():
    loss, feature = of()
    before = loss.centers.clone()
    empty = loss(feature[:0], IDENTITY[:0])
    assert empty.item() == 0
    empty.backward()
    loss.eval()(feature, IDENTITY)
    assert torch.equal(loss.centers, before)
    loss.train()(feature, IDENTITY)
    changed = (loss.centers != before).any(1)
    assert changed.tolist() == [True, True, True, False]


def test_centres_keep_their_precision_beside_half_precision_features():
    torch.manual_seed(0)
    loss, feature = CenterLoss(4, 3), torch.randn(7, 3).bfloat16()
    centers = loss.centers.clone()
    wanted = (feature.float() - centers[IDENTITY]).square().sum(1).mean()
    torch.testing.assert_close(loss(feature, IDENTITY), wanted)
    assert loss.centers.dtype == torch.float32


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="num_identities: 0 was given; allowed are values from 1"):
        CenterLoss(0, 3)
    with pytest.raises(ValueError, match="feature_dim: -1 was given"):
        CenterLoss(2, -1)
    with pytest.raises(ValueError, match="rate: nan was given; allowed are finite values from 0"):
        CenterLoss(2, 3, rate=float("nan"))
    loss, feature = of()
    with pytest.raises(ValueError, match=r"\[7, 2\], \[7\] were given; allowed are \[N, 3\] and \[N\]"):
        loss(feature[:, :2], IDENTITY)
    with pytest.raises(ValueError, match=r"\[7, 3\], \[6\] were given"):
        loss(feature, IDENTITY[:6])
    before = loss.centers.clone()
    with pytest.raises(IndexError):
        loss(feature, IDENTITY + 2)
    assert torch.equal(loss.centers, before)
