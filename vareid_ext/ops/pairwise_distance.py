"""All pairs' distances as an operator; the formulas are in :mod:`vareid_ext.reference.pairwise_distance`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._checks import check_choice
from vareid_ext.ops._features import check_features, check_same_features, row_magnitudes
from vareid_ext.ops._filter import Filter, block_edges, block_side, row_blocks, strip_side
from vareid_ext.ops._matmul import full_float32
from vareid_ext.ops._memory import new_distances
from vareid_ext.ops._operator import add_gradient, define
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference import pairwise_distance as reference

# On a GPU, blocks of up to so many pairs are computed by the package's own kernel, which needs one launch; larger ones
# by the vendor's product and a second kernel that turns it into distances.
_TILED_PAIRS = {"cuda": 1 << 16, "cpu": 0}
# On a CPU with AVX-512, for so many rows, the package's own products take two thirds to all of the vendor's time, and
# threads meet once in place of twice for each block.
_STRIP_ROWS = 128


def _reference_forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    row_magnitudes("x", x, nonzero=metric == "cosine")
    if y is not None:
        row_magnitudes("y", y, nonzero=metric == "cosine")
    return reference.pairwise_distance_forward(x, y, metric)


def _native_forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    if x.dtype == torch.float64:
        return NotImplemented
    symmetric, parts = y is None, [x] if y is None else [x, y]
    filtered = Filter(parts, ["x", "y"][: len(parts)], metric)
    other = len(parts) - 1
    out = new_distances(x, x.shape[0], filtered.parts[other].shape[0])
    side = block_side(x.device)
    # A set against itself is done in squares, whose mirror images are written too. A few rows that are multiplied where
    # they lie are done in wide blocks: threads meet at the end of each.
    across = side if symmetric else strip_side(x.device, side)
    workspace = None if symmetric else _strip_workspace(x)
    if x.device.type == "cpu" and filtered.direct and not symmetric:
        few = 4 * side * side // max(1, x.shape[0])
        across = max(across, few if workspace is None else filtered.parts[other].shape[0])
    columns_of = row_blocks(filtered, [other], across)
    with full_float32(x.device.type):
        for which, first, last, _ in row_blocks(filtered, [0], side):
            rows, at = filtered.block(which, first, last, 0), slice(first, last)
            for _, other_first, other_last, _ in columns_of:
                if symmetric and other_first < first:
                    continue  # the mirror image of a block that was done
                columns, to = filtered.block(other, other_first, other_last, 1), slice(other_first, other_last)
                block = out[at, to]
                mirror = out[to, at] if symmetric and other_first > first else None
                sides = _sides(filtered, at, other, to, metric)
                if block.numel() <= _TILED_PAIRS[x.device.type]:
                    prepared = rows.contiguous(), columns.contiguous()
                    _native.launch("pairwise_distance_tiled", *prepared, block, *sides, on=x)
                    if mirror is not None:
                        mirror.copy_(block.T)
                    continue
                if workspace is not None:
                    _native.launch("pairwise_distance_strips", rows, columns, block, *sides, workspace, on=x)
                    continue
                torch.mm(rows, columns.T, out=block)
                _native.launch("pairwise_distance_block", block, *sides, mirror, on=x)
                if symmetric and other_first == first:  # some vendors' products round (i, j) and (j, i) differently
                    block.triu_().add_(block.triu(1).T)
    return out


def _strip_workspace(x: Tensor) -> Tensor | None:
    """What the threads' own products of x and other rows are made in; None where the vendor's are taken."""
    if x.is_cuda or x.shape[0] < _STRIP_ROWS:
        return None
    needed = torch.get_num_threads() * _native.module().pairwise_distance_strip_bytes(x.shape[1])
    return torch.empty(needed, dtype=torch.uint8) if needed else None


def _sides(filtered: Filter, at: slice, other: int, to: slice, metric: str) -> tuple[Any, ...]:
    """What turns products of some rows of the first part and of another part into distances."""
    arrays: list[Tensor | None] = []
    for which, rows in ((0, at), (other, to)):
        factor = filtered.factors[which]
        arrays += [filtered.parts[which][rows], None if factor is None else factor[rows]]
    norms = filtered.norms[0][at], filtered.norms[other][to]
    return *arrays, *norms, reference.METRICS.index(metric), filtered.unscale


class RowDistances:
    """Squared distances of any rows of x to all rows of y, which is made ready for products once.

    Args:
        x: [M, D], finite.
        y: [N, D], finite.
        scale: what both are multiplied by, as :func:`vareid_ext.ops._filter.common_scale` gives it.
        center_by: as :class:`Filter` takes it.
        edges: where the blocks of y begin, and where the last one ends; None chooses.
        measured: whether distances that float32 products give badly are measured; else they are as the products of the
            neighbour lists give them.
    """

    def __init__(
        self, x: Tensor, y: Tensor, scale: float, center_by: Sequence[Tensor] | None = None,
        edges: Sequence[int] | None = None, measured: bool = True,
    ) -> None:  # fmt: skip
        self.x, self.y, self.scale, self._center_by, self._measured = x, y, scale, center_by, measured
        self._edges = edges or block_edges(y.shape[0], strip_side(y.device, block_side(y.device)))
        self._filtered: Filter | None = None

    def __call__(self, begin: int, end: int) -> Tensor:
        """float32 [end - begin, N]."""
        if not _native.available(self.x.device):
            rows, columns = (part.double() * self.scale for part in (self.x[begin:end], self.y))
            return reference.exact_distance(rows, columns, "sqeuclidean").to(torch.float32)
        if self._filtered is None:
            self._filtered = Filter([self.x, self.y], ["x", "y"], "sqeuclidean", self.scale, self._center_by)
        filtered, at = self._filtered, slice(begin, end)
        out = self.x.new_empty((end - begin, self.y.shape[0]), dtype=torch.float32)
        with full_float32(out.device.type):
            rows = filtered.block(0, begin, end, 0)
            for first, last in itertools.pairwise(self._edges):
                block = out[:, first:last]
                torch.mm(rows, filtered.block(1, first, last, 1).T, out=block)
                if not self._measured:
                    block.mul_(-2).add_(filtered.norms[1][first:last]).add_(filtered.norms[0][at, None]).clamp_(min=0)
                    continue
                sides = _sides(filtered, at, 1, slice(first, last), "sqeuclidean")
                _native.launch("pairwise_distance_block", block, *sides, None, on=out)
        return out


def _backward_impl(
    upstream: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    with full_float32(x.device.type):
        return reference.pairwise_distance_backward(upstream, x, y, distance, metric)


def _fake_forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    return x.new_empty((x.shape[0], (x if y is None else y).shape[0]), dtype=accumulator_dtype(x.dtype))


_forward = define(
    "pairwise_distance_forward(Tensor x, Tensor? y, str metric) -> Tensor",
    fake=_fake_forward,
    reference=_reference_forward,
    native=_native_forward,
)
_backward = define(
    "pairwise_distance_backward(Tensor upstream, Tensor x, Tensor? y, Tensor distance, str metric) -> (Tensor, Tensor)",
    fake=lambda _upstream, x, y, *_arguments: (x.new_empty(x.shape), x.new_empty((x if y is None else y).shape)),
    reference=_backward_impl,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, distance = ctx.saved_tensors
    grad_x, grad_y = _backward(upstream, x, y, distance, ctx.metric)
    return (grad_x + grad_y, None, None) if y is None else (grad_x, grad_y, None)


add_gradient(_forward, _save, _differentiate)


def pairwise_distance(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """Distances between tensors of features; :func:`vareid_ext.retrieval.pairwise_distance` says what it takes."""
    check_features("x", x)
    if y is not None:
        check_same_features("y", y, "x", x)
    check_choice("metric", metric, reference.METRICS)
    distance: Tensor = _forward(x, y, metric)
    return distance
