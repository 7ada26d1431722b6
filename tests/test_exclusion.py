"""Rules of exclusion: what they mean, and every metric under them against loops over all pairs in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import vareid_ext
from tests.test_verification import assert_follows_the_definition
from vareid_ext import evaluate_features, evaluate_ranking, evaluate_verification, rank_features, rank_queries
from vareid_ext._labels import Labels
from vareid_ext.metrics import (
    evaluate_by_group,
    evaluate_cross_viewpoint,
    evaluate_single_viewpoint,
    ranked_lists,
    verify_features,
)
from vareid_ext.metrics.exclusion import check_exclusion, check_labels, exclusion_text, label_arguments, parse_exclusion

# What each rule leaves out, of matrices that say where a column of query and image is the same and known.
RULES = {
    "none": lambda same: np.zeros_like(same["identity"]),
    "identity&camera": lambda same: same["identity"] & same["camera"],
    "identity&camera | identity&clothes": lambda same: same["identity"] & (same["camera"] | same["clothes"]),
    "identity&camera&clothes": lambda same: same["identity"] & same["camera"] & same["clothes"],
    "camera": lambda same: same["camera"],
    "camera&clothes | identity&viewpoint": lambda same: (
        (same["camera"] & same["clothes"]) | (same["identity"] & same["viewpoint"])
    ),
    "clothes | viewpoint": lambda same: same["clothes"] | same["viewpoint"],
    "identity&camera | identity&clothes | viewpoint&camera&clothes": lambda same: (
        (same["identity"] & (same["camera"] | same["clothes"])) | (same["viewpoint"] & same["camera"] & same["clothes"])
    ),
}


def problem(seed, Q=17, G=90, identities=5, low=-1):
    """Distances with ties, identities with junk, and columns with unknown values, as keyword arguments."""
    rng = np.random.default_rng(seed)
    identity = [rng.integers(low, identities, n) for n in (Q, G)]
    identity[0][0], identity[0][1] = identities + 7, identity[1][0]  # nobody's; somebody's
    camera, clothes, viewpoint = ([rng.integers(-1, k, n) for n in (Q, G)] for k in (3, 4, 3))
    arguments = {
        "query_identity": identity[0], "gallery_identity": identity[1], "query_camera": camera[0],
        "gallery_camera": camera[1], "columns": {"clothes": tuple(clothes), "viewpoint": tuple(viewpoint)},
    }  # fmt: skip
    return torch.from_numpy(rng.integers(0, 40, (Q, G)) / 8.0), arguments


def left_out(arguments, rule):
    pairs = {"camera": (arguments["query_camera"], arguments["gallery_camera"]), **arguments["columns"]}
    same = {name: (q[:, None] == g) & (q[:, None] != -1) for name, (q, g) in pairs.items()}
    same["identity"] = arguments["query_identity"][:, None] == arguments["gallery_identity"]
    return RULES[rule](same)


def in_order(distances, arguments, rule, junk=-1):
    """For each query the images that stay, by distance and index, and whether each is a match."""
    out = left_out(arguments, rule)
    for q, row in enumerate(np.asarray(distances)):
        kept = [g for g in range(len(row)) if not out[q, g] and arguments["gallery_identity"][g] != junk]
        kept.sort(key=lambda g: (row[g], g))
        yield kept, [arguments["gallery_identity"][g] == arguments["query_identity"][q] for g in kept]


def assert_ranked(got, distances, arguments, rule, junk=-1):
    for q, (_, match) in enumerate(in_order(distances, arguments, rule, junk)):
        ranks = np.flatnonzero(match) + 1
        n = len(ranks)
        assert int(got.num_matches[q]) == n
        assert int(got.first_match_rank[q]) == (ranks[0] if n else 0)
        expected = np.mean(np.arange(1, n + 1) / ranks) if n else 0
        assert float(got.average_precision[q]) == pytest.approx(expected, abs=1e-12)
        assert float(got.inverse_negative_penalty[q]) == pytest.approx(n / ranks[-1] if n else 0, abs=1e-12)


@pytest.mark.parametrize("junk", [-1, None, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_ranking_is_that_of_the_images_that_stay(backend, rule, junk):
    distances, arguments = problem(1)
    assert_ranked(
        rank_queries(distances, **arguments, exclude=rule, junk_identity=junk), distances, arguments, rule, junk
    )
    blocks = [distances[:5], distances[5:6], distances[6:]]
    assert_ranked(rank_queries(blocks, **arguments, exclude=rule, junk_identity=junk), distances, arguments, rule, junk)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("rule", RULES)
def test_features_are_ranked_as_their_float64_distances(backend, rule, metric):
    _, arguments = problem(2)
    rng = np.random.default_rng(2)
    query, gallery = (rng.integers(1, 4, (n, 3)).astype(np.float32) for n in (17, 90))
    a, b = (torch.from_numpy(x).double() for x in (query, gallery))
    if metric == "cosine":
        query, gallery = (rng.standard_normal((n, 3)) for n in (17, 90))  # ties of cosines are a matter of rounding
        a, b = torch.from_numpy(query), torch.from_numpy(gallery)
        distances = 1 - torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    else:
        distances = (a[:, None] - b[None]).square().sum(2)
    got = rank_features(query, gallery, **arguments, exclude=rule, metric=metric)
    assert_ranked(got, distances, arguments, rule)
    assert_ranked(
        rank_features(query, gallery, **arguments, exclude=rule, metric=metric, block_rows=4),
        distances,
        arguments,
        rule,
    )


@pytest.mark.parametrize("rule", RULES)
def test_reranked_distances_groups_and_lists_follow_the_same_rule(rule):
    _, arguments = problem(3)
    rng = np.random.default_rng(3)
    query, gallery = (rng.standard_normal((n, 4)).astype(np.float32) for n in (17, 90))
    kept = arguments["gallery_identity"] != -1
    how = {"rerank": {"k1": 5, "k2": 2}}
    distances = np.full((17, 90), np.inf)
    distances[:, kept] = vareid_ext.k_reciprocal_rerank(query, gallery[kept], k1=5, k2=2)
    plain = vareid_ext.pairwise_distance(query.astype(float), gallery.astype(float), metric="sqeuclidean")
    assert_ranked(rank_features(query, gallery, **arguments, exclude=rule, **how), distances, arguments, rule)
    for options, of in (({}, plain), (how, distances)):
        lists = ranked_lists(query, gallery, **arguments, exclude=rule, queries=range(17), top=12, **options)
        for found, (expected, _) in zip(lists, in_order(of, arguments, rule), strict=True):
            assert found.tolist() == expected[:12]
        groups = arguments["columns"]["viewpoint"]
        cells = evaluate_by_group(
            query, gallery, **arguments, exclude=rule, query_group=groups[0], gallery_group=groups[1], **options
        )
        for b, group in enumerate(cells.gallery_groups):
            inside = groups[1] == group
            sides = {
                **arguments, "gallery_identity": arguments["gallery_identity"][inside],
                "gallery_camera": arguments["gallery_camera"][inside],
                "columns": {name: (q, g[inside]) for name, (q, g) in arguments["columns"].items()},
            }  # fmt: skip
            matches = [match for _, match in in_order(of[:, inside], sides, rule)]
            for a, of_query in enumerate(cells.query_groups):
                first = [m[0] for q, m in enumerate(matches) if groups[0][q] == of_query and any(m)]
                assert cells.queries[a, b] == len(first)
                if first:
                    assert cells.rank1[a, b] == pytest.approx(np.mean(first))
                else:
                    assert math.isnan(cells.rank1[a, b])


@pytest.mark.parametrize("junk", [-1, None])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_verification_counts_the_pairs_that_stay(rule, junk):
    distances, arguments = problem(4)
    labels = [arguments[name] for name in ("query_identity", "gallery_identity", "query_camera", "gallery_camera")]
    out = left_out(arguments, rule)
    assert_follows_the_definition(
        distances.float(), *labels, junk=junk, left_out=out, exclude=rule, columns=arguments["columns"]
    )


def test_intervals_of_a_threshold_are_those_of_the_pairs_that_stay():
    distances, arguments = problem(5)
    how = {"recommend_fpr": 0.1, "resamples": 40, "seed": 1}
    got = evaluate_verification(distances, **arguments, exclude="camera", **how)
    hidden = left_out(arguments, "camera")
    # The same pairs by identities alone: images that are left out become junk, a query at a time.
    found = np.zeros((17, 4))
    for q, row in enumerate(distances.numpy()):
        match = arguments["gallery_identity"] == arguments["query_identity"][q]
        stays = ~hidden[q] & (arguments["gallery_identity"] != -1)
        within = row <= got.recommended.point.threshold
        found[q] = [(stays & kind & near).sum() for near in (within, True) for kind in (match, ~match)]
    counted = arguments["query_identity"] != -1
    names, place = np.unique(arguments["query_identity"][counted], return_inverse=True)
    table = np.zeros((len(names), 4))
    np.add.at(table, place, found[counted])
    rng, rates = np.random.default_rng(1), []
    for _ in range(40):
        match, other, matches, others = table[rng.integers(len(names), size=len(names))].sum(0)
        rates.append((other / others, 1 - match / matches if matches else np.nan))
    low, high = np.nanpercentile(rates, [2.5, 97.5], axis=0)
    assert got.recommended.fmr_interval == pytest.approx((low[0], high[0]))
    assert got.recommended.fnmr_interval == pytest.approx((low[1], high[1]))
    query, gallery = torch.zeros(17, 1), torch.zeros(90, 1)
    same = verify_features(query, gallery, **arguments, exclude="camera")
    assert same.num_matches + same.num_non_matches == found[counted, 2:].sum()


def test_without_a_rule_it_is_that_of_the_cameras_bit_for_bit():
    distances, arguments = problem(6)
    columns = {"columns": arguments.pop("columns")}
    expected = rank_queries(distances, **arguments)
    for rule in ("identity&camera", " camera & identity|identity&camera ", "identity&camera | identity&camera&clothes"):
        got = rank_queries(distances, **arguments, **columns, exclude=rule)
        assert all(torch.equal(a, b) for a, b in zip(vars(got).values(), vars(expected).values(), strict=True))
    identities = {name: arguments[name] for name in ("query_identity", "gallery_identity")}
    got, expected = rank_queries(distances, **arguments, exclude="none"), rank_queries(distances, **identities)
    assert all(torch.equal(a, b) for a, b in zip(vars(got).values(), vars(expected).values(), strict=True))


def test_the_cloth_changing_protocol_by_hand():
    """Of a person in a query's clothes nothing stays, of others everything: as LTCC and PRCC are evaluated."""
    distances = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    gallery = [5, 5, 9, 5, 9, 5]
    cameras, clothes = ([2], [2, 0, 2, 1, 0, 1]), ([30], [31, 30, 30, 32, -1, -1])
    # Image 0 is by the query's camera, 1 in its clothes; 3 and 5 stay, behind 2, and behind 2 and 4.
    got = evaluate_ranking(
        distances, [5], gallery, *cameras, exclude="identity&camera | identity&clothes", columns={"clothes": clothes}
    )
    assert got.mAP == pytest.approx((1 / 2 + 2 / 4) / 2, abs=1e-15)
    # Its cameras alone, or clothes alone.
    assert evaluate_ranking(distances, [5], gallery, *cameras).mAP == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    only = evaluate_ranking(distances, [5], gallery, exclude="identity&clothes", columns={"clothes": clothes})
    assert only.mAP == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # In the query's clothes only, whoever wears them: 0 to 2 do not stay.
    assert evaluate_ranking(distances, [5], gallery, *cameras, exclude="camera").mAP == pytest.approx(
        (1 + 1 + 3 / 4) / 3
    )


