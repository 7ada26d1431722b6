"""Rows of a feature map, and the embeddings and heads of parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tiny import batch_of, tiny
from vareid_ext.losses import part_cross_entropy
from vareid_ext.models import PartHeads, embedding, equal_rows, identity_head, pool_rows, row_runs


def test_equal_rows_cut_the_map_one_count_after_the_other():
    assert equal_rows(24, 1, 2, 4) == [(0, 24), (0, 12), (12, 24), (0, 6), (6, 12), (12, 18), (18, 24)]
    assert equal_rows(6, 6) == [(i, i + 1) for i in range(6)]
    assert equal_rows(24) == []


@pytest.mark.parametrize(("height", "count"), [(24, 5), (4, 6), (24, 0), (24, -1)])
def test_rows_that_do_not_divide_the_map_are_named(height, count):
    for rows in (equal_rows, row_runs):
        with pytest.raises(ValueError, match=rf"rows: {count} was given; .*height, {height}"):
            rows(height, count)


def test_the_runs_of_six_rows_are_the_21_windows_of_pyramid():
    windows = [(4 * i, 4 * (i + level)) for level in range(1, 7) for i in range(7 - level)]
    assert row_runs(24, 6) == windows
    assert len(windows) == 21
    assert row_runs(3, 1) == [(0, 3)]


@pytest.mark.parametrize(("height", "counts"), [(24, (1, 2, 3)), (4, (1, 2, 3)), (7, (2, 5)), (1, (3,))])
def test_overlapping_rows_are_those_of_adaptive_pooling(height, counts):
    x = torch.rand(2, 3, height, 5)
    expected = torch.cat([F.adaptive_avg_pool2d(x, (n, 1)).flatten(2) for n in counts], 2).transpose(1, 2)
    torch.testing.assert_close(pool_rows(x, equal_rows(height, *counts, overlap=True)), expected)


def test_rows_are_pooled_by_mean_maximum_both_added_or_side_by_side():
    x = torch.randn(2, 3, 6, 4, dtype=torch.bfloat16)
    rows = [(0, 6), (1, 2), (3, 6)]
    slices = [x.float()[:, :, begin:end] for begin, end in rows]
    mean = torch.stack([part.mean((2, 3)) for part in slices], 1)
    largest = torch.stack([part.flatten(2).max(2).values for part in slices], 1)
    for pooling, expected in {
        "avg": mean,
        "max": largest,
        "sum": mean + largest,
        "both": torch.cat([mean, largest], 2),
    }.items():
        torch.testing.assert_close(pool_rows(x, rows, pooling), expected)
    assert pool_rows(x[:0], rows, "both").shape == (0, 3, 6)


@pytest.mark.parametrize("pooling", ["avg", "max", "sum", "both"])
def test_a_row_sees_its_own_lines_only(pooling):
    x = torch.rand(1, 2, 6, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(pool_rows(x, [(0, 2), (2, 5)], pooling)[:, 1].sum(), x)
    assert gradient[:, :, 2:5].abs().sum() > 0
    assert gradient[:, :, [0, 1, 5]].abs().sum() == 0


def test_rows_and_poolings_that_do_not_exist_are_errors():
    x = torch.rand(1, 2, 6, 3)
    for rows in ([], [(0, 7)], [(3, 3)], [(-1, 2)]):
        with pytest.raises(ValueError, match=r"rows: .*lines in \[0, 6\]"):
            pool_rows(x, rows)
    with pytest.raises(ValueError, match="pooling: 'mean' was given; allowed are avg, max, sum, both"):
        pool_rows(x, [(0, 6)], "mean")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_parts_have_embeddings_and_heads_of_their_own(bias, relu):
    heads = PartHeads(3, 5, 4, 7, bias=bias, relu=relu, head_bias=bias).eval()
    for norm in heads.norm:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.running_mean)
    pooled = torch.randn(2, 3, 5)
    features = heads(pooled)
    logits = heads.logits(features)
    assert logits.shape == (2, 3, 7)
    for i, feature in enumerate(features):
        norm, linear, head = heads.norm[i], heads.reduce[i], heads.head[i]
        expected = F.linear(pooled[:, i], linear.weight, linear.bias) - norm.running_mean
        expected = norm.weight * expected / (norm.running_var + 1e-5).sqrt()
        torch.testing.assert_close(feature, expected.clamp(min=0) if relu else expected)
        torch.testing.assert_close(logits[:, i], F.linear(feature, head.weight, head.bias))
    assert sum(p.numel() for p in heads.parameters()) == 3 * (5 * 4 + 8 + 4 * 7 + bias * (4 + 7))


def test_a_shared_embedding_is_a_convolution_with_batch_norm_over_all_parts():
    heads = PartHeads(6, 5, 4, 7, shared=True)
    convolution = nn.Conv2d(5, 4, 1, bias=False)
    convolution.weight.data = heads.reduce[0].weight.data[:, :, None, None].clone()
    pooled = torch.randn(3, 6, 5)
    stripes = pooled.transpose(1, 2).unsqueeze(3)  # [N, C, 6, 1]
    expected = nn.BatchNorm2d(4)(convolution(stripes)).relu().squeeze(3)
    torch.testing.assert_close(torch.stack(heads(pooled), 2), expected)
    assert len(heads.reduce) == len(heads.norm) == 1
    assert len(heads.head) == 6


def test_reductions_begin_as_they_are_asked_to():
    torch.manual_seed(0)
    for init, fan in (("fan_in", 2048), ("fan_out", 256)):
        linear = embedding(2048, 256, bias=True, init=init)[0]
        assert linear.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.01)
        assert linear.bias.abs().max() == 0
    with pytest.raises(ValueError, match="init: 'he' was given; allowed are default, fan_in, fan_out"):
        embedding(4, 4, init="he")
    head = identity_head(256, 751, bias=True)
    assert head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert head.bias.abs().max() == 0


def test_the_loss_of_parts_is_the_mean_over_their_heads():
    torch.manual_seed(0)
    logits, identity = torch.randn(4, 3, 7), torch.tensor([0, 6, 2, 2])
    for smoothing in ({}, {"smoothing": "uniform", "epsilon": 0.2}):
        epsilon = smoothing.get("epsilon", 0)
        target = F.one_hot(identity, 7) * (1 - epsilon * 7 / 6) + epsilon / 6
        expected = torch.stack([-(target * part.log_softmax(1)).sum(1).mean() for part in logits.unbind(1)]).mean()
        torch.testing.assert_close(part_cross_entropy(logits, identity, **smoothing), expected)


def test_the_local_branch_of_va_reid_keeps_its_names_and_numbers():
    """Checkpoints of earlier versions hold these names."""
    method = tiny(local=True).eval()
    names = {name.removeprefix("stripes.") for name in method.state_dict() if name.startswith("stripes.")}
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    wanted = {f"{part}.{i}.weight" for part in ("reduce", "head") for i in range(6)}
    assert names == wanted | {f"norm.{i}.{name}" for i in range(6) for name in buffers}
    images = torch.rand(3, 3, 96, 32)
    with torch.no_grad():
        parts, x = method.features(batch_of(images)), method.backbone(images)
    for i, (begin, end) in enumerate([(0, 6), (0, 3), (3, 6), (0, 2), (2, 4), (4, 6)]):
        norm, linear = method.stripes.norm[i], method.stripes.reduce[i]
        torch.testing.assert_close(parts[1 + i], norm(F.linear(x[:, :, begin:end].mean((2, 3)), linear.weight)))
