"""The filter of :mod:`vareid_ext.ops._filter` with rows of bfloat16, where a GPU multiplies them ten times as fast.

A row is ``p_i = h_i + r_i``, with h_i the nearest of bfloat16. The vendor's product of h_i and h_j is of float32.

What is assumed of it. A product of two elements, 16 bits, is exact. These and partial sums are added in any order, some
at once. Addends are aligned to the largest of them, where each of the others loses less than 2^-23 of that one, and
their sum loses less than 2^-23 of itself when it becomes float32: both are truncations. So Fasi, Higham, Mikaitis and
Pranesh measured it on V100, T4 and A100 (Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330,
2021); for H100 and B200 see Khattak and Mikaitis (Accurate models of NVIDIA tensor cores, arXiv:2512.07004, 2025). Sums
that are rounded to nearest, in any order, are a case of it. tests/gpu/test_gpu_kernels.py compares a GPU with it.

The window is that of :mod:`vareid_ext.ops._rounded_filter` with ``c = 1.01 g`` and ``g = 4 D u / (1 - 4 D u)``:

1. The product. D products become one sum in I additions, of D + I - 1 addends. In each addition the largest addend
   loses nothing, so D - 1 lose by alignment; I <= D - 1 sums lose, too. Each loses at most 2 u of the largest partial
   sum of ``|h_ik h_jk|``, so ``|fl(h_i . h_j) - h_i . h_j| <= g sum_k |h_ik h_jk|``. Doubled, that is at most ``g
   (|h_i|^2 + |h_j|^2)``, and ``|h_ik| <= (1 + 2^-8) |p_ik|`` unless it is subnormal.
2. Underflow. ``|h_ik| <= 2^21 (1 + 2^-8)``, so subnormal elements that are taken for 0, or lose more than their share,
   change a product by at most 2^-104.9 D.

r_i is exact in float32; its length is summed in float64. One product suffices: it leaves 23 candidates to be measured
for 21 neighbours and 114 to 120 for 100, on features of a real network (D=256) and made ones (D=2048). With two terms a
row, three products, it would be 21 and 100 to 103.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext.ops._filter import Filter
from vareid_ext.ops._rounded_filter import UNIT, RoundedFilter

# Limits that follow from an H200's 67 and 770 TFLOP/s, and 0.6 TB/s of the scan; not measured.
_FEW_PRODUCTS = 1 << 35  # of elements: a millisecond in float32, about what rounding and the trial take
_FEW_ELEMENTS = 128  # of a feature, with which the scan takes longer than the product in float32
_FEW_OF_PAIRS = 1024  # likewise where largest distances are wanted, for which every block is scanned twice
_MANY_ELEMENTS = 1 << 20  # g is no bound for four times as many
_CAPABILITY = (8, 0)  # the first GPUs whose tensor cores take bfloat16


def product_error(D: int) -> float:
    """g of the module's proof: what the sum of D products may err by, as a share of the sum of their magnitudes."""
    return 4 * D * UNIT / (1 - 4 * D * UNIT)


def multiply(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """Writes the products of rows of bfloat16 to ``out``, float32."""
    torch.ops.aten.mm.dtype_out(rows, columns.T, torch.float32, out=out)


def _has_products(device: torch.device) -> bool:
    """Whether there are products of bfloat16 with results of float32: on newer GPUs, since PyTorch 2.8."""
    if device.type != "cuda" or not hasattr(torch.ops.aten.mm, "dtype_out"):
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


class BFloat16Filter(RoundedFilter):
    """The rows of a filter, rounded to bfloat16: their window, and their products.

    Args:
        filtered: the features, on a GPU.
        side: rows of the largest block.
    """

    name = "bfloat16"

    def __init__(self, filtered: Filter, side: int) -> None:
        self._buffers: dict[int, Tensor] = {}
        D = filtered.parts[0].shape[1]
        rounded = filtered.norm.new_empty(filtered.norm.shape, dtype=torch.float64)
        for which, errors in enumerate(rounded.split([part.shape[0] for part in filtered.parts])):
            for begin in range(0, errors.shape[0], side):
                end = min(errors.shape[0], begin + side)
                rows = filtered.block(which, begin, end, 0)
                lost = rows - rows.to(torch.bfloat16)
                torch.linalg.vector_norm(lost, dim=1, dtype=torch.float64, out=errors[begin:end])
        super().__init__(filtered, side, rounded.square_(), 1.01 * product_error(D))

    @staticmethod
    def pays(part: Tensor, products: int, *, pairs: bool = False) -> bool:
        """Whether rounding pays for so many products of features like these; ``pairs``: for largest distances, too."""
        D, few = part.shape[1], _FEW_OF_PAIRS if pairs else _FEW_ELEMENTS
        return few <= D <= _MANY_ELEMENTS and products * D >= _FEW_PRODUCTS and _has_products(part.device)

    def drop_buffers(self) -> None:
        """Gives the memory of blocks back."""
        self._buffers.clear()

    def multiply(self, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        """Writes the products of blocks of the filter's float32 rows, rounded, to ``out``."""
        left = self._round(rows, 0)
        multiply(left, left if columns is rows else self._round(columns, 1), out)

    def _round(self, rows: Tensor, slot: int) -> Tensor:
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.shape[0] < rows.shape[0]:
            buffer = self._buffers[slot] = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
        return buffer[: rows.shape[0]].copy_(rows)
