"""The GPU report: made on the CPU as a dry run; refused with a reason where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report


def test_dry_run_writes_both_files(tmp_path: Path) -> None:
    assert gpu_report.main(["--device=cpu", "--quick", "--rounds=1", "--no-tests", f"--output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    operators = {row["operator"] for row in report["cases"]}
    assert operators == {case.operator for case in gpu_report.cases(torch.device("cpu"), quick=True)}
    for row in report["cases"]:
        assert row["milliseconds"]["ours"] > 0
        assert row["times_as_fast"]["eager"] == pytest.approx(
            row["milliseconds"]["eager"] / row["milliseconds"]["ours"]
        )
    page = (tmp_path / "gpu_report.md").read_text()
    assert all(f"| {operator} |" in page for operator in operators)
    assert "say nothing about a GPU" in page


def test_ours_and_eager_compute_the_same() -> None:
    """What is timed against each other must be the same function."""
    for case in gpu_report.cases(torch.device("cpu"), quick=True):
        if not case.leaves:
            continue
        gradients = []
        for run in (case.ours, lambda case=case: case.eager().backward()):
            for leaf in case.leaves:
                leaf.grad = None
            run()
            gradients.append([leaf.grad.clone() for leaf in case.leaves])
        for ours, eager in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, eager)


def test_failed_tests_are_listed() -> None:
    report = {
        "environment": {"device": "G"},
        "gpu": {},
        "tests": {"status": "failed", "passed": 3, "skipped": 1, "failed": ["test_x"]},
        "copy_gigabytes_per_s": 100.0,
        "cases": [],
    }
    page = gpu_report.markdown(report)
    assert "3 passed, 1 skipped, 1 failed" in page
    assert "- failed: test_x" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_reason_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([f"--output={tmp_path}"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
