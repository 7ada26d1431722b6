"""The soft-label cross-entropies against the definition, written out sample by sample in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import vareid_ext
from vareid_ext import identity_cross_entropy, viewpoint_aware_cross_entropy, viewpoint_cross_entropy
from vareid_ext.reference.viewpoint_aware_cross_entropy import soft_target


def truth(
    logits: Tensor,
    identity: Tensor,
    viewpoint: Tensor | None = None,
    mask: Tensor | None = None,
    smoothing: str = "adaptive",
    alpha: float = 0.2,
    epsilon: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], d loss / d logits [N, K, V], target [N, K, V]) in float64, from the definition."""
    x = logits.detach().double()
    N, K, V = x.shape
    exists = torch.ones(K, V, dtype=torch.bool) if mask is None else mask
    losses, gradients, targets = [], [], []
    for i in range(N):
        y = int(identity[i])
        row = torch.where(exists, x[i], -math.inf)
        log_r = row - torch.logsumexp(row.flatten(), 0)
        r = log_r.exp()
        own, others = int(exists[y].sum()), int(exists.sum() - exists[y].sum())
        if viewpoint is None:
            w = torch.ones(1, dtype=torch.float64)
        elif viewpoint.is_floating_point():
            w = viewpoint[i].double()
        elif int(viewpoint[i]) < 0:
            w = exists[y].double() / own
        else:
            w = torch.zeros(V, dtype=torch.float64)
            w[int(viewpoint[i])] = 1
        eps1 = {"adaptive": alpha * (1 - float(r[y].sum())), "uniform": epsilon, "none": 0.0}[smoothing]
        eps1 = eps1 if others else 0.0
        eps2 = alpha * (1 - float((w * r[y]).sum())) if own > 1 else 0.0
        t = exists.double() * (eps1 / max(others, 1))
        for k in range(V):
            t[y, k] = (1 - eps1 - eps2) * w[k] + eps2 * (1 - w[k]) / max(own - 1, 1) if exists[y, k] else 0.0
        losses.append(-(t * log_r)[t != 0].sum())
        gradients.append(r - t)
        targets.append(t)
    return torch.stack(losses), torch.stack(gradients), torch.stack(targets)


def make(
    N: int, K: int, V: int, scale: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [N, K] and [N, K, V], identities and viewpoints (some unknown)."""
    rng = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(N, K, generator=rng)).to(dtype)
    s = (scale * torch.randn(N, K, V, generator=rng)).to(dtype)
    return z, s, torch.randint(K, (N,), generator=rng), torch.randint(-1, V, (N,), generator=rng)


def make_mask(K: int, V: int, identity: Tensor, viewpoint: Tensor, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 100)
    mask = torch.rand(K, V, generator=rng) < 0.6
    mask[torch.arange(K), torch.randint(V, (K,), generator=rng)] = True
    known = viewpoint >= 0
    mask[identity[known], viewpoint[known]] = True
    return mask


def plain_float32(logits: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own dense soft-label loss [N] in float32, and its gradient."""
    x = logits.detach().float().flatten(1).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, target.float().flatten(1), reduction="none")
    (loss * upstream.float()).sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad.view_as(logits)


SIZES = [(1, 1, 2), (1, 2, 1), (2, 1, 3), (3, 3, 1), (5, 2, 3), (4, 17, 3), (4, 751, 3), (2, 1031, 5), (1, 30011, 3)]


