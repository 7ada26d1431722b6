"""vareid rerank --neighbors: lists in files, re-ranked by one process or by shards of the queries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from _vareid_cli import run
from tests.factories import feature_array
from tests.test_neighbor_lists import exact_lists
from vareid_ext import k_reciprocal_from_neighbors
from vareid_ext.cli import rerank

SOUGHT = {"topk": 5, "k1": 6, "k2": 3, "lambda_value": 0.3}
OPTIONS = ["--topk", "5", "--k1", "6", "--k2", "3"]


def call(*arguments):
    return run(["rerank", *map(str, arguments), "--quiet"])


def content(path):
    with np.load(path) as file:
        return dict(file)


def lists_of(x, Q, k=18):
    return dict(zip(("index", "distance", "row_max"), exact_lists(x, Q, k), strict=True)) | {"num_query": Q}


@pytest.fixture
def features(tmp_path):
    """Groups far apart, so that lists of 18 hold all that counts; and junk near the queries."""
    x = (feature_array(96, 5) + 100 * (np.arange(96) % 8)[:, None]).astype(np.float32)
    identity = np.arange(72)
    identity[[4, 9, 33]] = -1
    np.savez(tmp_path / "q.npz", feature=x[:24])
    np.savez(tmp_path / "g.npz", feature=x[24:], identity=identity)
    return tmp_path / "q.npz", tmp_path / "g.npz"


@pytest.fixture
def lists(tmp_path):
    found = lists_of(feature_array(60, 5), 14)
    np.savez(tmp_path / "lists.npz", **found)
    return found


def expected_of(found, **changes):
    given = {"index": found["index"], "distance": found["distance"], "num_query": 14, "row_max": found.get("row_max")}
    return k_reciprocal_from_neighbors(**given | SOUGHT | changes)


def assert_holds(path, expected):
    found = content(path)
    np.testing.assert_array_equal(found["distance"], expected[0])
    np.testing.assert_array_equal(found["index"], expected[1])


@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_shards_of_exact_lists_are_the_bytes_of_a_re_ranking_of_the_features(features, tmp_path, capsys, count, suffix):
    """Lists that hold all that counts, which is said; more shards than queries, too."""
    whole = tmp_path / f"whole{suffix}"
    assert call(*features, "--output", whole, *OPTIONS) == 0
    assert run(["neighbors", *map(str, features), "--output", str(tmp_path / "l.npz"), "-k", "18", "--quiet"]) == 0
    capsys.readouterr()
    given = ["--neighbors", tmp_path / "l.npz", *OPTIONS]
    assert call(*given, "--output", tmp_path / f"one{suffix}") == 0
    assert "the lists reach far enough: this is what their features give" in capsys.readouterr().out
    assert (tmp_path / f"one{suffix}").read_bytes() == whole.read_bytes()
    names = [tmp_path / f"s{i}.npz" for i in range(1, count + 1)]
    for i, name in enumerate(names, start=1):
        assert call(*given, "--output", name, "--shard", f"{i}/{count}") == 0
    assert call("--merge", *names[::-1], "--output", tmp_path / f"merged{suffix}") == 0
    assert (tmp_path / f"merged{suffix}").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kind", ["random", "tied", "twice", "far"])
def test_features_and_short_lists_give_the_bytes_of_the_features_alone(backend, tmp_path, kind):
    """Junk, ties and duplicates included, however far the lists reach."""
    x = feature_array(120, 5, levels=3 if kind == "tied" else None)
    x = np.concatenate([x[:60], x[:60]]) if kind == "twice" else x * np.float32(1e-17) if kind == "far" else x
    identity = np.arange(90)
    identity[5:60:7] = -1
    np.save(tmp_path / "q.npy", x[:30])
    np.savez(tmp_path / "g.npz", feature=x[30:], identity=identity)
    features = [str(tmp_path / "q.npy"), str(tmp_path / "g.npz")]
    lists = str(tmp_path / "l.npz")
    assert run(["neighbors", *features, "--output", lists, "-k", "7", "--quiet"]) == 0
    options = ["--topk", 20, "--k1", 6, "--k2", 3]
    assert call(*features, "--output", tmp_path / "whole.npz", *options) == 0
    names = [tmp_path / f"s{i}.npz" for i in (1, 2, 3, 4)]
    for i, name in enumerate(names, start=1):
        assert call(*features, "--neighbors", lists, "--output", name, *options, "--shard", f"{i}/4") == 0
    assert call("--merge", *names, "--output", tmp_path / "merged.npz") == 0
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_features_that_the_lists_are_not_of_are_refused(features, tmp_path, capsys, lists):
    def made(name, *arguments):
        path = str(tmp_path / name)
        assert run(["neighbors", *map(str, features), "--output", path, "--quiet", *arguments]) == 0
        return path

    good, other = made("l.npz", "-k", "9"), made("c.npz", "--metric", "cosine")
    ended = tmp_path / "ended.npz"
    found = content(good)
    found["index"][5, 2:] = -1
    np.savez(ended, **found)
    changed = {**content(features[1])}
    changed["feature"][3, 2] += 1
    np.savez(tmp_path / "g2.npz", **changed)
    output = ["--output", tmp_path / "b.npz", *OPTIONS]
    for gallery, of_lists, arguments, message in (
        (tmp_path / "g2.npz", good, [], "l.npz is of other features than"),
        (features[0], good, [], "l.npz is of other features than"),
        (features[1], good, ["--junk-identity", "none"], "l.npz is of other features than"),
        (features[1], other, [], "c.npz holds cosine distances; with QUERY and GALLERY the squared distances"),
        (features[1], tmp_path / "lists.npz", [], "lists.npz holds lists of another program; with QUERY"),
        (features[1], good, ["--k1", "9"], "has lists of 9 images, but k1 and k2 need 10; vareid neighbors -k 10"),
        (features[1], good, ["--metric", "cosine"], "--metric: is for lists alone, but QUERY was given"),
        (features[1], good, ["--num-query", "24"], "--num-query: is for lists alone, but QUERY was given"),
        (features[1], ended, [], "index: holds -1"),
        (features[1], good, ["--topk", "70"], "topk: 70 was given; allowed are 1 to 69"),
    ):
        capsys.readouterr()
        assert call(features[0], gallery, "--neighbors", of_lists, *output, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b.npz").exists()


def test_a_shard_that_is_done_is_not_made_again(lists, tmp_path, capsys, monkeypatch):
    arguments = ("--neighbors", tmp_path / "lists.npz", *OPTIONS, "--shard", "2/3", "--output", tmp_path / "s.npz")
    assert call(*arguments) == 0
    whole, before = (tmp_path / "s.npz").read_bytes(), (tmp_path / "s.npz").stat()
    with monkeypatch.context() as patch:
        patch.setattr(rerank, "rerank_lists", None)
        capsys.readouterr()
        assert call(*arguments, "--json") == 0
        assert json.loads(capsys.readouterr().out)["done_before"] is True
    after = (tmp_path / "s.npz").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    (tmp_path / "s.npz").write_bytes(whole[:-50])
    assert call(*arguments) == 0
    assert (tmp_path / "s.npz").read_bytes() == whole
    np.savez(tmp_path / "lists.npz", **lists | {"row_max": 2 * lists["row_max"]})
    assert call(*arguments) == 0
    assert (tmp_path / "s.npz").read_bytes() != whole


@pytest.mark.parametrize("names", [("indices", "distances"), ("I", "D"), ("ids", "scores"), ("Neighbors", "dist")])
def test_lists_of_other_programs_have_other_names(lists, tmp_path, names):
    np.savez(tmp_path / "x.npz", **dict(zip(names, (lists["index"], lists["distance"]), strict=True)))
    given = ["--neighbors", tmp_path / "x.npz", "--num-query", 14, *OPTIONS, "--output", tmp_path / "b.npz"]
    assert call(*given) == 0
    assert_holds(tmp_path / "b.npz", expected_of(lists, row_max=None))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_a_file_for_each_array_will_do(lists, tmp_path, suffix):
    names = [tmp_path / f"{name}{suffix}" for name in ("index", "distance", "row_max")]
    for path in names:
        value = lists[path.stem]
        if suffix == ".pt":
            torch.save(torch.from_numpy(value), path)
        else:
            (np.save if suffix == ".npy" else np.savez)(path, value)
    given = ["--num-query", 14, *OPTIONS, "--output", tmp_path / "b.npz"]
    assert call("--neighbors", *names, *given) == 0
    assert_holds(tmp_path / "b.npz", expected_of(lists))
    assert call("--neighbors", *names[:2], *given) == 0
    assert_holds(tmp_path / "b.npz", expected_of(lists, row_max=None))


@pytest.mark.parametrize("dtype", ["uint32", "uint64", "int64", "int16"])
def test_what_was_not_found_may_be_the_largest_number_that_there_is(lists, tmp_path, dtype):
    """As programs without negative numbers write it."""
    index = lists["index"].astype(np.int64)
    index[3, 12:] = index[20, 9:] = -1
    np.savez(tmp_path / "x.npz", **lists | {"index": index.astype(dtype)})
    assert call("--neighbors", tmp_path / "x.npz", *OPTIONS, "--output", tmp_path / "b.npz") == 0
    assert_holds(tmp_path / "b.npz", expected_of(lists | {"index": index}))


def test_distances_of_other_kinds_are_made_squares(tmp_path):
    x = feature_array(60, 5).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = {name: value.astype(np.float64) if name in ("distance", "row_max") else value
             for name, value in lists_of(x, 14).items()}  # fmt: skip
    expected = expected_of(found)
    for metric, change in {
        "sqeuclidean": lambda d: d, "euclidean": np.sqrt, "cosine": lambda d: d / 2, "similarity": lambda d: 1 - d / 2,
    }.items():  # fmt: skip
        values = {name: change(found[name]) for name in ("distance", "row_max")}
        np.savez(tmp_path / "x.npz", **found | values)
        given = ["--neighbors", tmp_path / "x.npz", "--metric", metric, *OPTIONS, "--output", tmp_path / "b.npz"]
        assert call(*given) == 0
        np.testing.assert_allclose(content(tmp_path / "b.npz")["distance"], expected[0], atol=1e-6)
        np.testing.assert_array_equal(content(tmp_path / "b.npz")["index"], expected[1])


def test_what_stands_beside_the_end_of_a_list_counts_for_nothing(lists, tmp_path, recwarn):
    lists["index"][3, 12:] = -1
    rooted = {name: np.sqrt(lists[name]) for name in ("distance", "row_max")}
    expected = expected_of(lists | {name: np.square(values) for name, values in rooted.items()})
    rooted["distance"][3, 12:] = 3.4e38
    np.savez(tmp_path / "x.npz", **lists | rooted)
    given = ["--neighbors", tmp_path / "x.npz", "--metric", "euclidean", *OPTIONS, "--output", tmp_path / "b.npz"]
    assert call(*given) == 0
    assert_holds(tmp_path / "b.npz", expected)
    assert not recwarn.list


def test_distances_are_no_similarities(lists, tmp_path, capsys):
    given = ["--neighbors", tmp_path / "lists.npz", *OPTIONS, "--output", tmp_path / "b.npz"]
    assert call(*given, "--metric", "similarity") == 2
    assert "--metric: similarity was given, but no row's values fall, so they look like distances" in (
        capsys.readouterr().err
    )
    np.savez(tmp_path / "lists.npz", **lists | {"distance": lists["distance"][:, ::-1]})
    assert call(*given) == 2
    assert "distance: no row's values rise, so they look like similarities" in capsys.readouterr().err


def test_an_index_alone_is_no_list(lists, tmp_path, capsys):
    np.save(tmp_path / "I.npy", lists["index"])
    assert call("--neighbors", tmp_path / "I.npy", *OPTIONS, "--num-query", 14, "--output", tmp_path / "b.npz") == 2
    error = capsys.readouterr().err
    assert "I.npy: holds one array without a name; index and distance are needed, or a file for each: " in error
    assert "--neighbors INDEX DISTANCE [ROW_MAX]" in error


def test_the_help_says_what_is_needed(capsys):
    assert call("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ROW_MAX each row's smallest" in said
    assert "Give QUERY and GALLERY whenever you have them" in said


def test_how_far_lists_reach_is_said(lists, tmp_path, capsys):
    given = ["--neighbors", tmp_path / "lists.npz", *OPTIONS, "--output", tmp_path / "b.npz"]
    short = lists_of(feature_array(60, 5), 14, 7)
    for k, changes, said in (
        (60, {}, "the lists reach far enough: if they and row_max are exact, this is what their features give"),
        (7, {}, "beyond the lists: "),
        (7, {"index": np.where(np.arange(60)[:, None] == 3, -1, short["index"])}, "the lists of 1 rows are shorter"),
    ):
        np.savez(tmp_path / "lists.npz", **lists_of(feature_array(60, 5), 14, k) | changes)
        capsys.readouterr()
        assert call(*given) == 0
        assert said in capsys.readouterr().out
    np.savez(tmp_path / "lists.npz", index=short["index"], distance=short["distance"])
    assert call(*given, "--num-query", 14, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["results_beyond_lists"] > 0
    for i in (1, 2):
        assert call(*given[:-1], tmp_path / f"{i}.npz", "--num-query", 14, "--shard", f"{i}/2") == 0
    assert "row_max: not given" in capsys.readouterr().out
    assert call("--merge", tmp_path / "1.npz", tmp_path / "2.npz", "--output", tmp_path / "m.npz", "--json") == 0
    assert json.loads(capsys.readouterr().out)["results_beyond_lists"] == json.loads(shown.out)["results_beyond_lists"]


def test_shards_that_do_not_go_together_are_refused(lists, tmp_path, capsys):
    np.savez(
        tmp_path / "others.npz",
        **lists | {"distance": lists["distance"] * np.float32(1.5), "row_max": 1e3 + lists["row_max"]},
    )
    plans = {
        "a": ("lists", "1/2", []), "b": ("lists", "2/2", []), "third": ("lists", "2/3", []),
        "others": ("others", "2/2", []), "k1": ("lists", "2/2", ["--k1", "5"]), "topk": ("lists", "2/2", ["--topk", 4]),
    }  # fmt: skip
    for name, (file, shard, options) in plans.items():
        given = ["--neighbors", tmp_path / f"{file}.npz", *OPTIONS, *options, "--shard", shard]
        assert call(*given, "--output", tmp_path / f"s-{name}.npz") == 0
    arrays, whole = content(tmp_path / "s-b.npz"), (tmp_path / "s-b.npz").read_bytes()
    (tmp_path / "s-cut.npz").write_bytes(whole[:-100])
    np.savez(tmp_path / "s-rows.npz", **arrays | {"distance": arrays["distance"][1:]})
    np.savez(tmp_path / "s-strange.npz", **arrays | {"request": '["a list"]'})
    for names, message in (
        (["a"], "--merge: shards 2/2 are missing"),
        (["third"], "--merge: shards 1/3, 3/3 are missing"),
        (["b", "b"], "s-b.npz: shard 2/2 was given twice"),
        (["a", "others"], "s-others.npz: is of other lists or options than"),
        (["a", "k1"], "s-k1.npz: is of other lists or options than"),
        (["a", "topk"], "s-topk.npz: is of other lists or options than"),
        (["a", "third"], "s-third.npz: is of other lists or options than"),
        (["a", "cut"], "s-cut.npz: cannot be read"),
        (["a", "rows"], "s-rows.npz: is damaged: distance holds [6, 5]; [7, 5] is needed"),
        (["a", "strange"], "s-strange.npz: is no shard of vareid rerank"),
    ):
        capsys.readouterr()
        assert call("--merge", *[tmp_path / f"s-{name}.npz" for name in names], "--output", tmp_path / "m.npz") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "m.npz").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--topk", "0"], "topk: 0 was given"),
        ({}, ["--k1", "40"], "index: lists of 18 rows were given; k1 and k2 need 41"),
        ({}, ["--num-query", "13"], "--num-query: 13 was given, but lists.npz says 14"),
        ({}, ["--junk-identity", "3"], "--junk-identity: is for features, but --neighbors was given"),
        ({}, ["--max-memory", "3G"], "--max-memory: is for features, but --neighbors was given"),
        ({}, ["--shard", "1/2", "--output", "b.npy"], "b.npy: suffix '.npy' was given; allowed are .npz"),
        ({"num_query": None}, [], "--num-query: is needed, as the lists do not say"),
        ({"num_query": np.array([1, 2])}, [], "lists.npz: num_query is int64 [2]; whole numbers [] are needed"),
        ({"distance": None}, [], "lists.npz: holds index, row_max, num_query; index and distance are needed"),
        ({"distance": np.ones((60, 17), np.float32)}, [], "distance: shape [60, 17]"),
        ({"index": np.ones((60, 18), np.int32)}, [], "index: row 0 lists a row twice"),
        ({"index": np.ones((60, 18), np.float32)}, [], "index: dtype float32"),
        ({"shard": np.array([1, 2])}, [], "lists.npz: is one shard of lists; vareid neighbors --merge puts them"),
        ({"request": '{"metric": "cosine", "gallery": 46}'}, ["--metric", "euclidean"], "says cosine"),
        ({"request": '{"metric": "length", "gallery": 46}'}, [], "request names the metric 'length'"),
        (
            {"request": '{"metric": "cosine", "gallery": 46}', "gallery_row": np.arange(3)}, [],
            "lists.npz: gallery_row is int64 [3]; whole numbers [46] are needed",
        ),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_re_ranked_are_refused(lists, tmp_path, monkeypatch, capsys, change, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.savez("lists.npz", **{name: value for name, value in (lists | change).items() if value is not None})
    before = sorted(tmp_path.iterdir())
    assert call("--neighbors", "lists.npz", "--output", "b.npz", *OPTIONS, *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q.npz", "g.npz", "--shard", "1/2"], "--shard: is for neighbour lists; --neighbors LISTS is needed, too"),
        (["q.npz", "g.npz", "--num-query", "3"], "--num-query: is for neighbour lists"),
        (["q.npz", "g.npz", "--metric", "cosine"], "--metric: is for neighbour lists"),
        (["q.npz", "g.npz", "--neighbors", "l.npz"], "--topk: nothing was given; lists are re-ranked for the best K"),
        (["q.npz", "--neighbors", "q.npz", "--topk", "3"], "q.npz: does not exist"),
        (["--neighbors", "l.npz", "--plan"], "--plan: is for features, but --neighbors was given"),
        (["--neighbors", "l.npz"], "--topk: nothing was given; lists are re-ranked for the best K"),
        (["--neighbors", "l.npz", "--topk", "3"], "l.npz: does not exist"),
        (["--neighbors", *"abcd", "--topk", "3"], "--neighbors: 4 files were given; 1 to 3 are needed"),
        (["--merge", "l.npz", "--neighbors", "l.npz"], "--merge: takes shards alone, but --neighbors was"),
        (["--merge", "l.npz", "--k1", "5"], "--merge: takes shards alone, but --k1 was given too"),
        (["--merge", "l.npz", "--k2", "5"], "--merge: takes shards alone, but --k2 was given too"),
        (["--merge", "l.npz", "--lambda-value", "0"], "--merge: takes shards alone, but --lambda-value was given too"),
        (["q.npz"], "QUERY, GALLERY: both are needed"),
        ([], "QUERY, GALLERY: both are needed"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    output = "r.npz" if "--topk" in arguments or "--merge" in arguments else "r.npy"
    assert call(*arguments, "--output", output) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
