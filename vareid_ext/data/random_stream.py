"""Random numbers that are a pure function of a few keys, the same on every machine and with every NumPy version.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in plain integers.
NumPy promises its bit streams but not what its distributions make of them, so the few draws needed stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
T = TypeVar("T")


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Stream:
    """A stream of random integers that is a pure function of `keys`."""

    def __init__(self, *keys: int) -> None:
        state = 0
        for key in keys:
            state = _mix((state + _STEP + (key & _MASK)) & _MASK)
        self._state = state

    def bits(self) -> int:
        """The next integer in [0, 2**64)."""
        self._state = (self._state + _STEP) & _MASK
        return _mix(self._state)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + (self.bits() * (high - low + 1) >> 64)

    def chance(self, percent: int) -> bool:
        """True with a probability of `percent` in 100."""
        return self.integer(0, 99) < percent

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.integer(0, len(options) - 1)]

    def weighted(self, weights: Sequence[int]) -> int:
        """An index into `weights`, drawn in proportion to them."""
        left = self.integer(0, sum(weights) - 1)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        raise ValueError(f"weights must be non-negative with a positive sum, got {list(weights)}")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in random order (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.integer(0, last)
            result[last], result[other] = result[other], result[last]
        return result

    def array(self, *shape: int) -> np.ndarray:
        """int64 array of `shape` with values in [0, 256)."""
        count = int(np.prod(shape, dtype=np.int64))
        state = np.uint64(self.bits()) + np.uint64(_STEP) * np.arange(1, count + 1, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (state >> np.uint64(56)).astype(np.int64).reshape(shape)
