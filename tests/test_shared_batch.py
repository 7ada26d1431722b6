"""A batch that 2 or 3 processes share gives the losses, gradients and buffers that one process gets from all of it."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, DropPath
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as BatchNormOnCuda
from torch.nn.parallel import DistributedDataParallel

from tests.test_method_options import SETTINGS
from tests.test_pose_methods import pose_batch
from tests.tiny import method_of
from vareid_ext._processes import BatchShare, drawn
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.losses.center import CenterLoss
from vareid_ext.methods import METHODS
from vareid_ext.models.shared_batch import share_batches

CASES = {
    **{name: SETTINGS.get(name, {}) for name in METHODS},
    "va-reid": {"local": True, "stripe_dim": 4},
    "abdnet": {"dim": 16, "feature_from": 0, "feature_weight": 1.0},
    "pie": {"posebox_size": 56, "jitter": True},
    "pcb": {"rows": 2, "dim": 4},
    "pcb-rpp": {"rows": 2, "dim": 4},
    "two-branch": {"triplet_weight": 1.0},
    "oscnn": {"dim": 8},
}
ENDS = (0, 2, 4, 7)
"""Where the shares of three processes end."""


@contextlib.contextmanager
def in_float64():
    """A block in which nothing is computed in float32."""
    before = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = before
        torch.set_default_dtype(torch.float32)


def batch_for(name):
    height = 96 if name == "mgn" else 64
    batch = pose_batch(n=7, height=height, width=64)
    surface = torch.stack([torch.arange(7 * height * 64).reshape(7, height, 64) % 25] * 3, 1).byte()
    keypoints = batch.extras["keypoints"].clone()
    keypoints[::2, :, 2] = 0.1  # unsure: the jitter moves them
    extras = {**batch.extras, "keypoints": keypoints, "parsing": torch.rand(7, 5, height, 64), "iuv": surface}
    images = torch.rand(7, 3, height, 64)
    identity, viewpoint = torch.tensor([0, 0, 4, 4, 1, 1, 1]), torch.tensor([-1, -1, 0, 1, 2, -1, 0])
    return replace(batch, image=images, identity=identity, viewpoint=viewpoint, extras=extras)


def trained(group: Any, name: str) -> Any:
    """The losses, gradients and buffers of batches of which a process has a share, and the next random number."""
    with in_float64():
        method = method_of(name, **CASES[name])
        method.double()
        wrapped: nn.Module = method
        batch = batch_for(name)
        if group is not None:
            share = BatchShare(group, *ENDS[group.rank() :][:2], len(batch))
            method.share = share
            share_batches(method, share)
            wrapped = DistributedDataParallel(
                method, process_group=group, broadcast_buffers=False, find_unused_parameters=True
            )
            batch = batch._map(lambda rows: rows[share.begin : share.end])
        method.at_epoch(0)
        torch.manual_seed(5)
        values = []
        for _ in range(2 if name in ("srb", "pyramid") else 1):  # whose buffers count in the next batch
            weighted = torch.stack([term.weight * term.value for term in wrapped(batch).values()])
            values.append(weighted.detach() if group is None else share.mean(weighted))
            method.zero_grad()
            (weighted.sum() if group is None else weighted.sum() * share.fraction * group.size()).backward()
        gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        return values, gradients, dict(method.named_buffers()), torch.rand(1)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_on_shares_as_on_the_whole_batch(processes, name):
    values, gradients, buffers, following = trained(None, name)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for of_process in processes.run(3, trained, name):
        for found, expected in zip(of_process[0], values, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert of_process[1].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert (of_process[1][parameter] - gradient).abs().max() <= 1e-9 * largest, parameter
        for buffer, expected in buffers.items():
            torch.testing.assert_close(of_process[2][buffer], expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(of_process[3], following)


def of_share(group: Any, ends: tuple[int, ...], kind: str, settings: dict[str, Any], x: torch.Tensor) -> Any:
    """A layer's output, the gradients of input and parameters, and its buffers, with a share of the batch."""
    torch.manual_seed(2)
    layer = KINDS[kind](**settings).to(x.dtype)
    begin, end = (0, len(x)) if group is None else ends[group.rank() :][:2]
    if group is not None:
        network = nn.Sequential(layer)
        # A share may change, as between two stages.
        share_batches(network, BatchShare(group, 0, 1, 2))
        share_batches(network, BatchShare(group, begin, end, len(x)))
    own = x[begin:end].clone(memory_format=torch.preserve_format).requires_grad_()
    for factor in (1.0, 2.0):
        out = layer(factor * own)
    (out * torch.arange(len(x), dtype=x.dtype)[begin:end].view(-1, *[1] * (x.ndim - 1))).square().sum().backward()
    return out.detach(), own.grad, {n: p.grad for n, p in layer.named_parameters()}, dict(layer.named_buffers())


KINDS = {
    "BatchNorm1d": nn.BatchNorm1d, "BatchNorm2d": nn.BatchNorm2d, "BatchNormAct2d": BatchNormAct2d,
    "Dropout": nn.Dropout, "Dropout2d": nn.Dropout2d, "DropPath": DropPath,
}  # fmt: skip


