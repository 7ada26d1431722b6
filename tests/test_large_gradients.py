"""Gradients above 32 MiB, which lie in memory that is touched for the first time."""

from __future__ import annotations

import pytest
import torch

from vareid_ext import _native, angular_center_regularizer, identity_cross_entropy, reference_backend

pytestmark = pytest.mark.skipif(not _native.available("cpu"), reason="needs the compiled module")


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(loss, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss(*leaves).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize(("K", "D"), [(701, 4099), (3, 1_000_003)])
def test_centres(threads, K, D):
    generator = torch.Generator().manual_seed(0)
    W, U = torch.randn(K, D, generator=generator), torch.randn(K, 3, D, generator=generator)
    assert U.nbytes > 32 << 20
    found = gradients(angular_center_regularizer, W, U)
    with reference_backend():
        expected = gradients(angular_center_regularizer, W.double(), U.double())
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=float(want.abs().max()) * 1e-6)


@pytest.mark.parametrize(("N", "K"), [(1, 9_000_001), (67, 130_003)])
def test_logits(threads, N, K):
    generator = torch.Generator().manual_seed(1)
    logits, label = torch.randn(N, K, generator=generator), torch.arange(N) * 7
    assert logits.nbytes > 32 << 20
    (found,) = gradients(lambda z: identity_cross_entropy(z, label, smoothing="none"), logits)
    expected = torch.softmax(logits.double(), 1)
    expected[torch.arange(N), label] -= 1
    torch.testing.assert_close(found.double(), expected / N, rtol=1e-5, atol=1e-12)
