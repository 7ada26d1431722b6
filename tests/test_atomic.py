"""Files that appear when they are complete: what is left after a kill, a full disk, links, and writers side by side."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from vareid_ext.cli.rerank import _write_best
from vareid_ext.data import SyntheticSettings, synthetic_data, write_manifest
from vareid_ext.files import atomic
from vareid_ext.files.atomic import atomic_file, check_writable, remove_unfinished
from vareid_ext.files.checkpoint import save_checkpoint
from vareid_ext.files.features import Features
from vareid_ext.training.run_folder import RunFolder

_WRITER = """
import sys
from vareid_ext.files.atomic import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def writer(tmp_path):
    """A process that has begun to write ``result`` and goes on when its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / "result")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"writing\n"
    yield process
    process.kill()
    process.communicate()


def kill(process):
    process.kill()
    process.wait()


def test_the_file_appears_complete_with_the_usual_permissions(tmp_path):
    path = tmp_path / "result"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == ["plain", "result"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "result"
    path.write_bytes(b"old")

    def half():
        with atomic_file(path) as file:
            file.write(b"ne")
            raise error

    with pytest.raises(error):
        half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["result"]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, writer):
    kill(writer)
    assert len(names(tmp_path)) == 1
    with atomic_file(tmp_path / "result") as file:
        file.write(b"whole")
    assert names(tmp_path) == ["result"]


def test_a_run_folder_is_cleared_of_what_a_killed_run_left(tmp_path, writer):
    kill(writer)
    (left,) = tmp_path.iterdir()
    left.rename(left.with_name(left.name.replace("result", "best.pt")))
    RunFolder(tmp_path, resume=False).remove_unfinished()
    assert names(tmp_path) == []


def test_a_folder_is_cleared_of_all_that_was_left_in_it(tmp_path, writer):
    kill(writer)
    (left,) = tmp_path.iterdir()
    left.rename(left.with_name(left.name.replace("result", "another")))
    with atomic_file(tmp_path / "another", tidy=False) as file:
        file.write(b"whole")
        assert len(names(tmp_path)) == 2
    with atomic_file(tmp_path / "result") as file:
        remove_unfinished(tmp_path)
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["another", "result"]


def test_a_writer_that_runs_keeps_its_file(tmp_path, writer):
    with atomic_file(tmp_path / "result") as file:
        file.write(b"first")
    remove_unfinished(tmp_path / "result")
    assert len(names(tmp_path)) == 2
    writer.communicate()
    assert writer.returncode == 0
    assert (tmp_path / "result").read_bytes() == b"half"
    assert names(tmp_path) == ["result"]


def test_a_writer_of_this_process_keeps_its_file(tmp_path):
    with atomic_file(tmp_path / "result") as file:
        file.write(b"outer")
        remove_unfinished(tmp_path / "result")
        with atomic_file(tmp_path / "result") as other:
            other.write(b"inner")
    assert (tmp_path / "result").read_bytes() == b"outer"


def test_a_stopped_writer_keeps_its_file(tmp_path, writer):
    writer.send_signal(signal.SIGSTOP)
    remove_unfinished(tmp_path / "result")
    assert len(names(tmp_path)) == 1
    writer.send_signal(signal.SIGCONT)


def test_only_what_is_provably_left_behind_is_removed(tmp_path, writer, monkeypatch):
    kill(writer)
    (left,) = names(tmp_path)
    machine, mark = left.split(".")[2:4]
    others = [
        f".result.{int(machine, 16) ^ 1:08x}.{mark}.part",  # another machine's
        f".result2.{machine}.{mark}.part",
        f".result.{machine}.{mark}0.part",
        f".result.{machine}.part",
        left + ".npy",
        f"x{left}",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f".result.{machine}.00000000.part").mkdir()
    os.mkfifo(tmp_path / f".result.{machine}.00000001.part")
    (tmp_path / f".result.{machine}.00000002.part").symlink_to("nowhere")
    before = names(tmp_path)

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.fcntl, "flock", no_locks)
        remove_unfinished(tmp_path / "result")
        assert names(tmp_path) == before
        with atomic_file(tmp_path / "other") as file:
            file.write(b"written without locks")
    remove_unfinished(tmp_path / "result")
    assert names(tmp_path) == sorted({*before, "other"} - {left})


def test_a_file_taken_for_left_behind_before_its_lock_is_made_again(tmp_path, monkeypatch):
    """Another process may look between the file's creation and its lock."""
    flock, made = atomic.fcntl.flock, []

    def late(file, operation):
        if not made:
            made.append(file.name)
            os.unlink(file.name)
        flock(file, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with atomic_file(tmp_path / "result") as file:
        file.write(b"whole")
        assert file.name != made[0]
    assert (tmp_path / "result").read_bytes() == b"whole"


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    contents = {bytes([number]) * 50_000 for number in range(4)}

    def write(content):
        for _ in range(25):
            with atomic_file(tmp_path / "result") as file:
                file.write(content)
            assert (tmp_path / "result").read_bytes() in contents
        done.append(content)

    done = []
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(contents)
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if exists:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to("elsewhere/target")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
        assert os.path.dirname(file.name) == str(target.parent)
    assert target.read_bytes() == b"new"
    assert os.readlink(tmp_path / "link") == "second"
    assert os.readlink(tmp_path / "second") == "elsewhere/target"
    assert names(target.parent) == ["target"]


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 10,000 bytes, which fails as a full disk does: an OSError that names no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:  # before pytest goes on to write its output, which may be a file
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_plainly(path):
    with atomic_file(path) as file:
        file.write(bytes(20_000))


def write_features(path):
    Features(feature=torch.zeros(5_000, 1), identity=[0] * 5_000, camera=[0] * 5_000, viewpoint=[0] * 5_000).save(path)


def write_best(path, suffix):
    with atomic_file(path) as file:
        _write_best(file, suffix, np.zeros((50, 50), np.float32), np.zeros((50, 50), np.int64))


def write_log(path):
    folder = RunFolder(path.parent, resume=False)
    folder.log = path
    folder.append_log({"step": "x" * 20_000})


@pytest.mark.parametrize(
    "write",
    [
        write_plainly,
        write_features,
        write_log,
        lambda path: save_checkpoint(path, {"a": torch.zeros(5_000)}),
        lambda path: save_checkpoint(path, {str(i): torch.zeros(1) for i in range(500)}),  # only the directory is large
        lambda path: RunFolder(path.parent, resume=False).write_json(path, "x" * 20_000),
        lambda path: write_best(path, ".npy"),
        lambda path: write_best(path, ".npz"),
        lambda path: write_manifest(synthetic_data(SyntheticSettings(2, 2, 4)), path),
    ],
    ids=["bytes", "features", "log", "checkpoint", "checkpoint-of-little", "json", "best", "best-npz", "manifest"],
)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, write):
    path = tmp_path / "result"
    with pytest.raises(OSError, match="File too large") as caught, full_disk():
        write(path)
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value).endswith(f": '{path}'")
    assert names(tmp_path) == (["result"] if write is write_log else [])


@pytest.mark.parametrize("name", ["nowhere/result", "folder", "n" * 250])
def test_other_errors_name_the_file_too(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=name) as caught, atomic_file(tmp_path / name) as file:
        file.write(b"new")
    assert caught.value.filename == str(tmp_path / name)
    assert str(caught.value).endswith(f": '{tmp_path / name}'")
    assert names(tmp_path) == ["folder"]


def test_an_error_about_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "result"):
        (tmp_path / "input").read_bytes()
    assert caught.value.filename == str(tmp_path / "input")
    with pytest.raises(OSError, match=r"^cannot read the image$"), atomic_file(tmp_path / "result"):
        raise OSError("cannot read the image")


def test_results_go_to_files_that_can_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "device.npy").symlink_to(os.devnull)
    (tmp_path / "dangling.npy").symlink_to(tmp_path / "nowhere" / "result.npy")
    for name in ("pipe", "device", "dangling"):
        with pytest.raises(ValueError, match=f"{name}.npy"):
            check_writable(tmp_path / f"{name}.npy", (".npy",))
    (tmp_path / "link.npy").symlink_to("result.npy")
    assert check_writable(tmp_path / "link.npy", (".npy",)) == tmp_path / "link.npy"
