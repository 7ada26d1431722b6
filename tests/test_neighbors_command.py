"""vareid neighbors: exact lists in files, by one process or by shards, which are the same bytes."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from _vareid_cli import run
from tests.factories import feature_array
from tests.large.memory import peak_memory
from tests.reranking_truth import squared_distances
from vareid_ext import _native
from vareid_ext.cli import shards
from vareid_ext.retrieval import plan
from vareid_ext.retrieval.joint_lists import JointLists

BLOCKS = ["--block-rows", "16"]  # many of them


def call(*arguments):
    return run(["neighbors", *map(str, arguments), "--quiet"])


def content(path):
    with np.load(path) as file:
        return dict(file)


def rows_of(kind, count=130):
    if kind == "tied":
        return feature_array(count, 4, levels=3)
    if kind == "twice":
        return np.concatenate([feature_array(count // 2, 6)] * 2)
    if kind == "equal":
        return np.repeat(feature_array(1, 4), count, 0)
    return feature_array(count, 6)


def written(folder, x, queries, junk=()):
    """The two files of some features; the gallery's rows of these numbers are junk."""
    identity = np.arange(len(x) - queries)
    identity[list(junk)] = -1
    np.savez(folder / "q.npz", feature=x[:queries])
    np.savez(folder / "g.npz", feature=x[queries:], identity=identity)
    return folder / "q.npz", folder / "g.npz"


@pytest.fixture
def files(tmp_path):
    return written(tmp_path, rows_of("random"), 37)