def test_a_query_without_an_image_that_stays_has_no_match():
    distances, arguments = problem(7)
    got = rank_queries(distances, **arguments, exclude="identity")
    assert not got.num_matches.any()
    with pytest.raises(ValueError, match="none of the 17 queries has a match in the gallery"):
        got.metrics()
    arguments["gallery_camera"][:] = arguments["query_camera"][:] = 1
    assert not rank_queries(distances, **arguments, exclude="camera").num_matches.any()


def test_rules_that_mean_the_same_are_one():
    for rule, terms, text in (
        ("none", (), "none"),
        (" none ", (), "none"),
        ("identity&camera", (("identity", "camera"),), ""),
        ("camera & identity & camera", (("identity", "camera"),), ""),
        ("clothes&identity|camera&identity", (("identity", "camera"), ("identity", "clothes")), None),
        ("identity&clothes | clothes", (("clothes",),), "clothes"),
        ("viewpoint | identity&camera", (("identity", "camera"), ("viewpoint",)), None),
    ):
        assert parse_exclusion(rule) == terms
        assert exclusion_text(rule) == (" | ".join(map("&".join, terms)) if text is None else text)
    assert exclusion_text(None) == ""


@pytest.mark.parametrize(
    "rule", ["", " ", "|", "identity&", "identity || camera", "a-b", "none|camera", "identity camera"]
)
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ValueError, match=r"exclude: .* was given; allowed are 'none' and names of columns"):
        evaluate_ranking(torch.zeros(1, 1), [1], [1], exclude=rule)


