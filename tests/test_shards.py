"""What trains centres that are divided among processes, beside one process that has them all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from vareid_ext import ViewpointAwareLoss
from vareid_ext.training import shards
from vareid_ext.training.shards import Shards

K, D = 7, 4


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.loss = ViewpointAwareLoss(K, D)


def network() -> Network:
    torch.manual_seed(3)
    return Network().double()


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in network().named_parameters()
    }


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}


def step(model: nn.Module, optimizer: Any, shards: Shards | None, most: float) -> None:
    given = gradients()
    given = given if shards is None else shards.own(given)
    for name, parameter in model.named_parameters():
        parameter.grad = given[name].clone()
    if shards is None:
        nn.utils.clip_grad_norm_(model.parameters(), most)
    else:
        shards.clip_norm([*model.parameters()], most)
    optimizer.step()


def trained(group: Any, name: str, most: float) -> Any:
    """States after a step, divided and whole, and after a second step that follows reading them back."""
    shards._CHUNK_BYTES = 2 * D * 8  # several pieces
    model = network()
    average = copy.deepcopy(model)
    divided = Shards([model, average], group)
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, divided, most)
    whole = divided.whole(model.state_dict()), divided.whole_optimizer(optimizer)
    sizes = [len(average.loss.viewpoint_centers), len(model.loss.identity_centers)]
    return copy.deepcopy(whole), sizes, divided.identities


def resumed(group: Any, name: str, most: float, states: Any) -> Any:
    model = network()
    divided = Shards([model], group)
    optimizer = OPTIMIZERS[name](model.parameters())
    model.load_state_dict(divided.own(states[0]))
    optimizer.load_state_dict(divided.own_optimizer(optimizer, states[1]))
    step(model, optimizer, divided, most)
    return divided.whole(model.state_dict()), divided.whole_optimizer(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_divided_centres_are_trained_saved_and_divided_anew(processes, name):
    model, most = network(), 1.5
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, None, most)
    states, sizes, identities = zip(*processes.run(3, trained, name, most), strict=True)
    assert sizes == ([3, 3], [3, 3], [1, 1])
    assert identities[0] == {"loss.identity_centers": K, "loss.viewpoint_centers": K}
    torch.testing.assert_close(states[0][0], model.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[0][1]["state"], optimizer.state_dict()["state"], rtol=1e-12, atol=1e-12)
    assert states[0][1]["param_groups"] == optimizer.state_dict()["param_groups"]
    step(model, optimizer, None, most)
    method, of_optimizer = processes.run(2, resumed, name, most, states[0])[0]
    torch.testing.assert_close(method, model.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_optimizer["state"], optimizer.state_dict()["state"], rtol=1e-12, atol=1e-12)


def overflowing(group: Any, who: int) -> Any:
    model = network()
    divided = Shards([model], group)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if group.rank() == who:
        model.loss.viewpoint_centers.grad[0, 0, 0] = torch.inf
    divided.share_overflow([*model.parameters()])
    return [bool(torch.isfinite(p.grad).all()) for p in model.layer.parameters()], float(model.layer.bias.grad[0])


@pytest.mark.parametrize("who", [0, 2, None])
def test_an_overflow_of_one_process_is_seen_by_all(processes, who):
    for finite, untouched in processes.run(3, overflowing, who):
        assert all(finite) == (who is None)
        assert untouched == 1
