"""The parts of the training program, by themselves."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import zipfile
from multiprocessing import resource_sharer
from multiprocessing.connection import Client

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny
from vareid_ext._text import table
from vareid_ext.data import ImageList, SyntheticSettings, build_transform, synthetic_data
from vareid_ext.files.checkpoint import (
    load_checkpoint,
    random_state,
    read_tensors,
    save_checkpoint,
    set_random_state,
)
from vareid_ext.files.features import Features
from vareid_ext.training import evaluation, run_folder
from vareid_ext.training.console import tell
from vareid_ext.training.program import choose_queries, rankings
from vareid_ext.training.run_folder import RunFolder
from vareid_ext.training.signals import RunInterruptedError, Signals, ignore_in_worker, postponed


@pytest.mark.parametrize("path", ["file", "file/sub", "dangling"])
def test_a_path_that_can_be_no_folder_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match=f"output: .*{path}"):
        RunFolder(tmp_path / path, resume=False)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.os, "access", lambda place, mode: place != tmp_path)  # permissions do not bind root
    with pytest.raises(PermissionError, match="cannot be written to"):
        RunFolder(tmp_path / "new" / "run", resume=False)
    assert not list(tmp_path.iterdir())


def test_a_log_without_a_checkpoint_is_not_said_to_be_resumable(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match="ended before it saved anything"):
        RunFolder(tmp_path, resume=False)


class SignalsWhenDeleted:
    """What it raises is lost, as in the destructors that Python runs."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallows_ends_the_block():
    with (
        Signals() as signals,
        pytest.raises(RunInterruptedError, match="all is saved"),
        signals.immediate("all is saved"),
    ):
        SignalsWhenDeleted()


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "now")
    assert [str(run_folder.default_folder("a")) for _ in range(3)] == ["runs/a-now", "runs/a-now-2", "runs/a-now-3"]


def test_features_do_not_depend_on_batches_workers_or_generators():
    data = synthetic_data(SyntheticSettings(1, 3, 12, 0, height=32, width=16))
    model = tiny().train()
    transform = build_transform(32, 16, train=False)
    state = torch.get_rng_state()
    (whole,) = evaluation.extract_features(model, data.gallery, transform, batch_size=64)
    parts = torch.cat(evaluation.extract_features(model, data.gallery, transform, batch_size=5, workers=1))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    some = evaluation.extract_features(model, data.gallery, transform, batch_size=5, rows=range(5, 12))
    assert [len(part) for part in some] == [5, 2]
    torch.testing.assert_close(torch.cat(some), whole[5:12], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert whole.shape == (len(data.gallery), 16)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(data.gallery)))


def plain_images(*colours):
    pictures = {f"{i}": Image.new("RGB", (20, 40), colour) for i, colour in enumerate(colours)}
    labels = np.arange(len(colours))
    return ImageList(
        identity=labels, camera=labels, viewpoint=labels * 0, viewpoint_name=("",) * len(colours),
        paths=tuple(pictures), loader=pictures.__getitem__,
    )  # fmt: skip


