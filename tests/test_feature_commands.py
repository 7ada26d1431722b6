"""The command lines on feature files, rerank and evaluate: right results, named errors, outputs whole or untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_feature_files import images
from vareid_ext import (
    evaluate_cross_viewpoint,
    evaluate_features,
    evaluate_ranking,
    evaluate_single_viewpoint,
    k_reciprocal_rerank,
    verify_features,
)
from vareid_ext.cli.evaluate import main as evaluate
from vareid_ext.cli.rerank import main as rerank
from vareid_ext.metrics import evaluate_by_group

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sides(tmp_path):
    """Two .npz files and what is in them."""
    query, gallery = images(0, 14), images(1, 40)
    np.savez(tmp_path / "q.npz", **query)
    np.savez(tmp_path / "g.npz", **gallery)
    return str(tmp_path / "q.npz"), str(tmp_path / "g.npz"), query, gallery


# ---- python -m vareid_ext.rerank ----------------------------------------------------------------------------------


def test_rerank_writes_the_matrix(sides, tmp_path, capsys):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / "result.npy"
    output.write_text("an older result")
    assert rerank([query_file, gallery_file, "--output", str(output), "--k1", "8", "--quiet"]) == 0
    expected = k_reciprocal_rerank(query["feature"], gallery["feature"], k1=8)
    np.testing.assert_array_equal(np.load(output), expected)
    assert np.load(output).dtype == np.float32
    assert str(output) in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.npz", "q.npz", "result.npy"]
    assert output.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_rerank_writes_the_best(sides, tmp_path, suffix):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / f"best{suffix}"
    assert rerank([query_file, gallery_file, "--output", str(output), "--topk", "4", "--quiet"]) == 0
    distance, index = k_reciprocal_rerank(query["feature"], gallery["feature"], topk=4)
    found = np.load(output)
    np.testing.assert_array_equal(found["index"], index)
    np.testing.assert_array_equal(found["distance"], distance)


def run(module, *arguments, **keywords):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), *sys.path) if path)}
    return subprocess.run(
        [sys.executable, "-m", f"vareid_ext.{module}", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=600, check=False, **keywords,
    )  # fmt: skip


def test_rerank_as_a_command(sides, tmp_path):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / "result.npy"
    done = run("rerank", query_file, gallery_file, "--output", output, "--plan", "--max-memory", "1G")
    assert done.returncode == 0, done.stderr
    assert "re-ranking" in done.stderr
    np.testing.assert_allclose(np.load(output), k_reciprocal_rerank(query["feature"], gallery["feature"]), atol=1e-6)


@pytest.fixture
def junk(tmp_path, sides):
    """A gallery file with junk in it: near copies of the queries, which are in everybody's neighbourhood."""
    _, gallery_file, query, gallery = sides
    at = np.arange(3, 39, 4)
    gallery["feature"][at] = query["feature"][: len(at)] * 1.01
    gallery["identity"][at] = -1
    np.savez(gallery_file, **gallery)
    kept = gallery["identity"] != -1
    assert 0 < kept.sum() < len(kept)
    return kept


def test_rerank_and_evaluate_leave_the_same_junk_out(sides, junk, tmp_path, capsys):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / "result.npy"
    assert rerank([query_file, gallery_file, "--output", str(output), "--quiet"]) == 0
    assert f"{(~junk).sum()} of 40" in capsys.readouterr().out
    found = np.load(output)
    without_junk = k_reciprocal_rerank(query["feature"], gallery["feature"][junk])
    np.testing.assert_array_equal(found[:, junk], without_junk)
    assert found[:, junk].max() < found[:, ~junk].min()
    metrics = evaluate_ranking(found, *labels(query, gallery))
    reranked = results_of(tmp_path, "--features", query_file, gallery_file, "--rerank")["reranked"]
    assert metrics.mAP == pytest.approx(reranked["mAP"], abs=1e-12)
    assert metrics.mAP != evaluate_ranking(
        k_reciprocal_rerank(query["feature"], gallery["feature"]), *labels(query, gallery)
    ).mAP  # fmt: skip


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_the_best_are_no_junk_and_numbered_as_in_the_file(sides, junk, tmp_path, suffix):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / f"best{suffix}"
    assert rerank([query_file, gallery_file, "--output", str(output), "--topk", "4", "--quiet"]) == 0
    distance, index = k_reciprocal_rerank(query["feature"], gallery["feature"][junk], topk=4)
    np.testing.assert_array_equal(np.load(output)["index"], np.flatnonzero(junk)[index])
    np.testing.assert_array_equal(np.load(output)["distance"], distance)


