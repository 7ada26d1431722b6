"""How the commands end: quietly where nobody reads their output, and with an error where it cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_feature_files import images
from tests.test_train import SMALL
from vareid_ext import train
from vareid_ext.cli.common import run_program
from vareid_ext.training import terminal
from vareid_ext.training.terminal import TrainingBar

ROOT = Path(__file__).resolve().parent.parent


def command(name, folder):
    """The arguments of a short call of a command."""
    np.savez(folder / "x.npz", **images(0, 20))
    files = [str(folder / "x.npz")] * 2
    return {
        "doctor": ["vareid_ext.doctor"],
        "evaluate": ["vareid_ext.evaluate", "--features", *files, "--output", str(folder / "metrics.json")],
        "rerank": ["vareid_ext.rerank", *files, "--output", str(folder / "result.npy")],
        "train": ["vareid_ext.train", *SMALL, "--output", str(folder / "run")],
    }[name]


def call(arguments, encoding="utf-8", **streams):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": encoding}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, timeout=300, check=False, **streams)


@pytest.fixture
def unread():
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Puts the handler back that run_program, which ends a process, leaves."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["doctor", "evaluate", "rerank", "train"])
def test_a_command_whose_reader_has_gone_ends_as_by_sigpipe(tmp_path, unread, name):
    quiet = ["--quiet"] if name in ("evaluate", "rerank") else []
    done = call(command(name, tmp_path) + quiet, stdout=unread, stderr=subprocess.PIPE)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b"Error" not in done.stderr
    assert b"rror:" not in done.stderr
    assert b"roken" not in done.stderr
    # What was asked for as a file is there all the same.
    assert (tmp_path / "metrics.json").exists() == (name == "evaluate")
    assert (tmp_path / "result.npy").exists() == (name == "rerank")


def test_errors_and_bars_that_nobody_reads_end_it_as_well(tmp_path, unread):
    done = call(command("train", tmp_path), stdout=unread, stderr=unread)
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_output_that_cannot_be_written_is_one_line_and_status_2(tmp_path, name):
    with open("/dev/full", "wb") as full:
        done = call(command(name, tmp_path), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "standard output" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_table_reaches_a_terminal_of_few_letters(tmp_path):
    done = call(command("evaluate", tmp_path), "ascii", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b"original" in done.stdout


def test_a_training_whose_reader_goes_can_be_resumed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", *command("train", tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert any(b"epoch 1 " in line and b"mAP" in line for line in process.stdout)
    process.stdout.close()
    assert process.wait(timeout=300) == 128 + signal.SIGPIPE
    done = call(["vareid_ext.train", "--resume", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_bar_that_nobody_reads_does_not_stop_the_training(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(terminal, "_INTERVAL_OF_FILE", 0)
    with open(write, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        bar = TrainingBar(3, 0)
        os.close(read)
        with pytest.raises(BrokenPipeError):
            print("it is broken", file=stderr)
        for _ in range(3):
            bar.update(8, {"total": 1.0}, 0.1)
        bar.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # what is left in the buffer goes there


def interruptible():
    """What a process does with Ctrl-C where nobody has told it to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("name", "imported"),
    [*((name, "_interrupt") for name in ("doctor", "evaluate", "rerank", "train")), ("train", "_program")],
)
def test_ctrl_c_while_a_command_imports_is_quiet(tmp_path, name, imported):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", *command(name, tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible,
    )  # fmt: skip
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == f"vareid_ext.{imported}":
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=300) == 128 + signal.SIGINT
    assert "Traceback" not in rest


def test_ctrl_c_where_a_command_does_not_expect_it_is_one_line(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_program(interrupted)
    assert end.value.code == 128 + signal.SIGINT
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(train, "parse_or_exit", interrupted)
    assert train.main([]) == 128 + signal.SIGINT


def test_a_program_that_imports_the_package_keeps_its_ctrl_c(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import vareid_ext")
    (tmp_path / "other" / "__main__.py").write_text(
        "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-m", "other"], cwd=tmp_path, check=True, preexec_fn=interruptible)
