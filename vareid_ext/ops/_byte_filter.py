"""The filter of :mod:`vareid_ext.ops._filter` with rows of 8 bits, where a CPU multiplies them four times as fast
(AVX512-VNNI) or faster (AMX-INT8).

A row is ``p_i = s_i a_i + r_i`` with whole ``|a_ik| <= 127`` and ``s_i = max_k |p_ik| / 127``. The product is
``fl(s_i s_j (a_i . a_j))``, whose sum of whole numbers is exact (at most ``127^2 D < 2^31``) in any order and with
either's instructions.

The window is that of :mod:`vareid_ext.ops._rounded_filter` with ``product_error = 8 u``, and e_i for |r_i|:

1. The product. The sum is rounded to float32 and multiplied twice, three roundings of ``|p_i - r_i| |p_j - r_j| <=
   n_i + n_j + e_i^2 + e_j^2``. Doubled, that is at most ``6.1 u (n_i + n_j + e_i^2 + e_j^2)``.
2. Underflow. Rows without an element of 2^-100 are taken for 0, and e_i is their length. ``s_i <= 2^21``, so a product
   that is flushed to 0 changes a sum by at most 2^-105.

e_i^2 is measured of every row, in float64. That measurement and the terms in e^2 of 1 take less than the rest of 2^-18.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._filter import Filter, rows_at_once
from vareid_ext.ops._rounded_filter import UNIT, RoundedFilter

_FEW_ROWS = 64  # of the left set, for which it does not pay to round the right one
_FEW_ELEMENTS = 128  # of a feature, likewise
_MEASURED_SHARE = 256  # one of so many columns may be measured for a row's neighbours, on average
_COLUMNS = 32  # packed rows are a multiple of it
_INSTRUCTIONS = "", "AVX512-VNNI", "AMX-INT8"  # as the compiled module numbers them
_warned = False


def byte_products() -> str:
    """The instructions that make products of 8 bits on this CPU, or "". What it names and fails in is told of once."""
    global _warned
    used, broken = (_INSTRUCTIONS[number] for number in _native.module().byte_products())
    if broken and not _warned:
        _warned = True
        warnings.warn(
            f"this CPU names {broken} among its instructions, but does not execute them rightly: neighbours are "
            f"filtered with products of {f'8 bits ({used})' if used else 'float32'}, which takes longer",
            RuntimeWarning,
            stacklevel=2,
        )
    return used


class ByteFilter(RoundedFilter):
    """The rows of a filter, rounded: their scales, their window, and blocks of them for products.

    Args:
        filtered: the features, on a CPU.
        side: rows of the largest block.
    """

    def __init__(self, filtered: Filter, side: int) -> None:
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
        super().__init__(filtered, side, rounded, 8 * UNIT)
        self._buffers: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}
        self._elements = _native.module().packed_elements(D)
        self.name = f"8 bits ({byte_products()})"

    @staticmethod
    def pays(part: Tensor, rows: int) -> bool:
        """Whether rounding pays for products of features like these with so many rows on the left."""
        return not part.is_cuda and rows >= _FEW_ROWS and part.shape[1] >= _FEW_ELEMENTS and byte_products() != ""

    def suits(self, left: Sequence[int], right: Sequence[int], k: int, places: int) -> bool:
        """Whether the candidates beyond the places, which are measured, take less time than float32 products would."""
        tried, columns = self._trial(left, right, k), sum(self.filtered.parts[w].shape[0] for w in right)
        return sum(max(0, near - places) for near, _ in tried) * _MEASURED_SHARE <= len(tried) * columns

    def drop_buffers(self) -> None:
        """Gives the memory of blocks back."""
        self._buffers.clear()

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
