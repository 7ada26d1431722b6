"""Checks of the losses' arguments: labels, viewpoints, masks and the scalars."""

from __future__ import annotations

import warnings

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

SMOOTHING = ("adaptive", "uniform", "none")
REDUCTION = ("mean", "sum", "none")
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_told_alpha: set[tuple[float, int]] = set()
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
            stacklevel=3,  # the line that called the loss
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


def plain_viewpoint(viewpoint: Tensor) -> Tensor:
    """int64 labels or a float64 distribution: the two kinds the operators take; a target, so without gradient."""
    return viewpoint.detach().to(torch.float64 if viewpoint.is_floating_point() else torch.int64)


def check_mask(mask: Tensor | None, identities: int, views: int, anchor_name: str, anchor: Tensor) -> None:
    """TypeError or ValueError unless ``mask`` is None or a bool [K, V] on the anchor's device."""
    if mask is not None:
        check_shape("mask", mask, (identities, views))
        check_dtype("mask", mask, torch.bool)
        check_same_device("mask", mask, anchor_name, anchor)


def check_batch(samples: int, classes: int, reduction: str, name: str) -> None:
    """ValueError where there is no class, or a mean over no samples is asked for."""
    if classes == 0:
        raise ValueError(f"{name}: there are no classes; at least one identity and one viewpoint are needed")
    if samples == 0 and reduction == "mean":
        raise ValueError(f"{name}: the batch is empty; reduction='mean' needs at least one sample")


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, jvp, ...) is being applied.

    Operators with a closed-form gradient cannot be followed by these; the losses then run as a plain composition.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _without_wrappers(tensor: Tensor | None) -> Tensor | None:
    """The tensor that the wrappers of torch.func's transforms hold, with the dimensions that vmap hides."""
    while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_transformed_labels(
    identity: Tensor, viewpoint: Tensor | None, identities: int, views: int, mask: Tensor | None
) -> None:
    """:func:`check_label_values` inside a transform of ``torch.func``; labels batched by vmap need only be in range.

    Tensors without values (a tracer's, fake ones) are not looked at.
    """
    given = (identity, viewpoint, mask)
    plain = [_without_wrappers(tensor) for tensor in given]
    traced = torch._C._len_torch_dispatch_stack() > 0
    if traced or not all(_native.is_plain(tensor) for tensor in plain if tensor is not None):
        return
    with torch._C._DisableFuncTorch():
        whole_identity, whole_viewpoint, whole_mask = plain
        assert whole_identity is not None
        if all(p is None or p.dim() == t.dim() for p, t in zip(plain, given, strict=True) if t is not None):
            check_label_values(whole_identity, whole_viewpoint, identities, views, whole_mask)
            return
        check_label_values(whole_identity.flatten(), None, identities, 1, None)
        if whole_viewpoint is not None and not whole_viewpoint.is_floating_point():
            whole_viewpoint = whole_viewpoint.flatten()
            check_label_values(torch.zeros_like(whole_viewpoint), whole_viewpoint, 1, views, None)


def reduce_rows(loss: Tensor, reduction: str) -> Tensor:
    """The mean or the sum of the rows' losses, added up in float64; or the rows as they are."""
    if reduction == "none":
        return loss
    total = loss.to(torch.float64).sum()
    return (total / loss.shape[0] if reduction == "mean" else total).to(loss.dtype)


def check_label_values(
    identity: Tensor, viewpoint: Tensor | None, identities: int, views: int, mask: Tensor | None
) -> None:
    """IndexError or ValueError where a label, a view distribution or the mask is impossible. CPU tensors only.

    On other devices this would have to wait for the device; see :func:`vareid_ext.raise_label_errors`.
    """
    if identity.device.type != "cpu" or identity.numel() == 0:
        return
    if _native.loaded() and not _native.reference_forced():
        labels = (None if t is None else _native.view(t.contiguous()) for t in (identity, viewpoint, mask))
        if _native.module().viewpoint_aware_cross_entropy_labels_fit(*labels, identities, views):
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


def label_error_slot(device: torch.device) -> Tensor | None:
    """Where the kernels on a GPU note a bad label: int64 [2], one for each head, in memory that host and device share.

    None on the CPU. Raises what earlier calls on this device have noted by now, without waiting for it.
    """
    if device.type != "cuda":
        return None
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
    the device anyway (when it reads the loss, say). On the CPU bad labels are refused at once. Inside the transforms of
    ``torch.func`` nothing looks at labels on a GPU.

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
