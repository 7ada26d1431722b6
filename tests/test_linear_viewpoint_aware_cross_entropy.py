"""The losses from features against the losses from logits, composed by autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vareid_ext import linear_viewpoint_aware_cross_entropy, reference_backend, viewpoint_aware_cross_entropy
from vareid_ext.ops import _linear_tiles
from vareid_ext.ops import linear_viewpoint_aware_cross_entropy as op

N, K, V, D = 7, 37, 3, 12


def make(
    N: int = N, K: int = K, V: int = V, D: int = D, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """feature, W, U (leaves that require grad), identity, viewpoint, mask."""
    rng = torch.Generator().manual_seed(seed)
    feature, W, U = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, D), (K, D), (K, V, D))
    )
    identity = torch.randint(K, (N,), generator=rng)
    viewpoint = torch.randint(-1, V, (N,), generator=rng)
    mask = torch.rand(K, V, generator=rng) < 0.7
    mask[:, 0] |= ~mask.any(1)
    known = viewpoint >= 0
    mask[identity[known], viewpoint[known]] = True
    return feature, W, U, identity, viewpoint, mask


def composed(
    feature: Tensor, W: Tensor, U: Tensor, identity: Tensor, viewpoint: Tensor, *, normalize: bool = False,
    scale: float = 1.0, **arguments: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same losses, from logits that autograd knows (the losses from logits have their own tests)."""
    if normalize:
        feature = scale * torch.nn.functional.normalize(feature, dim=-1)
        W, U = (torch.nn.functional.normalize(x, dim=-1) for x in (W, U))
    with reference_backend():
        return viewpoint_aware_cross_entropy(
            feature @ W.T, torch.einsum("nd,kvd->nkv", feature, U), identity, viewpoint, **arguments
        )


def gradients(
    losses: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...], weights: tuple[float, float] = (0.1, 0.3)
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weights[0] * losses[0].sum() + weights[1] * losses[1].sum(), inputs)


# chunk_rows, memory budget: everything at once; chunks of rows; blocks of identities, by a budget below one row.
TILES = [(None, 2**28), (1, 2**28), (3, 2**28), (None, 1000), (None, 1)]


