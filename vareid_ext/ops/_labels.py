"""Checks of the losses' arguments: labels, viewpoints, masks and the scalars."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from vareid_ext.ops._checks import (
    FLOATING,
    check_choice,
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
)

SMOOTHING = ("adaptive", "uniform", "none")
REDUCTION = ("mean", "sum", "none")
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_told_alpha: set[tuple[float, int]] = set()


def check_scalars(smoothing: str, alpha: float, epsilon: float, reduction: str) -> None:
    """ValueError unless the modes are known, alpha is in [0, 0.5) and epsilon in [0, 1)."""
    check_choice("smoothing", smoothing, SMOOTHING)
    check_choice("reduction", reduction, REDUCTION)
    if not 0 <= alpha < 0.5:
        raise ValueError(f"alpha: {alpha} was given; it must be in [0, 0.5)")
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon: {epsilon} was given; it must be in [0, 1)")


def warn_of_alpha(alpha: float, views: int) -> None:
    """Warn once where alpha is so large that a wrong view's target can exceed the true one's."""
    if torch.compiler.is_compiling() or views < 2 or alpha <= (views - 1) / (2 * views - 1):
        return
    if (alpha, views) not in _told_alpha:
        _told_alpha.add((alpha, views))
        limit = (views - 1) / (2 * views - 1)
        warnings.warn(
            f"alpha: {alpha} is above {limit:.3g}; with {views} viewpoints the target of a wrong view can exceed that "
            "of the true one",
            RuntimeWarning,
            stacklevel=4,
        )


def check_identity(identity: Tensor, samples: int, anchor_name: str, anchor: Tensor) -> None:
    """TypeError or ValueError unless ``identity`` holds one integer for each sample, on the anchor's device."""
    check_tensor("identity", identity)
    if identity.dtype not in _INTEGER:
        raise TypeError(f"identity: dtype {dtype_name(identity.dtype)} was given; an integer type is needed")
    check_shape("identity", identity, (samples,))
    check_same_device("identity", identity, anchor_name, anchor)


def check_viewpoint(viewpoint: Tensor, samples: int, views: int, anchor_name: str, anchor: Tensor) -> None:
    """TypeError or ValueError unless ``viewpoint`` is an integer [N] or a floating [N, V], on the anchor's device."""
    check_tensor("viewpoint", viewpoint)
    if viewpoint.dtype in FLOATING:
        check_shape("viewpoint", viewpoint, (samples, views))
    elif viewpoint.dtype in _INTEGER:
        check_shape("viewpoint", viewpoint, (samples,))
    else:
        raise TypeError(
            f"viewpoint: dtype {dtype_name(viewpoint.dtype)} was given; an integer or floating type is needed"
        )
    check_same_device("viewpoint", viewpoint, anchor_name, anchor)


def check_mask(mask: Tensor | None, identities: int, views: int, anchor_name: str, anchor: Tensor) -> None:
    """TypeError or ValueError unless ``mask`` is None or a bool [K, V] on the anchor's device."""
    if mask is not None:
        check_shape("mask", mask, (identities, views))
        check_dtype("mask", mask, torch.bool)
        check_same_device("mask", mask, anchor_name, anchor)


def check_batch(samples: int, identities: int, reduction: str, name: str) -> None:
    """ValueError where there is no identity, or a mean over no samples is asked for."""
    if identities == 0:
        raise ValueError(f"{name}: there are no identities (K = 0)")
    if samples == 0 and reduction == "mean":
        raise ValueError(f"{name}: the batch is empty; reduction='mean' needs at least one sample")


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def check_label_values(
    identity: Tensor, viewpoint: Tensor | None, identities: int, views: int, mask: Tensor | None
) -> None:
    """IndexError or ValueError where a label, a view distribution or the mask is impossible. CPU tensors only.

    On other devices this would have to wait for the device; see :func:`vareid_ext.raise_label_errors`.
    """
    if identity.device.type != "cpu" or identity.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(identity))
    if smallest < 0 or largest >= identities:
        row = _first((identity < 0) | (identity >= identities))
        raise IndexError(f"identity: {int(identity[row])} at row {row}; labels must be in [0, {identities})")
    if mask is not None:
        empty = ~mask.any(1)
        if bool(empty.any()):
            raise ValueError(f"mask: identity {_first(empty)} has no existing viewpoint")
    if viewpoint is None:
        return
    if viewpoint.is_floating_point():
        wide = viewpoint.to(torch.float64)
        wrong = ~(((wide >= 0).all(1)) & ((wide.sum(1) - 1).abs() <= 1e-4))
        if bool(wrong.any()):
            row = _first(wrong)
            raise ValueError(
                f"viewpoint: {wide[row].tolist()} at row {row}; a distribution must be non-negative and sum to 1 "
                "within 1e-4"
            )
        if mask is not None:
            outside = ((wide > 0) & ~mask[identity]).any(1)
            if bool(outside.any()):
                row = _first(outside)
                raise ValueError(
                    f"viewpoint: {wide[row].tolist()} at row {row} has weight on a view that the mask excludes for "
                    f"identity {int(identity[row])}"
                )
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(viewpoint))
    if smallest < -1 or largest >= views:
        row = _first((viewpoint < -1) | (viewpoint >= views))
        raise IndexError(
            f"viewpoint: {int(viewpoint[row])} at row {row}; labels must be in [0, {views}), or -1 for unknown"
        )
    if mask is not None:
        excluded = (viewpoint >= 0) & ~mask[identity, viewpoint.clamp(min=0)]
        if bool(excluded.any()):
            row = _first(excluded)
            raise ValueError(
                f"mask: excludes viewpoint {int(viewpoint[row])} of identity {int(identity[row])}, which row {row} has"
            )