@pytest.mark.parametrize("ends", [(0, 2, 5), (0, 1, 2, 5), (0, 0, 5)], ids=len)
@pytest.mark.parametrize(
    ("kind", "settings", "shape", "channels_last"),
    [
        ("BatchNorm1d", {"num_features": 3}, (5, 3), False),
        ("BatchNorm1d", {"num_features": 3, "affine": False}, (5, 3, 4), False),
        ("BatchNorm2d", {"num_features": 3, "momentum": None}, (5, 3, 4, 2), True),
        ("BatchNorm2d", {"num_features": 3, "track_running_stats": False}, (5, 3, 4, 2), False),
        ("BatchNormAct2d", {"num_features": 3}, (5, 3, 4, 2), True),
        ("Dropout", {"p": 0.5}, (5, 3), False),
        ("Dropout", {"p": 0.3}, (5, 3, 4, 2), True),
        ("Dropout", {"p": 0.3}, (5, 3, 4, 2), False),
        ("Dropout2d", {"p": 0.5}, (5, 3, 4, 2), True),
        ("DropPath", {"drop_prob": 0.5}, (5, 3, 4, 2), True),
    ],
)
def test_a_layer_does_to_a_share_what_it_does_to_the_whole_batch(processes, ends, kind, settings, shape, channels_last):
    if ends == (0, 0, 5) and not kind.startswith("BatchNorm"):
        ends = (0, 4, 5)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 20
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    out, gradient, parameters, buffers = of_share(None, ends, kind, settings, x)
    outcomes = processes.run(len(ends) - 1, of_share, ends, kind, settings, x)
    torch.testing.assert_close(torch.cat([o[0] for o in outcomes]), out)
    torch.testing.assert_close(torch.cat([o[1] for o in outcomes]), gradient)
    for name, expected in parameters.items():
        torch.testing.assert_close(sum(o[2][name] for o in outcomes), expected)
    for name, expected in buffers.items():
        for outcome in outcomes:
            torch.testing.assert_close(outcome[3][name], expected)


def shared(network, **options):
    share_batches(network, BatchShare(None, 0, 1, 2), **options)
    return network


def test_a_shared_network_is_the_same_network_in_evaluation():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    names, x = [*network.state_dict()], torch.randn(5, 3)
    expected = network(x)
    assert torch.equal(shared(network)(x), expected)
    assert [*network.state_dict()] == names
    assert isinstance(network[1], nn.BatchNorm1d)
    assert type(shared(nn.Sequential(nn.BatchNorm1d(4)), batch_norm=False)[0]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.AlphaDropout(), "a batch shared by processes was given, and 0 is a AlphaDropout; allowed are Dropout, "),
        (nn.LazyBatchNorm1d(), "run.sync_batch_norm: true was given, and 0 is a LazyBatchNorm1d; allowed are "),
    ],
)
def test_a_layer_that_cannot_be_shared_is_named(layer, message):
    with pytest.raises(ValueError, match=message):
        shared(nn.Sequential(layer))


def test_the_arguments_of_the_batch_norm_on_cuda_are_those_that_torch_takes():
    taken = list(inspect.signature(BatchNormOnCuda.forward).parameters)[1:]
    assert taken == [
        "input", "weight", "bias", "running_mean", "running_var", "eps", "momentum", "process_group", "world_size",
    ]  # fmt: skip


def test_rows_that_are_no_multiple_of_the_images_are_refused():
    with pytest.raises(ValueError, match="rows: 7 was given; allowed are multiples of the 2 images of this process"):
        drawn(BatchShare(None, 1, 3, 5), 7, torch.rand)


def hardest(group: Any, feature: torch.Tensor, identity: torch.Tensor, ends: tuple[int, ...]) -> Any:
    begin, end = ends[group.rank() :][:2]
    own = feature[begin:end].clone().requires_grad_()
    loss = batch_hard_triplet(own, identity[begin:end], margin=1.0, group=group)
    (loss * (end - begin)).backward()
    return loss.detach(), own.grad


@pytest.mark.parametrize("ends", [(0, 3, 8), (0, 1, 8), (0, 0, 8), (0, 3, 3, 8)], ids=str)
def test_the_hardest_triplets_are_those_of_the_whole_batch(processes, ends):
    feature = torch.randn(8, 3, dtype=torch.float64)
    feature[6] = feature[2]  # a tie, at distance 0
    identity = torch.tensor([0, 1, 2, 0, 1, 1, 2, 3])  # every process needs the others' images
    whole = feature.clone().requires_grad_()
    expected = batch_hard_triplet(whole, identity, margin=1.0)
    (expected * 8).backward()
    outcomes = processes.run(len(ends) - 1, hardest, feature, identity, ends)
    sizes = [end - begin for begin, end in pairwise(ends)]
    torch.testing.assert_close(sum(o[0] * n for o, n in zip(outcomes, sizes, strict=True)) / 8, expected.detach())
    torch.testing.assert_close(torch.cat([o[1] for o in outcomes]), whole.grad)


def moved(group: Any, feature: torch.Tensor, identity: torch.Tensor, ends: tuple[int, ...]) -> Any:
    torch.manual_seed(3)
    begin, end = (0, len(feature)) if group is None else ends[group.rank() :][:2]
    loss = CenterLoss(4, 3)
    for _ in range(2):
        value = loss(feature[begin:end], identity[begin:end], group=group)
    return loss.centers, value


@pytest.mark.parametrize("ends", [(0, 3, 8), (0, 0, 8), (0, 3, 3, 8), (0, 0, 0)], ids=str)
def test_the_centres_follow_the_images_of_all_processes(processes, ends):
    feature, identity = torch.randn(ends[-1], 3), torch.tensor([0, 1, 2, 0, 1, 1, 2, 3])[: ends[-1]]
    centers, value = moved(None, feature, identity, ends)
    outcomes = processes.run(len(ends) - 1, moved, feature, identity, ends)
    for outcome in outcomes:
        torch.testing.assert_close(outcome[0], centers)
        assert torch.equal(outcome[0], outcomes[0][0])
    sizes = [end - begin for begin, end in pairwise(ends)]
    total = sum(o[1] * n for o, n in zip(outcomes, sizes, strict=True))
    torch.testing.assert_close(total, value * ends[-1])
