"""mAP and rank-1 from one group of images to another, against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vareid_ext import k_reciprocal_rerank
from vareid_ext.metrics import evaluate_by_group, evaluate_features


def made(seed, queries=23, images=61, cameras=3, views=3, identities=6):
    """Features and labels with junk (-1), unknown views (-1) and ties."""
    random = np.random.default_rng(seed)
    sides = []
    for n in (queries, images):
        feature = random.integers(-2, 3, (n, 4)).astype(np.float32)
        identity = random.integers(0 if n == queries else -1, identities, n)
        sides.append((feature, identity, random.integers(0, cameras, n), random.integers(-1, views, n)))
    return zip(*sides, strict=True)


def average_precision(distances, matches):
    """AP and whether the first is a match, ties by index; None without a match."""
    order = sorted(range(len(distances)), key=lambda i: (distances[i], i))
    hits, precisions = 0, []
    for rank, i in enumerate(order, 1):
        if matches[i]:
            hits += 1
            precisions.append(hits / rank)
    return (sum(precisions) / hits, matches[order[0]]) if hits else None


def loop(distances, identity, camera, group, a, b):
    found = []
    for q in np.flatnonzero(group[0] == a):
        columns = [
            g
            for g in range(len(identity[1]))
            if group[1][g] == b
            and identity[1][g] != -1
            and not (identity[1][g] == identity[0][q] and camera[1][g] == camera[0][q])
        ]
        found.append(average_precision([distances[q][g] for g in columns], identity[1][columns] == identity[0][q]))
    return [value for value in found if value is not None]


@pytest.mark.parametrize("rerank", [False, {"k1": 5, "k2": 3}])
@pytest.mark.parametrize("by", ["view", "camera"])
def test_every_cell_is_what_a_loop_over_its_images_gives(rerank, by):
    feature, identity, camera, view = made(1)
    group = view if by == "view" else camera
    found = evaluate_by_group(*feature, *identity, *camera, query_group=group[0], gallery_group=group[1], rerank=rerank)
    kept = identity[1] != -1
    distances = np.full((len(feature[0]), len(kept)), np.inf)
    if rerank:
        distances[:, kept] = k_reciprocal_rerank(feature[0], feature[1][kept], **rerank)
    else:
        distances = ((feature[0][:, None].astype(np.float64) - feature[1][None]) ** 2).sum(2)
    assert found.query_groups == tuple(sorted(set(group[0].tolist()) - {-1}))
    assert found.left_out == (int((group[0] == -1).sum()), int((group[1][kept] == -1).sum()))
    for i, a in enumerate(found.query_groups):
        for j, b in enumerate(found.gallery_groups):
            expected = loop(distances, identity, camera, group, a, b)
            assert found.queries[i, j] == len(expected)
            assert found.images[j] == (kept & (group[1] == b)).sum()
            if expected:
                np.testing.assert_allclose(found.mAP[i, j], np.mean([ap for ap, _ in expected]), rtol=1e-12)
                np.testing.assert_allclose(found.rank1[i, j], np.mean([first for _, first in expected]), rtol=1e-12)
            else:
                assert math.isnan(found.mAP[i, j])
                assert math.isnan(found.rank1[i, j])


def test_one_group_is_the_whole_evaluation():
    feature, identity, camera, _ = made(2)
    zeros = [np.zeros(len(side), dtype=int) for side in identity]
    found = evaluate_by_group(*feature, *identity, *camera, query_group=zeros[0], gallery_group=zeros[1])
    whole = evaluate_features(*feature, *identity, *camera)
    assert (found.mAP.item(), found.rank1.item(), found.queries.item()) == (
        whole.mAP,
        whole.rank1,
        whole.num_valid_queries,
    )


@pytest.mark.parametrize("rerank", [False, {"k1": 5, "k2": 3}])
def test_without_a_junk_identity_no_image_is_left_out(rerank):
    feature, identity, camera, _ = made(3)
    zeros = [np.zeros(len(side), dtype=int) for side in identity]
    groups = {"query_group": zeros[0], "gallery_group": zeros[1]}
    found = evaluate_by_group(*feature, *identity, *camera, **groups, rerank=rerank, junk_identity=None)
    whole = evaluate_features(*feature, *identity, *camera, rerank=rerank, junk_identity=None)
    assert found.images.tolist() == [len(identity[1])]
    assert found.mAP.item() == whole.mAP


def test_a_cell_without_a_match_is_empty_and_said_so():
    feature = torch.eye(4)
    found = evaluate_by_group(
        feature[:2], feature, [0, 1], [0, 5, 1, 5], query_group=[0, 1], gallery_group=[0, 0, 1, 1], names=("front",)
    )
    assert found.queries.tolist() == [[1, 0], [0, 1]]
    assert found.as_dict()["mAP"] == [[1.0, None], [None, 1.0]]  # the second by index: all are as far
    assert found.as_dict()["query_names"] == found.as_dict()["gallery_names"] == ["front", "1"]
    lines = str(found).splitlines()
    assert lines[0].split() == ["query", "\\", "gallery", "front", "1"]
    assert lines[2].split() == ["front", "100.0", "/", "100.0", "(1)", "\u2013"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_group": [0, 1]}, ValueError, "query_group: length 2 was given, expected 3"),
        ({"gallery_group": [-1] * 4}, ValueError, "gallery_group: no image has a known group"),
        ({"query_group": [0.5, 1, 1]}, TypeError, "query_group: dtype"),
        ({"gallery_group": [3, -1, -1, -1], "junk_identity": 7}, ValueError, "gallery_group: no image has a known"),
    ],
)
def test_groups_that_do_not_fit_are_named(change, error, message):
    arguments = {"query_group": [0, 1, 1], "gallery_group": [0, 1, 1, 1], **change}
    with pytest.raises(error, match=message):
        evaluate_by_group(torch.eye(4)[:3], torch.eye(4), [0, 1, 2], [7, 0, 1, 2], **arguments)
