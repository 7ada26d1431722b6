"""Paired differences between rankings, against a plain loop with the same draws, and `vareid compare`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from _vareid_cli import run
from tests.test_feature_files import images
from vareid_ext import evaluate_features, rank_features
from vareid_ext.metrics import QueryRanking, compare_rankings


def ranking_of(precision, first, matches=None):
    precision, first = np.asarray(precision, dtype=np.float64), np.asarray(first)
    matches = np.ones(len(first), dtype=np.int64) if matches is None else np.asarray(matches)
    return QueryRanking(precision, precision, first, matches)


def files(folder, name, seed, noise=0.0, **changes):
    """Query and gallery files of the same images, with noise on the features."""
    paths = []
    for side, N, at in (("q", 30, 0), ("g", 60, 1)):
        arrays = images(seed + at, N)
        arrays["feature"] += noise * np.random.default_rng(7 + at).standard_normal((N, 12)).astype(np.float32)
        arrays["path"] = np.array([f"{name}/{side}{i}.jpg" for i in range(N)])
        if side == "q":
            arrays.update({key: change(arrays[key]) for key, change in changes.items()})
        np.savez(folder / f"{name}-{side}.npz", **arrays)
        paths.append(str(folder / f"{name}-{side}.npz"))
    return paths


@pytest.fixture
def two(tmp_path):
    return files(tmp_path, "a", 3), files(tmp_path, "b", 3, noise=1.5)


def compare(capsys, *arguments, status=0):
    capsys.readouterr()
    assert run(["compare", *map(str, arguments), "--json", "--quiet", "--resamples", "200"]) == status
    return json.loads(capsys.readouterr().out)


# ---- the function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
def test_differences_and_intervals_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(1)
    n, resamples = 37, 300
    matches = rng.integers(0, 3, n)
    first, other = (ranking_of(rng.random(n).round(1), rng.integers(1, 4, n), matches) for _ in range(2))
    found = compare_rankings(first, other, resamples=resamples, seed=seed)
    counted = [q for q in range(n) if matches[q] > 0]
    values = {
        "mAP": [(first.average_precision[q], other.average_precision[q]) for q in counted],
        "rank1": [(float(first.first_match_rank[q] == 1), float(other.first_match_rank[q] == 1)) for q in counted],
    }
    draws = np.random.default_rng(seed)
    chosen = [draws.integers(len(counted), size=len(counted)) for _ in range(resamples)]
    for name, pairs in values.items():
        result = found[name]
        assert result.difference == pytest.approx(np.mean([b - a for a, b in pairs]), abs=1e-12)
        assert result.won == sum(b > a for a, b in pairs)
        assert result.lost == sum(b < a for a, b in pairs)
        assert result.tied == sum(b == a for a, b in pairs)
        means = [sum(pairs[i][1] for i in some) / len(some) - sum(pairs[i][0] for i in some) / len(some)
                 for some in chosen]  # fmt: skip
        assert result.interval == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)


def test_a_ranking_with_itself_is_tied_everywhere():
    ranking = ranking_of([0.2, 0.9, 0.5], [3, 1, 2])
    for result in compare_rankings(ranking, ranking, resamples=20).values():
        assert (result.difference, result.interval) == (0, (0, 0))
        assert (result.won, result.lost, result.tied) == (0, 0, 3)


def test_the_interval_of_one_query_is_its_difference():
    found = compare_rankings(ranking_of([0.25], [4]), ranking_of([1.0], [1]), resamples=10)
    assert found["mAP"].interval == (0.75, 0.75)
    assert (found["rank1"].difference, found["rank1"].won) == (1, 1)


def test_the_two_orders_mirror_each_other():
    a, b = ranking_of([0.2, 0.9, 0.5, 0.1], [3, 1, 2, 1]), ranking_of([0.3, 0.4, 0.5, 0.9], [1, 2, 2, 1])
    forth, back = compare_rankings(a, b, resamples=99), compare_rankings(b, a, resamples=99)
    for name, result in forth.items():
        assert result.difference == -back[name].difference
        assert (result.won, result.lost) == (back[name].lost, back[name].won)
        assert result.interval == pytest.approx([-end for end in reversed(back[name].interval)])


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (ranking_of([0.1], [1]), {}, "other: 1 queries were given; 2 are needed"),
        (
            ranking_of([0.1, 0], [1, 0], [1, 0]),
            {},
            "other: query 1 has no match in the gallery, but one in that of first",
        ),
        (ranking_of([0.1, 1], [1, 1]), {"resamples": 0}, "resamples: 0 was given"),
        (ranking_of([0.1, 1], [1, 1]), {"seed": -1}, "seed: -1 was given"),
    ],
)
def test_what_cannot_be_compared_is_named(other, options, message):
    with pytest.raises(ValueError, match=message):
        compare_rankings(ranking_of([0.1, 0.2], [1, 2]), other, **options)


def test_no_query_with_a_match_is_an_error():
    nothing = ranking_of([0, 0], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="none of the 2 queries has a match"):
        compare_rankings(nothing, nothing)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_files_are_compared_as_in_python(two, capsys, tmp_path):
    a, b = two
    found = compare(capsys, "--features", *a, "--features", *b, "--output", tmp_path / "out.json")
    assert found == json.loads((tmp_path / "out.json").read_text())
    names = [" ".join(pair) for pair in two]
    rankings = []
    for name, pair in zip(names, two, strict=True):
        query, gallery = (np.load(path) for path in pair)
        arguments = [
            query["feature"],
            gallery["feature"],
            *(s[k] for k in ("identity", "camera") for s in (query, gallery)),
        ]
        rankings.append(rank_features(*arguments))
        assert found["metrics"][name] == pytest.approx(evaluate_features(*arguments).as_dict())
    expected = compare_rankings(*rankings, resamples=200)
    assert found["first"] == names[0]
    assert found["differences"] == {names[1]: {name: result.as_dict() for name, result in expected.items()}}
    assert found["differences"][names[1]]["mAP"]["lost"] > 0
    assert compare(capsys, "--features", *a, "--features", *b, "--rerank")["metrics"] != found["metrics"]


def test_a_run_is_compared_with_its_checkpoint(trained_run, capsys):
    run_, best = str(trained_run), str(trained_run / "last.pt")
    found = compare(capsys, run_, best, "--workers", "0", "--device", "cpu")
    metrics = json.loads((trained_run / "metrics.json").read_text())
    assert found["metrics"][run_] == pytest.approx(metrics["trained"])
    result = found["differences"][best]["mAP"]
    assert (result["difference"], result["won"], result["lost"], result["tied"]) == (0, 0, 0, found["queries"])


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        (["mAP=-0.5"], 4),
        (["rank1=-100", "mAP=-0.001"], 4),
        (["mAP=-100"], 0),
        (["rank1=-100", "mAP=-100"], 0),
    ],
)
def test_a_limit_has_an_exit_status_of_its_own(two, capsys, limits, status):
    a, b = two
    arguments = [word for limit in limits for word in ("--fail-below", limit)]
    found = compare(capsys, "--features", *a, "--features", *b, *arguments, status=status)
    assert bool(found["below"]) == (status == 4)
    assert found["differences"][" ".join(b)]["mAP"]["difference"] < -0.005


def test_the_text_says_it_in_points(two, capsys):
    a, b = two
    assert run(["compare", "--features", *a, "--features", *b, "--quiet", "--fail-below", "mAP=5"]) == 4
    text = capsys.readouterr().out
    assert "10,000 bootstrap draws" in text
    assert "below +5" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": lambda v: np.where(np.arange(len(v)) == 4, 9, v)}, "identity of query 4 is"),
        ({"camera": lambda v: v + 1}, "camera of query 0 is"),
        ({"path": lambda v: v[::-1]}, "path of query 0 is q0.jpg in"),
    ],
)
def test_other_queries_are_refused_with_the_difference(tmp_path, capsys, changes, message):
    a, b = files(tmp_path, "a", 3), files(tmp_path, "b", 3, **changes)
    assert run(["compare", "--features", *a, "--features", *b, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "of 30 differ" in error


def test_another_number_of_queries_is_refused_and_another_gallery_is_said(two, tmp_path, capsys):
    (query, gallery), _ = two
    assert run(["compare", "--features", query, gallery, "--features", gallery, "--quiet"]) == 2
    assert "has 30" in capsys.readouterr().err
    kept = {key: value[:50] for key, value in np.load(gallery).items()}
    np.savez(tmp_path / "less.npz", **kept)
    assert (
        run(["compare", "--features", query, gallery, "--features", query, str(tmp_path / "less.npz"), "--quiet"]) == 0
    )
    assert f"galleries differ: {query} {gallery} has 60 images, {query} {tmp_path / 'less.npz'} has 50" in (
        capsys.readouterr().out
    )


def test_galleries_of_one_size_with_other_images_are_said(tmp_path, capsys):
    a, b = files(tmp_path, "a", 3), files(tmp_path, "b", 3)
    other = dict(np.load(b[1]))
    other["path"] = np.where(np.arange(60) % 20 == 7, "x/other.jpg", other["path"])
    np.savez(b[1], **other)
    assert run(["compare", "--features", *a, "--features", *b, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert f"galleries differ: path of image 7 is g7.jpg in {' '.join(a)}, other.jpg in {' '.join(b)} (3 of 60" in text
    assert run(["compare", "--features", *a, "--features", *files(tmp_path, "c", 3), "--quiet"]) == 0
    assert "galleries differ" not in capsys.readouterr().out


def test_a_match_in_one_gallery_only_is_said_with_both_files_and_what_to_do(tmp_path, capsys):
    a, b = files(tmp_path, "a", 3), files(tmp_path, "b", 3)
    gallery, query = dict(np.load(b[1])), np.load(b[0])
    gallery["identity"] = np.where(gallery["identity"] == query["identity"][2], 77, gallery["identity"])
    np.savez(b[1], **gallery)
    for first, second in ((a, b), (b, a)):
        assert run(["compare", "--features", *first, "--features", *second, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert re.search(
            rf"{' '.join(b)}: query \d+ has no match in the gallery, but one in that of {' '.join(a)} ", error
        )
        assert "measure both with one gallery" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}"], "RUN: one was given; two or more are needed"),
        (["--features", "{q}", "{q}"], "--features: one was given"),
        (["--features", "{q}", "--features", "{q}"], "was given twice"),
        (["{a}", "{a}", "--fail-below", "mINP=1"], "mAP=POINTS or rank1=POINTS is needed"),
        (["{a}", "{a}", "--fail-below", "mAP=nan"], "mAP=POINTS or rank1=POINTS is needed"),
        (["{a}", "{b}", "--resamples", "0"], "--resamples: 0 was given"),
        (["{a}", "{b}", "--output", "x.txt"], "suffix '.txt'"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(trained_run, two, capsys, arguments, message):
    places = {"a": trained_run, "b": trained_run / "best.pt", "q": two[0][0]}
    assert run(["compare", *(argument.format(**places) for argument in arguments), "--quiet"]) == 2
    assert message in capsys.readouterr().err
