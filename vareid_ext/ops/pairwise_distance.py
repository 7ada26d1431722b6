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
    side = block_side(x.device)
    columns_of = row_blocks(filtered, [other], side)
    with full_float32(x.device.type):
        for which, first, last, _ in row_blocks(filtered, [0], side):
            rows, at = filtered.block(which, first, last, 0), slice(first, last)
            for _, other_first, other_last, _ in columns_of:
                if symmetric and other_first < first:
                    continue  # the mirror image of a block that was done
                columns, to = filtered.block(other, other_first, other_last, 1), slice(other_first, other_last)
                block, mirrored = out[at, to], symmetric and other_first > first
                if block.numel() <= _TILED_PAIRS[x.device.type]:
                    _native.module().pairwise_distance_tiled(
                        _native.view(rows.contiguous()), _native.view(columns.contiguous()), _native.view(block),
                        *_rows_of(filtered, 0, at), *_rows_of(filtered, other, to),
                        _native.view(filtered.norms[0][at]), _native.view(filtered.norms[other][to]),
                        reference.METRICS.index(metric), filtered.unscale, stream_of(x),
                    )  # fmt: skip
                    if mirrored:
                        out[to, at] = block.T
                    continue
                torch.mm(rows, columns.T, out=block)
                _finish(block, filtered, at, other, to, metric, out[to, at] if mirrored else None)
                if symmetric and other_first == first:  # some vendors' products round (i, j) and (j, i) differently
                    block.triu_().add_(block.triu(1).T)
    return out


def _rows_of(filtered: Filter, which: int, at: slice) -> tuple[Any, Any]:
    """Features and factors of some rows, as the compiled module takes them."""
    factor = filtered.factors[which]
    return _native.view(filtered.parts[which][at]), _native.view(None if factor is None else factor[at])


def _finish(
    products: Tensor, filtered: Filter, at: slice, other: int, to: slice, metric: str, mirror: Tensor | None = None
) -> None:
    """Turns products of some rows of the first part and of another part into distances."""
    _native.module().pairwise_distance_block(
        _native.view(products), *_rows_of(filtered, 0, at), *_rows_of(filtered, other, to),
        _native.view(filtered.norms[0][at]), _native.view(filtered.norms[other][to]), reference.METRICS.index(metric),
        filtered.unscale, _native.view(mirror), filtered.threads, stream_of(products),
    )  # fmt: skip


class RowDistances:
    """Squared distances of any rows of x to all rows of y, which is made ready for products once.

    Args:
        x: [M, D], finite.
        y: [N, D], finite.
        scale: what both are multiplied by, as :func:`vareid_ext.ops._filter.common_scale` gives it.
    """

    def __init__(self, x: Tensor, y: Tensor, scale: float) -> None:
        self.x, self.y, self.scale = x, y, scale
        self._filtered: Filter | None = None

    def __call__(self, begin: int, end: int) -> Tensor:
        """float32 [end - begin, N]."""
        if not _native.available(self.x.device):
            rows, columns = (part.double() * self.scale for part in (self.x[begin:end], self.y))
            return reference.exact_distance(rows, columns, "sqeuclidean").to(torch.float32)
        if self._filtered is None:
            self._filtered = Filter([self.x, self.y], ["x", "y"], "sqeuclidean", scale=self.scale)
        filtered, at = self._filtered, slice(begin, end)
        out = self.x.new_empty((end - begin, self.y.shape[0]), dtype=torch.float32)
        with full_float32(out.device.type):
            rows = filtered.block(0, begin, end, 0)
            for _, first, last, _ in row_blocks(filtered, [1], block_side(out.device)):
                torch.mm(rows, filtered.block(1, first, last, 1).T, out=out[:, first:last])
                _finish(out[:, first:last], filtered, at, 1, slice(first, last), "sqeuclidean")
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
