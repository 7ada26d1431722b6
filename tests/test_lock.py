"""One process at a time trains into a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.test_train import SMALL
from vareid_ext.cli import ablate, train
from vareid_ext.files import lock
from vareid_ext.training import program

HOLDER = """
import os, runpy, sys, time
from pathlib import Path
with runpy.run_path(sys.argv[1])["locked"](Path(sys.argv[2])):
    worker = os.fork() or time.sleep(600)
    print(worker, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Locks a folder in another process, which has a worker, and returns what kills that process alone."""
    begun = []

    def start(folder):
        command = [sys.executable, "-S", "-c", HOLDER, lock.__file__, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        begun.append((process, int(process.stdout.readline())))
        return lambda: (process.kill(), process.wait())

    yield start
    for process, worker in begun:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_ablation_ends_before_any_work_and_a_kill_frees_the_folder(tmp_path, monkeypatch, capsys, hold):
    monkeypatch.setattr("vareid_ext.training.program.run", lambda request: 1 / 0)
    kill = hold(tmp_path)
    assert ablate.main([*SMALL, "--evaluation.every=0", "--output", str(tmp_path)]) == 2
    assert f"error: output: '{tmp_path}' was given, which another process is writing;" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    kill()
    with lock.locked(tmp_path):
        pass


def test_a_run_that_another_process_has_finished_meanwhile_is_not_overwritten(tmp_path, monkeypatch, capsys):
    read = program.load_run_data

    def meanwhile(*args, **options):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text("{}")
        return read(*args, **options)

    monkeypatch.setattr(program, "load_run_data", meanwhile)
    assert train.main([*SMALL, "--workers=0", "--output", str(tmp_path / "run")]) == 2
    assert "metrics.json" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_text() == "{}"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_is_resumed_once_at_a_time(trained_run, monkeypatch, capsys, hold):
    monkeypatch.setattr("vareid_ext.training.program.load_run_data", lambda *args, **options: 1 / 0)
    kill = hold(trained_run)
    assert train.main(["--resume", str(trained_run)]) == 2
    assert f"error: output: '{trained_run}' was given, which another process is" in capsys.readouterr().err
    kill()
    assert train.main(["--resume", str(trained_run)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_folder_that_a_new_run_was_given_while_it_read_its_data_is_left_alone(tmp_path, monkeypatch, capsys, hold):
    output, load = tmp_path / "run", train.program.load_run_data

    def loaded(*arguments, **options):
        output.mkdir()
        hold(output)
        return load(*arguments, **options)

    monkeypatch.setattr("vareid_ext.training.program.load_run_data", loaded)
    assert train.main([*SMALL, "--output", str(output)]) == 2
    assert "which another process is writing" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [".lock"]