def test_baselines_on_plain_colours():
    images = plain_images((255, 0, 0), (250, 5, 10), (0, 0, 255))
    histogram = evaluation.colour_histogram_features(images).feature
    torch.testing.assert_close(histogram @ histogram.T, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    pixels = evaluation.raw_pixel_features(images).feature
    assert pixels.shape == (3, 3 * 64 * 32)
    assert pixels[0] @ pixels[1] > 0.99
    assert pixels[0] @ pixels[2] == 0


def test_rankings_leave_out_what_the_protocol_leaves_out():
    query = Features(feature=torch.zeros(1, 1), identity=[7], camera=[1], viewpoint=[0])
    feature = torch.tensor([0.1, 0.4, 0.2, 0.4, 0.3])[:, None]
    gallery = Features(feature=feature, identity=[7, 7, 3, 7, 3], camera=[1, 2, 1, -1, 2], viewpoint=[0] * 5)
    scores = evaluation.score(query, gallery)
    (row,) = rankings(query, gallery, {"trained": (scores, None)}, 3)
    assert row["query"] == 0
    assert row["trained"]["gallery"] == [2, 4, 1, 3]
    assert row["trained"]["average_precision"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert scores.overall.mAP == pytest.approx(row["trained"]["average_precision"])
    assert set(scores.by_viewpoint) == {"front"}


def test_choose_queries_takes_every_viewpoint_in_turn():
    viewpoint = np.array([0, 0, 0, 1, 1, 2, -1])
    precision = np.array([0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 0.4])
    chosen = choose_queries(viewpoint, precision, np.array([True] * 5 + [False, True]), 4)
    assert len(chosen) == len(set(chosen)) == 4
    assert {int(viewpoint[q]) for q in chosen} == {-1, 0, 1}
    assert choose_queries(viewpoint, precision, np.ones(7, bool), 99) == [6, 1, 2, 0, 4, 3, 5]
    assert choose_queries(viewpoint, precision, np.zeros(7, bool), 4) == []


def test_random_states_go_through_a_checkpoint(tmp_path):
    import random

    save_checkpoint(tmp_path / "a.pt", {"random": random_state()})
    drawn = (random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(1).item())
    set_random_state(load_checkpoint(tmp_path / "a.pt")["random"])
    assert drawn == (random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(1).item())


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        load_checkpoint(tmp_path / "missing.pt")
    save_checkpoint(tmp_path / "cut.pt", {"a": torch.zeros(1000)})
    data = (tmp_path / "cut.pt").read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.pt"):
            load_checkpoint(tmp_path / "cut.pt")
    torch.save({"format": 999}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="format 999"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_bit_that_flipped_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "last.pt"
    saved = {"weights": torch.arange(20.0), "step": 5, "names": ["a", "b"]}
    save_checkpoint(path, saved)
    written = path.read_bytes()
    directory = written.index(b"PK\x01\x02")
    refused = 0
    for position in (*range(0, directory, 5), *range(directory, len(written))):
        damaged = bytearray(written)
        damaged[position] ^= 16 if position >= directory else 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except ValueError:
            refused += 1
            continue
        assert torch.equal(found.pop("weights"), saved["weights"])
        assert found == {"format": 2, "step": 5, "names": ["a", "b"]}
    assert refused > 400


def test_a_file_of_weights_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.arange(5)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_tensors(tmp_path / "a.pt", "weights")["a"].tolist() == [0, 1, 2, 3, 4]


def test_weights_that_unpack_to_more_than_they_are_get_refused_unread(tmp_path):
    torch.save({"a": torch.zeros(2_000_000)}, tmp_path / "flat.pt")
    with (
        zipfile.ZipFile(tmp_path / "flat.pt") as flat,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in flat.namelist():
            bomb.writestr(name, flat.read(name))
    with pytest.raises(ValueError, match=r"a\.pt"):
        read_tensors(tmp_path / "a.pt", "weights")


def test_a_signal_in_the_middle_of_a_write_is_raised_as_what_it_is(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})

    class Interrupted(io.FileIO):
        def write(self, data):
            done = super().write(data)
            if not signals.received:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

    monkeypatch.setattr(io, "FileIO", Interrupted)
    with Signals() as signals, pytest.raises(RunInterruptedError), signals.immediate("all is saved"):
        save_checkpoint(tmp_path / "last.pt", {"step": 2, **{str(i): torch.zeros(100_000) for i in range(5)}})
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(torch.nn.Linear(2, 2), r"\(.*Linear was not an allowed global.*\)"), (b"<!DOCTYPE html>", r"\(.*operand 60\)")],
)
def test_what_holds_no_plain_tensors_is_refused_without_advice_to_run_it(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights: .*cannot be read: it holds more than tensors .*" + words) as caught:
        read_tensors(path, "weights")
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), TypeError("set_() received"), MemoryError()])
def test_whatever_a_damaged_checkpoint_fails_with_names_the_file(tmp_path, monkeypatch, error):
    def fail(path, **options):
        raise error

    (tmp_path / "odd.pt").write_bytes(b"odd")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=r"checkpoint: .*odd\.pt' cannot be read: (.*\w)"):
        load_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"garbage", "that is not JSON"), (b"\xff", "that is not JSON"), (b"5", "without a step: 5"),
        (b'{"loss": {}}', "without a step"),
    ],
)  # fmt: skip
def test_a_damaged_log_is_named(tmp_path, line, words):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    (tmp_path / "last.pt").touch()
    with pytest.raises(ValueError, match=rf"log\.jsonl' holds a line {words}"):
        RunFolder(tmp_path, resume=True).rewind_log(1, [])


def test_a_signal_while_a_file_is_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch, "load", interrupted)
    (tmp_path / "last.pt").touch()
    with Signals() as signals, pytest.raises(RunInterruptedError), signals.immediate("all is saved"):
        load_checkpoint(tmp_path / "last.pt")


def test_signals_are_kept_until_asked_for_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(RunInterruptedError), signals.immediate("all is saved"):
            pass
    assert signal.getsignal(signal.SIGTERM) is before
    with Signals() as signals, pytest.raises(RunInterruptedError), signals.immediate("all is saved"):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_block_that_postpones_a_signal_is_finished_before_it_is_raised():
    finished = []

    def work():
        with postponed():
            os.kill(os.getpid(), signal.SIGTERM)
            finished.append(sum(range(1000)))
        finished.append("too far")

    with Signals() as signals, pytest.raises(RunInterruptedError), signals.immediate("all is saved"):
        work()
    assert finished == [499500]
    with postponed():  # without anybody who waits for signals
        finished.clear()
    assert not finished


def test_a_loading_process_says_nothing_if_what_it_hands_over_is_not_taken(capfd):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def load():
        ignore_in_worker()
        theirs.send([resource_sharer.DupFd(theirs.fileno()) for _ in range(2)])
        theirs.recv()

    process = context.Process(target=load)
    process.start()
    left, taken = ours.recv()
    # What an interrupted main process does; the second one is handed over after that.
    Client(left._id[0], authkey=multiprocessing.current_process().authkey).close()
    os.close(taken.detach())
    ours.send(None)
    process.join()
    assert capfd.readouterr().err == ""


def test_a_terminal_of_few_letters_is_no_reason_to_stop(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    tell("\u2500 Zo\u00eb \udcff")
    assert written.getvalue() == b"? Zo? ?\n"


def test_table_lines_up():
    lines = table(("a", "long"), [("row", "1"), ("r", "22")]).splitlines()
    assert lines == ["a    long", "\u2500\u2500\u2500  \u2500\u2500\u2500\u2500", "row     1", "r      22"]
