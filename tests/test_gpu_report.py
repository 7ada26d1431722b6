"""What proves a GPU, without one: steps that fault, hang or run out of time; what is timed; what runs where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vareid_ext
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import jobs, operators
from benchmarks.gpu import step as shared
from benchmarks.gpu.records import read_records
from benchmarks.gpu.report import page, write_report
from tests.gpu import gpu_backend

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import os, sys, time
from benchmarks.gpu.records import Records, Skip
def raises(error): raise error
records = Records()
"""


@pytest.fixture(autouse=True)
def _dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAREID_GPU_DRY_RUN", "1")
    for module in (shared, operators, jobs):
        monkeypatch.setattr(module, "DRY_RUN", True)
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))


def step(name: str, program: str, seconds: float = 60, patience: float = 60, **options: Any) -> gpu.Step:
    return gpu.Step(name, name, ["-c", PRELUDE + program], seconds, patience, **options)


def run(folder: Path, *steps: gpu.Step, budget: float = 300) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and what the report on disk says of each step."""
    report = gpu.Report(folder, dry_run=True, build_seconds=1.0)
    with (folder / "log.txt").open("ab") as log:
        status = gpu.run_steps(report, budget, {2**i: s for i, s in enumerate(steps)}, log)
    return status, {s["name"]: s for s in json.loads((folder / "gpu_report.json").read_text())["steps"]}


def statuses(entry: dict[str, Any]) -> dict[str, str]:
    return {record["name"]: record["status"] for record in entry["records"]}


def test_an_exception_in_a_check_fails_it_and_the_next_goes_on(tmp_path: Path) -> None:
    program = """
records.check("wrong", lambda: raises(ValueError("seven")))
records.check("right", lambda: {"ms": 1.5})
records.check("absent", lambda: raises(Skip("not here")))
with records.section("large data"):
    raises(MemoryError("eight"))
records.check("last", dict)
"""
    status, found = run(tmp_path, step("bad", program), step("good", 'records.check("b", dict)'))
    assert status == 1
    assert found["bad"]["status"] == "failed"
    assert found["good"]["status"] == "passed"
    expected = {"wrong": "failed", "right": "passed", "absent": "skipped", "large data": "failed", "last": "passed"}
    assert statuses(found["bad"]) == expected
    assert "seven" in found["bad"]["records"][0]["why"]
    assert found["bad"]["records"][1]["ms"] == 1.5


@pytest.mark.parametrize(
    ("fault", "why"),
    [("os.abort", "signal 6"), ("lambda: os._exit(75)", "75"), ("lambda: time.sleep(60)", "nothing happened")],
    ids=["crash", "lost GPU", "hang"],
)
def test_a_check_that_takes_its_process_along_fails_alone(tmp_path: Path, fault: str, why: str) -> None:
    program = f"""
records.check("before", dict)
records.check("fault", {fault})
records.check("after", dict)
"""
    status, found = run(tmp_path, step("s", program, patience=4 if "sleep" in fault else 60))
    assert status == 1
    assert statuses(found["s"]) == {"before": "passed", "fault": "failed", "after": "passed"}
    assert why in found["s"]["records"][1]["why"]


def test_a_step_beyond_its_time_is_ended_with_all_it_has_started(tmp_path: Path) -> None:
    program = f"""
