"""k-reciprocal re-ranking straight from its definition, with sets and loops: the independent truth of the tests."""

from __future__ import annotations

import numpy as np


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Float64 sums of squared differences, one pair at a time."""
    x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
    return np.stack([((row - y) ** 2).sum(1) for row in x]) if len(x) else np.zeros((0, len(y)))


def ranked(distance: np.ndarray) -> np.ndarray:
    """Each row's order, ties by index."""
    return np.argsort(distance, axis=1, kind="stable")


def reciprocal(rank: list[list[int]], i: int, k: int) -> set[int]:
    return {j for j in rank[i][: k + 1] if i in rank[j][: k + 1]}


def expanded_sets(rank: list[list[int]], k1: int) -> list[set[int]]:
    half = int(np.around(k1 / 2))
    sets = []
    for i in range(len(rank)):
        base = reciprocal(rank, i, k1)
        total = set(base)
        for candidate in base:
            theirs = reciprocal(rank, candidate, half)
            if 3 * len(theirs & base) > 2 * len(theirs):
                total |= theirs
        sets.append(total)
    return sets


def rerank(distance: np.ndarray, num_query: int, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Final distances [Q, G] from all squared distances [M, M] in float64."""
    M = len(distance)
    rank = ranked(distance).tolist()
    maximum = distance.max(1, keepdims=True)
    normalised = np.divide(distance, maximum, out=np.zeros_like(distance), where=maximum > 0)
    V = np.zeros((M, M))
    for i, members in enumerate(expanded_sets(rank, k1)):
        for j in members:
            V[i, j] = np.exp(-normalised[i, j])
        if members:
            V[i] /= V[i].sum()
    if k2 > 1:
        V = np.stack([V[rank[i][:k2]].mean(0) for i in range(M)])
    shared = np.stack([np.minimum(V[i], V[num_query:]).sum(1) for i in range(num_query)])
    jaccard = 1 - shared / (2 - shared)
    return (1 - lambda_value) * jaccard + lambda_value * normalised[:num_query, num_query:]
