"""Training by several processes: what one process gives, whoever is interrupted, killed or fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import free_port
from tests.test_train import SMALL, STAGED, assert_same_state, log_of
from vareid_ext.cli.common import silent
from vareid_ext.data import synthetic_data
from vareid_ext.files.checkpoint import load_checkpoint
from vareid_ext.methods import METHODS
from vareid_ext.training import program
from vareid_ext.training.command_line import parse
from vareid_ext.training.processes import ALONE, Processes
from vareid_ext.training.run import Run, plan_stages
from vareid_ext.training.signals import RunInterruptedError

WORKERS = "--workers=0"
WHOLE = ["--local", "--ema-decay=0.9", "--clip-norm=1", WORKERS]
IN_STAGES = [
    "--stages=[{epochs: 1, train: [neck, loss]}, {epochs: 1, sampler: {kind: shuffled, batch_size: 7}}]",
    "--local", "--evaluation.every=0", WORKERS,
]  # fmt: skip
WHEN_INTERRUPTED = 5
"""The step."""


def trained(group: Any, arguments: list[str], signalled: int | None = None, spoiled: int | None = None) -> Any:
    """Train in this process; the number of the signal that ended it, and what the weights sum up to.

    Args:
        group: None for one process.
        arguments: of the command line.
        signalled: the process that gets a SIGTERM in step `WHEN_INTERRUPTED`.
        spoiled: the process whose loss is NaN in that step.
    """
    processes = ALONE if group is None else Processes(group)
    run, log, ended, states = parse(arguments), Run.log, 0, []

    def signalling(self: Run, terms: Any) -> None:
        states[:] = [self.state]
        if self.state.progress.step == WHEN_INTERRUPTED and signalled == processes.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, terms)

    def spoiling(self: Run, batch: Any, forward=Run.forward) -> Any:
        terms = forward(self, batch)
        if self.state.progress.step + 1 == WHEN_INTERRUPTED and spoiled == processes.rank:
            terms["identity"] = terms["identity"]._replace(value=terms["identity"].value * torch.nan)
        return terms

    with pytest.MonkeyPatch.context() as patch, silent(True):
        patch.setattr(Run, "log", signalling)
        patch.setattr(Run, "forward", spoiling)
        try:
            program.run(run, processes)
        except RunInterruptedError as error:
            ended = error.number
    method = states[0].method
    return ended, [float(p.detach().double().sum()) for p in (*method.parameters(), *method.buffers())]


def assert_close_to(output, expected, tolerance):
    """Two runs end with the same weights, to rounding, and log the same."""
    states = [load_checkpoint(folder / "last.pt") for folder in (output, expected)]
    for part in ("method", "average"):
        if states[1][part] is None:
            continue
        assert states[0][part].keys() == states[1][part].keys()
        for name, value in states[1][part].items():
            torch.testing.assert_close(states[0][part][name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert states[0]["progress"]["step"] == states[1]["progress"]["step"]
    for generator in ("python", "numpy", "torch"):
        assert repr(states[0]["random"][generator]) == repr(states[1]["random"][generator])
    entries = [log_of(folder) for folder in (output, expected)]
    assert len(entries[0]) == len(entries[1])
    for found, wanted in zip(*entries, strict=True):
        assert found.get("loss", {}) == pytest.approx(wanted.get("loss", {}), rel=tolerance, abs=tolerance)
        assert (found["step"], found["epoch"]) == (wanted["step"], wanted["epoch"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    trained(None, [*SMALL, *WHOLE, "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, processes):
    """The same run of two processes, and another that a signal to one of them ended."""
    folder = tmp_path_factory.mktemp("runs")
    whole = processes.run(2, trained, [*SMALL, *WHOLE, "--output", str(folder / "whole")])
    assert whole[0] == whole[1]
    stopped = processes.run(2, trained, [*SMALL, *WHOLE, "--output", str(folder / "stopped")], 1)
    assert [ended for ended, _ in stopped] == [signal.SIGTERM] * 2
    assert load_checkpoint(folder / "stopped" / "last.pt")["progress"]["step"] == WHEN_INTERRUPTED + 1
    return folder


def test_two_processes_train_what_one_does(alone, by_two):
    assert_close_to(by_two / "whole", alone, 2e-4)
    environment = json.loads((by_two / "whole" / "environment.json").read_text())
    assert environment["processes"] == 2
    files = [{path.name for path in folder.iterdir()} for folder in (by_two / "whole", alone)]
    assert files[0] == files[1]


def test_three_processes_share_four_identities(alone, tmp_path, processes):
    outcomes = processes.run(3, trained, [*SMALL, *WHOLE, "--output", str(tmp_path / "run")])
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert_close_to(tmp_path / "run", alone, 2e-4)
    plans = [
        plan_stages(parse(SMALL).config, synthetic_data(parse(SMALL).config.data.synthetic), Three(rank))
        for rank in range(3)
    ]
    assert [plan.sampler.own for (plan,) in plans] == [(0, 2), (2, 4), (4, 8)]


class Three:
    size = 3

    def __init__(self, rank):
        self.rank = rank


def resumed(folder, tmp_path, processes, count):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(folder / "stopped"), str(copy)], check=True)
    arguments = ["--resume", str(copy)]
    (trained(None, arguments) if count == 1 else processes.run(count, trained, arguments))
    return copy


def test_as_many_processes_go_on_bit_identically(by_two, tmp_path, processes):
    assert_same_state(resumed(by_two, tmp_path, processes, 2), by_two / "whole")


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_processes_goes_on(by_two, tmp_path, processes, count):
    assert_close_to(resumed(by_two, tmp_path, processes, count), by_two / "whole", 2e-4)


def test_divided_centres_are_trained_as_whole_ones(alone, tmp_path, processes):
    arguments = [*SMALL, *WHOLE, "--shard-identities"]
    outputs = [tmp_path / name for name in ("whole", "stopped", "same", "fewer")]
    sums = processes.run(3, trained, [*arguments, "--output", str(outputs[0])])
    assert sums[0][1] != sums[1][1]  # each has centres of its own
    assert_close_to(outputs[0], alone, 2e-4)
    stopped = processes.run(3, trained, [*arguments, "--output", str(outputs[1])], 1)
    assert [ended for ended, _ in stopped] == [signal.SIGTERM] * 3
    for output in outputs[2:]:
        subprocess.run(["cp", "-r", str(outputs[1]), str(output)], check=True)
    processes.run(3, trained, ["--resume", str(outputs[2])])
    assert_same_state(outputs[2], outputs[0])
    trained(None, ["--resume", str(outputs[3])])
    assert_close_to(outputs[3], alone, 2e-4)


def test_a_loss_without_divided_centres_is_refused():
    with pytest.raises(ValueError, match=r"loss.shard_identities: true was given; method 'pcb' as it is configured"):
        program.check(parse([*SMALL, "--method=pcb", "--shard-identities"]).config)


def test_stages_and_images_at_random_are_shared(tmp_path, processes):
    folders = [tmp_path / "alone", tmp_path / "three"]
    trained(None, [*STAGED, *IN_STAGES, "--output", str(folders[0])])
    processes.run(3, trained, [*STAGED, *IN_STAGES, "--output", str(folders[1])])
    assert_close_to(folders[1], folders[0], 2e-4)


def test_features_are_bit_identical_whoever_extracts_them(tmp_path, processes):
    arguments = [*SMALL, "--epochs=0", "--save-features", "--evaluation.batch-size=7", WORKERS, "--output"]
    trained_features = {}
    for count in (1, 3):
        folder = tmp_path / str(count)
        if count == 1:
            untrained(None, [*arguments, str(folder)])
        else:
            processes.run(3, untrained, [*arguments, str(folder)])
        trained_features[count] = folder
    for side in ("query", "gallery"):
        files = [np.load(folder / f"{side}.npz") for folder in trained_features.values()]
        assert sorted(files[0]) == sorted(files[1])
        for name in files[0]:
            np.testing.assert_array_equal(files[0][name], files[1][name])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in trained_features.values()]
    for found in metrics:
        found.pop("seconds")
    assert metrics[0] == metrics[1]


def untrained(group: Any, arguments: list[str]) -> None:
    with silent(True):
        program.run(parse(arguments), ALONE if group is None else Processes(group))


def test_switched_off_each_process_looks_at_its_own_images(alone, tmp_path, processes):
    own = ["--sync-batch-norm=false", "--gather-triplets=false", "--evaluation.every=0"]
    outcomes = processes.run(2, trained, [*SMALL, *WHOLE, *own, "--output", str(tmp_path / "own")])
    assert outcomes[0] == outcomes[1]  # the statistics of the first count
    logs = [[entry["loss"] for entry in log_of(folder) if "loss" in entry] for folder in (alone, tmp_path / "own")]
    assert logs[0][0]["triplet"] != pytest.approx(logs[1][0]["triplet"], rel=1e-3)
    assert logs[0][0]["identity"] == pytest.approx(logs[1][0]["identity"], rel=1e-2)


def test_a_loss_of_one_process_that_is_not_finite_stops_all(tmp_path, processes):
    folder = tmp_path / "run"
    outcomes = processes(3, trained, [*SMALL, WORKERS, "--output", str(folder)], None, 2)
    assert {type(outcome).__name__ for outcome in outcomes} == {"NonFiniteLossError"}
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "the loss of step 5 (epoch 2) is nan" in str(outcomes[0])
    kept = torch.load(folder / "non_finite_batch.pt")
    config = parse(SMALL).config
    (plan,) = plan_stages(config, synthetic_data(config.data.synthetic))
    plan.sampler.set_epoch(1)
    assert kept["index"].tolist() == [draw.index for draw in next(iter(plan.sampler))]
    assert len(kept["image"]) == len(kept["paths"]) == 8
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 4


def test_what_cannot_be_trained_is_said_by_all(tmp_path, processes, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "log.jsonl").touch()
    few = "sampler.identities: a batch has 2, and 3 processes share it; allowed is at least one for each"
    for arguments, message in (
        (["--sampler.identities=2", "--output", str(tmp_path / "new")], few),
        (["--output", str(tmp_path / "taken")], "holds the log of a run that ended"),
    ):
        outcomes = processes(3, untrained, [*SMALL, WORKERS, *arguments])
        assert all(isinstance(outcome, (ValueError, FileExistsError)) for outcome in outcomes)
        assert len({str(outcome) for outcome in outcomes}) == 1
        assert message in str(outcomes[0])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("stage", "refused"), [("generator", True), ("photograph", False), (None, True)])
def test_images_that_are_compared_stay_on_one_process(stage, refused):
    train = "" if stage is None else f", train: [{stage}]"
    shuffled = f"--stages=[{{epochs: 1, sampler: {{kind: shuffled, batch_size: 6}}{train}}}]"
    small = [option for option in STAGED if not option.startswith("--model")]
    config = parse(["--method=pngan-generated", *small, shuffled]).config
    plans = plan_stages(config, synthetic_data(config.data.synthetic))

    class Method:
        about, needs_whole_identities = METHODS["pngan-generated"].about, ("generator",)

        def named_parameters(self):
            return [("generator.layer", None), ("photograph.layer", None)]

    if not refused:
        program.check_identities_are_whole(Method(), plans, Three(0))
        return
    with pytest.raises(ValueError, match=r"sampler\.kind: 'shuffled' was given for stage 1 on 3 processes"):
        program.check_identities_are_whole(Method(), plans, Three(0))
    program.check_identities_are_whole(Method(), plans, ALONE)


def torchrun(*arguments, count=2, **options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port",
        str(free_port()), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_a_killed_process_is_started_again_with_the_others(by_two, tmp_path):
    """kill -9 in the second epoch: torchrun starts both again, which go on from the first one's end."""
    output = tmp_path / "run"
    arguments = [a.replace("--local", "--method.local") for a in (*SMALL, *WHOLE)]  # torchrun has a --local-addr
    program_ = ["-m", "tests.killed", *arguments, "--output", str(output)]
    process = torchrun("--max-restarts", "1", *program_)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert (output / "killed").is_file()
    assert "resumed  at step 4" in out
    assert_same_state(output, by_two / "whole")
    assert out.count("metrics.json, curves.png, ranking.png") == 1


@pytest.mark.parametrize("saved", [True, False])
def test_processes_that_are_started_again_go_on_in_their_own_folder_alone(tmp_path, monkeypatch, saved):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="output: nothing was given; with torchrun --max-restarts 3 a"):
        program.restarted(parse(SMALL))
    request = parse([*SMALL, "--output", str(tmp_path)])
    assert program.restarted(request) is request
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    environment = program.environment(torch.device("cpu"), "", 2, program.launch())
    for name in ("log.jsonl", "config.yaml", *["last.pt"] * saved):
        (tmp_path / name).write_text("own")
    (tmp_path / "mine.txt").write_text("kept")
    # Another launch's run is refused as ever, not taken or removed.
    (tmp_path / "environment.json").write_text(json.dumps({**environment, "launch": "none 1 2"}))
    assert program.restarted(request) is request
    assert (tmp_path / "log.jsonl").exists()
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    assert program.restarted(request).resume == saved
    left = {"mine.txt", "config.yaml"} | ({"log.jsonl", "last.pt", "environment.json"} if saved else set())
    assert {path.name for path in tmp_path.iterdir()} == left