import subprocess
records.check("first", dict)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
records.check("endless", lambda: [time.sleep(0.1) or records.put(str(i), "passed") for i in range(600)])
"""
    start = time.monotonic()
    status, found = run(tmp_path, step("long", program, seconds=3), step("next", 'records.check("b", dict)'))
    assert time.monotonic() - start < 50
    assert status == 1
    assert statuses(found["long"])["first"] == "passed"
    assert statuses(found["long"])["endless"] == "failed"
    assert found["next"]["status"] == "passed"
    state = Path("/proc", (tmp_path / "child").read_text(), "status")
    assert not state.exists() or "State:\tZ" in state.read_text()  # ended, if perhaps not yet waited for


def test_steps_without_time_left_are_named(tmp_path: Path) -> None:
    status, found = run(tmp_path, step("late", 'records.check("a", dict)'), budget=0.5)
    assert status == 1
    assert found["late"]["status"] == "failed"
    assert found["late"]["records"] == []


@pytest.mark.parametrize("program", ["", "raise SystemExit(1)", 'records.check("a", dict); raise SystemExit(3)'])
def test_a_step_that_checks_nothing_or_ends_badly_fails(tmp_path: Path, program: str) -> None:
    status, found = run(tmp_path, step("s", program))
    assert status == 1
    assert found["s"]["why"]


def test_an_optional_step_may_be_skipped(tmp_path: Path) -> None:
    program = 'records.check("tool", lambda: raises(Skip("no such tool")))'
    status, found = run(tmp_path, step("s", program, optional=True))
    assert status == 0
    assert found["s"]["status"] == "skipped"
    assert run(tmp_path, step("s", program))[0] == 1


def test_the_report_is_there_while_a_step_still_runs(tmp_path: Path) -> None:
    """What a run has found when it is killed from outside."""
    program = f"""
records.check("done", lambda: {{"ms": 2.0}})
open({str(tmp_path / "reached")!r}, "w").close()
records.check("under way", lambda: time.sleep(60))
"""
    code = f"""
