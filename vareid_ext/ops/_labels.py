"""Checks of the losses' arguments: labels, viewpoints, masks and the scalars."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import (
    FLOATING,
    check_choice,
    check_dtype,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
)
from vareid_ext.ops._operator import contiguous
from vareid_ext.reference.viewpoint_aware_cross_entropy import label_error

SMOOTHING = ("adaptive", "uniform", "none")
REDUCTION = ("mean", "sum", "none")
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_warned_alpha: set[tuple[float, int]] = set()
_label_errors: dict[torch.device, Tensor] = {}
# The codes of csrc/cuda/cross_entropy_rows.cuh.
_LABEL_ERRORS = (
    "",
    "identity: out of range",
    "viewpoint: out of range",
    "viewpoint: one that the mask excludes",
    "viewpoint: not a distribution (non-negative, summing to 1 within 1e-4)",
    "mask: no existing viewpoint for the identity",
)


def check_scalars(smoothing: str, alpha: float, epsilon: float, reduction: str) -> None:
    """ValueError unless the modes are known, alpha is in [0, 0.5) and epsilon in [0, 1); TypeError unless numbers."""
    check_choice("smoothing", smoothing, SMOOTHING)
    check_choice("reduction", reduction, REDUCTION)
    check_number("alpha", alpha)
    check_number("epsilon", epsilon)
    if not 0 <= alpha < 0.5:
        raise ValueError(f"alpha: {alpha} was given; it must be in [0, 0.5)")
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon: {epsilon} was given; it must be in [0, 1)")


def smoothing_arguments(smoothing: str, alpha: float, epsilon: float) -> tuple[bool, float, float]:
    """(adaptive, alpha, epsilon) of the operators: epsilon is eps1 where that is not adaptive."""
    return smoothing == "adaptive", alpha, epsilon if smoothing == "uniform" else 0.0


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


def plain_identity(identity: Tensor) -> Tensor:
    """int64 labels."""
    return identity if identity.dtype == torch.int64 else identity.long()  # even no conversion takes a microsecond


def plain_viewpoint(viewpoint: Tensor) -> Tensor:
    """int64 labels or a float64 distribution: the two kinds the operators take; a target, so without gradient."""
    return viewpoint.detach().double() if viewpoint.is_floating_point() else plain_identity(viewpoint)


def check_batch(samples: int, classes: int, reduction: str, name: str) -> None:
    """ValueError where there is no class, or a mean over no samples is asked for."""
    if classes == 0:
        raise ValueError(f"{name}: there are no classes; at least one identity and one viewpoint are needed")
    if samples == 0 and reduction == "mean":
        raise ValueError(f"{name}: the batch is empty; reduction='mean' needs at least one sample")


def reduce_rows(loss: Tensor, reduction: str) -> Tensor:
    """The mean or the sum of the rows' losses, added up in float64; or the rows as they are."""
    if reduction == "none":
        return loss
    total = loss.to(torch.float64).sum()
    return (total / loss.shape[0] if reduction == "mean" else total).to(loss.dtype)


def warn_of_alpha(alpha: float, views: int, nested: int = 0) -> None:
    """Warn once where alpha is so large that a wrong view's target can exceed the true one's.

    ``nested``: how many functions of the package lie between the loss and this one.
    """
    if torch.compiler.is_compiling() or views < 2 or alpha <= (views - 1) / (2 * views - 1):
        return
    if (alpha, views) not in _warned_alpha:
        _warned_alpha.add((alpha, views))
        limit = (views - 1) / (2 * views - 1)
        warnings.warn(
            f"alpha: {alpha} is above {limit:.3g}; with {views} viewpoints the target of a wrong view can exceed that "
            "of the true one",
            RuntimeWarning,
            stacklevel=3 + nested,  # the line that called the loss
        )


def check_labels(
    name: str,
    anchor: Tensor,
    shape: Sequence[int],
    identity: Tensor,
    viewpoint: Tensor,
    mask: Tensor | None,
    reduction: str,
    alpha: float,
) -> None:
    """The checks of what all losses of both labels take; shape is (N, K, V), name is what errors call the anchor."""
    N, K, V = shape
    check_identity(identity, N, name, anchor)
    check_viewpoint(viewpoint, N, V, name, anchor)
    if mask is not None:
        check_shape("mask", mask, (K, V))
        check_dtype("mask", mask, torch.bool)
        check_same_device("mask", mask, name, anchor)
    check_batch(N, K * V, reduction, name)
    warn_of_alpha(alpha, V, nested=1)


def check_label_values(
    identity: Tensor, viewpoint: Tensor | None, identities: int, views: int, mask: Tensor | None
) -> None:
    """IndexError or ValueError where a label, a view distribution or the mask is impossible. CPU tensors only.

    On other devices this would have to wait for the device; see :func:`vareid_ext.raise_label_errors`.
    """
    if not identity.is_cpu or identity.numel() == 0:
        return
    if _native.loaded() and not _native.reference_forced():
        labels = map(_native.capsule, map(contiguous, (identity, viewpoint, mask)))
        code, row = _native.module().viewpoint_aware_cross_entropy_label_error(*labels, identities, views)
    else:
        code, row = label_error(identity, viewpoint, mask, identities, views)
    if code == 0:
        return
    if code == 5:
        raise ValueError(f"mask: identity {row} has no existing viewpoint")
    y = int(identity[row])
    if code == 1:
        raise IndexError(f"identity: {y} at row {row}; labels must be in [0, {identities})")
    assert viewpoint is not None
    given = viewpoint[row].tolist()
    if code == 2:
        raise IndexError(f"viewpoint: {given} at row {row}; labels must be in [0, {views}), or -1 for unknown")
    if code == 3:
        raise ValueError(f"viewpoint: {given} at row {row} is on a view that the mask excludes for identity {y}")
    raise ValueError(f"viewpoint: {given} at row {row}; a distribution must be non-negative and sum to 1 within 1e-4")


def label_error_slot(device: torch.device) -> Tensor:
    """Where the kernels on a GPU note a bad label: int64 [2], one for each head, in memory that host and device share.

    Raises what earlier calls on this device have noted by now, without waiting for it.
    """
    if device not in _label_errors:
        _label_errors[device] = torch.zeros(2, dtype=torch.int64, pin_memory=True)
    _raise_noted(_label_errors[device])
    return _label_errors[device]


def _raise_noted(slot: Tensor) -> None:
    noted = [code for code in slot.tolist() if code]
    if noted:
        slot.zero_()
        row, code = divmod(noted[0], 8)
        error = IndexError if code <= 2 else ValueError
        raise error(f"{_LABEL_ERRORS[code]}, at row {row} of an earlier batch on the GPU, whose loss was NaN")


def raise_label_errors(device: torch.device | str | int | None = None) -> None:
    """Raise the error of a bad label in an earlier loss call on a GPU, if there was one.

    The losses do not wait for the GPU to look at labels: there, a label out of range makes its row's loss and gradient
    NaN, and the error is raised by the next loss call that finds it noted, or here. Call it where the loop waits for
    the device anyway (when it reads the loss, say). On the CPU bad labels are refused at once.

    Args:
        device: the GPU; None for all that were used. It is waited for.

    Raises:
        IndexError: an identity or a viewpoint was out of range.
        ValueError: a viewpoint was excluded by the mask, or no distribution.
    """
    wanted = (
        None if device is None else torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    )
    for used, slot in _label_errors.items():
        if wanted is None or wanted == used or (wanted.type == used.type and wanted.index is None):
            torch.cuda.synchronize(used)
            _raise_noted(slot)