@pytest.mark.parametrize("kind", ["random", "tied", "twice", "equal"])
def test_the_lists_are_those_of_a_sort_of_all_distances(backend, tmp_path, kind):
    x = rows_of(kind)
    junk = np.arange(3, 60, 7)
    assert call(*written(tmp_path, x, 37, junk), "--output", tmp_path / "l.npz", "-k", 11, *BLOCKS) == 0
    found = content(tmp_path / "l.npz")
    kept = np.delete(x, 37 + junk, axis=0)
    distance = squared_distances(kept, kept)
    order = np.argsort(distance, axis=1, kind="stable")[:, :11]
    assert list(found) == ["index", "distance", "row_max", "num_query", "gallery_row", "request"]
    assert (found["index"].dtype, found["distance"].dtype, found["row_max"].dtype) == ("int32", "float32", "float32")
    np.testing.assert_array_equal(found["index"], order)
    np.testing.assert_allclose(found["distance"], np.take_along_axis(distance, order, 1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found["row_max"], distance.max(1), rtol=1e-4, atol=1e-4)
    assert found["num_query"] == 37
    np.testing.assert_array_equal(x[37:][found["gallery_row"]], kept[37:])


def test_the_cosine_is_that_of_rows_of_length_1(tmp_path):
    x = rows_of("random")
    assert call(*written(tmp_path, x, 37), "--output", tmp_path / "l.npz", "--metric", "cosine", *BLOCKS) == 0
    unit = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    distance = np.sort(squared_distances(unit, unit) / 2, axis=1)
    found = content(tmp_path / "l.npz")
    np.testing.assert_allclose(found["distance"], distance[:, :100], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found["row_max"], distance[:, -1], rtol=1e-5)
    assert "gallery_row" not in found


@pytest.mark.parametrize("kind", ["random", "tied", "equal"])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_shards_together_are_the_bytes_of_the_whole(tmp_path, monkeypatch, kind, count):
    """Also more of them than there are blocks, in any order, and some rows at a time."""
    files = written(tmp_path, rows_of(kind), 37, (5, 6, 30))
    assert call(*files, "--output", tmp_path / "whole.npz", "-k", 9, *BLOCKS) == 0
    monkeypatch.setattr(plan, "_ROWS_AT_ONCE", 40)
    names = [tmp_path / f"s{i}.npz" for i in range(1, count + 1)]
    rows = 0
    for i, name in enumerate(names, start=1):
        assert call(*files, "--output", name, "-k", 9, *BLOCKS, "--shard", f"{i}/{count}") == 0
        rows += len(content(name)["index"])
    assert rows == 127
    assert call("--merge", *names[::-1], "--output", tmp_path / "merged.npz") == 0
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_more_shards_than_rows_leave_some_empty(tmp_path):
    files = written(tmp_path, rows_of("random", 4), 1)
    names = [tmp_path / f"s{i}.npz" for i in range(1, 8)]
    for i, name in enumerate(names, start=1):
        assert call(*files, "--output", name, "--shard", f"{i}/7", "--block-rows", 1) == 0
    assert sorted(len(content(name)["index"]) for name in names) == [0, 0, 0, 1, 1, 1, 1]
    assert call("--merge", *names, "--output", tmp_path / "all.npz") == 0
    assert content(tmp_path / "all.npz")["index"][:, 0].tolist() == [0, 1, 2, 3]


def test_a_shard_that_is_done_is_not_made_again(files, tmp_path, monkeypatch, capsys):
    arguments = (*files, "--output", tmp_path / "s.npz", "--shard", "1/2", *BLOCKS)
    assert call(*arguments) == 0
    before = (tmp_path / "s.npz").stat()
    monkeypatch.setattr(JointLists, "rows", None)
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == 52
    assert call(*arguments) == 0
    assert "is done already" in capsys.readouterr().out
    after = (tmp_path / "s.npz").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    monkeypatch.undo()
    whole = (tmp_path / "s.npz").read_bytes()
    for changed in (whole[:-300], b"", b"no archive"):  # what a copy that was cut off would be
        (tmp_path / "s.npz").write_bytes(changed)
        assert call(*arguments) == 0
        assert (tmp_path / "s.npz").read_bytes() == whole
    for other in (["-k", 5], ["--metric", "cosine"], ["--shard", "1/3"], ["--shard", "2/2"]):
        assert call(*arguments, *other) == 0
        assert (tmp_path / "s.npz").read_bytes() != whole
        (tmp_path / "s.npz").write_bytes(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_shard_that_was_stopped_goes_on_where_it_was(files, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(plan, "_ROWS_AT_ONCE", 40)
    arguments = (*files, "--output", tmp_path / "s.npz", *BLOCKS)
    assert call(*files, "--output", tmp_path / "whole.npz", *BLOCKS) == 0
    (tmp_path / "s.npz").write_bytes(b"an older result")
    made, rows_of_lists = [], JointLists.rows

    def stopped(lists, begin, end):
        if len(made) == 2:
            signal.raise_signal(number)
        made.append((begin, end))
        return rows_of_lists(lists, begin, end)

    monkeypatch.setattr(JointLists, "rows", stopped)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us ignoring it
    try:
        assert call(*arguments) == 128 + number
    finally:
        signal.signal(signal.SIGINT, handler)
    done = made[-1][1]
    assert 0 < done < 130
    error = capsys.readouterr().err
    assert f"{done} of 130 rows are done; the same command goes on there" in error
    assert "s.npz is as it was" in error
    assert (tmp_path / "s.npz").read_bytes() == b"an older result"
    assert call(*arguments, "-k", 8) == 2
    assert "holds what another command has begun (other features or options)" in capsys.readouterr().err
    monkeypatch.setattr(JointLists, "rows", rows_of_lists)
    assert call(*arguments) == 0
    assert f"{done} of them by an earlier start" in capsys.readouterr().out
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_a_killed_shard_leaves_no_half_of_a_file(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.Parts, "read", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        call(*files, "--output", tmp_path / "s.npz", "--shard", "1/2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.npz", "q.npz", "s.npz.parts"]


def test_what_a_kill_behind_the_result_has_left_is_removed(files, tmp_path, monkeypatch, capsys):
    """By the same command, which says that it is done; another's parts stay, and a half of them is nobody else's."""
    arguments = (*files, "--output", tmp_path / "s.npz", *BLOCKS)
    left = tmp_path / "s.npz.parts"
    remove = shards.Parts.remove
    with monkeypatch.context() as patch:
        patch.setattr(shards.Parts, "remove", lambda _: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            call(*arguments)
        patch.setattr(shards.Parts, "remove", remove)
        patch.setattr(shards.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(SystemExit))
        assert (tmp_path / "s.npz").exists()
        assert list(left.glob("*.npy"))
        with pytest.raises(SystemExit):
            call(*arguments)
    assert sorted(path.name for path in left.iterdir()) == [".lock", "request"]
    assert call(*arguments, "-k", 5) == 2
    assert "holds what another command has begun" in capsys.readouterr().err
    assert call(*arguments) == 0
    assert "is done already" in capsys.readouterr().out
    assert not left.exists()
    left.mkdir()
    (left / "request").write_text("another")
    assert call(*arguments) == 0
    assert (left / "request").read_text() == "another"


@pytest.mark.parametrize("options", [["-k", 5], ["--metric", "cosine"], BLOCKS, ["--max-memory", "2G"], ["--plan"]])
def test_a_merge_takes_no_other_options(tmp_path, capsys, options):
    assert call("--merge", tmp_path / "a.npz", "--output", tmp_path / "m.npz", *options) == 2
    assert f"--merge: takes shards alone, but {options[0]} was given too" in capsys.readouterr().err


def test_the_help_says_what_a_part_is_and_how_long_lists_are(capsys):
    assert call("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the I-th of N equal parts of the rows, in whole blocks of 1,024 rows" in said
    assert "looks at max(k1 + 1, k2) images of a list" in said
    assert "-k 21 suffices" in said


@pytest.fixture
def made(files, tmp_path):
    """Shards by name: two halves, and what does not go with them."""
    x = feature_array(130, 6)
    x[129, 5] += 1e-6
    (tmp_path / "o").mkdir()
    other = written(tmp_path / "o", x, 37)
    plans = {
        "a": (files, "1/2", []), "b": (files, "2/2", []), "third": (files, "2/3", []), "features": (other, "2/2", []),
        "metric": (files, "2/2", ["--metric", "cosine"]), "shorter": (files, "2/2", ["-k", 5]),
    }  # fmt: skip
    for name, (sides, shard, options) in plans.items():
        assert call(*sides, "--output", tmp_path / f"{name}.npz", "--shard", shard, *BLOCKS, *options) == 0
    return {name: tmp_path / f"{name}.npz" for name in plans}


def test_shards_that_do_not_go_together_are_refused(made, files, tmp_path, capsys):
    arrays, whole = content(made["b"]), made["b"].read_bytes()
    made["cut"] = tmp_path / "cut.npz"
    made["cut"].write_bytes(whole[:-500])
    made["middle"] = tmp_path / "middle.npz"
    made["middle"].write_bytes(whole[:2000] + whole[4000:])
    made["rows"] = tmp_path / "rows.npz"
    np.savez(made["rows"], **arrays | {"index": arrays["index"][:-1]})
    made["less"] = tmp_path / "less.npz"
    np.savez(made["less"], **{name: value for name, value in arrays.items() if name != "row_max"})
    made["extract"] = tmp_path / "extract.npz"
    np.savez(made["extract"], feature=np.ones((3, 2)), request="abc", shard=[2, 2])
    made["whole"] = tmp_path / "whole.npz"
    assert call(*files, "--output", made["whole"], *BLOCKS) == 0
    for names, message in (
        (["a"], "--merge: shards 2/2 are missing"),
        (["third"], "--merge: shards 1/3, 3/3 are missing"),
        (["a", "a"], "a.npz: shard 1/2 was given twice"),
        (["a", "features"], "features.npz: is of other features or options than"),
        (["a", "metric"], "metric.npz: is of other features or options than"),
        (["a", "shorter"], "shorter.npz: is of other features or options than"),
        (["a", "third"], "third.npz: is of other features or options than"),
        (["a", "whole"], "whole.npz: is no shard: it was not made with --shard"),
        (["a", "cut"], "cut.npz: cannot be read"),
        (["a", "middle"], "middle.npz: "),
        (["a", "rows"], "rows.npz: is damaged: index holds [77, 100]; [78, 100] is needed"),
        (["a", "less"], "less.npz: is damaged: row_max holds nothing; [78] is needed"),
        (["a", "extract"], "extract.npz: is no shard of vareid neighbors"),
        (["a", "nothing"], "nothing.npz: does not exist"),
    ):
        capsys.readouterr()
        assert call("--merge", *[tmp_path / f"{name}.npz" for name in names], "--output", tmp_path / "m.npz") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "m.npz").exists()
    assert call("--merge", made["a"], made["b"], "--output", made["a"]) == 2
    assert "is one of the input files" in capsys.readouterr().err
    assert call(files[0], "--merge", made["a"], made["b"], "--output", tmp_path / "m.npz") == 2
    assert "--merge: takes shards alone, but QUERY was given too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gallery", "arguments", "message"),
    [
        (feature_array(0, 6), [], "gallery: no rows were given"),
        (feature_array(9, 5), [], "gallery: features of 5 elements"),
        (np.full((9, 6), np.inf, np.float32), [], "gallery: row 0 holds NaN or Inf"),
        (feature_array(9, 6), ["-k", "47"], "k: 47 was given; allowed are 1 to 46"),
        (feature_array(9, 6), ["-k", "0"], "k: 0 was given"),
        (feature_array(9, 6), ["--metric", "euclidean"], "--metric"),
        (feature_array(9, 6) * 0, ["--metric", "cosine"], "gallery: row 0"),
        (feature_array(9, 6), ["--shard", "0/2"], "--shard: '0/2' was given"),
        (feature_array(9, 6), ["--max-memory", "1M"], "max_memory: 1048576 bytes were given, but the least needed is"),
        (feature_array(9, 6), ["--block-rows", "0"], "block_rows: 0"),
        (None, [], "QUERY, GALLERY: both are needed"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(tmp_path, capsys, gallery, arguments, message):
    np.save(tmp_path / "q.npy", feature_array(37, 6))
    files = [tmp_path / "q.npy"]
    if gallery is not None:
        np.save(tmp_path / "g.npy", gallery)
        files.append(tmp_path / "g.npy")
    before = sorted(tmp_path.iterdir())
    assert call(*files, "--output", tmp_path / "l.npz", *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_memory_is_said_before_the_work_and_kept(files, tmp_path, capsys):
    assert call(*files, "--output", tmp_path / "l.npz", "--plan", *BLOCKS) == 0
    assert "lists of 130 rows at once, in blocks of 16: " in capsys.readouterr().err
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    limit, used = peak_memory(
        """
import torch
from vareid_ext.retrieval import plan
from vareid_ext.retrieval.joint_lists import JointLists

small = torch.randn(60, 64)
JointLists(small[:20], small[20:]).rows(0, 60)
torch.randn(600, 64) @ torch.randn(64, 600)
x = torch.randn(12000, 64)
lists = JointLists(x[:2000], x[2000:], max_memory=24 << 20)
limit = lists.plan.peak
print(limit)
""",
        "lists.rows(0, lists.piece(0))",
    )
    assert used <= limit + (4 << 20)  # the buffers of the vendor's product differ between processors
