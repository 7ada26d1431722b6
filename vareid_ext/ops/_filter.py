"""Features made ready for blocks of float32 products that filter exactly.

A distance is ``|z_i - z_j|^2`` with ``z_i = factor_i x_i``: the factor is 1, one power of two for all rows where the
features or their differences are far from 1, or 1 / |x_i| for the cosine. The product is that of
``p_i = float32(z_i - c)``: c is 0, or the features' mean where that holds most of their length (distances do not
change, but the products' errors shrink). Where p_i is x_i, the products read the features where they lie.

The window. With u = 2^-24, n_i = |p_i|^2, and fl() what is computed, every pair has
``|n_i + n_j - 2 fl(p_i . p_j) - |z_i - z_j|^2| <= w_i + w_j`` for ``w_i = (g + 32 u) n_i + 2^-77 b^2 + 2^-104 D``,
``g = D u / (1 - D u)``, and b = |c| for the cosine, else 0:

1. The product. Whatever the order of its D products and D - 1 sums, fused or not, ``|fl(p_i . p_j) - p_i . p_j| <= g
   sum_k |p_ik p_jk|`` (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), and the sum is at
   most ``|p_i| |p_j| <= (n_i + n_j) / 2``. Doubled, that is ``g (n_i + n_j)``.
2. Sums of floats. The norms, the lower and upper bounds and their comparison take fewer than eight roundings, of
   values of at most ``2 (n_i + n_j)``: together at most ``16 u (n_i + n_j)``. (A threshold above that decides nothing.)
3. Preparation. A power of two times an element is exact, and c is what its float64 elements are, so each element of
   p_i is rounded twice, once to float64 and once to float32; for the cosine its product with the factor is rounded,
   too: ``|p_i - (z_i - c)| <= e_i = 1.01 u |p_i| + 2^-52 b``, and ``||p_i - p_j|^2 - |z_i - z_j|^2| <= (e_i + e_j)
   (2 |p_i - p_j| + e_i + e_j)``. With ``|p_i - p_j|^2 <= 2 (n_i + n_j)`` and ``2 s t <= s^2 + t^2`` for the term in b
   that is at most ``8 u (n_i + n_j) + 2^-77 b^2``. The float64 sum that is the truth errs by less than
   ``u (n_i + n_j)`` itself.
4. Underflow. ``|p_ik| <= 2^21``, so elements or products that are flushed to 0 change a sum by at most ``2^-105 D``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.ops._features import row_magnitudes

_SIDE = 1024  # rows and columns of a block of products: 4 MiB, which stays in a third-level cache
_UNIT = 2.0**-24
_FEW_ROWS = 32  # looked at or converted at once where no block is at hand: at most 2 MiB
_MANY_ELEMENTS = 1 << 21  # likewise on a GPU, where each launch and each look costs, and there is no cache to stay in
_TILE, _TILES_EACH = 128, 8  # of the vendor's product on a GPU: rows and columns, and how many fill a multiprocessor
_STRIP = 4  # blocks side by side in one product there
_SAMPLE = 1024  # rows by which others are judged
_CENTER_ROWS = 256  # of them, about, that the centre is found from: any is correct, a good one makes the window small
_ONE_THREAD = 1 << 14  # elements that PyTorch does not share out among threads, which may have to be waited for
_CENTERED_SHARE = 0.5  # the mean's share of the mean squared length from which on features are centred
_NARROW = 2.0**-10  # differences below this share of the largest element decide the scale in its place


def common_scale(parts: Sequence[Tensor], largest: float) -> float:
    """1, or the power of two by which features are multiplied so that their distances fit into float32.

    It brings the largest element into [1, 2) where that lies outside [2^-20, 2^20]. Where all rows are the same but for
    less than 2^-10 of the largest element (large constant elements, say), it does that to the largest difference from
    the first row, as far as the elements stay below 2^1000: such rows are centred before their products are taken.

    Args:
        parts: features [rows, D], finite.
        largest: the largest absolute value of them.
    """
    if largest == 0:
        return 1.0
    first = next(part[:1] for part in parts if part.shape[0]).double()
    return scale_of(largest, spread_from(first, parts, largest))


def scale_of(largest: float, spread: float) -> float:
    """:func:`common_scale` of features whose largest element, and whose largest difference from a row, are these."""
    if largest == 0:
        return 1.0
    size, exponent = (largest, 1022) if spread == 0 or spread >= _NARROW * largest else (spread, 1000)
    if 2.0**-20 <= size <= 2.0**20:
        return 1.0
    return 2.0 ** max(-1022, min(1023, 1 - math.frexp(size)[1], exponent - math.frexp(largest)[1]))


def spread_from(first: Tensor, parts: Sequence[Tensor], largest: float) -> float:
    """The largest absolute difference between elements of a row and of the first row, float64 [1, D].

    Or one that is so large a share of ``largest``, the features' largest element, that it does not matter which.
    """
    spread = 0.0
    for part in parts:
        for rows in part.split(rows_at_once(part)):
            spread = max([spread, *(rows.double() - first).abs().amax(1).tolist()])
            if spread >= _NARROW * largest:
                return spread
    return spread


def samples(parts: Sequence[Tensor]) -> list[Tensor]:
    """The rows of each part that others are judged by, and that the centre is found from."""
    return [part[:: sample_step(part.shape[0], len(parts))] for part in parts]


def sample_step(rows: int, parts: int) -> int:
    """Every so many rows of a part with so many, one of some parts, is among :func:`samples`."""
    return max(1, -(-rows * parts // _SAMPLE))


def block_side(device: torch.device) -> int:
    """Rows and columns of a block of products: small enough for a CPU's cache, or large enough for the whole GPU."""
    if device.type != "cuda":
        return _SIDE
    tiles = _TILES_EACH * torch.cuda.get_device_properties(device).multi_processor_count
    return _SIDE * max(1, round(_TILE * math.sqrt(tiles) / _SIDE))


