"""One linear head in tiles: products by PyTorch's library, rows by the native kernels, logits in one buffer.

The logits of a tile are overwritten by their gradient. Tiles are chunks of rows, so that each centre's gradient is
added to once for each chunk. Where so few rows fit that the products would be slow, they are blocks of identities
instead: each row's statistics are gathered over all blocks first, and the logits are computed a second time. Half types
take blocks of identities wherever not everything fits, so that each centre's gradient is rounded once, and the
feature's gradient is gathered in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._labels import label_error_slot
from vareid_ext.reference import accumulator_dtype
from vareid_ext.reference.viewpoint_aware_cross_entropy import STATISTICS

_FEW_ROWS = 64  # below this, products over a chunk of rows are slower than computing the logits twice
_ALIGNED_IDENTITIES = 16  # blocks of identities are multiples of this, so that their rows stay aligned


class Shard(NamedTuple):
    """Which identities a head's centres are, where other processes have the others'."""

    first: int
    """The number of the first."""
    identities: int
    """K, of all processes."""
    most: int
    """Identities that a process has at most: all of them take tiles of the same rows."""
    exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Of these identities' summaries [N, parts, 4] and own logits [N, V], those of all; called with the same N by all
    processes."""


class Head(NamedTuple):
    """What defines one head's loss; labels are contiguous."""

    centers: Tensor
    """[K, V, D], contiguous."""
    identity: Tensor
    viewpoint: Tensor | None
    mask: Tensor | None
    adaptive: bool
    alpha: float
    epsilon: float
    normalize: bool
    scale: float


class Tiling(NamedTuple):
    """The size of the tiles of one head."""

    rows: int
    identities: int


def tiling(N: int, K: int, V: int, element_bytes: int, budget: int, chunk_rows: int) -> Tiling:
    """Tiles whose logits stay within ``budget`` bytes, but at least a row or 16 identities; chunk_rows 0 = free."""
    if chunk_rows:
        return Tiling(min(chunk_rows, N), K)
    fitting = budget // (K * V * element_bytes)
    if fitting >= (N if element_bytes == 2 else min(N, _FEW_ROWS)):
        chunks = -(-N // max(1, fitting))
        return Tiling(-(-N // chunks), K)
    identities = budget // (N * V * element_bytes)
    identities = max(identities // _ALIGNED_IDENTITIES, 1) * _ALIGNED_IDENTITIES
    return Tiling(N, min(identities, K))


def _row_stride(columns: int, some: Tensor) -> int:
    """Columns of the buffer of logits: its rows begin at 16-byte boundaries."""
    step = 16 // some.element_size()
    return -(-columns // step) * step


def inverse_norms(x: Tensor) -> Tensor:
    """1 / |x_i| for each row of ``x [rows, D]``; 0 for a zero vector."""
    inverse = x.new_empty(x.shape[0], dtype=accumulator_dtype(x.dtype))
    _native.launch("linear_viewpoint_aware_cross_entropy_inverse_norms", x, inverse, on=x)
    return inverse


def project(x: Tensor, inverse: Tensor, gradient: Tensor) -> None:
    """Remove from each row of the gradient what points along the row of x, in place."""
    _native.launch("linear_viewpoint_aware_cross_entropy_project", x, inverse, gradient, on=x)


class _Rows:
    """The native row kernels over the tiles of some rows."""

    def __init__(
        self, head: Head, first_row: int, rows: int, blocks: list[int], scale: Tensor | None, shard: Shard | None
    ) -> None:
        self.head, self.scale, self.shard = head, scale, shard
        self.K, self.V, _ = head.centers.shape
        self.offset = 0
        if shard is not None:
            self.K, self.offset = shard.identities, shard.first
        self.identity = head.identity[first_row : first_row + rows]
        self.viewpoint = None if head.viewpoint is None else head.viewpoint[first_row : first_row + rows]
        self.parts = [self._parts(rows, identities * self.V) for identities in blocks]
        new = head.centers.new_empty
        self.summaries = new((rows, sum(self.parts), 4), dtype=torch.float64)
        make = new if shard is None else head.centers.new_zeros  # another process may have the identity
        self.own_logits = make((self.V, rows), dtype=torch.float64)
        self.statistics = new((STATISTICS, rows), dtype=torch.float64)

    def _parts(self, rows: int, columns: int) -> int:
        return _native.module().linear_viewpoint_aware_cross_entropy_parts(rows, columns, self.head.centers.is_cuda)

    def _scale(self, first: int, logits: Tensor) -> Tensor | None:
        return None if self.scale is None else self.scale[first * self.V :][: logits.shape[1]]

    def summarise(self, logits: Tensor, first: int, block: int) -> None:
        _native.launch(
            "linear_viewpoint_aware_cross_entropy_summarise", logits, self._scale(first, logits), self.identity,
            self.head.mask, self.summaries, self.own_logits, self.K, self.V, self.offset + first,
            sum(self.parts[:block]), on=logits,
        )  # fmt: skip

    def exchange(self) -> None:
        """Make the summaries those of all processes' identities."""
        if self.shard is not None:
            others, own = self.shard.exchange(self.summaries, self.own_logits.T)
            self.summaries, self.own_logits = others.contiguous(), own.T.contiguous()

    def finish(self, loss: Tensor) -> None:
        head = self.head
        _native.launch(
            "linear_viewpoint_aware_cross_entropy_finish", self.summaries, self.own_logits, self.identity,
            self.viewpoint, head.mask, loss, self.statistics, head.adaptive, head.alpha, head.epsilon, self.K,
            label_error_slot(loss.device) if loss.is_cuda else None, on=loss,
        )  # fmt: skip

    def differentiate(self, logits: Tensor, first: int, upstream: Tensor, share: float) -> None:
        _native.launch(
            "linear_viewpoint_aware_cross_entropy_gradient", logits, self._scale(first, logits), self.identity,
            self.viewpoint, self.head.mask, self.statistics, upstream, share, self.K, self.V, self.offset + first,
            on=logits,
        )  # fmt: skip


def run_head(
    feature: Tensor,
    head: Head,
    upstream: Tensor,
    share: float,
    budget: int,
    chunk_rows: int,
    want_feature: bool,
    want_centers: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss [N] of one head, and the gradients that are wanted, times ``upstream * share``.

    Args:
        feature: [N, D], contiguous.
        head: the head.
        upstream: [] or [N], the gradient of each row's loss.
        share: another factor of the gradients.
        budget: bytes for a tile of logits.
        chunk_rows: rows of a tile, 0 for as many as fit.
        want_feature: whether feature's gradient is wanted.
        want_centers: whether the centres' gradient is wanted.
        shard: where these are some of the identities; labels and mask are of all.
    """
    (N, D), (K, V, _) = feature.shape, head.centers.shape
    wide = accumulator_dtype(feature.dtype)
    centers = head.centers.view(K * V, D)
    loss = feature.new_empty(N, dtype=wide)
    feature_gradient = torch.empty_like(feature) if want_feature else None
    centers_gradient = torch.empty_like(centers) if want_centers else None
    if N == 0:
        return loss, feature_gradient, None if centers_gradient is None else centers_gradient.zero_().view(K, V, D)
    operand, scale, feature_inverse = feature, None, None
    if head.normalize:
        feature_inverse, scale = inverse_norms(feature), inverse_norms(centers)
        operand = (feature * (feature_inverse * head.scale)[:, None]).to(feature.dtype)
    most = K if shard is None else shard.most
    tile = tiling(N, most, V, feature.element_size(), budget, chunk_rows)
    firsts = list(range(0, K, tile.identities))
    blocks = [min(tile.identities, K - first) for first in firsts]
    stride = _row_stride(tile.identities * V, feature)
    buffer = feature.new_empty(tile.rows * stride)
    feature_sum = feature_gradient
    if feature_gradient is not None and len(firsts) > 1 and wide != feature.dtype:
        feature_sum = torch.empty_like(feature, dtype=wide)
    for begin in range(0, N, tile.rows):
        rows = slice(begin, min(begin + tile.rows, N))
        count = rows.stop - begin
        kernels = _Rows(head, begin, count, blocks, scale, shard)

        def logits_of(block: int, rows: slice = rows, count: int = count) -> tuple[Tensor, Tensor]:
            first, columns = firsts[block] * V, blocks[block] * V
            part = centers[first : first + columns]
            logits = buffer.as_strided((count, columns), (stride, 1))
            return torch.mm(operand[rows], part.T, out=logits), part

        for block, first in enumerate(firsts):
            logits, _ = logits_of(block)
            kernels.summarise(logits, first, block)
        kernels.exchange()
        kernels.finish(loss[rows])
        if not (want_feature or want_centers):
            continue
        row_upstream = upstream[rows] if upstream.dim() else upstream
        for block, first in enumerate(firsts):
            logits, part = (logits, centers) if len(firsts) == 1 else logits_of(block)
            kernels.differentiate(logits, first, row_upstream, share)
            if feature_sum is not None:
                _product(logits, part, feature_sum[rows], add=block > 0)
            if centers_gradient is not None:
                out = centers_gradient[first * V : (first + blocks[block]) * V]
                _product(logits.T, operand[rows], out, add=begin > 0)
    if feature_gradient is not None and feature_sum is not None and feature_sum is not feature_gradient:
        feature_gradient.copy_(feature_sum)
    if feature_gradient is not None and K == 0:
        feature_gradient.zero_()
    if head.normalize:
        if feature_gradient is not None and feature_inverse is not None:
            feature_gradient.mul_((feature_inverse * head.scale)[:, None])
            project(feature, feature_inverse, feature_gradient)
        if centers_gradient is not None and scale is not None:
            project(centers, scale, centers_gradient)
    return loss, feature_gradient, None if centers_gradient is None else centers_gradient.view(K, V, D)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if out.dtype != a.dtype:
        out.copy_(out + a @ b if add else a @ b)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
