"""Memory for large results."""

from __future__ import annotations

import torch
from torch import Tensor

from vareid_ext import _native

_LARGE = 32 << 20  # bytes from where on allocators ask the system for an array's memory, which nothing else is in


def new_distances(like: Tensor, rows: int, columns: int) -> Tensor:
    """float32 [rows, columns], uninitialised, on a tensor's device; if large, on large pages where the system has them.

    The first use of a page costs more than filling it, and a matrix has thousands of small ones.
    """
    out = like.new_empty((rows, columns), dtype=torch.float32)
    if out.device.type == "cpu" and out.nbytes >= _LARGE and _native.loaded():
        _native.module().use_large_pages(_native.capsule(out))
    return out