import sys
from pathlib import Path
from benchmarks.gpu import __main__ as gpu
gpu.STEPS = (gpu.Step("s", "s", ["-c", {PRELUDE + program!r}], 60, 60),)
sys.exit(gpu.main([{str(tmp_path)!r}, "--dry-run"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (tmp_path / "reached").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    assert process.wait() == 143
    entry = json.loads((tmp_path / "gpu_report.json").read_text())["steps"][1]
    assert statuses(entry) == {"done": "passed", "under way": "begun"}
    assert "done" in (tmp_path / "gpu_report.md").read_text()


def test_a_record_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text(
        '{"name": "a", "status": "begun", "predicted ms": 1.0}\n{"name": "a", "status": "passed"}\n{"name": '
    )
    assert read_records(path) == {"a": {"name": "a", "status": "passed", "predicted ms": 1.0}}


def test_the_page_shows_what_failed_and_what_was_measured(tmp_path: Path) -> None:
    records = [
        {"name": "op one", "status": "passed", "predicted ms": 1.25, "ms": 2.5, "seconds": 1.0},
        {"name": "op two", "status": "passed", "predicted ms": 4096.0, "ms": 5000.0, "seconds": 1.0},
        {"name": "op three", "status": "failed", "why": "Boom", "seconds": 1.0},
        {"name": "op four", "status": "skipped", "why": "no second GPU", "seconds": 1.0},
    ]
    entry = {"name": "s", "title": "Ops", "status": "failed", "why": "", "seconds": 3.0, "records": records}
    write_report(tmp_path, {"dry run": False, "seconds": 3.0, "steps": [entry]})
    text = (tmp_path / "gpu_report.md").read_text()
    assert "| Ops | failed | 2 passed, 1 failed, 1 skipped | 3 |" in text
    assert "| op one | 1.25 | 2.5 |" in text
    assert "| op two | 4,096 | 5,000 |" in text
    assert "op three: Boom" in text
    assert "1 skipped: no second GPU" in text
    assert text.strip() == page(json.loads((tmp_path / "gpu_report.json").read_text())).strip()


def test_ours_and_plain_pytorch_compute_the_same() -> None:
    """What is timed against each other must be the same function."""
    torch.manual_seed(0)
    compared = 0
    for case in operators.cases():
        if case.leaves and case.leaves[0].dtype == torch.float32:
            gradients = []
            for loss in (case.ours, case.eager):
                case.run(loss)()
                gradients.append([leaf.grad.clone() for leaf in case.leaves])
            for ours, eager in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
            compared += 1
        elif case.operator == "pairwise_distance":
            torch.testing.assert_close(case.ours(), case.eager(), rtol=1e-3, atol=1e-3)
            compared += 1
    assert compared == 6


def test_least_bytes_follow_from_the_sizes() -> None:
    """A block of products is read once for its rows, once for its columns, and written as distances; rows are read."""
    Q, G, D = 30, 120, 32
    x = torch.randn(Q + G, D)
    least = operators.least_bytes(lambda: vareid_ext.k_reciprocal_rerank(x[:Q], x[Q:]))
    rows_of_blocks = 4 * (Q * Q + G * G + Q * G)  # queries with themselves, the gallery with itself, and across
    across_again = 4 * 2 * Q * G  # for the columns, and written
    assert least["nearest_neighbors_scan"] == rows_of_blocks + across_again
    assert least["pairwise_distance_max_abs"] == (Q + G) * (4 * D + 8)
    calls, times = operators.kernel_times(lambda: vareid_ext.k_reciprocal_rerank(x[:Q], x[Q:]))
    assert calls["nearest_neighbors_scan"] == 3
    assert set(times) == set(calls) == set(least)


def test_predictions_are_the_larger_of_bytes_and_operations() -> None:
    class Found:
        def neighbour(self, step: str) -> dict[str, Any]:
            values = {"copy": 4000.0, "float32 product": 50.0, "bfloat16 product": 800.0}
            return {name: {"status": "passed", "value": value} for name, value in values.items()}

    ceilings = operators.Ceilings(Found())  # type: ignore[arg-type]
    assert ceilings.predict(4_000_000_000) == {"predicted ms": pytest.approx(1.0), "bound": "bytes"}
    assert ceilings.predict(1, 10**11) == {"predicted ms": pytest.approx(2.0), "bound": "product"}
    assert ceilings.predict(1, 10**11, "bfloat16")["predicted ms"] == pytest.approx(0.125)


def test_the_dense_reranking_is_the_same_as_ours() -> None:
    """The opponent on the GPU computes what it is timed for."""
    query, gallery = (jobs.features(30, 170, 24).feature[part] for part in (slice(0, 30), slice(30, None)))
    ours = vareid_ext.k_reciprocal_rerank(query, gallery)
    torch.testing.assert_close(jobs.dense_reranking(query, gallery), ours, rtol=1e-4, atol=1e-5)


def test_operators_run_on_copies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides and what lies between the elements go along; what an operator writes comes back."""
    moved = []
    monkeypatch.setattr(gpu_backend, "DEVICE", torch.device("cpu"))
    original = gpu_backend._to_device
    monkeypatch.setattr(gpu_backend, "_to_device", lambda tensor: moved.append(tensor) or original(tensor))
    wide, out = torch.randn(30, 40), torch.zeros(10, 20)
    query, gallery = wide[:10, :24], wide[10:, :24]
    with gpu_backend.on_gpu():
        got = vareid_ext.k_reciprocal_rerank(query, gallery, out=out)
    assert got is out
    assert any(tensor.stride() == (40, 1) for tensor in moved)
    copy = original(gallery)
    assert copy.stride() == (40, 1)
    assert torch.equal(copy, gallery)
    assert copy.data_ptr() != gallery.data_ptr()
    torch.testing.assert_close(out, vareid_ext.k_reciprocal_rerank(query, gallery), rtol=0, atol=0)


def test_bad_labels_are_refused_where_operators_run_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "DEVICE", torch.device("cpu"))
    with gpu_backend.on_gpu(), pytest.raises(IndexError, match="identity"):
        vareid_ext.identity_cross_entropy(torch.randn(2, 3), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "folder"),
        (["OUT", "--wheels", "EMPTY", "--dry-run"], "EMPTY"),
        (["OUT", "--wheels", "HALF", "--dry-run"], "half-1.0"),
        (["OUT", "--wheels", "NOWHERE", "--dry-run"], "NOWHERE"),
        (["/proc/report"], "/proc/report"),
        (["OUT", "--fast"], "--fast"),
        pytest.param(
            ["OUT"], "GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
        ),
    ],
    ids=["no folder", "no wheels", "half a wheel", "no folder of wheels", "no place", "unknown option", "no GPU"],
)
def test_what_cannot_work_is_one_line_that_names_it(tmp_path: Path, arguments: list[str], named: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "HALF").mkdir()
    (tmp_path / "HALF" / "half-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
    paths = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", ROOT / ".ci" / "gpu", *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr
