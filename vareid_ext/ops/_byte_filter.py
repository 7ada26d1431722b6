"""The filter of :mod:`vareid_ext.ops._filter` with rows of 8 bits, where a CPU multiplies them four times as fast.

A row is ``p_i = s_i a_i + r_i`` with whole ``|a_ik| <= 127`` and ``s_i = max_k |p_ik| / 127``. The product is
``fl(s_i s_j (a_i . a_j))``, whose sum of whole numbers is exact (at most ``127^2 D < 2^31``) in any order.

The window. In the notation there, and with ``e_i >= |r_i|``, every pair has ``|n_i + n_j - 2 fl(..) - |z_i - z_j|^2| <=
w_i + w_j`` for ``w_i = (1 + 2^-18) ((1 + 1 / t) e_i^2 + (t + 40 u) n_i + 2^-77 b^2 + 2^-104 D)``, with any t > 0:

1. Rounding. ``p_i . p_j - s_i s_j (a_i . a_j) = r_i . p_j + p_i . r_j - r_i . r_j``. Doubled, the first is at most
   ``2 e_i |p_j| <= e_i^2 / t + t n_j``, the second likewise, and the third at most ``e_i^2 + e_j^2``: together
   ``(1 + 1 / t) (e_i^2 + e_j^2) + t (n_i + n_j)``. t is what makes that small, e / |p| of the average row.
2. The product. The sum is rounded to float32 and multiplied twice, three roundings of ``|p_i - r_i| |p_j - r_j| <=
   n_i + n_j + e_i^2 + e_j^2``. Doubled, that is at most ``6.1 u (n_i + n_j + e_i^2 + e_j^2)``.
3. Sums of floats and the preparation are those of the other proof. But the bounds reach beyond ``2 (n_i + n_j)``, by
   twice the window at most: ``16 u = 2^-20`` of it, doubled.
4. Underflow. Rows without an element of 2^-100 are taken for 0, and e_i is their length. ``s_i <= 2^21``, so a product
   that is flushed to 0 changes a sum by at most 2^-105.

e_i^2 is measured of every row, in float64. That measurement and the terms in e^2 of 2 take less than the rest of 2^-18.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._filter import Filter, row_blocks, rows_at_once

_UNIT = 2.0**-24
_FEW_ROWS = 64  # of the left set, for which it does not pay to round the right one
_FEW_ELEMENTS = 128  # of a feature, likewise
_COLUMNS = 32  # packed rows are a multiple of it
_TRIED, _TRIED_PRODUCTS = 64, 1 << 20  # rows and products that are made at most to see how many the window leaves
_AT_ONCE = 1 << 17  # products of them that are looked at at once
_CROWDED = 8  # of so many rows one may have more candidates than places
_FAR_SHARE = 64  # one of so many columns may be measured for a row's largest distance
_warned = False


def byte_products() -> bool:
    """Whether this CPU has products of 8 bits; one that claims to and fails is told of once."""
    global _warned
    state = _native.module().byte_products()
    if state == 2 and not _warned:
        _warned = True
        warnings.warn(
            "this CPU names AVX512-VNNI among its instructions, but does not execute them rightly: neighbours are "
            "filtered with float32 products, which takes longer",
            RuntimeWarning,
            stacklevel=2,
        )
    return bool(state == 1)


class ByteFilter:
    """The rows of a filter, rounded: their scales, their window, and blocks of them for products.

    Args:
        filtered: the features, on a CPU.
        side: rows of the largest block.
    """

    def __init__(self, filtered: Filter, side: int) -> None:
        self.filtered, self.side = filtered, side
        norm, D = filtered.norm, filtered.parts[0].shape[1]
        sizes = [part.shape[0] for part in filtered.parts]
        scale, rounded = norm.new_empty(norm.shape), norm.new_empty(norm.shape, dtype=torch.float64)
        self.scales = list(scale.split(sizes))
        for which, errors in enumerate(rounded.split(sizes)):
            size = sizes[which]
            step = max(1, size) if filtered.direct else rows_at_once(filtered.parts[which])
            for begin in range(0, size, step):
                end = min(size, begin + step)
                rows = filtered.block(which, begin, end, 0)
                _native.launch(
                    "nearest_neighbors_round", rows, self.scales[which][begin:end], errors[begin:end], on=rows
                )
        total = float(norm.sum(dtype=torch.float64))
        share = max(math.sqrt(float(rounded.sum()) / total), 2.0**-20) if total else 1.0
        window = (1 + 1 / share) * rounded + (share + 40 * _UNIT) * norm.double() + filtered.smallest
        self.window = (window * (1 + 2.0**-18)).float()
        self.windows = list(self.window.split(sizes))
        self._buffers: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}
        self._scratch: Tensor | None = None
        self._elements = -(-D // 4) * 4

    @staticmethod
    def pays(part: Tensor, rows: int) -> bool:
        """Whether rounding pays for products of features like these with so many rows on the left."""
        return not part.is_cuda and rows >= _FEW_ROWS and part.shape[1] >= _FEW_ELEMENTS and byte_products()

    def bounds(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Norms and windows of one part or of all, in order."""
        if len(which) == len(self.windows):
            return self.filtered.norm, self.window
        return self.filtered.norms[which[0]], self.windows[which[0]]

    def suits(self, left: Sequence[int], right: Sequence[int], k: int, places: int) -> bool:
        """Whether few rows have more candidates than places for their k nearest."""
        tried = self._trial(left, right, min(k, sum(self.filtered.parts[w].shape[0] for w in right)))
        return sum(near > places for near, _ in tried) * _CROWDED <= len(tried)

    def far_pairs(self) -> float:
        """Of the first part, the share of pairs that a row's largest distance may be that of."""
        tried = self._trial([0], [0], 1)
        return sum(far for _, far in tried) / (len(tried) * self.filtered.parts[0].shape[0])

    def _trial(self, left: Sequence[int], right: Sequence[int], k: int) -> list[tuple[int, int]]:
        """For some rows of the left set, how many of the right one may be among the k nearest, and the farthest.

        Their products are of float32, which is not what the window is of, but about as far.
        """
        filtered = self.filtered
        D, columns = filtered.parts[0].shape[1], sum(filtered.parts[w].shape[0] for w in right)
        total = sum(filtered.parts[w].shape[0] for w in left)
        step = -(-total // max(8, min(total // 16, _TRIED, _TRIED_PRODUCTS // columns)))
        numbers = [torch.arange(0, filtered.parts[w].shape[0], step) for w in left]
        tried = filtered.norm.new_empty((sum(map(len, numbers)), D))
        done = 0
        for which, rows in zip(left, numbers, strict=True):
            filtered.gather(which, rows, tried[done : done + len(rows)])
            done += len(rows)
        products = filtered.norm.new_empty((len(tried), columns))
        for which, first, last, offset in row_blocks(filtered, right, self.side):
            columns_of = filtered.block(which, first, last, 1)
            torch.mm(tried, columns_of.T, out=products[:, offset : offset + last - first])
        norms, windows = (
            torch.cat([of[which][rows] for which, rows in zip(left, numbers, strict=True)])
            for of in (filtered.norms, self.windows)
        )
        right_norm, right_window = self.bounds(right)
        found = []
        step = max(1, _AT_ONCE // columns)
        for some in (slice(begin, begin + step) for begin in range(0, len(tried), step)):
            distance = products[some].mul_(-2).add_(norms[some, None]).add_(right_norm)
            reach = right_window + windows[some, None]
            upper, lower = distance + reach, distance.sub_(reach)
            near, far = lower <= upper.kthvalue(k).values[:, None], upper >= lower.amax(1, keepdim=True)
            found += list(zip(near.sum(1).tolist(), far.sum(1).tolist(), strict=True))
        return found

    @property
    def workspace(self) -> Tensor:
        """What the threads' products are written to."""
        if self._scratch is None:
            size = torch.get_num_threads() * _native.module().packed_scan_bytes
            self._scratch = self.filtered.norm.new_empty(size, dtype=torch.uint8)
        return self._scratch

    def drop_buffers(self) -> None:
        """Gives the memory of blocks back."""
        self._buffers.clear()
        self._scratch = None

    def block(self, which: int, begin: int, end: int, *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows begin to end of a part, as one operand or the other; valid until the next call for it."""
        if left not in self._buffers:
            padded, new = -(-self.side // _COLUMNS) * _COLUMNS, self.filtered.norm.new_empty
            self._buffers[left] = (
                new((padded, self._elements), dtype=torch.uint8), new(padded), new(padded, dtype=torch.int32)
            )  # fmt: skip
        rows, scale = self.filtered.block(which, begin, end, 0 if left else 1), self.scales[which][begin:end]
        _native.launch("nearest_neighbors_pack", rows, scale, left, self._buffers[left], on=rows)
        return self._buffers[left]


def pairs_pay(sampled: Sequence[Tensor], metric: str, scale: float | None) -> bool:
    """Whether rows' largest distances are those of few pairs, which are then measured, in place of what products give.

    It depends on nothing but :func:`vareid_ext.ops._filter.samples` of the rows: where they are divided, too.
    """
    rows = torch.cat(list(sampled))
    if not ByteFilter.pays(rows, rows.shape[0]):
        return False
    return ByteFilter(Filter([rows], ["samples"], metric, scale), rows.shape[0]).far_pairs() * _FAR_SHARE <= 1
