"""ViewpointAwareLoss: its parts are the public functions, and its switches the ablations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vareid_ext import (
    ViewpointAwareLoss,
    angular_center_regularizer,
    identity_cross_entropy,
    reference_backend,
    viewpoint_aware_cross_entropy,
)
from vareid_ext.losses import viewpoint_aware as losses

N, K, V, D = 6, 11, 3, 16


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, D, generator=rng),
        torch.randint(K, (N,), generator=rng),
        torch.randint(-1, V, (N,), generator=rng),
    )


def make_loss(**arguments: object) -> ViewpointAwareLoss:
    loss = ViewpointAwareLoss(K, D, **arguments)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for centers in loss.parameters():
            centers.copy_(torch.randn(centers.shape, generator=rng))
    return loss


def test_total_and_parts_are_the_public_functions() -> None:
    feature, identity, viewpoint = batch()
    mask = torch.ones(K, V, dtype=torch.bool)
    mask[(identity[0] + 1) % K, 0] = False
    viewpoint[:] = 1
    loss = make_loss(alpha=0.3, beta=0.25, view_weight=0.5, mask=mask)
    feature.requires_grad_()
    parts = loss(feature, identity, viewpoint)
    W, U = loss.identity_centers, loss.viewpoint_centers
    L_y, L_v = viewpoint_aware_cross_entropy(
        feature @ W.T, torch.einsum("nd,kvd->nkv", feature, U), identity, viewpoint, alpha=0.3, mask=mask
    )
    L_R = angular_center_regularizer(W, U, mask=mask)
    total = L_y + 0.5 * L_v + 0.25 * L_R
    for have, want in zip(parts, (total, L_y, L_v, L_R), strict=True):
        assert have.shape == ()
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    assert (parts.total, parts.identity, parts.viewpoint, parts.regularizer) == tuple(parts)
    inputs = (feature, W, U)
    for have, want in zip(torch.autograd.grad(parts.total, inputs), torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)
    loss.view_weight = 0.0
    torch.testing.assert_close(loss(feature, identity, viewpoint).total, L_y + 0.25 * L_R)


@pytest.mark.parametrize(
    ("switches", "has_viewpoint_centers"),
    [
        ({"smoothing": "none", "use_viewpoint": False, "use_regularizer": False}, False),
        ({"smoothing": "uniform", "use_viewpoint": False, "use_regularizer": False}, False),
        ({"smoothing": "adaptive", "use_viewpoint": False, "use_regularizer": False}, False),
        ({"use_viewpoint": True, "use_regularizer": False}, True),
        ({"use_viewpoint": False, "use_regularizer": True}, True),
        ({}, True),
    ],
)
def test_switches_give_the_ablations(switches: dict, has_viewpoint_centers: bool) -> None:
    feature, identity, viewpoint = batch()
    loss = make_loss(**switches)
    assert (loss.viewpoint_centers is not None) == has_viewpoint_centers
    assert len(list(loss.parameters())) == 1 + has_viewpoint_centers
    parts = loss(feature, identity, viewpoint)
    want = identity_cross_entropy(
        feature @ loss.identity_centers.T, identity, smoothing=switches.get("smoothing", "adaptive")
    )
    torch.testing.assert_close(parts.identity, want)
    assert (parts.viewpoint != 0) == switches.get("use_viewpoint", True)
    assert (parts.regularizer != 0) == switches.get("use_regularizer", True)
    torch.testing.assert_close(parts.total, parts.identity + parts.viewpoint + 0.1 * parts.regularizer)
    parts.total.backward()
    for centers in loss.parameters():
        assert centers.grad is not None
        assert (centers.grad != 0).any()


def test_viewpoint_is_needed_only_where_it_is_used() -> None:
    feature, identity, _ = batch()
    with pytest.raises(ValueError, match="viewpoint: None was given"):
        make_loss()(feature, identity)
    without = make_loss(use_viewpoint=False)(feature, identity)
    assert without.viewpoint == 0


def test_state_and_copies_carry_centers_and_mask() -> None:
    mask = torch.ones(K, V, dtype=torch.bool)
    mask[0, 0] = False
    loss = make_loss(mask=mask)
    mask[1, 1] = False  # the module keeps its own
    other = ViewpointAwareLoss(K, D, mask=torch.ones(K, V, dtype=torch.bool))
    other.load_state_dict(loss.state_dict())
    feature, identity, _ = batch()
    viewpoint = torch.ones(N, dtype=torch.int64)
    for same in (other, copy.deepcopy(loss)):
        assert not same.mask[0, 0]
        assert same.mask[1, 1]
        torch.testing.assert_close(same(feature, identity, viewpoint), loss(feature, identity, viewpoint))
    assert "num_viewpoints=3" in repr(loss)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_identities": 0}, ValueError, "num_identities: 0"),
        ({"num_identities": 2.0}, TypeError, "num_identities: float"),
        ({"beta": "0.1"}, TypeError, "beta: str"),
        ({"use_viewpoint": "no"}, TypeError, "use_viewpoint: str"),
        ({"use_regularizer": 0}, TypeError, "use_regularizer: int"),
        ({"alpha": None}, TypeError, "alpha: NoneType"),
        ({"feature_dim": 0}, ValueError, "feature_dim: 0"),
        ({"num_viewpoints": 1}, ValueError, "num_viewpoints: 1"),
        ({"alpha": 0.7}, ValueError, "alpha"),
        ({"beta": -1.0}, ValueError, "beta: -1.0"),
        ({"view_weight": float("nan")}, ValueError, "view_weight: nan"),
        ({"smoothing": "hard"}, ValueError, "smoothing"),
        ({"epsilon": 2.0}, ValueError, "epsilon"),
        ({"mask": torch.ones(K, 2, dtype=torch.bool)}, ValueError, "mask: shape"),
        ({"mask": torch.zeros(K, V, dtype=torch.bool)}, ValueError, "mask: identity 0"),
        ({"mask": torch.ones(K, V, dtype=torch.bool).to_sparse()}, TypeError, "mask"),
        ({"mask": torch.ones(K, V, dtype=torch.bool, device="meta")}, ValueError, "mask"),
        ({"num_identities": 2**70}, ValueError, "num_identities"),
        ({"num_identities": 2**30}, ValueError, "num_identities"),
        ({"feature_dim": 2**31}, ValueError, "feature_dim"),
        ({"num_viewpoints": 2**70}, ValueError, "num_viewpoints"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ViewpointAwareLoss(**{"num_identities": K, "feature_dim": D, **arguments})


def test_bad_features_are_named() -> None:
    loss, (feature, identity, viewpoint) = make_loss(), batch()
    with pytest.raises(ValueError, match=r"feature: shape \[6, 15\]"):
        loss(feature[:, 1:], identity, viewpoint)
    with pytest.raises(ValueError, match="feature: the batch is empty"):
        loss(feature[:0], identity[:0], viewpoint[:0])
    with pytest.raises(TypeError, match="feature: dtype int64"):
        loss(feature.long(), identity, viewpoint)
    with pytest.raises(TypeError, match="feature: dtype float16 was given; float32"):
        loss(feature.half(), identity, viewpoint)
    with pytest.raises(ValueError, match="feature: is on meta"):
        loss(feature.to("meta"), identity, viewpoint)


def _curve(steps: int) -> list[float]:
    torch.manual_seed(0)
    neck, loss = nn.BatchNorm1d(D), make_loss()
    optimizer = torch.optim.Adam([*neck.parameters(), *loss.parameters()], lr=0.01)
    curve = []
    for step in range(steps):
        feature, identity, viewpoint = batch(step)
        optimizer.zero_grad()
        total = loss(neck(feature), identity, viewpoint).total
        total.backward()
        optimizer.step()
        curve.append(total.item())
    return curve


def test_twenty_steps_give_the_same_curve_on_both_backends() -> None:
    native = _curve(20)
    with reference_backend():
        plain = _curve(20)
    assert native == pytest.approx(plain, rel=1e-4)
    assert native[-1] < native[0]


@pytest.mark.parametrize("view_weight", [1.0, 0.3])
def test_large_heads_give_the_same_without_holding_the_logits(
    monkeypatch: pytest.MonkeyPatch, view_weight: float
) -> None:
    loss, (feature, identity, viewpoint) = make_loss(view_weight=view_weight), batch()
    inputs = (feature.requires_grad_(), *loss.parameters())
    held = loss(feature, identity, viewpoint)
    held_gradients = torch.autograd.grad(held.total, inputs)
    monkeypatch.setattr(losses, "_LINEAR_FROM_BYTES", 0)
    monkeypatch.setattr(losses, "viewpoint_aware_cross_entropy", None)
    parts = loss(feature, identity, viewpoint)
    torch.testing.assert_close(parts, held)
    torch.testing.assert_close(torch.autograd.grad(parts.total, inputs), held_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_losses_and_gradients(dtype: torch.dtype) -> None:
    loss, (feature, identity, viewpoint) = make_loss(), batch()
    want = loss(feature, identity, viewpoint)
    with torch.autocast("cpu", dtype):
        parts = loss(feature, identity, viewpoint)
    assert {part.dtype for part in parts} == {torch.float32}
    torch.testing.assert_close(parts, want, rtol=0.03, atol=0.01)
    parts.total.backward()
    assert {centers.grad.dtype for centers in loss.parameters()} == {torch.float32}


def test_grad_scaler_sees_a_scaled_and_then_the_true_gradient() -> None:
    loss, (feature, identity, viewpoint) = make_loss(), batch()
    loss(feature, identity, viewpoint).total.backward()
    want = loss.identity_centers.grad.clone()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(feature, identity, viewpoint).total).backward()
    torch.testing.assert_close(loss.identity_centers.grad, 1024 * want, rtol=1e-5, atol=1e-4)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(loss.identity_centers.grad, want, rtol=1e-5, atol=1e-7)


def test_frozen_centers_get_no_gradient() -> None:
    loss, (feature, identity, viewpoint) = make_loss(), batch()
    want = torch.autograd.grad(loss(feature.requires_grad_(), identity, viewpoint).total, feature)[0]
    loss.requires_grad_(False)
    loss(feature, identity, viewpoint).total.backward()
    torch.testing.assert_close(feature.grad, want)
    assert all(centers.grad is None for centers in loss.parameters())
