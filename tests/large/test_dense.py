"""Arrays of more than 2^31 elements, all of them in use."""

from __future__ import annotations

import pytest
import torch

from tests.large.memory import BACKENDS, BEYOND, PERIOD, need, periodic, random_tile, running
from vareid_ext import (
    angular_center_regularizer,
    identity_cross_entropy,
    linear_viewpoint_aware_cross_entropy,
    viewpoint_aware_cross_entropy,
    viewpoint_cross_entropy,
)
from vareid_ext.metrics import rank_queries
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.retrieval import nearest_neighbors, pairwise_distance

ALPHA = 0.2


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running(request.param):
        yield request.param


@pytest.fixture
def native():
    """For what the CUDA kernels do piece by piece: the harness would take minutes for it."""
    with running("native"):
        yield


def rows_to_check(rows, row_size):
    """The first and last rows, and those around element 2^31 and around element 2^32, should that exist."""
    edges = [at // row_size for at in (BEYOND, 2 * BEYOND) if at // row_size < rows - 1]
    return sorted({0, 1, rows - 2, rows - 1, *(edge + step for edge in edges for step in (-1, 0, 1))})


def view_targets(probability, y, v):
    """The targets [K, V] of one sample's subclasses, from their probabilities."""
    K, V = probability.shape
    eps1, eps2 = ALPHA * (1 - probability[y].sum()), ALPHA * (1 - probability[y, v])
    target = torch.full_like(probability, float(eps1) / (V * (K - 1)))
    target[y] = eps2 / (V - 1)
    target[y, v] = 1 - eps1 - eps2
    return target


def test_logits_of_many_rows(backend):
    N, K, V = 10_007, 43_003, 5
    assert N * K * V > BEYOND
    need(2 * 2 * N * K * (V + 1) / 1e9)
    z, s = periodic((N, K), random_tile(0, torch.float16)), periodic((N, K, V), random_tile(1, torch.float16))
    y, v = torch.arange(N) * 7919 % K, torch.arange(N) % V
    leaves = z.tensor.requires_grad_(), s.tensor.requires_grad_()
    losses = viewpoint_aware_cross_entropy(*leaves, y, v, alpha=ALPHA, reduction="none")
    upstream = torch.full((N,), 1024.0)
    z_grad, s_grad = torch.autograd.grad(losses, leaves, [upstream, upstream])
    losses = [loss.detach() for loss in losses]
    for i in rows_to_check(N, K * V):
        logits = s.at(i * K * V, K * V).view(K, V)
        log_probability = (logits.view(-1) - logits.logsumexp((0, 1))).view(K, V)
        target = view_targets(log_probability.exp(), y[i], v[i])
        assert float(losses[1][i]) == pytest.approx(float(-(target * log_probability).sum()), rel=1e-6)
        torch.testing.assert_close(
            s_grad[i].double(), 1024 * (log_probability.exp() - target), rtol=1e-3, atol=2.0**-24
        )
        log_probability = torch.log_softmax(z.at(i * K, K), 0)
        eps = ALPHA * (1 - log_probability[y[i]].exp())
        target = torch.full_like(log_probability, float(eps) / (K - 1))
        target[y[i]] = 1 - eps
        assert float(losses[0][i]) == pytest.approx(float(-(target * log_probability).sum()), rel=1e-6)
        torch.testing.assert_close(
            z_grad[i].double(), 1024 * (log_probability.exp() - target), rtol=1e-3, atol=2.0**-24
        )


def pieces_to_check(size):
    return [(first, 3000) for first in (0, BEYOND - 1500, size - 3000)]


def test_logits_of_one_long_row(backend):
    K = BEYOND + 4099
    need(2 * 2 * K / 1e9)
    z = periodic((1, K), random_tile(2, torch.bfloat16))
    y, tile, counts = K - 2, z.tile.double(), z.counts()
    leaf = z.tensor.requires_grad_()
    loss = identity_cross_entropy(leaf, torch.tensor([y]), alpha=ALPHA)
    (grad,) = torch.autograd.grad(loss, leaf)
    total = tile.max() + (counts * (tile - tile.max()).exp()).sum().log()
    own = float(z.at(y, 1))
    eps = float(ALPHA * (1 - (own - total).exp()))
    expected = total - (1 - eps) * own - eps / (K - 1) * ((counts * tile).sum() - own)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    for first, count in pieces_to_check(K):
        slope = (z.at(first, count) - total).exp() - eps / (K - 1)
        if first <= y < first + count:
            slope[y - first] = (own - total).exp() - (1 - eps)
        torch.testing.assert_close(grad[0, first : first + count].double(), slope, rtol=2.0**-7, atol=1e-15)


def test_masked_logits_of_one_long_row(backend):
    K, V = BEYOND // 3 + 1009, 3
    assert K * V > BEYOND
    need(2 * 2 * K * V / 1e9 + 2 * K * V / 1e9)
    s = periodic((1, K, V), random_tile(3, torch.bfloat16))
    mask = periodic((K, V), torch.arange(PERIOD) % 3 != 1)  # of three neighbours no more than one is missing
    y = K - 3
    exists, views = mask.at(y * V, V), s.at(y * V, V)
    v = int(exists.nonzero()[-1])
    leaf = s.tensor.requires_grad_()
    loss = viewpoint_cross_entropy(leaf, torch.tensor([y]), torch.tensor([v]), alpha=ALPHA, mask=mask.tensor)
    (grad,) = torch.autograd.grad(loss, leaf)
    tile, counts = s.tile.double(), s.counts() * mask.tile
    total = tile.max() + (counts * (tile - tile.max()).exp()).sum().log()
    own = views[exists]
    others, others_sum = counts.sum() - len(own), (counts * tile).sum() - own.sum()
    eps1 = float(ALPHA * (1 - (own - total).exp().sum()))
    eps2 = float(ALPHA * (1 - (views[v] - total).exp())) if len(own) > 1 else 0.0
    target = torch.full((V,), eps2 / max(1, len(own) - 1), dtype=torch.float64)
    target[v] = 1 - eps1 - eps2
    expected = total - (target * views)[exists].sum() - eps1 / others * others_sum
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    for first, count in pieces_to_check(K * V):
        at = torch.arange(first, first + count)
        slope = (s.at(first, count) - total).exp() - eps1 / others
        own_here = at // V == y
        slope[own_here] = (s.at(first, count)[own_here] - total).exp() - target[at[own_here] % V]
        slope *= mask.at(first, count)
        torch.testing.assert_close(grad.view(-1)[first : first + count].double(), slope, rtol=2.0**-7, atol=1e-15)


def test_angular_center_regularizer(backend):
    K, V, D = 131_101, 4, 4096
    assert K * V * D > BEYOND
    need(2 * 2 * K * (V + 1) * D / 1e9)
    W, U = periodic((K, D), random_tile(4, torch.bfloat16)), periodic((K, V, D), random_tile(5, torch.bfloat16))
    leaves = W.tensor.requires_grad_(), U.tensor.requires_grad_()
    loss = angular_center_regularizer(*leaves)
    grads = torch.autograd.grad(loss, leaves)

    def cosines_and_norms(j):
        w, u = W.at(j * D, D), U.at(j * V * D, V * D).view(V, D)
        return w, u, (u @ w) / (w.norm() * u.norm(dim=1))

    # Identities that are PERIOD apart have equal centres.
    sums = torch.stack([(1 - cosines_and_norms(j)[2]).sum() for j in range(PERIOD)])
    expected = float(sum(sums[j] * len(range(j, K, PERIOD)) for j in range(PERIOD)))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    for j in rows_to_check(K, V * D):
        w, u, cosine = cosines_and_norms(j)
        along, lengths = w / w.norm(), u.norm(dim=1, keepdim=True)
        u_slope = -(along - cosine[:, None] * u / lengths) / lengths
        w_slope = (-(u / lengths - cosine[:, None] * along) / w.norm()).sum(0)
        torch.testing.assert_close(grads[1][j].double(), u_slope, rtol=2.0**-7, atol=1e-6)
        torch.testing.assert_close(grads[0][j].double(), w_slope, rtol=2.0**-7, atol=1e-6)


def test_linear_loss_with_many_centres(native):
    N, K, V, D = 3, 131_101, 4, 4096
    assert K * V * D > BEYOND
    need(2 * 2 * K * (V + 1) * D / 1e9 + 0.6)
    W, U = periodic((K, D), random_tile(6, torch.bfloat16)), periodic((K, V, D), random_tile(7, torch.bfloat16))
    feature = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y, v = torch.tensor([K - 1, 0, BEYOND // (V * D)]), torch.tensor([3, 0, 2])
    leaves = W.tensor.requires_grad_(), U.tensor.requires_grad_()
    scale = 16.0
    losses = linear_viewpoint_aware_cross_entropy(
        feature, *leaves, y, v, smoothing="none", normalize=True, scale=scale, alpha=0.0, reduction="none"
    )
    upstream = 64 * torch.eye(N)
    grads = torch.autograd.grad(losses, leaves, [upstream[0] + upstream[1] + upstream[2]] * 2)
    unit = torch.nn.functional.normalize(feature.double(), dim=1)
    # Rows of centres that are PERIOD apart are equal, so that all logits are known from PERIOD of them.
    for h, (centers, rows, own) in enumerate(((W, K, y), (U, K * V, y * V + v))):
        known = torch.stack([centers.at(r * D, D) for r in range(PERIOD)])
        logits = scale * unit @ torch.nn.functional.normalize(known, dim=1).T
        counts = torch.tensor([len(range(r, rows, PERIOD)) for r in range(PERIOD)])
        total = (logits + counts.log()).logsumexp(1)
        expected = total - logits[torch.arange(N), own % PERIOD]
        torch.testing.assert_close(losses[h].detach().double(), expected, rtol=1e-2, atol=0)
        grad = grads[h].view(rows, D)
        for r in {0, rows - 1, BEYOND // D, BEYOND // D - 1, BEYOND // D + 1} & set(range(rows)) | set(own.tolist()):
            center = centers.at(r * D, D)
            probability = (logits[:, r % PERIOD] - total).exp() - (own == r).double()
            slope = 64 * scale * (probability[:, None] * unit).sum(0)
            direction = center / center.norm()
            slope = (slope - direction * (direction @ slope)) / center.norm()
            torch.testing.assert_close(grad[r].double(), slope, rtol=0, atol=float(slope.abs().max()) * 0.05)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pairwise_distance(native, symmetric):
    rows, D = 46_399, 8
    assert rows**2 > BEYOND
    need(4 * rows**2 / 1e9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, D, generator=generator)
    y = x if symmetric else torch.randn(rows, D, generator=generator)
    found = pairwise_distance(x) if symmetric else pairwise_distance(x, y)
    for r in rows_to_check(rows, rows):
        exact = (x[r].double() - y.double()).square().sum(1).sqrt()
        torch.testing.assert_close(found[r].double(), exact, rtol=1e-5, atol=1e-5)
        exact = (x.double() - y[r].double()).square().sum(1).sqrt()
        torch.testing.assert_close(found[:, r].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_nearest_neighbors_of_long_features(native, turned):
    rows, few, D, k = 131_101, 11, 16_384, 3
    assert rows * D > BEYOND
    need(2 * rows * D / 1e9 + 0.5)
    many, some = periodic((rows, D), random_tile(8, torch.float16)), random_tile(9, torch.float16).repeat(200)
    some = some[: few * D].view(few, D) * 0.9
    x, y = (some, many.tensor) if turned else (many.tensor, some)
    distance, index = nearest_neighbors(x, y, k=k, metric="cosine")
    known = torch.stack([many.at(r * D, D) for r in range(PERIOD)])
    cosine = torch.nn.functional.normalize(known, dim=1) @ torch.nn.functional.normalize(some.double(), dim=1).T
    if turned:  # rows that are PERIOD apart are equal; the lowest come first
        best = (1 - cosine).min(0)
        assert torch.equal(index, best.indices[:, None] + PERIOD * torch.arange(k))
        torch.testing.assert_close(distance.double(), best.values[:, None].expand(-1, k), rtol=1e-6, atol=1e-7)
        return
    expected = torch.sort(1 - cosine, dim=1, stable=True)
    period = torch.arange(rows) % PERIOD
    assert torch.equal(index, expected.indices[:, :k][period])
    torch.testing.assert_close(distance.double(), expected.values[:, :k][period], rtol=1e-6, atol=1e-7)


def test_ranking(backend):
    Q = G = 46_399
    need(2 * Q * G / 1e9 + 0.3)
    distances = periodic((Q, G), random_tile(10, torch.float16).abs())
    query, gallery = torch.arange(Q) % 5000, torch.arange(G) % 5000
    cameras = torch.arange(Q) % 3, torch.arange(G) // 5000 % 4
    found = rank_queries(distances.tensor, query, gallery, *cameras)
    for q in rows_to_check(Q, G):
        kept = ~((gallery == query[q]) & (cameras[1] == cameras[0][q]))
        order = torch.sort(distances.at(q * G, G)[kept], stable=True).indices
        ranks = (gallery[kept][order] == query[q]).nonzero()[:, 0].double() + 1
        precision = (torch.arange(1, len(ranks) + 1) / ranks).mean()
        assert found.average_precision[q] == pytest.approx(float(precision), rel=1e-9)
        assert found.inverse_negative_penalty[q] == pytest.approx(len(ranks) / float(ranks[-1]), rel=1e-9)
        assert (found.first_match_rank[q], found.num_matches[q]) == (ranks[0], len(ranks))


def test_neighbors_from_matrices(backend):
    Q, G, k = 7, 46_399, 21
    need(2 * G * G / 1e9)
    g_g = periodic((G, G), random_tile(11, torch.float16).abs())
    q_g = periodic((Q, G), random_tile(12, torch.float16).abs())
    q_q = periodic((Q, Q), random_tile(13, torch.float16).abs())
    neighbor, row_max = stages.matrix_neighbors(q_g.tensor, q_q.tensor, g_g.tensor, k)
    for g in rows_to_check(G, G):
        row = torch.cat([q_g.tensor[:, g].double(), g_g.at(g * G, G)])
        assert torch.equal(neighbor[Q + g].long(), torch.sort(row, stable=True).indices[:k])
        assert row_max[Q + g] == row.max()


def test_blend(backend):
    Q = G = 46_399
    need(4 * Q * G / 1e9 + 0.1)
    lambda_value, M = 0.3, Q + G
    distance = periodic((Q, G), random_tile(14, torch.float32).abs())
    row = torch.arange(M)
    index = torch.stack([row % 97, 100 + row % 89, 200 + row % 83], 1).to(torch.int32)
    value = (torch.rand(M, 3, generator=torch.Generator().manual_seed(0)) + 0.1) / 3
    row_max = torch.rand(M, generator=torch.Generator().manual_seed(1)) + 1
    indptr = torch.arange(M + 1) * 3
    rows = indptr, index.view(-1), value.view(-1)
    inverted = stages.k_reciprocal_invert(*rows, Q, M)
    stages.k_reciprocal_blend(distance.tensor, row_max, *rows, *inverted, lambda_value)
    for q in rows_to_check(Q, G):
        equal = index[Q:] == index[q]
        shared = (equal * torch.minimum(value[Q:], value[q])).double().sum(1)
        original = (lambda_value * distance.at(q * G, G) / row_max[q].double()).clamp(max=lambda_value)
        expected = (1 - lambda_value) * (1 - shared / (2 - shared)) + original
        torch.testing.assert_close(distance.tensor[q].double(), expected, rtol=0, atol=1e-6)
