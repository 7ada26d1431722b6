"""Checks of features: shapes and types without reading them, and the rows that no distance is defined for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import check_dtype, check_floating, check_same_device, check_shape

_MAX_DIM = 16384
_MAX_ROWS = (1 << 31) - 1
_CHUNK = 1 << 21  # elements read at once


def check_features(name: str, value: Tensor) -> None:
    """TypeError or ValueError unless ``value`` is a floating [rows, D] with 1 <= D <= 16,384 and rows < 2^31."""
    check_floating(name, value)
    check_shape(name, value, ("rows", "D"))
    if not 1 <= value.shape[1] <= _MAX_DIM:
        raise ValueError(f"{name}: features of {value.shape[1]} elements were given; 1 to {_MAX_DIM} are allowed")
    if value.shape[0] > _MAX_ROWS:
        raise ValueError(f"{name}: {value.shape[0]} rows were given; at most {_MAX_ROWS} are allowed")


def check_same_features(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """:func:`check_features`, and the same D, dtype and device as another set of features."""
    check_features(name, value)
    if value.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name}: features of {value.shape[1]} elements were given, but {other_name}'s have {other.shape[1]}"
        )
    check_dtype(name, value, other.dtype)
    check_same_device(name, value, other_name, other)


def refuse_row(name: str, row: int, what: str) -> None:
    """The ValueError that names a row."""
    raise ValueError(f"{name}: row {row} {what}")


def row_magnitudes(name: str, value: Tensor, *, nonzero: bool = False) -> Tensor:
    """float64 [rows], each row's largest absolute value.

    Raises:
        ValueError: naming the first row that holds NaN or Inf, or (``nonzero``) nothing but zeros.
    """
    out = torch.empty(value.shape[0], dtype=torch.float64, device=value.device)
    contiguous = value.shape[1] <= 1 or value.stride(1) == 1
    if value.device.type in ("cpu", "cuda") and contiguous and _native.available(value.device):
        _native.launch("pairwise_distance_max_abs", value, out, on=value)
    else:
        step = max(1, _CHUNK // value.shape[1])
        for begin in range(0, value.shape[0], step):
            out[begin : begin + step] = value[begin : begin + step].abs().amax(1)  # amax keeps NaN
        out[out.isinf()] = torch.nan
    bad = out.isnan()
    if bool(bad.any()):
        refuse_row(name, int(bad.nonzero()[0]), "holds NaN or Inf")
    if nonzero and bool((out == 0).any()):
        refuse_row(name, int((out == 0).nonzero()[0]), "is all zeros, which has no cosine")
    return out


def largest_magnitude(features: Mapping[str, Tensor], *, nonzero: bool = False) -> float:
    """The largest absolute value of some sets of features, each with a row at least; errors as row_magnitudes."""
    return max(float(row_magnitudes(name, value, nonzero=nonzero).max()) for name, value in features.items())
