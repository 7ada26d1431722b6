"""Whatever becomes of the process that runs a test, every test is reported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.cuda_on_cpu import build

CONFTEST = """
from tests.cuda_on_cpu import worker
from tests.cuda_on_cpu.worker import pytest_runtest_protocol

def pytest_runtest_logstart(nodeid):
    worker.LIMIT = 1 if "hangs" in nodeid else 300
"""
TESTS = """
import ctypes, os, pytest, time, warnings

state = []

def test_keeps(): state.append(1)
def test_sees_what_was_kept(): assert state == [1]
def test_fails(): raise ValueError("this one")
def test_skips(): pytest.skip("why not")
def test_warns(): warnings.warn("beware")
@pytest.mark.filterwarnings("error:beware")
def test_raises(): warnings.warn("beware")
def test_reads_nowhere(): ctypes.string_at(0)
def test_starts_anew(): assert state == []
def test_ends(): os._exit(0)
def test_hangs(): time.sleep(600)
def test_comes_last(): pass
"""


def test_a_test_that_ends_its_process_takes_no_report_along(tmp_path: Path) -> None:
    folder = tmp_path / "cuda_on_cpu"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_these.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=build.ROOT, timeout=600, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = dict(reversed(line) for line in re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\w+)", done.stdout, re.M))
    passes, fails = ("keeps", "sees_what_was_kept", "warns", "starts_anew", "comes_last"), ("fails", "raises")
    ends = ("reads_nowhere", "ends", "hangs")
    assert found == {**dict.fromkeys(passes, "PASSED"), **dict.fromkeys(fails + ends, "FAILED")}
    for text in ("1 skipped", "1 warning", "ValueError: this one", "SIGSEGV", "SIGKILL"):
        assert text in done.stdout
