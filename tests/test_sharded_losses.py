"""Centres divided among processes: the losses and gradients of one process that has them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vareid_ext import ViewpointAwareLoss, reference_backend
from vareid_ext.losses import viewpoint_aware

CASES = {
    "plain": {},
    "masked": {"masked": True},
    "soft views": {"views": "soft"},
    "unknown views": {"views": "unknown", "masked": True},
    "an empty shard": {"K": 4, "counts": (2, 2, 1)},
    "a process without images": {"counts": (3, 0, 2)},
    "identity alone": {"use_viewpoint": False, "use_regularizer": False},
    "identity and regularizer": {"use_viewpoint": False},
    "uniform": {"smoothing": "uniform", "masked": True},
    "no smoothing": {"smoothing": "none"},
    "five views": {"V": 5, "masked": True, "views": "unknown"},
    "blocks": {"K": 40, "D": 9, "budget": 8 * 16 * 3, "masked": True},
    "long rows": {"K": 3, "counts": (70, 3, 0), "budget": 1},
}


def problem(name: str) -> dict[str, Any]:
    """Everything that a case's batch and centres are, the same wherever it is made."""
    case: dict[str, Any] = {"K": 7, "V": 3, "D": 5, "counts": (3, 1, 4), "views": "known", **CASES[name]}
    generator = torch.Generator().manual_seed(0)
    K, V, N = case["K"], case["V"], sum(case["counts"])
    mask = torch.rand(K, V, generator=generator) < 0.6
    mask[torch.arange(K), torch.randint(V, (K,), generator=generator)] = True
    case["mask"] = mask if case.pop("masked", False) else None
    exists = mask if case["mask"] is not None else torch.ones(K, V, dtype=torch.bool)
    identity = torch.randint(K, (N,), generator=generator)
    weights = torch.rand(N, V, generator=generator, dtype=torch.float64) * exists[identity]
    viewpoint = weights.argmax(1)
    if case["views"] == "unknown":
        viewpoint[::2] = -1
    if case["views"] == "soft":
        viewpoint = weights / weights.sum(1, keepdim=True)
    feature = 3 * torch.randn(N, case["D"], generator=generator, dtype=torch.float64)
    return {**case, "feature": feature, "identity": identity, "viewpoint": viewpoint}


def module_of(case: dict[str, Any], dtype: torch.dtype) -> ViewpointAwareLoss:
    settings = {name: case[name] for name in ("use_viewpoint", "use_regularizer", "smoothing") if name in case}
    torch.manual_seed(1)
    loss = ViewpointAwareLoss(
        case["K"], case["D"], num_viewpoints=case["V"], mask=case["mask"], view_weight=0.7, beta=0.3, **settings
    ).to(dtype)
    with torch.no_grad():
        for centers in loss.parameters():
            centers.mul_(1000)
    return loss


def sharded(group: Any, name: str, dtype: torch.dtype, native: bool) -> Any:
    """A process's losses, the gradients of its centres and of its images' features."""
    if not native:
        with reference_backend():
            return sharded(group, name, dtype, True)
    case = problem(name)
    loss = module_of(case, dtype)
    loss.shard_identities(group)
    counts = case["counts"]
    rows = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
    feature = case["feature"][rows].to(dtype).requires_grad_()
    before, viewpoint_aware.MEMORY_BUDGET = viewpoint_aware.MEMORY_BUDGET, case.get("budget", 1 << 20)
    try:
        parts = loss(feature, case["identity"][rows], case["viewpoint"][rows])
    finally:
        viewpoint_aware.MEMORY_BUDGET = before
    # Each process weighs the loss otherwise, as by its share of the images.
    (parts.total * (1 + group.rank())).backward()
    return [part.detach() for part in parts], [centers.grad for centers in loss.parameters()], feature.grad


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_losses_and_gradients_of_the_whole(processes, name, native):
    case = problem(name)
    loss = module_of(case, torch.float64)
    feature = case["feature"].clone().requires_grad_()
    expected = loss(feature, case["identity"], case["viewpoint"])
    expected.total.backward()
    size = len(case["counts"])
    upstream = sum(range(1, size + 1))
    outcomes = processes.run(size, sharded, name, torch.float64, native)
    for parts, _, _ in outcomes:
        torch.testing.assert_close(parts, [part.detach() for part in expected], rtol=1e-9, atol=1e-12)
        assert [part.tolist() for part in parts] == [part.tolist() for part in outcomes[0][0]]
    for number, centers in enumerate(loss.parameters()):
        own = [gradients[number] for _, gradients, _ in outcomes]
        most = -(-case["K"] // size)
        assert [len(part) for part in own] == [max(0, min(most, case["K"] - most * p)) for p in range(size)]
        torch.testing.assert_close(torch.cat(own), centers.grad * upstream / size, rtol=1e-9, atol=1e-12)
    whole = torch.cat([gradient for *_, gradient in outcomes])
    torch.testing.assert_close(whole, feature.grad * upstream, rtol=1e-9, atol=1e-12)


def test_float32_agrees_to_rounding(processes):
    case = problem("masked")
    expected = module_of(case, torch.float32)(case["feature"].float(), case["identity"], case["viewpoint"])
    for parts, _, _ in processes.run(3, sharded, "masked", torch.float32, True):
        torch.testing.assert_close(parts, [part.detach() for part in expected], rtol=1e-5, atol=1e-6)


def refused(group: Any, K: int, bad_label: bool) -> None:
    loss = ViewpointAwareLoss(K, 2)
    loss.shard_identities(group)
    identity = torch.tensor([K if bad_label and group.rank() == 1 else 0])
    loss(torch.ones(1, 2), identity, torch.tensor([0]))


def test_bad_input_is_refused_by_all_processes(processes):
    outcomes = processes(3, refused, 2, False)
    assert {str(outcome) for outcome in outcomes} == {"num_identities: 2 was given; 3 processes need one each at least"}
    outcomes = processes(3, refused, 5, True)
    assert {type(outcome) for outcome in outcomes} == {IndexError}
    assert {str(outcome) for outcome in outcomes} == {"identity: 5 at row 1; labels must be in [0, 5)"}


def divided_twice(group: Any) -> None:
    loss = ViewpointAwareLoss(9, 2)
    loss.shard_identities(group)
    loss.shard_identities(group)


def test_divided_centres_are_not_divided_again(processes):
    for outcome in processes(2, divided_twice):
        assert isinstance(outcome, ValueError)
        assert "divided among processes already" in str(outcome)


def twice(group: Any) -> None:
    loss = ViewpointAwareLoss(5, 2)
    loss.shard_identities(group)
    total = loss(torch.ones(1, 2, requires_grad=True), torch.tensor([0]), torch.tensor([0])).identity
    total.backward(retain_graph=True)
    total.backward()


def test_a_second_backward_pass_is_refused(processes):
    outcomes = processes(2, twice)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 2
    assert "backward: it was called twice" in str(outcomes[0])
