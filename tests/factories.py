"""Inputs that the tests of several files are made of, all from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def features(
    rows: int,
    D: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    levels: int | None = None,
    equal: int = 0,
) -> Tensor:
    """[rows, D] of a normal distribution, or whole numbers below ``levels``; the last ``equal`` rows are the first."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, D)) if levels is None else rng.integers(0, levels, (rows, D))
    if equal:
        values[-equal:] = values[0]
    return torch.from_numpy(values).to(dtype)


def feature_array(*arguments: Any, **keywords: Any) -> np.ndarray:
    """:func:`features` in NumPy."""
    return features(*arguments, **keywords).numpy()


def people(
    seed: int, Q: int, G: int, identities: int = 6, D: int = 16, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Any, ...]:
    """Query [Q, D], gallery [G, D], clustered by identity; query and gallery identities; their cameras."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((identities, D))
    query_identity, gallery_identity = rng.integers(0, identities, Q), rng.integers(0, identities, G)

    def draw(identity: np.ndarray) -> Tensor:
        return torch.from_numpy((centers[identity] + rng.standard_normal((len(identity), D))) * scale).to(dtype)

    cameras = rng.integers(0, 3, Q), rng.integers(0, 3, G)
    return draw(query_identity), draw(gallery_identity), query_identity, gallery_identity, *cameras