@pytest.mark.parametrize(("N", "K", "V"), SIZES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_viewpoint_loss_and_gradient_match_the_definition(
    backend: str, N: int, K: int, V: int, masked: bool, kind: str
) -> None:
    _, s, identity, viewpoint = make(N, K, V)
    mask = make_mask(K, V, identity, viewpoint) if masked else None
    if kind == "soft":
        w = torch.rand(N, V, generator=torch.Generator().manual_seed(5)) + 0.05
        w = w if mask is None else w * mask[identity]
        viewpoint = w / w.sum(1, keepdim=True)
    s.requires_grad_()
    loss = viewpoint_cross_entropy(s, identity, viewpoint, mask=mask, reduction="none")
    upstream = torch.linspace(-1, 2, N)
    loss.backward(upstream)
    want_loss, want_gradient, _ = truth(s, identity, viewpoint, mask)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.grad.double(), want_gradient * upstream[:, None, None].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", ["adaptive", "uniform", "none"])
@pytest.mark.parametrize("K", [1, 2, 3, 17, 751, 4099])
def test_identity_loss_and_gradient_match_the_definition(backend: str, smoothing: str, K: int) -> None:
    z, _, identity, _ = make(6, K, 1)
    z.requires_grad_()
    loss = identity_cross_entropy(z, identity, smoothing=smoothing, alpha=0.3, epsilon=0.15, reduction="none")
    loss.sum().backward()
    want_loss, want_gradient, _ = truth(z[:, :, None], identity, None, None, smoothing, 0.3, 0.15)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), want_gradient[:, :, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", ["uniform", "none"])
def test_identity_modes_agree_with_pytorch(backend: str, smoothing: str) -> None:
    z, _, identity, _ = make(8, 41, 1, dtype=torch.float64)
    K = z.shape[1]
    # PyTorch's label_smoothing spreads over all K classes, the method's over the K - 1 others.
    label_smoothing = 0.1 * K / (K - 1) if smoothing == "uniform" else 0.0
    want = torch.nn.functional.cross_entropy(z, identity, label_smoothing=label_smoothing)
    torch.testing.assert_close(identity_cross_entropy(z, identity, smoothing=smoothing, epsilon=0.1), want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_both_losses_in_every_type_and_reduction(backend: str, reduction: str, dtype: torch.dtype) -> None:
    N = 9
    z, s, identity, viewpoint = make(N, 61, 3, dtype=dtype)
    mask = make_mask(61, 3, identity, viewpoint)
    z.requires_grad_()
    s.requires_grad_()
    L_y, L_v = viewpoint_aware_cross_entropy(z, s, identity, viewpoint, mask=mask, reduction=reduction)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert L_y.dtype == L_v.dtype == wide
    assert L_y.shape == L_v.shape == ((N,) if reduction == "none" else ())
    (0.1 * (L_y.sum() + 2 * L_v.sum())).backward()
    share = 1 / N if reduction == "mean" else 1.0
    for x, loss, weight, labels in (
        (z[:, :, None], L_y, 0.1, (identity,)), (s, L_v, 0.2, (identity, viewpoint, mask))
    ):  # fmt: skip
        want_loss, want_gradient, _ = truth(x, *labels)
        if reduction != "none":
            want_loss = want_loss.sum() * share
        torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
        gradient = (z.grad[:, :, None] if labels == (identity,) else s.grad).double()
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(gradient, want_gradient * weight * share, rtol=rounding, atol=1e-6)


def test_float64_gradient_by_finite_differences_with_the_target_frozen(backend: str) -> None:
    _, s, identity, viewpoint = make(3, 4, 3, dtype=torch.float64)
    s.requires_grad_()
    target = truth(s, identity, viewpoint)[2].flatten(1)

    def frozen(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x.flatten(1), target)

    assert torch.autograd.gradcheck(frozen, (s,))
    viewpoint_cross_entropy(s, identity, viewpoint).backward()
    (want,) = torch.autograd.grad(frozen(s), s)
    torch.testing.assert_close(s.grad, want, rtol=1e-12, atol=1e-14)


def test_dense_targets_are_the_definition() -> None:
    _, s, identity, viewpoint = make(5, 13, 3, dtype=torch.float64)
    mask = make_mask(13, 3, identity, viewpoint)
    target = soft_target(s, identity, viewpoint, mask=mask)
    torch.testing.assert_close(target, truth(s, identity, viewpoint, mask)[2])
    torch.testing.assert_close(target.flatten(1).sum(1), torch.ones(5, dtype=torch.float64))


def _largest_errors(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Largest absolute error of each (value, truth) pair; NaN counts as infinite."""
    return [float((have.double() - want).abs().nan_to_num(nan=math.inf).max()) for have, want in pairs]


def _rising_late(x: Tensor) -> Tensor:
    """Small logits, and one class late in the row that takes all probability."""
    x = x.clone()
    x[:, x.shape[1] * 3 // 4, 0] += 23.7
    return x


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale 1": lambda x: x,
    "scale 30": lambda x: 30 * x,
    "scale 1e4": lambda x: 1e4 * x,
    "all equal": lambda x: torch.zeros_like(x) + 7.25,
    "one dominating": lambda x: x.index_fill(1, torch.tensor([0]), 90.0),
    "rising late": _rising_late,
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("K", [1, 2, 3, 1301])
@pytest.mark.parametrize("masked", [False, True])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend: str, rows: str, K: int, masked: bool) -> None:
    N, V = 12, 3
    _, s, identity, viewpoint = make(N, K, V, scale=1.0, seed=3)
    identity[: N // 2] = 0
    mask = make_mask(K, V, identity, viewpoint) if masked else None
    s = ROWS[rows](s)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    want_loss, want_gradient, target = truth(s, identity, viewpoint, mask)
    upstream = torch.ones(N)
    s.requires_grad_()
    loss = viewpoint_cross_entropy(s, identity, viewpoint, mask=mask, reduction="none")
    loss.backward(upstream)
    have = _largest_errors([(loss.detach(), want_loss), (s.grad, want_gradient)])
    if mask is not None:  # a dense loss makes 0 * -inf of the classes that do not exist
        keep = mask.flatten()
        plain_loss, plain_gradient = plain_float32(
            s.detach().flatten(1)[:, keep][:, :, None], target.flatten(1)[:, keep][:, :, None], upstream
        )
        want_gradient = want_gradient.flatten(1)[:, keep][:, :, None]
    else:
        plain_loss, plain_gradient = plain_float32(s, target, upstream)
    plain = _largest_errors([(plain_loss, want_loss), (plain_gradient, want_gradient)])
    # One unit in the last place of the largest value is always allowed: plain PyTorch can be exact by chance.
    unit = [float(want.abs().max()) * 2**-23 for want in (want_loss, want_gradient)]
    for ours, theirs, one in zip(have, plain, unit, strict=True):
        assert ours <= 2 * theirs + one


def test_masked_classes_are_not_read(backend: str) -> None:
    _, s, identity, viewpoint = make(4, 5, 3)
    mask = make_mask(5, 3, identity, viewpoint)
    want = viewpoint_cross_entropy(s, identity, viewpoint, mask=mask, reduction="none")
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        x = s.masked_fill(~mask, poison).requires_grad_()
        loss = viewpoint_cross_entropy(x, identity, viewpoint, mask=mask, reduction="none")
        torch.testing.assert_close(loss, want, rtol=0, atol=0)
        loss.sum().backward()
        assert (x.grad[:, ~mask] == 0).all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_inf_make_the_row_nan_and_no_other(backend: str, poison: float) -> None:
    z, s, identity, viewpoint = make(3, 700, 3)
    z[1, 695], s[1, 3, 1] = poison, poison
    z.requires_grad_()
    s.requires_grad_()
    losses = viewpoint_aware_cross_entropy(z, s, identity, viewpoint, reduction="none")
    for loss in losses:
        assert loss.isnan().tolist() == [False, True, False]
    (losses[0] + losses[1]).sum().backward()
    for gradient in (z.grad, s.grad):
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


def test_impossible_class_with_target_zero_contributes_nothing(backend: str) -> None:
    z = torch.tensor([[2.0, -math.inf, 1.0]], requires_grad=True)
    loss = identity_cross_entropy(z, torch.tensor([0]), smoothing="none")
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert z.grad[0, 1] == 0
    smoothed = identity_cross_entropy(z.detach(), torch.tensor([0]), smoothing="uniform")
    assert float(smoothed) == math.inf  # a positive target of an impossible class
    # Certain prediction: eps = 0, so the impossible ones have target 0 again.
    certain = torch.tensor([[3.0, -math.inf, -math.inf]])
    assert float(identity_cross_entropy(certain, torch.tensor([0]))) == 0


def test_nothing_possible_is_nan(backend: str) -> None:
    assert identity_cross_entropy(torch.full((2, 5), -math.inf), torch.tensor([0, 1]), reduction="none").isnan().all()


def test_one_identity_has_no_other_to_smooth_over(backend: str) -> None:
    for smoothing in ("adaptive", "uniform", "none"):
        assert float(identity_cross_entropy(torch.tensor([[4.0]]), torch.tensor([0]), smoothing=smoothing)) == 0
    loss = viewpoint_cross_entropy(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([0]), torch.tensor([2]))
    torch.testing.assert_close(loss.double(), truth(torch.tensor([[[1.0, 2.0, 3.0]]]), [0], torch.tensor([2]))[0][0])


def test_hard_labels_are_one_hot_distributions_and_unknown_is_uniform(backend: str) -> None:
    _, s, identity, viewpoint = make(12, 7, 3)
    assert (viewpoint < 0).any()
    w = torch.nn.functional.one_hot(viewpoint.clamp(min=0), 3).float()
    w[viewpoint < 0] = 1 / 3
    torch.testing.assert_close(viewpoint_cross_entropy(s, identity, w), viewpoint_cross_entropy(s, identity, viewpoint))


def test_rows_far_apart_in_memory_and_other_layouts(backend: str) -> None:
    z, s, identity, viewpoint = make(5, 37, 3)
    want = viewpoint_aware_cross_entropy(z, s, identity, viewpoint)
    wide_z, wide_s = torch.randn(5, 64), torch.randn(5, 50, 3)
    wide_z[:, 9:46], wide_s[:, 2:39] = z, s
    for z_, s_ in (
        (wide_z[:, 9:46], wide_s[:, 2:39]),
        (z.t().contiguous().t(), s.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
        (z.repeat_interleave(2, 0)[::2], s.repeat_interleave(2, 1)[:, ::2]),
        (torch._neg_view(-z), torch._neg_view(-s)),
    ):
        z_, s_ = z_.detach().requires_grad_(), s_.detach().requires_grad_()
        have = viewpoint_aware_cross_entropy(z_, s_, identity[None].expand(2, 5).t()[:, 0], viewpoint)
        torch.testing.assert_close(have, want, rtol=0, atol=0)
        (have[0] + have[1]).backward()
        torch.testing.assert_close(s_.grad, (truth(s, identity, viewpoint)[1] / 5).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_depends_neither_on_the_threads_nor_on_the_rows_beside(backend: str, threads: int) -> None:
    _, s, identity, viewpoint = make(3, 20011, 3)

    def results(rows: slice) -> tuple[Tensor, Tensor]:
        x = s[rows].clone().requires_grad_()
        loss = viewpoint_cross_entropy(x, identity[rows], viewpoint[rows], reduction="none")
        return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [results(slice(i, i + 1)) for i in range(3)]
        of_one_thread = results(slice(0, 3))
        torch.set_num_threads(threads)
        together = results(slice(0, 3))
    finally:
        torch.set_num_threads(before)
    for have, want in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(have, torch.cat(want), rtol=1e-6, atol=1e-9)
    if backend != "reference":  # PyTorch's sums may depend on the threads
        torch.testing.assert_close(together, of_one_thread, rtol=0, atol=0)


def test_only_the_heads_that_need_it_get_a_gradient(backend: str) -> None:
    z, s, identity, viewpoint = make(4, 9, 3)
    s.requires_grad_()
    L_y, L_v = viewpoint_aware_cross_entropy(z, s, identity, viewpoint)
    L_v.backward()
    torch.testing.assert_close(s.grad.double(), truth(s, identity, viewpoint)[1] / 4, rtol=1e-5, atol=1e-7)
    assert z.grad is None
    z.requires_grad_()
    s.grad = None
    L_y, _ = viewpoint_aware_cross_entropy(z, s, identity, viewpoint)
    L_y.backward()
    assert s.grad is None or (s.grad == 0).all()
    torch.testing.assert_close(z.grad.double(), truth(z[:, :, None], identity)[1][:, :, 0] / 4, rtol=1e-5, atol=1e-7)


def test_gradients_accumulate_and_a_graph_can_be_used_twice(backend: str) -> None:
    _, s, identity, viewpoint = make(4, 9, 3)
    s.requires_grad_()
    loss = viewpoint_cross_entropy(s, identity, viewpoint)
    loss.backward(retain_graph=True)
    once = s.grad.clone()
    (3 * loss + loss).backward()
    torch.testing.assert_close(s.grad, 5 * once)


def test_double_backward_is_refused(backend: str) -> None:
    z, _, identity, _ = make(2, 3, 1)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(identity_cross_entropy(z, identity), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_empty_batches(backend: str) -> None:
    z, s = torch.empty(0, 4, requires_grad=True), torch.empty(0, 4, 3, requires_grad=True)
    identity = viewpoint = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch is empty"):
        viewpoint_aware_cross_entropy(z, s, identity, viewpoint)
    total = viewpoint_aware_cross_entropy(z, s, identity, viewpoint, reduction="sum")
    (total[0] + total[1]).backward()
    assert [part.item() for part in total] == [0, 0]
    assert z.grad.shape == (0, 4)
    assert viewpoint_cross_entropy(s, identity, viewpoint, reduction="none").shape == (0,)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_empty_batch_may_have_any_strides(backend: str, reduction: str) -> None:
    """Also a slice of rows that are not dense, as of a transposed or a wider tensor."""
    identity = torch.zeros(8, dtype=torch.int64)[::2][:0]
    soft = torch.ones(8, 6)[::2, ::2][:0]
    for z in (torch.randn(4, 6)[:0, ::2], torch.randn(3, 4).T[:0], torch.randn(1, 3).expand(4, 3)[:0]):
        z = z.detach().requires_grad_()
        loss = identity_cross_entropy(z, identity, reduction=reduction)
        assert loss.sum() == 0
        loss.sum().backward()
        assert z.grad is not None
        assert z.grad.shape == (0, 3)
    for s in (torch.randn(4, 5, 6)[:0, :, ::2], torch.randn(3, 5, 4).permute(2, 1, 0)[:0]):
        for viewpoint in (identity, soft):
            s = s.detach().requires_grad_()
            both = viewpoint_aware_cross_entropy(s[:, :, 0], s, identity, viewpoint, reduction=reduction)
            (both[0].sum() + both[1].sum()).backward()
            assert s.grad is not None
            assert s.grad.shape == (0, 5, 3)


Z, S, Y, VIEW = make(4, 5, 3)
GOOD_MASK = make_mask(5, 3, Y, VIEW)
NO_VIEW = GOOD_MASK.clone()
NO_VIEW[2] = False


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"identity_logits": Z.tolist()}, TypeError, "identity_logits"),
        ({"identity_logits": Z.long()}, TypeError, "identity_logits: dtype int64"),
        ({"identity_logits": Z.to_sparse()}, TypeError, "identity_logits: layout torch.sparse_coo"),
        ({"identity_logits": Z[0]}, ValueError, r"identity_logits: shape \[5\]"),
        ({"identity_logits": torch.nested.nested_tensor([Z])}, TypeError, "identity_logits"),
        ({"viewpoint_logits": S.to_sparse()}, TypeError, "viewpoint_logits"),
        ({"identity": Y.to_sparse()}, TypeError, "identity"),
        ({"viewpoint": VIEW.to_sparse()}, TypeError, "viewpoint"),
        ({"viewpoint": torch.eye(4, 3).to_sparse()}, TypeError, "viewpoint"),
        ({"mask": GOOD_MASK.to_sparse()}, TypeError, "mask"),
        ({"viewpoint_logits": S.double()}, TypeError, "viewpoint_logits: dtype float64"),
        ({"viewpoint_logits": S[:, :4]}, ValueError, "viewpoint_logits: shape"),
        ({"viewpoint_logits": S[:, :, :0], "viewpoint": Y * 0 - 1}, ValueError, "there are no classes"),
        ({"viewpoint_logits": S.to("meta")}, ValueError, "viewpoint_logits: is on meta"),
        ({"identity": Y.float()}, TypeError, "identity: dtype float32"),
        ({"identity": Y[:3]}, ValueError, "identity: shape"),
        ({"identity": Y.to("meta")}, ValueError, "identity: is on meta"),
        ({"identity": torch.tensor([0, 5, 1, 2])}, IndexError, r"identity: 5 at row 1; labels must be in \[0, 5\)"),
        ({"identity": torch.tensor([0, 1, 1, -1])}, IndexError, "identity: -1 at row 3"),
        ({"viewpoint": torch.tensor([0, 3, 1, 2])}, IndexError, "viewpoint: 3 at row 1"),
        ({"viewpoint": torch.tensor([0, 0, 1, -2])}, IndexError, "viewpoint: -2 at row 3"),
        ({"viewpoint": VIEW[:2]}, ValueError, "viewpoint: shape"),
        ({"viewpoint": torch.rand(4, 2)}, ValueError, "viewpoint: shape"),
        ({"viewpoint": VIEW > 0}, TypeError, "viewpoint: dtype bool"),
        ({"viewpoint": torch.full((4, 3), 0.3)}, ValueError, "viewpoint: .* at row 0; a distribution"),
        ({"viewpoint": torch.tensor([[1.5, -0.5, 0.0]] * 4)}, ValueError, "viewpoint: .* non-negative"),
        ({"viewpoint": torch.tensor([[math.nan, 1.0, 0.0]] * 4)}, ValueError, "viewpoint: .* at row 0"),
        ({"mask": GOOD_MASK[:4]}, ValueError, "mask: shape"),
        ({"mask": GOOD_MASK.int()}, TypeError, "mask: dtype int32"),
        ({"mask": NO_VIEW, "identity": torch.tensor([0, 0, 1, 1])}, ValueError, "mask: identity 2 has no existing"),
        ({"alpha": 0.5}, ValueError, "alpha: 0.5"),
        ({"alpha": "0.2"}, TypeError, "alpha: str"),
        ({"epsilon": None}, TypeError, "epsilon: NoneType"),
        ({"alpha": -0.1}, ValueError, "alpha: -0.1"),
        ({"alpha": math.nan}, ValueError, "alpha: nan"),
        ({"epsilon": 1.0}, ValueError, "epsilon: 1.0"),
        ({"smoothing": "soft"}, ValueError, "smoothing: 'soft'"),
        ({"reduction": "max"}, ValueError, "reduction: 'max'"),
    ],
)
def test_bad_arguments_are_named(backend: str, changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"identity_logits": Z, "viewpoint_logits": S, "identity": Y, "viewpoint": VIEW, **changes}
    with pytest.raises(error, match=message):
        viewpoint_aware_cross_entropy(**arguments)


def test_mask_that_excludes_a_sample_is_refused(backend: str) -> None:
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4, 1] = False
    identity = torch.tensor([0, 4, 4, 1])
    with pytest.raises(ValueError, match="viewpoint: 1 at row 2 is on a view that the mask excludes for identity 4"):
        viewpoint_cross_entropy(S, identity, torch.tensor([1, 0, 1, 1]), mask=mask)
    with pytest.raises(ValueError, match="at row 1 is on a view that the mask excludes for identity 4"):
        viewpoint_cross_entropy(S, identity, torch.full((4, 3), 1 / 3), mask=mask)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-22.9 + 2**-24), (torch.float64, 2**-51.9 + 2**-53)])
@pytest.mark.parametrize("lowest", [-1.0, -30.0, -87.3])
def test_exponentials_are_as_exact_as_documented(dtype: torch.dtype, bound: float, lowest: float) -> None:
    """Beside a dominating class and without smoothing, the gradient is exp(x) times a factor that is known."""
    if vareid_ext.backends()["cpu"] != "native":
        pytest.skip("the compiled module is not here")
    x = torch.rand(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(lowest).to(dtype)
    z = torch.cat([torch.zeros(1, dtype=dtype), x, torch.tensor([-math.inf, -750.0], dtype=dtype)])[None]
    label, one = torch.zeros(1, dtype=torch.int64), torch.ones((), dtype=dtype)
    ops = torch.ops.vareid
    _, _, statistics = ops.viewpoint_aware_cross_entropy_forward(z, None, label, None, None, False, 0.0, 0.0, "sum")
    gradient, _ = ops.viewpoint_aware_cross_entropy_backward(one, None, z, None, label, None, None, statistics, "sum")
    factor = statistics[0, 1, 0].to(dtype).numpy().astype(np.longdouble)
    want = np.exp(x.numpy().astype(np.longdouble)) * factor
    normal = want > float(torch.finfo(dtype).tiny) * 2
    error = np.abs(gradient[0, 1:-2].numpy().astype(np.longdouble) - want)[normal] / want[normal]
    assert error.max() <= bound
    assert (gradient[0, -2:] == 0).all()


def test_large_alpha_warns_once() -> None:
    with pytest.warns(RuntimeWarning, match="alpha: 0.45 is above 0.4") as caught:
        viewpoint_cross_entropy(S, Y, VIEW, alpha=0.45)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        viewpoint_cross_entropy(S, Y, VIEW, alpha=0.45)
        identity_cross_entropy(Z, Y, alpha=0.49)
