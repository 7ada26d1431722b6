"""The angular center regularizer against float64 loops, gradcheck, and the limits of its input."""

from __future__ import annotations

import math
import os
import signal
from unittest import mock

import pytest
import torch

from vareid_ext import _native, angular_center_regularizer
from vareid_ext.ops import angular_center as op
from vareid_ext.reference import angular_center as reference

SIZES = [(1, 1, 1), (1, 3, 5), (3, 2, 16), (5, 3, 33), (4, 6, 1030), (2, 5, 2048), (17, 3, 7), (0, 3, 8), (3, 0, 8)]


def centers(K, V, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(K, D, generator=generator, dtype=torch.float64)
    U = torch.randn(K, V, D, generator=generator, dtype=torch.float64)
    return W.to(dtype), U.to(dtype)


def random_mask(K, V, seed=0):
    return torch.rand(K, V, generator=torch.Generator().manual_seed(seed)) < 0.6


def truth(W, U, mask=None, upstream=1.0):
    """The loss and its gradients by loops over pairs, in float64."""
    W, U = W.double(), U.double()
    loss, grad_W, grad_U = 0.0, torch.zeros_like(W), torch.zeros_like(U)
    for j in range(U.shape[0]):
        for k in range(U.shape[1]):
            if mask is not None and not mask[j, k]:
                continue
            w, u = W[j], U[j, k]
            a, b = math.sqrt(float(w @ w)), math.sqrt(float(u @ u))
            if a == 0 or b == 0:
                loss += 1.0
                continue
            cosine = float(w @ u) / (a * b)
            loss += 1.0 - cosine
            grad_W[j] += upstream * (cosine * w / a - u / b) / a
            grad_U[j, k] = upstream * (cosine * u / b - w / a) / b
    return loss, grad_W, grad_U


def run(W, U, mask=None, upstream=1.0, **options):
    W, U = W.detach().clone().requires_grad_(), U.detach().clone().requires_grad_()
    loss = angular_center_regularizer(W, U, mask=mask, **options)
    (upstream * loss).backward()
    return loss.detach(), W.grad, U.grad


def assert_close(result, expected, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert math.isclose(result[0].item(), expected[0], rel_tol=tolerance, abs_tol=tolerance)
    for got, want in zip(result[1:], expected[1:], strict=True):
        assert got.dtype == dtype
        if got.numel():
            scale = want.abs().max().item()
            assert (got.double() - want).abs().max().item() <= tolerance * max(scale, 0.1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_matches_the_definition(backend, size, masked):
    W, U = centers(*size)
    mask = random_mask(*size[:2]) if masked else None
    assert_close(run(W, U, mask, 0.1), truth(W, U, mask, 0.1), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(backend, dtype):
    W, U = centers(6, 3, 130, dtype)
    loss, grad_W, grad_U = run(W, U, None, 3.0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close((loss, grad_W, grad_U), truth(W, U, None, 3.0), dtype)


def test_every_half_value_is_converted_exactly(backend):
    """Every finite float16 value passes through the kernel's own conversion, in both directions."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = bits[bits.isfinite() & (bits != 0)]
    if backend == "cuda_on_cpu":  # one block each
        finite = finite[::61]
    W = finite[:, None].clone()
    loss, grad_W, _ = run(W, W[:, None].clone())
    assert loss.item() == pytest.approx(0.0, abs=1e-3)
    assert (grad_W.abs() <= 1e-3 / W.abs().float().clamp(max=1)).all()
    norm = op._forward(W, W[:, None], None)[2]
    assert torch.equal(norm, finite.float().square().sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_round_to_nearest(backend, dtype):
    """From the subnormal range to overflow: the gradient equals the float32 gradient rounded once."""
    W, U = centers(9, 3, 64, dtype, seed=3)
    for upstream in (1e-7, 1e-5, 1e-2, 1.0, 1e3, 1e5, 1e7):
        _, got_W, got_U = run(W, U, None, upstream)
        _, want_W, want_U = run(W.float(), U.float(), None, upstream)
        for got, want in ((got_W, want_W), (got_U, want_U)):
            want = want.to(dtype)
            inf = want.isinf()
            assert torch.equal(got.isinf(), inf)
            step = (
                torch.finfo(dtype).eps * want.abs().float()
                + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            )
            assert ((got.float() - want.float()).abs() <= step)[~inf].all()


def test_error_is_that_of_plain_pytorch(backend):
    W, U = centers(64, 3, 2048, seed=1)
    U = W[:, None] + 0.05 * U
    expected = truth(W, U)
    ours, plain = run(W, U), None
    a, b = W.clone().requires_grad_(), U.clone().requires_grad_()
    loss = (1 - torch.nn.functional.cosine_similarity(a[:, None], b, dim=2)).sum()
    loss.backward()
    plain = (loss.detach(), a.grad, b.grad)
    rounding = 64 * 3 * torch.finfo(torch.float32).eps / 8  # of cosines near 1: a quarter of the worst
    assert abs(ours[0].item() - expected[0]) <= 2 * abs(plain[0].item() - expected[0]) + rounding
    for got, peer, want in zip(ours[1:], plain[1:], expected[1:], strict=True):
        assert (got - want).abs().max() <= 2 * (peer - want).abs().max()


def test_zero_vectors_have_cosine_and_gradient_zero(backend):
    W, U = centers(4, 3, 9)
    W[0] = 0
    U[1, 2] = 0
    W[3], U[3] = 0, 0
    result = run(W, U)
    assert_close(result, truth(W, U), torch.float32)
    assert (result[1][0] == 0).all()
    assert (result[2][0] == 0).all()
    assert (result[2][1, 2] == 0).all()


def test_missing_pairs_are_neither_read_nor_moved(backend):
    W, U = centers(5, 3, 20)
    mask = random_mask(5, 3)
    mask[2] = False
    poisoned = U.clone()
    poisoned[~mask] = float("nan")
    loss, grad_W, grad_U = run(W, poisoned, mask)
    assert_close((loss, grad_W, grad_U), truth(W, U, mask), torch.float32)
    assert (grad_U[~mask] == 0).all()
    assert (grad_W[2] == 0).all()


@pytest.mark.parametrize("mode", ["autocast", "matmul precision"])
def test_the_result_depends_on_no_precision_setting(backend, mode):
    W, U = centers(6, 3, 257)
    expected = run(W, U)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if mode == "matmul precision" else before)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            result = run(W, U)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_give_a_nan_loss(backend, poison):
    W, U = centers(3, 3, 8)
    U[1, 1, 4] = poison
    assert math.isnan(run(W, U)[0].item())


def test_mean_divides_by_the_existing_pairs(backend):
    W, U = centers(5, 3, 12)
    mask = random_mask(5, 3)
    expected = truth(W, U, mask)
    loss, grad_W, _ = run(W, U, mask, reduction="mean")
    count = int(mask.sum())
    assert loss.item() == pytest.approx(expected[0] / count, rel=1e-6)
    assert torch.allclose(grad_W.double(), expected[1] / count, atol=1e-6)
    assert math.isnan(angular_center_regularizer(W, U, mask=torch.zeros_like(mask), reduction="mean").item())


def test_non_contiguous_centers(backend):
    W, U = centers(6, 4, 18)
    strided_W = torch.randn(6, 36)[:, ::2].copy_(W)
    strided_U = torch.randn(4, 18, 6).permute(2, 0, 1).copy_(U)
    mask = random_mask(4, 6).T
    expected = truth(W, U, mask)
    a, b = strided_W.detach().requires_grad_(), strided_U.detach().requires_grad_()
    loss = angular_center_regularizer(a, b, mask=mask)
    loss.backward()
    assert_close((loss.detach(), a.grad, b.grad), expected, torch.float32)


def test_gradcheck_and_frozen_centers(backend):
    W, U = centers(3, 2, 5, torch.float64)
    W.requires_grad_()
    U.requires_grad_()
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    assert torch.autograd.gradcheck(lambda a, b: angular_center_regularizer(a, b, mask=mask), (W, U))
    frozen = U.detach()
    loss = angular_center_regularizer(W, frozen)
    loss.backward()
    assert torch.allclose(W.grad, truth(W.detach(), frozen)[1])


def test_reference_is_its_own_derivative():
    W, U = centers(4, 3, 6, torch.float64)
    a, b = W.clone().requires_grad_(), U.clone().requires_grad_()
    reference.angular_center(a, b).backward()
    expected = truth(W, U)
    assert torch.allclose(a.grad, expected[1])
    assert torch.allclose(b.grad, expected[2])


def test_same_result_for_every_number_of_threads():
    W, U = centers(50, 3, 100)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(W, U))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_double_backward_is_a_clear_error(backend):
    W, U = (x.requires_grad_() for x in centers(2, 2, 4))
    (grad,) = torch.autograd.grad(angular_center_regularizer(W, U), W, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_forward_mode_is_a_clear_error(backend):
    """Not a tangent of zero."""
    W, U = centers(2, 2, 4)
    with pytest.raises(RuntimeError, match="forward mode"), torch.autograd.forward_ad.dual_level():
        angular_center_regularizer(W, torch.autograd.forward_ad.make_dual(U, U))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["identity", "viewpoint"])
def test_only_the_gradients_that_are_needed_are_computed(backend, needs):
    W, U = centers(5, 3, 20)
    mask = random_mask(5, 3)
    a, b = W.clone().requires_grad_(needs[0]), U.clone().requires_grad_(needs[1])
    angular_center_regularizer(a, b, mask=mask).backward()
    expected = truth(W, U, mask)[1:]
    for centre, need, want in zip((a, b), needs, expected, strict=True):
        assert (centre.grad is not None) == need
        assert not need or torch.allclose(centre.grad.double(), want, atol=1e-6)
    upstream, saved = torch.ones(()), op._forward(W, U, mask)[1:]
    gradients = op._backward(upstream, W, U, mask, *saved, *needs)
    assert [bool(gradient.numel()) for gradient in gradients] == list(needs)


def test_used_twice_in_one_graph(backend):
    W, U = (x.requires_grad_() for x in centers(3, 3, 10))
    (angular_center_regularizer(W, U) + 2 * angular_center_regularizer(W, U)).backward()
    assert torch.allclose(W.grad.double(), truth(W.detach(), U.detach(), None, 3.0)[1], atol=1e-6)


def test_opcheck(backend):
    W, U = centers(3, 2, 8)
    W.requires_grad_()
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for given in (None, mask):
        torch.library.opcheck(op._forward, (W, U.requires_grad_(), given), test_utils=tests)


def test_compiles_without_graph_breaks(backend):
    W, U = (x.requires_grad_() for x in centers(3, 2, 8))
    compiled = torch.compile(lambda a, b: angular_center_regularizer(a, b), fullgraph=True, backend="aot_eager")
    loss = compiled(W, U)
    loss.backward()
    expected = truth(W.detach(), U.detach())
    assert_close((loss.detach(), W.grad, U.grad), expected, torch.float32)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_hang():
    W, U = centers(64, 3, 64)
    expected = run(W, U)[0].item()  # the parent's thread pool exists now
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # ends a child that hangs; the test then fails
        value = _native_loss_only(W, U) if _native.backends()["cpu"] == "native" else expected
        os.write(write, repr(value).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert float(text) == expected


def _native_loss_only(W, U):
    """The kernel alone: PyTorch's own thread pool does not survive a fork."""
    K, V = U.shape[:2]
    loss, *saved = torch.empty(()), torch.empty(K, V), torch.empty(K), torch.empty(K, V)
    with mock.patch.object(torch, "get_num_threads", return_value=2):
        _native.launch("angular_center_forward", W, U, None, loss, *saved, on=W)
    return loss.item()


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (lambda W, U: (W.long(), U), TypeError, "identity_centers"),
        (lambda W, U: (W, U.double()), TypeError, "viewpoint_centers"),
        (lambda W, U: (W[0], U), ValueError, "identity_centers"),
        (lambda W, U: (W, U[:, 0]), ValueError, "viewpoint_centers"),
        (lambda W, U: (W[:2], U), ValueError, "viewpoint_centers"),
        (lambda W, U: (W[:, :3], U), ValueError, "viewpoint_centers"),
        (lambda W, U: (W.numpy(), U), TypeError, "identity_centers"),
        (lambda W, U: (W, U.to("meta")), ValueError, "viewpoint_centers"),
        (lambda W, U: (W.to_sparse(), U), TypeError, "identity_centers"),
        (lambda W, U: (W, U.to_sparse()), TypeError, "viewpoint_centers"),
    ],
)
def test_bad_centers(backend, change, error, names):
    with pytest.raises(error, match=names):
        angular_center_regularizer(*change(*centers(3, 2, 4)))


def test_bad_options(backend):
    W, U = centers(3, 2, 4)
    with pytest.raises(ValueError, match=r"reduction: 'none' was given; allowed are 'sum', 'mean'"):
        angular_center_regularizer(W, U, reduction="none")
    with pytest.raises(ValueError, match=r"mask: shape \[2, 3\] was given; \[3, 2\] is needed"):
        angular_center_regularizer(W, U, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: dtype float32"):
        angular_center_regularizer(W, U, mask=torch.ones(3, 2))
    with pytest.raises(TypeError, match="mask"):
        angular_center_regularizer(W, U, mask=torch.ones(3, 2, dtype=torch.bool).to_sparse())
