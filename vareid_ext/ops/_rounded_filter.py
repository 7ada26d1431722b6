"""What filters of rounded rows share: the form of their window, and a trial of how much it leaves open.

A row is ``p_i = h_i + r_i``, and the products are ``fl(h_i . h_j)``. The window. In the notation of
:mod:`vareid_ext.ops._filter`, and with ``e_i >= |r_i|``, every pair has ``|n_i + n_j - 2 fl(h_i . h_j) - |z_i - z_j|^2|
<= w_i + w_j`` for ``w_i = (1 + 2^-18) ((1 + 1 / t) e_i^2 + (t + c + 32 u) n_i + 2^-77 b^2 + 2^-104 D)``, any t > 0:

1. Rounding. ``p_i . p_j - h_i . h_j = r_i . p_j + p_i . r_j - r_i . r_j``. Doubled, the first is at most ``2 e_i |p_j|
   <= e_i^2 / t + t n_j``, the second likewise, and the third at most ``e_i^2 + e_j^2``: together ``(1 + 1 / t) (e_i^2 +
   e_j^2) + t (n_i + n_j)``. t is what makes that small, e / |p| of the average row; but at least 2 D u, so that the
   window holds for float32 products, too: some blocks are made of them.
2. The product. ``2 |fl(h_i . h_j) - h_i . h_j| <= c (n_i + n_j)``; each filter says why.
3. Sums of floats and the preparation are those of the other proof. But the bounds reach beyond ``2 (n_i + n_j)``, by
   twice the window at most: ``16 u = 2^-20`` of it, doubled.
4. Underflow. Each filter says why 2^-104 D suffices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vareid_ext.ops._filter import Filter, row_blocks

UNIT = 2.0**-24
_TRIED, _TRIED_PRODUCTS = 32, 1 << 20  # rows and products that are made at most to see how many the window leaves
_AT_ONCE = 1 << 17  # products of them that are looked at at once on a CPU
_CROWDED = 8  # of so many rows one may have more candidates than places


class RoundedFilter:
    """The rows of a filter, rounded, and their window.

    Args:
        filtered: the features.
        side: rows of the largest block.
        rounded: float64, e_i^2 of all rows in order.
        product_error: c of the module's proof.
    """

    name: str
    """of the products, as counts have it"""

    def __init__(self, filtered: Filter, side: int, rounded: Tensor, product_error: float) -> None:
        self.filtered, self.side = filtered, side
        norm = filtered.norm.double()
        total, lost = torch.stack([norm.sum(), rounded.sum()]).tolist()
        share = max(math.sqrt(lost / total), 2 * filtered.parts[0].shape[1] * UNIT) if total else 1.0
        window = (1 + 1 / share) * rounded + (share + product_error + 32 * UNIT) * norm + filtered.smallest
        self.window = (window * (1 + 2.0**-18)).float()
        self.windows = list(self.window.split([part.shape[0] for part in filtered.parts]))

    def bounds(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Norms and windows of one part or of all, in order."""
        if len(which) == len(self.windows):
            return self.filtered.norm, self.window
        return self.filtered.norms[which[0]], self.windows[which[0]]

    def drop_buffers(self) -> None:
        """Gives the memory of blocks back."""
        raise NotImplementedError

    def suits(self, left: Sequence[int], right: Sequence[int], k: int, places: int) -> bool:
        """Whether few rows have more candidates than places for their k nearest."""
        tried = self._trial(left, right, k)
        return sum(near > places for near, _ in tried) * _CROWDED <= len(tried)

    def far_pairs(self) -> float:
        """The share of pairs that a row's largest distance may be that of."""
        every = range(len(self.windows))
        tried = self._trial(every, every, 1)
        return sum(far for _, far in tried) / (len(tried) * len(self.window))

    def _trial(self, left: Sequence[int], right: Sequence[int], k: int) -> list[tuple[int, int]]:
        """For some rows of the left set, how many of the right one may be among the k nearest, and the farthest.

        Their products are of float32, which is not what the window is of, but about as far.
        """
        filtered = self.filtered
        D, columns = filtered.parts[0].shape[1], sum(filtered.parts[w].shape[0] for w in right)
        total = sum(filtered.parts[w].shape[0] for w in left)
        step = -(-total // max(8, min(max(16, total // 256), _TRIED, _TRIED_PRODUCTS // columns)))
        numbers = [torch.arange(0, filtered.parts[w].shape[0], step, device=filtered.norm.device) for w in left]
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
        step = len(tried) if tried.is_cuda else max(1, _AT_ONCE // columns)
        for some in (slice(begin, begin + step) for begin in range(0, len(tried), step)):
            distance = products[some].mul_(-2).add_(norms[some, None]).add_(right_norm)
            reach = right_window + windows[some, None]
            upper, lower = distance + reach, distance.sub_(reach)
            near, far = (
                lower <= upper.topk(min(k, columns), largest=False).values[:, -1:],
                upper >= lower.amax(1, keepdim=True),
            )
            found += list(zip(*torch.stack([near.sum(1), far.sum(1)]).tolist(), strict=True))
        return found