@pytest.mark.parametrize("how", ["none", "another", "no labels", "text", "file"])
def test_what_rerank_takes_for_junk(sides, junk, tmp_path, capsys, how):
    query_file, gallery_file, query, gallery = sides
    arguments, kept = [], np.ones(40, dtype=bool)
    if how in ("none", "another"):
        arguments = ["--junk-identity", "none" if how == "none" else "2"]
        kept = kept if how == "none" else gallery["identity"] != 2
    elif how == "text":
        np.savez(gallery_file, feature=gallery["feature"], identity=np.array(["anna"] * 40))
    else:
        np.save(tmp_path / "labels.npy", gallery["identity"])
        np.savez(gallery_file, feature=gallery["feature"])
    if how == "file":
        arguments, kept = ["--gallery-identity", str(tmp_path / "labels.npy")], junk
    output = tmp_path / "result.npy"
    assert rerank([query_file, gallery_file, "--output", str(output), "--quiet", *arguments]) == 0
    expected = k_reciprocal_rerank(query["feature"], gallery["feature"][kept])
    np.testing.assert_array_equal(np.load(output)[:, kept], expected)
    assert "junk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        ({"identity": np.full(40, -1)}, [], "g.npz"),
        ({"identity": np.arange(3)}, ["--gallery-identity", "identity"], "identity"),
        ({}, ["--junk-identity", str(2**70)], "junk_identity"),
    ],
)
def test_junk_that_cannot_be_left_out_is_an_error(sides, tmp_path, capsys, change, arguments, named):
    query_file, gallery_file, _, gallery = sides
    np.savez(gallery_file, **{**gallery, **change})
    assert rerank([query_file, gallery_file, "--output", str(tmp_path / "r.npy"), "--quiet", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "r.npy").exists()


@pytest.mark.parametrize("command", [rerank, evaluate])
def test_a_junk_identity_that_is_no_number_is_shown(command, capsys):
    assert command(["--junk-identity", "anna"]) == 2
    message = capsys.readouterr().err
    assert "--junk-identity" in message
    assert "'anna'" in message
    assert "_identity" not in message  # a function's name


@pytest.mark.parametrize(
    ("break_it", "arguments", "message"),
    [
        (lambda q, g: q.write_bytes(q.read_bytes()[:-300]), [], "q.npz: "),
        (lambda q, g: g.unlink(), [], "g.npz: does not exist"),
        (lambda q, g: np.savez(g, one=np.zeros((3, 2)), two=np.zeros((3, 2))), [], "g.npz: has no key"),
        (lambda q, g: np.savez(g, feature=np.zeros((3, 2), np.float32)), [], "gallery: features of 2 elements"),
        (lambda q, g: np.savez(g, feature=np.zeros((0, 12), np.float32)), [], "gallery: no rows were given"),
        (lambda q, g: np.savez(g, feature=np.full((9, 12), np.nan, np.float32)), [], "gallery: row 0 holds NaN or Inf"),
        (lambda q, g: None, ["--k1", "0"], "k1: 0 was given"),
        (lambda q, g: None, ["--lambda-value", "2"], "lambda_value: 2.0 was given"),
        (lambda q, g: None, ["--topk", "41"], "topk: 41 was given; allowed are 1 to 40"),
        (lambda q, g: None, ["--max-memory", "10"], "max_memory: 10 bytes were given"),
        (lambda q, g: None, ["--max-memory", "1e30G"], "max_memory: "),
        (lambda q, g: None, ["--topk", str(2**70)], "topk: "),
        (lambda q, g: None, ["--k1", str(2**70)], "k1: "),
        (lambda q, g: None, ["--k2", str(2**70)], "k2: "),
        (lambda q, g: None, ["--block-rows", str(2**70)], "block_rows: "),
        (lambda q, g: None, ["--gallery-key", "nothing"], "has no key 'nothing'"),
    ],
)
def test_rerank_errors_leave_the_output_alone(sides, tmp_path, capsys, break_it, arguments, message):
    query_file, gallery_file, *_ = sides
    output = tmp_path / "result.npy"
    output.write_text("an older result")
    break_it(Path(query_file), Path(gallery_file))
    before = sorted(p.name for p in tmp_path.iterdir())
    assert rerank([query_file, gallery_file, "--output", str(output), "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert output.read_text() == "an older result"
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_rerank_checks_the_output_first(sides, tmp_path, capsys):
    query_file, gallery_file, *_ = sides
    for output, message in (
        (tmp_path / "result.txt", "suffix '.txt'"),
        (tmp_path / "nowhere" / "result.npy", "nowhere does not exist"),
        (tmp_path / "result.npz", "suffix '.npz'"),
    ):
        assert rerank([query_file, gallery_file, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "folder.npy").mkdir()
    assert rerank([query_file, gallery_file, "--output", str(tmp_path / "folder.npy")]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["q.npy", "g.npy", "link.npy"])
def test_rerank_does_not_replace_its_input(tmp_path, capsys, which):
    for name, rows in (("q", 4), ("g", 9)):
        np.save(tmp_path / f"{name}.npy", images(0, rows)["feature"])
    (tmp_path / "link.npy").symlink_to("g.npy")
    before = (tmp_path / which).read_bytes()
    arguments = [str(tmp_path / "q.npy"), str(tmp_path / "g.npy"), "--output", str(tmp_path / which), "--quiet"]
    assert rerank(arguments) == 2
    assert f"{which}: is one of the input files" in capsys.readouterr().err
    assert (tmp_path / which).read_bytes() == before


def test_rerank_needs_no_labels(sides, tmp_path):
    query_file, gallery_file, query, gallery = sides
    np.savez(query_file, feature=query["feature"], identity=np.array(["anna", "bert"]))
    output = tmp_path / "result.npy"
    assert rerank([query_file, gallery_file, "--output", str(output), "--quiet"]) == 0
    np.testing.assert_array_equal(np.load(output), k_reciprocal_rerank(query["feature"], gallery["feature"]))


def test_rerank_takes_its_disk_space_first(sides, tmp_path, capsys, monkeypatch):
    """The space can go between the look and the writing, and a quota is not seen by looking."""
    query_file, gallery_file, *_ = sides
    output = tmp_path / "result.npy"
    output.write_text("an older result")

    def full(file, begin, size):
        assert size > 4 * 14 * 40
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("vareid_ext.cli.rerank.k_reciprocal_rerank", None)
    assert rerank([query_file, gallery_file, "--output", str(output), "--quiet"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert output.read_text() == "an older result"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.npz", "q.npz", "result.npy"]


def test_rerank_refuses_a_result_larger_than_the_disk(sides, tmp_path, capsys, monkeypatch):
    query_file, gallery_file, *_ = sides
    monkeypatch.setattr("vareid_ext.cli.rerank.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    assert rerank([query_file, gallery_file, "--output", str(tmp_path / "result.npy")]) == 2
    assert "needs 2240 bytes, but 100 are free" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rerank_stopped_half_way_leaves_nothing_behind(sides, tmp_path, capsys, monkeypatch, number):
    query_file, gallery_file, *_ = sides
    output = tmp_path / "result.npy"
    output.write_text("an older result")

    def half_way(*features, out, **options):
        out[0] = 1
        assert len(list(tmp_path.glob(".result.npy.*.part"))) == 1
        signal.raise_signal(number)

    monkeypatch.setattr("vareid_ext.cli.rerank.k_reciprocal_rerank", half_way)
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us ignoring it
    try:
        assert rerank([query_file, gallery_file, "--output", str(output)]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "is as it was" in capsys.readouterr().err
    assert output.read_text() == "an older result"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.npz", "q.npz", "result.npy"]


# ---- python -m vareid_ext.evaluate --------------------------------------------------------------------------------


def labels(query, gallery, cameras=True):
    names = ("identity", "camera") if cameras else ("identity",)
    return [side[name] for name in names for side in (query, gallery)]


def test_evaluate_reports_what_the_functions_give(sides, tmp_path, capsys):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / "metrics.json"
    arguments = ["--features", query_file, gallery_file, "--rerank", "--k1", "8", "--output", str(output), "--quiet"]
    assert evaluate(arguments) == 0
    found = json.loads(output.read_text())
    features = query["feature"], gallery["feature"]
    for name, rerank_options in (("original", False), ("reranked", {"k1": 8})):
        expected = evaluate_features(*features, *labels(query, gallery), rerank=rerank_options)
        for key, value in expected.as_dict().items():
            assert found[name][key] == pytest.approx(value, abs=1e-12)
        assert len(found[name]["cmc"]) == 50
        assert found[name]["num_queries"] == 14
    table = capsys.readouterr().out
    assert f"{100 * found['reranked']['mAP']:.2f}" in table
    assert evaluate(["--features", query_file, gallery_file, "--no-cameras", "--metric", "cosine", "--quiet"]) == 0
    expected = evaluate_features(*features, *labels(query, gallery, cameras=False), metric="cosine")
    assert f"{100 * expected.mAP:.2f}" in capsys.readouterr().out


def test_evaluate_reports_verification_for_each_ranking(sides, capsys):
    query_file, gallery_file, query, gallery = sides
    arguments = ["--features", query_file, gallery_file, "--rerank", "--recommend-threshold", "fpr=0.05", "--json"]
    assert evaluate(arguments) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    features = query["feature"], gallery["feature"]
    for name, reranking in (("original", False), ("reranked", True)):
        expected = verify_features(*features, *labels(query, gallery), rerank=reranking, recommend_fpr=0.05)
        assert found[name]["verification"] == expected.as_dict()
        assert f"{name}: recommended threshold for FPR 0.05: {expected.recommended.point.threshold:.9g};" in output.err
        assert found[name]["mAP"] == evaluate_features(*features, *labels(query, gallery), rerank=reranking).mAP
    assert evaluate(["--features", query_file, gallery_file, "--verification", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "TPR@FPR=1e-3" in text
    assert "recommended" not in text


def test_evaluate_says_from_where_to_where_and_what_each_query_has_reached(sides, tmp_path, capsys):
    query_file, gallery_file, query, gallery = sides
    files = [tmp_path / "queries.csv", tmp_path / "people.csv"]
    arguments = ["--features", query_file, gallery_file, "--rerank", "--by", "viewpoint", "camera", "--json"]
    assert evaluate([*arguments, "--per-query", str(files[0]), "--per-identity", str(files[1])]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    rows, people = ([line.split(",") for line in file.read_text().splitlines()] for file in files)
    features = query["feature"], gallery["feature"]
    assert len(rows) == 1 + 2 * len(query["identity"])
    for name, reranking in (("original", False), ("reranked", True)):
        for label in ("viewpoint", "camera"):
            groups = {"query_group": query[label], "gallery_group": gallery[label]}
            names = ("front", "side", "back") if label == "viewpoint" else ()
            cells = evaluate_by_group(*features, *labels(query, gallery), rerank=reranking, **groups, names=names)
            assert found[name][f"by_{label}"] == cells.as_dict()
            assert f"{name}, by {label}" in output.err
        mine = [dict(zip(rows[0], row, strict=True)) for row in rows if row[0] == name]
        counted = [row for row in mine if row["matches"] != "0"]
        assert found[name]["num_valid_queries"] == len(counted)
        np.testing.assert_allclose(
            np.mean([float(row["average_precision"]) for row in counted]), found[name]["mAP"], rtol=1e-12
        )
        assert [int(row["identity"]) for row in mine] == query["identity"].tolist()
        of_name = [dict(zip(people[0], row, strict=True)) for row in people if row[0] == name]
        assert [int(row["identity"]) for row in of_name] == sorted(set(query["identity"].tolist()))
        for row in of_name:
            values = [float(r["average_precision"]) for r in counted if r["identity"] == row["identity"]]
            assert (int(row["counted"]), row["mAP"] == "") == (len(values), not values)
            if values:
                np.testing.assert_allclose(float(row["mAP"]), np.mean(values), rtol=1e-12)


@pytest.fixture
def named(sides, tmp_path):
    """The same files; and with people that are called as their numbers are written, numbered in the reverse order."""
    files = []
    for path, side in zip(sides[:2], sides[2:], strict=True):
        texts = {name: side[name].astype(str) for name in ("identity", "camera")}
        own = {name: np.unique(-side[name], return_inverse=True)[1].reshape(-1) for name in texts}
        files.append(str(tmp_path / f"named-{Path(path).name}"))
        np.savez(files[-1], **{**side, **own}, **{f"{name}_name": values for name, values in texts.items()})
    return sides[:2], files


@pytest.mark.parametrize("which", [(1, 1), (0, 1), (1, 0)])
def test_names_are_printed_and_junk_is_one_of_them(named, which, tmp_path, capsys):
    found = []
    for number, sides in enumerate(((0, 0), which)):
        files = [named[side][i] for i, side in enumerate(sides)]
        tables = [tmp_path / f"{what}{number}.csv" for what in ("queries", "people")]
        arguments = ["--features", *files, "--by", "camera", "--junk-identity", "3", "--quiet", "--json"]
        assert evaluate([*arguments, "--per-query", str(tables[0]), "--per-identity", str(tables[1])]) == 0
        result = json.loads(capsys.readouterr().out)["original"]
        cells = result.pop("by_camera")
        names = cells["query_names"], cells["gallery_names"]
        by_name = {
            (a, b): (cells["mAP"][i][j], cells["queries"][i][j])
            for i, a in enumerate(names[0])
            for j, b in enumerate(names[1])
        }
        found.append((result, by_name, *(sorted(table.read_text().splitlines()) for table in tables)))
    assert found[0] == found[1]


def test_unknown_people_are_minus_one_in_tables_and_common_to_nobody(tmp_path, capsys):
    query, gallery, table = (tmp_path / name for name in ("q.npz", "g.npz", "queries.csv"))
    feature = np.eye(4, dtype=np.float32)
    np.savez(query, feature=feature[:2], identity=[0, -1], camera=[1, 1], identity_name=["p4", ""])
    np.savez(gallery, feature=feature, identity=[0, 0, 1, -1], camera=[2] * 4, identity_name=["p4", "p4", "p5", ""])
    assert evaluate(["--features", str(query), str(gallery), "--per-query", str(table), "--quiet"]) == 0
    assert [line.split(",")[3] for line in table.read_text().splitlines()] == ["identity", "p4", "-1"]
    np.savez(gallery, feature=feature, identity=[4, 4, 5, -1], camera=[2] * 4)
    capsys.readouterr()
    assert evaluate(["--features", str(query), str(gallery), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert f"as {query} and {gallery} have no identity in common; identity: " in error


def test_labels_that_are_given_have_their_files_names_too(named, tmp_path, capsys):
    (query, _), (_, gallery) = named
    plain = results_of(tmp_path, "--features", query, gallery)
    given = [f"--{side}-{label}" for side in ("query", "gallery") for label in ("identity", "camera")]
    sources = [f"{file}:{label}" for file in (query, gallery) for label in ("identity", "camera")]
    explicit = [text for pair in zip(given, sources, strict=True) for text in pair]
    assert results_of(tmp_path, "--features", query, gallery, *explicit) == plain
    capsys.readouterr()
    results_of(tmp_path, "--features", gallery, gallery, "--query-identity", "viewpoint")
    assert "identity_name: left aside" in capsys.readouterr().out


def test_rerank_knows_junk_by_its_name(named, tmp_path):
    results = []
    for number, (query, gallery) in enumerate(named):
        output = str(tmp_path / f"{number}.npy")
        assert rerank([query, gallery, "--output", output, "--junk-identity", "3", "--quiet"]) == 0
        results.append(np.load(output))
    np.testing.assert_array_equal(*results)


def test_evaluate_as_a_command(sides):
    query_file, gallery_file, *_ = sides
    done = run("evaluate", "--features", query_file, gallery_file, "--rerank")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:4] if line[0].isalpha()] == ["original", "reranked"]


@pytest.mark.parametrize("names", [("feature", "label", "camid"), ("feats", "pids", "camera_id"), ("f", "id", "cams")])
def test_evaluate_takes_the_cameras_of_one_file_for_both_sides(sides, tmp_path, capsys, names):
    *_, query, gallery = sides
    both = {
        f"{side}_{name}": data[what]
        for side, data in (("query", query), ("gallery", gallery))
        for name, what in zip(names, ("feature", "identity", "camera"), strict=True)
    }
    file = tmp_path / "both.npz"
    np.savez(file, **both)
    found = {}
    for cameras in (True, False):
        found[cameras] = results_of(tmp_path, "--features", file, file)["original"]["mAP"]
        expected = evaluate_features(query["feature"], gallery["feature"], *labels(query, gallery, cameras=cameras))
        assert found[cameras] == pytest.approx(expected.mAP, abs=1e-12)
        printed = capsys.readouterr().out
        assert (f"query_{names[2]}" in printed, "no cameras" in printed) == (cameras, not cameras)
        assert all(name in printed for name in both if names[2] not in name)
        np.savez(file, **{name: value for name, value in both.items() if names[2] not in name})
    assert abs(found[True] - found[False]) > 0.01
    unknown = {
        f"{side}_{names[2]}": np.full_like(data["camera"], -1)
        for side, data in (("query", query), ("gallery", gallery))
    }
    np.savez(file, **both | unknown)
    assert results_of(tmp_path, "--features", file, file)["original"]["mAP"] == pytest.approx(found[False], abs=1e-12)
    assert "no cameras" in capsys.readouterr().out


def test_the_commands_raise_the_limit_on_compressed_files(tmp_path, capsys):
    gallery = np.random.default_rng(0).integers(0, 2, (2000, 300)).astype(np.float64)
    np.savez_compressed(tmp_path / "g.npz", feature=gallery, pid=np.zeros(len(gallery), int))
    np.savez(tmp_path / "q.npz", feature=gallery[:1], pid=[0])
    files = [str(tmp_path / "q.npz"), str(tmp_path / "g.npz")]
    output = ["--topk", "1", "--output", str(tmp_path / "r.npy")]
    for command, arguments in ((evaluate, ["--features", *files]), (rerank, [*files, *output])):
        assert command([*arguments, "--quiet", "--max-unpacked", "1M"]) == 2
        assert "g.npz" in capsys.readouterr().err
        assert command([*arguments, "--quiet", "--max-unpacked", "20M"]) == 0


@pytest.mark.parametrize("protocol", ["cross-viewpoint", "single-viewpoint"])
def test_evaluate_runs_the_viewpoint_protocols(sides, tmp_path, capsys, protocol):
    query_file, gallery_file, query, gallery = sides
    output = tmp_path / "metrics.json"
    arguments = ["--protocol", protocol, "--no-cameras", "--repeats", "3", "--output", str(output), "--quiet"]
    assert evaluate(["--features", query_file, gallery_file, *arguments]) == 0
    found = json.loads(output.read_text())
    assert list(found) == ["original front", "original side", "original back"]
    together = [np.concatenate([query[name], gallery[name]]) for name in ("feature", "identity", "viewpoint")]
    if protocol == "cross-viewpoint":
        expected = {view: metrics.as_dict() for view, metrics in evaluate_cross_viewpoint(*together).items()}
    else:
        expected = {view: draws.mean() for view, draws in evaluate_single_viewpoint(*together, repeats=3).items()}
        assert "±" in capsys.readouterr().out
    for view, name in enumerate(found):
        assert found[name]["mAP"] == pytest.approx(expected[view]["mAP"], abs=1e-12)


@pytest.fixture
def one_set(tmp_path):
    """A file of one set of images, and what is in it."""
    data = images(5, 60)
    np.savez(tmp_path / "all.npz", **data)
    return tmp_path / "all.npz", data


def results_of(tmp_path, *arguments):
    """What a call of evaluate writes to its .json file."""
    output = tmp_path / "metrics.json"
    assert evaluate([*map(str, arguments), "--output", str(output), "--quiet"]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("protocol", ["cross-viewpoint", "single-viewpoint"])
@pytest.mark.parametrize("second", ["none", "same", "path", "symlink", "hard link", "copy"])
def test_one_set_of_images_counts_once(one_set, tmp_path, capsys, protocol, second):
    """Twice, a query would find its own copy under the single-viewpoint protocol."""
    path, data = one_set
    (tmp_path / "folder").mkdir()
    other = {
        "none": lambda: None,
        "same": lambda: path,
        "path": lambda: tmp_path / "folder" / ".." / "all.npz",
        "symlink": lambda: (tmp_path / "link.npz").symlink_to(path) or tmp_path / "link.npz",
        "hard link": lambda: (tmp_path / "hard.npz").hardlink_to(path) or tmp_path / "hard.npz",
        "copy": lambda: shutil.copy(path, tmp_path / "copy.npz"),
    }[second]()
    found = results_of(tmp_path, "--features", *filter(None, (path, other)), "--protocol", protocol)
    given = data["feature"], data["identity"], data["viewpoint"], data["camera"]
    if protocol == "cross-viewpoint":
        expected = [metrics.as_dict() for metrics in evaluate_cross_viewpoint(*given).values()]
        assert sum(result["num_queries"] for result in found.values()) == 60
    else:
        expected = [draws.mean() for draws in evaluate_single_viewpoint(*given).values()]
    assert [result["mAP"] for result in found.values()] == pytest.approx([e["mAP"] for e in expected], abs=1e-12)
    assert "60 images" in capsys.readouterr().out


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_of_both_sides_is_two_sets_however_often_it_is_named(tmp_path, capsys, times):
    query, gallery = images(0, 14), images(1, 40)
    sides = {f"{side}_{name}": value for side, data in (("query", query), ("gallery", gallery))
             for name, value in data.items()}  # fmt: skip
    np.savez(tmp_path / "both.npz", **sides)
    found = results_of(tmp_path, "--features", *[tmp_path / "both.npz"] * times, "--protocol", "cross-viewpoint")
    together = [np.concatenate([query[name], gallery[name]]) for name in ("feature", "identity", "viewpoint", "camera")]
    for result, metrics in zip(found.values(), evaluate_cross_viewpoint(*together).values(), strict=True):
        assert result["mAP"] == pytest.approx(metrics.mAP, abs=1e-12)
        assert result["num_queries"] == metrics.num_queries
    assert "54 images" in capsys.readouterr().out
    found = results_of(tmp_path, "--features", *[tmp_path / "both.npz"] * times)
    expected = evaluate_features(query["feature"], gallery["feature"], *labels(query, gallery))
    assert found["original"]["mAP"] == pytest.approx(expected.mAP, abs=1e-12)


def test_labels_of_one_set_need_be_named_once(one_set, tmp_path, capsys):
    path, data = one_set
    np.save(tmp_path / "features.npy", data["feature"])
    np.save(tmp_path / "other.npy", data["viewpoint"][::-1])
    sources = [
        text for label in ("identity", "camera", "viewpoint") for text in (f"--query-{label}", f"{path}:{label}")
    ]
    cross = ("--protocol", "cross-viewpoint")
    for names in (["features.npy"], ["features.npy"] * 2):
        files = ["--features", *(tmp_path / name for name in names)]
        assert results_of(tmp_path, *files, *sources, *cross) == results_of(tmp_path, "--features", path, *cross)
        assert evaluate([*map(str, files), *sources, "--gallery-viewpoint", str(tmp_path / "other.npy"), *cross]) == 2
        assert "--gallery-viewpoint" in capsys.readouterr().err
    assert evaluate(["--features", *[str(path)] * 3]) == 2
    assert "--features" in capsys.readouterr().err


def test_it_is_said_that_queries_find_themselves(one_set, tmp_path, capsys):
    path, data = one_set
    data["camera"][:7] = -1
    np.savez(path, **data)
    for arguments, count in (((), 7), (("--no-cameras",), 60)):
        results_of(tmp_path, "--features", path, *arguments)
        assert f" {count} of 60 " in capsys.readouterr().out


def test_what_is_left_out_is_counted(one_set, tmp_path, capsys):
    path, data = one_set
    data["identity"][:7], data["viewpoint"][5:11] = -1, -1
    np.savez(path, **data)
    query = images(0, 14)
    np.savez(tmp_path / "q.npz", **query)
    results_of(tmp_path, "--features", tmp_path / "q.npz", path)
    assert "7 of 60" in capsys.readouterr().out
    results_of(tmp_path, "--features", path, "--protocol", "cross-viewpoint")
    assert ": 11 of " in capsys.readouterr().out
    results_of(tmp_path, "--features", path, "--protocol", "cross-viewpoint", "--junk-identity", "none")
    assert ": 6 of " in capsys.readouterr().out
    kept = results_of(tmp_path, "--features", tmp_path / "q.npz", path, "--junk-identity", "none")["original"]
    expected = evaluate_features(query["feature"], data["feature"], *labels(query, data), junk_identity=None)
    assert kept["mAP"] == pytest.approx(expected.mAP, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"identity": None}, [], "--query-identity"),
        ({"camera": None}, [], "--query-camera: is needed"),
        ({"identity": np.zeros(3, dtype=int)}, [], "query identity: length 3 was given; 14 is needed"),
        ({"camera": np.zeros(15, dtype=int)}, [], "query camera: length 15"),
        ({"identity": np.full(14, 77)}, [], "none of the 14 queries has a match"),
        ({"feature": np.full((14, 12), np.inf, np.float32)}, [], "row 0 holds NaN or Inf"),
        ({"viewpoint": None}, ["--protocol", "cross-viewpoint"], "--query-viewpoint: is needed"),
        ({"identity": np.full(14, 77)}, ["--verification"], "none of the 14 queries has a match"),
        ({"identity": np.full(14, 3)}, ["--recommend-threshold", "fpr=0.1"], "query_identity: one identity was given"),
        ({}, ["--recommend-threshold", "fpr=2"], "'fpr=2' was given; fpr=RATE is needed"),
        ({}, ["--recommend-threshold", "far=0.1"], "'far=0.1' was given; fpr=RATE is needed"),
        ({}, ["--verification", "--protocol", "cross-viewpoint"], "--verification: was given with --protocol"),
        ({}, ["--by", "camera", "--protocol", "cross-viewpoint"], "--by: was given with --protocol"),
        ({}, ["--by", "camera", "--no-cameras"], "--by: camera was given with --no-cameras"),
        ({"viewpoint": None}, ["--by", "viewpoint"], "--query-viewpoint: is needed"),
        ({"viewpoint": np.full(14, -1)}, ["--by", "viewpoint"], "query_group: no image has a known group"),
        ({}, ["--per-query", "queries.txt"], "queries.txt"),
        ({}, ["--max-rank", "0"], "max_rank: 0"),
        ({}, ["--rerank", "--k2", "0"], "k2: 0"),
        ({}, ["--junk-identity", str(2**70)], "junk_identity: "),
        ({}, ["--max-rank", str(2**31)], "max_rank: "),
        ({}, ["--rerank", "--k1", str(2**70)], "k1: "),
        ({}, ["--block-rows", str(2**70)], "block_rows: "),
        ({}, ["--protocol", "single-viewpoint", "--seed", "-1"], "seed: "),
        ({}, ["--protocol", "single-viewpoint", "--repeats", str(2**70)], "repeats: "),
        ({}, ["--query-identity", "nobody"], "nobody: is neither a file nor a key"),
    ],
)
def test_evaluate_errors_leave_the_output_alone(sides, tmp_path, capsys, change, arguments, message):
    query_file, gallery_file, query, _ = sides
    changed = {name: value for name, value in {**query, **change}.items() if value is not None}
    np.savez(query_file, **changed)
    output = tmp_path / "metrics.json"
    output.write_text("an older result")
    assert evaluate(["--features", query_file, gallery_file, "--output", str(output), "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert output.read_text() == "an older result"
    assert len(list(tmp_path.iterdir())) == 3


def test_evaluate_checks_the_re_ranking_before_it_ranks(sides, capsys, monkeypatch):
    query_file, gallery_file, _, _ = sides
    monkeypatch.setattr("vareid_ext.cli.evaluate.rank_features", None)
    assert evaluate(["--features", query_file, gallery_file, "--rerank", "--lambda-value", "1.5"]) == 2
    assert "lambda_value: 1.5" in capsys.readouterr().err