def strip_side(device: torch.device, side: int) -> int:
    """Columns of products that are made at once: some blocks' on a GPU, so that few processors idle at the end."""
    return _STRIP * side if device.type == "cuda" else side


def rows_at_once(part: Tensor) -> int:
    """Rows that are looked at or converted at once where no block is at hand."""
    return max(_FEW_ROWS, _MANY_ELEMENTS // part.shape[1]) if part.is_cuda else _FEW_ROWS


def has_contiguous_rows(x: Tensor) -> bool:
    """Whether a row's elements lie one after another, as the kernels need them."""
    return x.shape[1] <= 1 or x.stride(1) == 1


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy of it if its rows are not contiguous."""
    return x if has_contiguous_rows(x) else x.contiguous()


class Filter:
    """One or two sets of features, their float32 blocks for products, and the window of the products.

    Args:
        parts: features [rows, D] of one dtype and device.
        names: how errors call them.
        metric: "sqeuclidean", "euclidean" or "cosine".
        scale: the common factor, where the rows have been checked before; distances are then those of the scaled rows.
        center_by: with a scale, the :func:`samples` of more rows than these that are centred alike; None: of these.

    Raises:
        ValueError: a row with NaN or Inf, or (cosine) a zero row.
    """

    def __init__(
        self, parts: Sequence[Tensor], names: Sequence[str], metric: str, scale: float | None = None,
        center_by: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.parts = [contiguous_rows(part.detach()) for part in parts]
        D, device = self.parts[0].shape[1], self.parts[0].device
        self.unscale = 1.0
        self.factors: list[Tensor | None] = [None] * len(self.parts)
        if scale is None:
            magnitudes = [
                row_magnitudes(name, part, nonzero=metric == "cosine")
                for name, part in zip(names, self.parts, strict=True)
            ]
            scale = 1.0
            if metric == "cosine":
                self.factors = [self._unit_factors(p, m) for p, m in zip(self.parts, magnitudes, strict=True)]
            else:
                largest = max((float(rows.max()) for rows in magnitudes if rows.numel()), default=0.0)
                scale = common_scale(self.parts, largest)
                self.unscale = 1 / scale
        if scale != 1:
            self.factors = [torch.full((p.shape[0],), scale, dtype=torch.float64, device=device) for p in self.parts]
        if center_by is None:
            factors = [None if f is None else f[:: sample_step(len(f), len(parts))] for f in self.factors]
            self.center, center_norm = self._find_center(samples(self.parts), factors)
        else:
            each = None if scale == 1 else torch.full((1,), scale, dtype=torch.float64, device=device)
            factors = [None if each is None else each.expand(len(part)) for part in center_by]
            self.center, center_norm = self._find_center(center_by, factors)
        rounded = center_norm if metric == "cosine" else 0.0  # the other factors are powers of two
        self.direct = self.center is None and self.factors[0] is None and self.parts[0].dtype == torch.float32
        self._buffers: dict[int, Tensor] = {}
        gamma = D * _UNIT / (1 - D * _UNIT)
        sizes = [part.shape[0] for part in self.parts]
        norm = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.norms = list(norm.split(sizes))
        for which in range(len(self.parts)):
            self._fill_norms(which)
        self.smallest = 2.0**-77 * rounded + 2.0**-104 * D
        window = norm * ((gamma + 32 * _UNIT) * (1 + 2.0**-20)) + self.smallest
        self.windows = list(window.split(sizes))
        self.norm, self.window = norm, window

    def _unit_factors(self, x: Tensor, magnitude: Tensor) -> Tensor:
        """1 / |x_i|, by way of rows scaled by powers of two, so that no square leaves float64's range."""
        shift = torch.ldexp(torch.ones_like(magnitude), -torch.frexp(magnitude).exponent.clamp(-1000, 1000))
        return shift / self._norms_of(x, shift).sqrt()

    def _norms_of(self, x: Tensor, factor: Tensor | None) -> Tensor:
        out = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
        _native.launch("pairwise_distance_norm", x, factor, out, on=x)
        return out

    def _find_center(self, sampled: Sequence[Tensor], factors: Sequence[Tensor | None]) -> tuple[Tensor | None, float]:
        """The centre and its squared length, or None and 0: one look at the device's values."""
        first: Tensor | None = None  # elements that are the same in all rows get a centre without rounding errors
        total = torch.zeros(self.parts[0].shape[1], dtype=torch.float64, device=self.parts[0].device)
        squares, count = torch.zeros_like(total[0]), 0
        whole = torch.ones_like(squares, dtype=torch.bool)
        every = max(1, sum(map(len, sampled)) // _CENTER_ROWS)
        for part, factor in zip(sampled, factors, strict=True):
            step = rows_at_once(part) if part.is_cuda else max(1, _ONE_THREAD // part.shape[1])
            for begin in range(0, part.shape[0], every * step):
                some = slice(begin, begin + every * step, every)
                rows = part[some].double()
                if factor is not None:
                    rows = rows * factor[some, None]
                first = rows[0] if first is None else first
                squares += rows.square().sum()
                if part.is_cuda or whole:
                    whole = whole & ~rows.frac().any()  # round() takes threads for 2,048 elements
                total += (rows - first).sum(0)
                count += rows.shape[0]
        if first is None:
            return None, 0.0
        mean = first + total / count
        # Differences of whole numbers stay whole, and so their products exact.
        mean = torch.where(whole, mean.round(), mean)
        center_norm, length = torch.stack([mean.square().sum(), squares / count]).tolist()
        # Squares leave float64's range only where the rows' differences are tiny beside the rows.
        centered = center_norm > _CENTERED_SHARE * length or math.isinf(length)
        return (mean, center_norm) if centered else (None, 0.0)

    def _fill_norms(self, which: int) -> None:
        part = self.parts[which]
        if self.direct:
            self.norms[which].copy_(self._norms_of(part, None))
            return
        for begin in range(0, part.shape[0], rows_at_once(part)):
            self.block(which, begin, min(part.shape[0], begin + rows_at_once(part)), 0)

    def _prepare(self, x: Tensor, factor: Tensor | None, out: Tensor, norm: Tensor) -> Tensor:
        _native.launch("pairwise_distance_prepare", x, factor, self.center, out, norm, on=x)
        return out

    def block(self, which: int, begin: int, end: int, slot: int) -> Tensor:
        """The float32 rows begin to end of a part; valid until the next call with this slot."""
        part, factor = self.parts[which][begin:end], self.factors[which]
        if self.direct:
            return part
        rows, D = part.shape
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.shape[0] < rows:
            buffer = self._buffers[slot] = torch.empty((rows, D), dtype=torch.float32, device=part.device)
        factor = None if factor is None else factor[begin:end]
        return self._prepare(part, factor, buffer[:rows], self.norms[which][begin:end])

    def gather(self, which: int, rows: Tensor, out: Tensor) -> None:
        """Writes the float32 rows of these numbers of a part to ``out``."""
        if self.direct:
            torch.index_select(self.parts[which], 0, rows, out=out)
            return
        part, factor = self.parts[which].index_select(0, rows), self.factors[which]
        factor = None if factor is None else factor[rows]
        self._prepare(part, factor, out, torch.empty(rows.numel(), dtype=torch.float32, device=part.device))

    def drop_buffers(self) -> None:
        """Gives the memory of converted blocks back."""
        self._buffers.clear()

    def bounds(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Norms and windows of one part or of all, in order."""
        if len(which) == len(self.parts):
            return self.norm, self.window
        return self.norms[which[0]], self.windows[which[0]]

    def sets(self, *which: int) -> list[tuple[Tensor, Tensor | None]]:
        """The features and factors of some parts, as the compiled module takes them."""
        return [(self.parts[w], self.factors[w]) for w in which]


def row_blocks(filtered: Filter, which: Sequence[int], block_rows: int) -> list[tuple[int, int, int, int]]:
    """(part, first row, last row, the first row's number among all parts) of blocks of about equal size."""
    blocks, offset = [], 0
    for part in which:
        rows = filtered.parts[part].shape[0]
        edges = itertools.pairwise(block_edges(rows, block_rows))
        blocks += [(part, first, last, offset + first) for first, last in edges]
        offset += rows
    return blocks


def block_edges(rows: int, block_rows: int) -> list[int]:
    """Where the blocks of a part of so many rows begin, and where the last one ends; [0] without rows."""
    count = -(-rows // block_rows)
    return [0, *(rows * b // count for b in range(1, count + 1))]