ONE = torch.zeros(1, 2), [1], [1, 2]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"exclude": "identity&camera"}, ValueError, "exclude: 'identity&camera' was given, but camera is not; allowed "
         "are 'none' and terms of identity$"),
        ({"exclude": "clothes", "columns": {"day": ([1], [1, 2])}}, ValueError, "but clothes is not; .* identity, day"),
        ({"exclude": 3}, TypeError, "exclude: int was given"),
        ({"columns": {"camera": ([1], [1, 2])}}, ValueError, "columns: 'camera' was given; allowed are names"),
        ({"columns": {"none": ([1], [1, 2])}}, ValueError, "columns: 'none' was given"),
        ({"columns": [1]}, TypeError, "columns: list was given"),
        ({"columns": {"day": [1]}}, TypeError, "columns: day: list was given; a pair is needed"),
        ({"columns": {"day": np.zeros((2, 2))}}, TypeError, "columns: day: ndarray was given; a pair is needed"),
        ({"columns": {"day": ([1, 2], [1, 2])}}, ValueError, "columns: day of query: length 2 was given, expected 1"),
        ({"columns": {"day": ([1], [1])}}, ValueError, "columns: day of gallery: length 1 was given, expected 2"),
        ({"columns": {"day": ([1.5], [1, 2])}}, TypeError, "columns: day of query: dtype"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(keywords, error, message):
    for call in (evaluate_ranking, evaluate_verification):
        with pytest.raises(error, match=message):
            call(*ONE, **keywords)
    for call in (evaluate_features, verify_features):
        with pytest.raises(error, match=message):
            call(torch.zeros(1, 3), torch.zeros(2, 3), *ONE[1:], **keywords)


def test_rows_are_named_by_their_numbers_as_given():
    distances, arguments = problem(8)
    distances[11, 3] = math.nan
    for call in (evaluate_ranking, evaluate_verification):
        with pytest.raises(ValueError, match=r"distances: row 11 holds nan \(column 3\)"):
            call([distances[:9], distances[9:]], **arguments, exclude="camera")
    query, gallery = torch.ones(17, 2), torch.ones(90, 2)
    query[11, 1] = math.inf
    with pytest.raises(ValueError, match="query: row 11 holds NaN or Inf"):
        evaluate_features(query, gallery, **arguments, exclude="camera")
    query[11] = 0
    with pytest.raises(ValueError, match="query: row 11 is all zeros"):
        evaluate_features(query, gallery, **arguments, exclude="camera", metric="cosine")


def test_progress_counts_every_query_once():
    distances, arguments = problem(9)
    done = []
    rank_queries(lambda a, b: distances[a:b], **arguments, exclude="camera", block_rows=5, progress=done.append)
    assert done == [5, 5, 5, 2]


def images(seed, n=40):
    rng = np.random.default_rng(seed)
    identity, camera, viewpoint, clothes = (
        rng.integers(low, high, n) for low, high in ((0, 4), (-1, 3), (0, 3), (-1, 3))
    )
    return Labels(identity, camera, viewpoint, columns={"clothes": clothes})


def test_viewpoint_protocols_take_a_rule():
    """As of these queries in this gallery by :func:`evaluate_features`, whose draws are the protocol's."""
    labels, feature = images(1), np.random.default_rng(1).standard_normal((40, 3))
    arrays = {"identity": labels.identity, "viewpoint": labels.viewpoint, "camera": labels.camera}
    rule = {"exclude": "identity&clothes | camera", "columns": dict(labels.columns)}
    found = evaluate_cross_viewpoint(feature, **arrays, **rule)
    for view, metrics in found.items():
        query, gallery = labels.viewpoint == view, labels.viewpoint != view
        sides = labels.select(query), labels.select(gallery)
        assert metrics.mAP == evaluate_features(
            feature[query], feature[gallery], sides[0].identity, sides[1].identity, sides[0].camera, sides[1].camera,
            exclude=rule["exclude"], columns={"clothes": tuple(side.columns["clothes"] for side in sides)},
        ).mAP  # fmt: skip
    assert found[0].mAP != evaluate_cross_viewpoint(feature, **arrays)[0].mAP
    alone = evaluate_single_viewpoint(feature, **arrays, **rule, repeats=2)
    assert alone[0].mean() != evaluate_single_viewpoint(feature, **arrays, repeats=2)[0].mean()
    for protocol in (evaluate_cross_viewpoint, evaluate_single_viewpoint):
        with pytest.raises(ValueError, match="exclude: 'day' was given, but day is not"):
            protocol(feature, **arrays, exclude="day")


def test_labels_of_images_become_the_arguments_of_a_rule():
    query, gallery = images(2), images(3)
    assert label_arguments(query, gallery)["columns"] == {}
    found = label_arguments(query, gallery, "identity&clothes | viewpoint | camera")
    assert found["query_camera"] is query.camera
    assert list(found["columns"]) == ["clothes", "viewpoint"]
    assert found["columns"]["clothes"][1].tolist() == gallery.columns["clothes"].tolist()
    check_exclusion("identity&clothes | viewpoint | camera", query, gallery)
    check_exclusion("none", query, gallery)
    check_exclusion(None, query, dataclasses.replace(gallery, camera=np.full(40, -1)))
    gallery = dataclasses.replace(gallery, camera=np.full(40, -1))
    allowed = "allowed are 'none' and terms of identity, viewpoint, clothes"
    for rule, column, side in (("identity&camera", "camera", "gallery"), ("day", "day", "query")):
        message = f"--exclude: '{rule}' was given, but no {side} image has a known {column}; {allowed}"
        with pytest.raises(ValueError, match=message):
            check_exclusion(rule, query, gallery, "--exclude")


def test_large_and_negative_numbers_are_compared_as_they_are():
    big = 2**62
    labels = check_labels([1], [1, 1, 1], [big], [big, big + 1, -1], "identity&camera | identity&day",
                          {"day": ([-5], [-5, 3, 4])})  # fmt: skip
    assert labels.left_out(slice(None), slice(None)).tolist() == [True, False, False]
    both = check_labels([1], [1, 1, 1], [big], [big, big, big], "identity&camera&day", {"day": ([-5], [-5, 3, -1])})
    assert both.left_out(slice(None), slice(None)).tolist() == [True, False, False]