@pytest.mark.parametrize(("chunk_rows", "budget"), TILES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_gradients_are_those_of_the_composed_form(
    backend: str, monkeypatch: pytest.MonkeyPatch, chunk_rows: int | None, budget: int, normalize: bool, masked: bool,
    reduction: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(op, "MEMORY_BUDGET", budget)
    *tensors, mask = make()
    arguments = {"mask": mask if masked else None, "reduction": reduction, "alpha": 0.3}
    form = {"normalize": normalize, "scale": 4.0 if normalize else 1.0}
    have = linear_viewpoint_aware_cross_entropy(*tensors, chunk_rows=chunk_rows, **form, **arguments)
    want = composed(*tensors, **form, **arguments)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
    inputs = tuple(tensors[:3])
    torch.testing.assert_close(gradients(have, inputs), gradients(want, inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", ["adaptive", "uniform", "none"])
def test_smoothing_modes_and_soft_viewpoints(backend: str, smoothing: str) -> None:
    feature, W, U, identity, _, mask = make()
    w = torch.rand(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * mask[identity]
    w = w / w.sum(1, keepdim=True)
    arguments = {"smoothing": smoothing, "epsilon": 0.2, "mask": mask}
    have = linear_viewpoint_aware_cross_entropy(feature, W, U, identity, w, **arguments)
    want = composed(feature, W, U, identity, w, **arguments)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
    inputs = (feature, W, U)
    torch.testing.assert_close(gradients(have, inputs), gradients(want, inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("budget", [2**28, 200])
def test_narrow_types(
    backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, normalize: bool, budget: int
) -> None:
    monkeypatch.setattr(op, "MEMORY_BUDGET", budget)
    *tensors, _ = make(dtype=dtype)
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]
    have = linear_viewpoint_aware_cross_entropy(*tensors, normalize=normalize)
    want = composed(*wide, normalize=normalize)
    assert have[0].dtype == have[1].dtype == torch.float32
    error = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(torch.stack(have).double(), torch.stack(want), rtol=error, atol=error)
    for ours, theirs in zip(gradients(have, tuple(tensors[:3])), gradients(want, tuple(wide[:3])), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=10 * error, atol=error * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [2**28, 60_000, 20_000])
def test_error_in_half_types_is_at_most_twice_that_of_plain_pytorch(
    backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, budget: int
) -> None:
    """However many tiles there are: gradients are not rounded again for each of them."""
    monkeypatch.setattr(op, "MEMORY_BUDGET", budget)
    feature, W, U, identity, viewpoint, _ = make(N=128, K=150, D=32)
    identity[:40] = 3
    half = [x.detach().to(dtype) for x in (feature, 0.3 * W, 0.3 * U)]

    def plain(f: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(f, u.flatten(0, 1)).unflatten(1, u.shape[:2])
        with reference_backend():
            return viewpoint_aware_cross_entropy(torch.nn.functional.linear(f, w), logits, identity, viewpoint)

    def ours(f: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return linear_viewpoint_aware_cross_entropy(f, w, u, identity, viewpoint)

    def scaled_gradients(run: Any, inputs: list[Tensor]) -> list[Tensor]:
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        return [g.double() / 1024 for g in gradients(run(*leaves), leaves, (1024.0, 1024.0))]

    truth = scaled_gradients(plain, [x.double() for x in half])
    for have, theirs, want in zip(scaled_gradients(ours, half), scaled_gradients(plain, half), truth, strict=True):
        assert (have - want).abs().max() <= 2 * (theirs - want).abs().max()
        assert (have - want).norm() <= 1.5 * (theirs - want).norm()


def test_many_identities_of_a_small_batch_do_not_vanish_in_half_precision(backend: str) -> None:
    """A gradient of 1 / (K N) is below float16's smallest number; the loss scale must come before the rounding."""
    feature, W, U, identity, viewpoint, _ = make(N=64, K=1500, dtype=torch.float32)
    half = [x.detach().half().requires_grad_() for x in (feature, W, U)]
    L_y, _ = linear_viewpoint_aware_cross_entropy(*half, identity, viewpoint, smoothing="none")
    scaled = torch.autograd.grad(2.0**16 * L_y, half[1])[0].double() / 2**16
    wide = [x.detach().double().requires_grad_() for x in half]
    (want_W,) = torch.autograd.grad(composed(*wide, identity, viewpoint, smoothing="none")[0], wide[1])
    others = torch.ones(1500, dtype=torch.bool)
    others[identity] = False
    assert (scaled[others] - want_W[others]).norm() < 0.02 * want_W[others].norm()


def test_zero_vectors_have_cosine_and_gradient_zero(backend: str) -> None:
    *tensors, _ = make()
    feature, W, U = (x.detach().clone() for x in tensors[:3])
    feature[2], W[5], U[4, 1] = 0, 0, 0
    leaves = [x.requires_grad_() for x in (feature, W, U)]
    have = linear_viewpoint_aware_cross_entropy(*leaves, *tensors[3:], normalize=True, scale=2.0)
    for got in gradients(have, tuple(leaves)):
        assert got.isfinite().all()
    f_grad, W_grad, U_grad = gradients(
        linear_viewpoint_aware_cross_entropy(*leaves, *tensors[3:], normalize=True, scale=2.0), tuple(leaves)
    )
    assert (f_grad[2] == 0).all()
    assert (W_grad[5] == 0).all()
    assert (U_grad[4, 1] == 0).all()
    torch.testing.assert_close(have, composed(*leaves, *tensors[3:], normalize=True, scale=2.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("budget", [2**28, 1000])
def test_frozen_inputs_get_no_gradient(
    backend: str, monkeypatch: pytest.MonkeyPatch, frozen: tuple[int, ...], budget: int
) -> None:
    monkeypatch.setattr(op, "MEMORY_BUDGET", budget)
    *tensors, _ = make()
    want = gradients(composed(*tensors), tuple(tensors[:3]))
    for index in frozen:
        tensors[index].requires_grad_(False)
    losses = linear_viewpoint_aware_cross_entropy(*tensors)
    assert losses[0].requires_grad == (len(frozen) < 3)
    if len(frozen) < 3:
        (0.1 * losses[0] + 0.3 * losses[1]).backward()
    for index, tensor in enumerate(tensors[:3]):
        if index in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, want[index], rtol=1e-9, atol=1e-12)


def test_one_of_the_two_losses_alone(backend: str) -> None:
    *tensors, _ = make()
    for alone in range(2):
        weights = (float(alone == 0), float(alone == 1))
        want = gradients(composed(*tensors), tuple(tensors[:3]), weights)
        for tensor in tensors[:3]:
            tensor.grad = None
        linear_viewpoint_aware_cross_entropy(*tensors)[alone].backward()
        torch.testing.assert_close(tensors[0].grad, want[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tensors[1 + alone].grad, want[1 + alone], rtol=1e-9, atol=1e-12)
        assert tensors[2 - alone].grad is None


def test_two_backward_passes_through_one_graph(backend: str) -> None:
    *tensors, _ = make()
    want = gradients(composed(*tensors), tuple(tensors[:3]))
    L_y, L_v = linear_viewpoint_aware_cross_entropy(*tensors)
    total = 0.1 * L_y + 0.3 * L_v
    total.backward(retain_graph=True)
    (2 * total).backward()
    for tensor, once in zip(tensors, want, strict=False):
        torch.testing.assert_close(tensor.grad, 3 * once, rtol=1e-9, atol=1e-12)


def test_double_use_in_one_graph_and_accumulation(backend: str) -> None:
    *tensors, _ = make()
    other = [x.detach() if x.is_floating_point() else x for x in make(seed=1)[:5]]
    inputs = tuple(tensors[:3])

    def total(run: Any) -> Tensor:
        first = run(*tensors)
        second = run(other[0], *tensors[1:3], *other[3:])
        return first[0] + 2 * first[1] + second[0] + 3 * second[1]

    with reference_backend():
        want = torch.autograd.grad(total(composed), inputs)
    torch.testing.assert_close(
        torch.autograd.grad(total(linear_viewpoint_aware_cross_entropy), inputs), want, rtol=1e-9, atol=1e-12
    )


def test_layouts_that_are_not_dense(backend: str) -> None:
    *tensors, _ = make()
    want = composed(*tensors)
    feature, W, U, identity, viewpoint = tensors
    spread = (
        feature.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_(),
        W.detach().t().contiguous().t().requires_grad_(),
        U.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_(),
    )
    have = linear_viewpoint_aware_cross_entropy(*spread, identity.repeat_interleave(2)[::2], viewpoint)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(have, spread), gradients(want, tuple(tensors[:3])), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_linear_layer(backend: str, dtype: torch.dtype) -> None:
    *tensors, _ = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        have = linear_viewpoint_aware_cross_entropy(*tensors)
        want = viewpoint_aware_cross_entropy(
            torch.nn.functional.linear(tensors[0], tensors[1]),
            torch.nn.functional.linear(tensors[0], tensors[2].flatten(0, 1)).unflatten(1, (K, V)),
            *tensors[3:],
        )
    torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-2)
    assert {g.dtype for g in gradients(have, tuple(tensors[:3]))} == {torch.float32}


def test_no_gradient_is_made_where_none_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *tensors, _ = make()
    want = composed(*tensors)
    with torch.no_grad():
        have = linear_viewpoint_aware_cross_entropy(*tensors)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
    assert not have[0].requires_grad


def test_double_backward_is_refused(backend: str) -> None:
    *tensors, _ = make()
    L_y, _ = linear_viewpoint_aware_cross_entropy(*tensors, reduction="none")
    (gradient,) = torch.autograd.grad(L_y.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_forward_mode_is_refused(backend: str) -> None:
    *tensors, _ = make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0].detach(), torch.ones_like(tensors[0]))
        with pytest.raises(RuntimeError, match="forward mode"):
            linear_viewpoint_aware_cross_entropy(dual, *tensors[1:])


def test_empty_batch(backend: str) -> None:
    *tensors, _ = make(N=0)
    with pytest.raises(ValueError, match="batch is empty"):
        linear_viewpoint_aware_cross_entropy(*tensors)
    losses = linear_viewpoint_aware_cross_entropy(*tensors, reduction="sum")
    assert [loss.item() for loss in losses] == [0, 0]
    f_grad, W_grad, U_grad = gradients(losses, tuple(tensors[:3]))
    assert f_grad.shape == (0, D)
    strided = torch.randn(4, 2 * D)[:0, ::2].to(tensors[0].dtype)
    assert sum(linear_viewpoint_aware_cross_entropy(strided, *tensors[1:], reduction="sum")) == 0
    assert (W_grad == 0).all()
    assert (U_grad == 0).all()


def test_nan_features_give_a_nan_loss(backend: str) -> None:
    *tensors, _ = make()
    tensors[0].data[3, 2] = torch.nan
    L_y, L_v = linear_viewpoint_aware_cross_entropy(*tensors, reduction="none")
    for loss in (L_y, L_v):
        assert loss.isnan().nonzero().flatten().tolist() == [3]


def test_tiles_stay_within_the_budget() -> None:
    for N_, K_, V_, size, budget in (
        (256, 100_000, 3, 4, 2**28), (256, 10**6, 3, 4, 2**28), (64, 751, 1, 2, 2**28), (256, 70 * 10**6, 3, 4, 2**28),
        (1, 10**6, 3, 8, 2**20), (256, 1000, 1, 4, 2**16), (5, 3, 2, 4, 1),
    ):  # fmt: skip
        tile = _linear_tiles.tiling(N_, K_, V_, size, budget, 0)
        assert 1 <= tile.rows <= N_
        assert 1 <= tile.identities <= K_
        assert tile.rows == N_ or tile.identities == K_
        if tile.rows * tile.identities * V_ * size > budget:
            assert tile.identities == min(16, K_)
    assert _linear_tiles.tiling(256, 100_000, 3, 4, 2**28, 0) == (128, 100_000)
    assert _linear_tiles.tiling(256, 10**6, 3, 4, 2**28, 0) == (256, 87376)
    assert _linear_tiles.tiling(256, 10**6, 3, 4, 2**28, 10) == (10, 10**6)
    assert _linear_tiles.tiling(448, 100_000, 3, 2, 2**28, 0).rows == 448  # half types are not cut into rows


FEATURE, W_, U_, Y, VIEW, MASK = (x.detach() for x in make(dtype=torch.float32))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature": FEATURE[0]}, ValueError, "feature: shape"),
        ({"feature": FEATURE.long()}, TypeError, "feature: dtype int64"),
        ({"identity_centers": W_[:, 1:]}, ValueError, "identity_centers: shape"),
        ({"identity_centers": W_.double()}, TypeError, "identity_centers: dtype float64"),
        ({"viewpoint_centers": U_[1:]}, ValueError, "viewpoint_centers: shape"),
        ({"viewpoint_centers": U_.to("meta")}, ValueError, "viewpoint_centers: is on meta"),
        ({"identity": Y + K}, IndexError, "identity: .* at row 0"),
        ({"viewpoint": VIEW + 3}, IndexError, "viewpoint: .* at row"),
        ({"mask": MASK[1:]}, ValueError, "mask: shape"),
        ({"alpha": 0.5}, ValueError, "alpha"),
        ({"reduction": "all"}, ValueError, "reduction"),
        ({"scale": 2.0}, ValueError, "scale: 2.0 was given, but"),
        ({"scale": 0.0, "normalize": True}, ValueError, "scale: 0.0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows: 0"),
        ({"chunk_rows": 2**70}, ValueError, "chunk_rows"),
        ({"viewpoint_centers": U_.to_sparse()}, TypeError, "viewpoint_centers"),
        ({"identity": Y.to_sparse()}, TypeError, "identity"),
        ({"viewpoint": VIEW.to_sparse()}, TypeError, "viewpoint"),
        ({"mask": MASK.to_sparse()}, TypeError, "mask"),
        ({"chunk_rows": 8.0}, TypeError, "chunk_rows: float"),
        ({"scale": "16", "normalize": True}, TypeError, "scale: str"),
        ({"normalize": "no"}, TypeError, "normalize: str"),
    ],
)
def test_bad_arguments_are_named(backend: str, changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "feature": FEATURE, "identity_centers": W_, "viewpoint_centers": U_, "identity": Y, "viewpoint": VIEW, **changes
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_viewpoint_aware_cross_entropy(**arguments)
