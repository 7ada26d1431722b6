"""The plan of a training, beside what its method and optimizer really hold."""

from __future__ import annotations

import json

import pytest
import torch

from tests.test_train import SMALL
from tests.test_trained import FITTING
from vareid_ext.cli import train
from vareid_ext.methods import METHODS, TrainingClasses
from vareid_ext.training.command_line import parse
from vareid_ext.training.optimizers import build_optimizer
from vareid_ext.training.plan import Machine, training_plan
from vareid_ext.training.state import build_method

K, V = 50, 3


def config_of(*arguments):
    return parse([*SMALL, *arguments]).config


def method_of(config):
    return build_method(config, TrainingClasses(K, V, torch.ones(K, V, dtype=torch.bool)))


@pytest.mark.parametrize("arguments", [[], ["--local"], ["--method=pcb", *FITTING["pcb"]], ["--optimizer.name=adam"]])
def test_one_process_holds_what_the_plan_says(arguments):
    config = config_of(*arguments)
    method = method_of(config)
    plan = training_plan(config, processes=1, identities=K, viewpoints=V)
    numbers = sum(p.numel() for p in method.parameters())
    weights = sum(size for part, size in plan.memory.items() if part.startswith("weights"))
    assert weights == 4 * numbers
    assert plan.memory["gradients"] == 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert plan.memory["buffers that gradients are sent from"] == 0
    optimizer = build_optimizer(config.resolved_stages[0].optimizer, method)
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = [x for entries in optimizer.state.values() for x in entries.values() if torch.is_tensor(x) and x.dim()]
    assert plan.memory["optimizer"] == 4 * sum(x.numel() for x in state)
    assert sum(plan.sent.values()) == 0


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_send_gradients_round_a_ring_or_divide_centres(processes):
    config = config_of("--sync-batch-norm=false", "--sampler.identities=8")
    whole = training_plan(config, processes=processes, identities=K, viewpoints=V)
    numbers = sum(p.numel() for p in method_of(config).parameters() if p.requires_grad)
    assert sum(whole.sent.values()) == pytest.approx(2 * (processes - 1) / processes * 4 * numbers)
    divided = training_plan(
        config_of("--sync-batch-norm=false", "--sampler.identities=8", "--shard-identities"),
        processes=processes,
        identities=K,
        viewpoints=V,
    )
    own = -(-K // processes)
    assert divided.memory["weights of the centres"] * K == whole.memory["weights of the centres"] * own
    assert divided.memory["weights of the network"] == whole.memory["weights of the network"]
    network = divided.memory["gradients"] - divided.memory["weights of the centres"]
    assert divided.sent["gradients, averaged"] == pytest.approx(2 * (processes - 1) / processes * network)


def test_the_part_that_takes_the_longest_bounds_the_step():
    config = config_of("--shard-identities")
    slow = training_plan(config, processes=2, identities=K, viewpoints=V, machine=Machine(network=1))
    assert slow.bound == "bytes that are sent"
    assert "bytes that are sent bound the step" in str(slow)
    fast = training_plan(config, processes=2, identities=10**6, viewpoints=V, machine=Machine(flops=1))
    assert fast.bound == "operations of the centres' heads"
    # 16 images by 500,000 identities a process, four logits of each, twice for the gradients and once more in tiles.
    features = fast.memory["features of the batch"] / 12 / config.sampler.images_per_batch
    logits = config.sampler.images_per_batch * 500_000 * 4
    passes = 3 + (4 * logits > 256 * 2**20)
    assert fast.seconds["operations of the centres' heads"] == 2 * logits * features * passes


@pytest.mark.parametrize("name", ["srb", "pie", "pngan-generated"])
def test_a_method_that_reads_more_than_images_says_what_is_not_known(name):
    plan = training_plan(config_of(f"--method={name}", *FITTING.get(name, [])), processes=2, identities=K, viewpoints=V)
    assert (plan.memory["what a pass keeps (float32)"] > 0) == (not METHODS[name].test_inputs)
    assert any("not known" in note for note in plan.notes) == bool(METHODS[name].test_inputs)


def test_the_command_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*SMALL, "--plan", "processes=3", "identities=90", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["processes"], found["identities"], found["viewpoints"]) == (3, 90, 3)
    assert train.main([*SMALL, "--plan", "--quiet"]) == 0
    assert "1 processes" not in capsys.readouterr().out
    for wrong in ("processes=two", "machines=3", "processes", "processes=0"):
        assert train.main([*SMALL, "--plan", wrong]) == 2
        assert f"--plan: {wrong!r} was given; allowed are processes=NUMBER" in capsys.readouterr().err
    for given, said in (
        (["processes=9", "identities=3", "viewpoints=3"], "identities: 3 was given; allowed are values from 9"),
        (["processes=9", "identities=90", "viewpoints=3"], "processes: 9 was given; a batch has 4 identities for them"),
        (["processes=2", "processes=3"], "--plan: 'processes=3' was given"),
        (["viewpoints=3", "identities=9", "--method=pcb", "--method.rows=2", "--shard-identities"], "method 'pcb'"),
    ):
        assert train.main([*SMALL, "--plan", *given]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
