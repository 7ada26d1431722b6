"""All pairs' distances as an operator; the formulas are in :mod:`vareid_ext.reference.pairwise_distance`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import check_choice
from vareid_ext.ops._features import check_features, check_same_features, row_magnitudes, stream_of
from vareid_ext.ops._filter import Filter, block_side, row_blocks
from vareid_ext.ops._matmul import full_float32
from vareid_ext.reference import pairwise_distance as reference

# On a GPU, blocks of up to so many pairs are computed by the package's own kernel, which needs one launch; larger ones
# by the vendor's product and a second kernel that turns it into distances.
_TILED_PAIRS = {"cuda": 1 << 16, "cpu": 0}


def _check_rows(x: Tensor, y: Tensor | None, metric: str) -> None:
    row_magnitudes("x", x, nonzero=metric == "cosine")
    if y is not None:
        row_magnitudes("y", y, nonzero=metric == "cosine")


@torch.library.custom_op("vareid::pairwise_distance_forward", mutates_args=())
def _forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    _check_rows(x, y, metric)
    return reference.pairwise_distance_forward(x, y, metric)


@torch.library.custom_op("vareid::pairwise_distance_backward", mutates_args=())
def _backward(upstream: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    with full_float32(x.device.type):
        return reference.pairwise_distance_backward(upstream, x, y, distance, metric)


@_forward.register_fake
def _(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    other = x if y is None else y
    return x.new_empty((x.shape[0], other.shape[0]), dtype=reference.result_dtype(x.dtype))


@_backward.register_fake
def _(upstream: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x if y is None else y).shape)


def _native_forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    if x.dtype == torch.float64:
        return NotImplemented
    symmetric, parts = y is None, [x] if y is None else [x, y]
    filtered = Filter(parts, ["x", "y"][: len(parts)], metric)
    other = len(parts) - 1
    out = x.new_empty((x.shape[0], filtered.parts[other].shape[0]), dtype=torch.float32)
    view = _native.view

    def features(which: int, at: slice) -> tuple[Any, Any]:
        factor = filtered.factors[which]
        return view(filtered.parts[which][at]), view(None if factor is None else factor[at])

    side = block_side(x.device)
    columns_of = row_blocks(filtered, [other], side)
    with full_float32(x.device.type):
        for which, first, last, _ in row_blocks(filtered, [0], side):
            rows, at = filtered.block(which, first, last, 0), slice(first, last)
            for _, other_first, other_last, _ in columns_of:
                if symmetric and other_first < first:
                    continue  # the mirror image of a block that was done
                columns, to = filtered.block(other, other_first, other_last, 1), slice(other_first, other_last)
                block = out[at, to]
                if block.numel() <= _TILED_PAIRS[x.device.type]:
                    _native.module().pairwise_distance_tiled(
                        view(rows.contiguous()), view(columns.contiguous()), view(block), *features(0, at),
                        *features(other, to), view(filtered.norms[0][at]), view(filtered.norms[other][to]),
                        reference.METRICS.index(metric), filtered.unscale, stream_of(x),
                    )  # fmt: skip
                    if symmetric and other_first > first:
                        out[to, at] = block.T
                    continue
                torch.mm(rows, columns.T, out=block)
                _native.module().pairwise_distance_block(
                    view(block), *features(0, at), *features(other, to),
                    view(filtered.norms[0][at]), view(filtered.norms[other][to]), reference.METRICS.index(metric),
                    filtered.unscale, view(out[to, at] if symmetric and other_first > first else None),
                    filtered.threads, stream_of(x),
                )  # fmt: skip
                if symmetric and other_first == first:  # some vendors' products round (i, j) and (j, i) differently
                    block.triu_().add_(block.triu(1).T)
    return out


for _device_type in ("cpu", "cuda"):
    _native.register(_forward, _device_type)(_native_forward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, distance = ctx.saved_tensors
    grad_x, grad_y = _backward(upstream, x, y, distance, ctx.metric)
    return (grad_x + grad_y, None, None) if y is None else (grad_x, grad_y, None)


def _refuse_double_backward(ctx: Any, *_grads: Tensor) -> None:
    raise RuntimeError("pairwise_distance: double backward is not supported (its gradient is a closed form)")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_double_backward)


def pairwise_distance(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """Distances between tensors of features; :func:`vareid_ext.retrieval.pairwise_distance` says what it takes."""
    check_features("x", x)
    if y is not None:
        check_same_features("y", y, "x", x)
    check_choice("metric", metric, reference.METRICS)
    return _forward(x, y, metric)
