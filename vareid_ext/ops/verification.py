"""Pairs counted by distance as operators; the definition is in :mod:`vareid_ext.reference.verification`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._filter import contiguous_rows
from vareid_ext.ops._operator import define
from vareid_ext.ops.ranking import GroupedLabels
from vareid_ext.reference import verification as reference
from vareid_ext.reference.verification import DIGIT_VALUES

MOST_PREFIXES = 8  # of verification_refine

_LABELS = (
    "Tensor query_identity, Tensor gallery_identity, Tensor? query_codes, Tensor? gallery_codes, SymInt? junk_identity"
)


def _empty_histogram(distances: Tensor, *_labels: Any) -> tuple[Tensor, Tensor, Tensor]:
    Q = distances.shape[0]
    return (
        distances.new_zeros((2, DIGIT_VALUES), dtype=torch.int64),
        distances.new_empty((2, Q), dtype=torch.float64),
        distances.new_empty((2, Q), dtype=torch.int64),
    )


def _empty_counts(distances: Tensor, *arguments: Any) -> Tensor:
    return distances.new_zeros((2, len(arguments[5]), DIGIT_VALUES), dtype=torch.int64)


def _empty_accepted(distances: Tensor, *_arguments: Any) -> Tensor:
    return distances.new_empty((2, distances.shape[0]), dtype=torch.int64)


def _workspace(distances: Tensor, prefixes: int) -> Tensor | None:
    """For the counts of each thread, for the histogram with 0 prefixes; a GPU needs none."""
    if distances.is_cuda:
        return None
    needed = _native.module().verification_workspace_bytes(prefixes, *distances.shape, torch.get_num_threads())
    return torch.empty(needed, dtype=torch.uint8)


def _native_histogram(distances: Tensor, *labels: Any) -> tuple[Tensor, Tensor, Tensor]:
    results = _empty_histogram(distances)
    rows, grouped = contiguous_rows(distances), GroupedLabels(*labels)
    _native.launch(
        "verification_histogram", rows, grouped.arrays(slice(None)), *results, _workspace(rows, 0), on=distances
    )
    return results


def _native_refine(distances: Tensor, *arguments: Any) -> Tensor:
    *labels, prefixes, digits = arguments
    counts = _empty_counts(distances, *arguments)
    rows, grouped = contiguous_rows(distances), GroupedLabels(*labels)
    _native.launch(
        "verification_refine", rows, grouped.arrays(slice(None)), prefixes, digits, counts,
        _workspace(rows, len(prefixes)), on=distances,
    )  # fmt: skip
    return counts


def _native_accepted(distances: Tensor, *arguments: Any) -> Tensor:
    *labels, threshold = arguments
    accepted = _empty_accepted(distances)
    rows, grouped = contiguous_rows(distances), GroupedLabels(*labels)
    _native.launch("verification_accepted", rows, grouped.arrays(slice(None)), threshold, accepted, on=distances)
    return accepted


verification_histogram = define(
    f"verification_histogram(Tensor distances, {_LABELS}) -> (Tensor, Tensor, Tensor)",
    fake=_empty_histogram,
    reference=reference.verification_histogram,
    native=_native_histogram,
)
"""Arguments and results are those of :func:`vareid_ext.reference.verification.verification_histogram`."""

verification_refine = define(
    f"verification_refine(Tensor distances, {_LABELS}, int[] prefixes, int digits) -> Tensor",
    fake=_empty_counts,
    reference=reference.verification_refine,
    native=_native_refine,
)
"""Arguments and result are those of :func:`vareid_ext.reference.verification.verification_refine`."""

verification_accepted = define(
    f"verification_accepted(Tensor distances, {_LABELS}, float threshold) -> Tensor",
    fake=_empty_accepted,
    reference=reference.verification_accepted,
    native=_native_accepted,
)
"""Arguments and result are those of :func:`vareid_ext.reference.verification.verification_accepted`."""
