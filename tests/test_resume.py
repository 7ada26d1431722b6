"""Runs that are interrupted within each stage, or around a change of their method, end as if nothing had happened."""

from __future__ import annotations

import functools

import pytest

from tests.test_train import assert_same_state, interrupt_at, start
from vareid_ext.cli import train
from vareid_ext.data import READERS, synthetic_data

RUNS = {  # method -> its options, and the steps after which the run is interrupted; an epoch has two
    "pyramid": (["--rows=2", "--dim=4"], [1]),
    "pcb-rpp": (
        [
            "--rows=2", "--dim=4", "--group=4",
            "--stages=[{epochs: 1, train: [backbone, parts]}, {epochs: 1, train: [classifier]}, {epochs: 1}]",
        ],
        [1, 3, 5],
    ),
    "abdnet": (
        [
            "--dim=16", "--feature-from=0",
            "--stages=[{epochs: 1, train: [shallow, shorten, reduce, attended, mix, head, half_heads]}, {epochs: 1}]",
        ],
        [1, 3],
    ),
    "pdc": (
        [
            "--part-height=64", "--part-width=64", "--localizer-pool=1",
            "--stages=[{epochs: 1, train: [backbone, tails.0, photograph_head]}, {epochs: 1}]",
        ],
        [1, 3],
    ),
    "pie": (
        [
            "--posebox-size=28", "--jitter",
            "--stages=[{epochs: 1, train: [photograph, posebox, photograph_head, posebox_head]}, {epochs: 1}]",
        ],
        [1, 3],
    ),
    "pgr": (
        [
            "--region-dim=4",
            "--stages=[{epochs: 1, train: [part_teacher, region_teacher]}, {epochs: 1, train: [student]}]",
        ],
        [1, 3],
    ),
    "pngan-generated": (
        [
            "--embed-dim=8", "--generator-width=4", "--generator-blocks=1", "--height=56", "--width=56",
            "--stages=[{epochs: 1, train: [generator, discriminator]}, {epochs: 1, train: [photograph]}, "
            "{epochs: 1, train: [generated]}]",
        ],
        [1, 3, 5],
    ),
    "oscnn": (["--method.dim=8", "--label-epochs=1"], [1, 3]),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def rendered_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "synthetic", functools.lru_cache(synthetic_data))
        patch.setattr(train, "draw_figures", lambda *args: None)
        yield


@pytest.mark.parametrize("method", RUNS)
def test_runs_resume_bit_identical_within_each_stage(tmp_path, monkeypatch, method):
    options, stops = RUNS[method]
    options = [f"--method={method}", "--batches-per-epoch=2", "--baselines=false", "--evaluation.every=0", *options]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, *options) == 0
    for done, step in zip([0, *stops], stops, strict=False):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step - done, 15)
            again = train.main(["--resume", str(parts)]) if done else start(parts, *options)
            assert again == 128 + 15
    assert train.main(["--resume", str(parts)]) == 0
    state = assert_same_state(whole, parts)
    assert state["progress"]["step"] > stops[-1]
    if method in ("pyramid", "pcb-rpp"):
        assert state["method"]["dynamic.averages" if method == "pyramid" else "refined"].all()
