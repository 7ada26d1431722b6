"""Filtering by products of bfloat16 however small the work, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from vareid_ext.ops import _bfloat16_filter, _byte_filter

_multiply, _has_products = _bfloat16_filter.multiply, _bfloat16_filter._has_products


def multiply(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """The product of a GPU that has it; elsewhere (a CPU's own may not run) that of the same elements in float32."""
    assert rows.dtype == columns.dtype == torch.bfloat16
    if _has_products(rows.device):
        _multiply(rows, columns, out)
    else:
        torch.mm(rows.float(), columns.float().T, out=out)


@contextmanager
def products_of_bfloat16(*, always: bool = True) -> Iterator[None]:
    """Inside, they filter; with ``always``, where many rows have to be done again, too."""
    changes = {"_FEW_ELEMENTS": 1, "_FEW_OF_PAIRS": 1, "_FEW_PRODUCTS": 1, "_has_products": lambda _: True,
               "multiply": multiply}  # fmt: skip
    with ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(_bfloat16_filter, name, value))
        stack.enter_context(mock.patch.object(_byte_filter.ByteFilter, "pays", return_value=False))
        if always:
            of = _bfloat16_filter.BFloat16Filter
            stack.enter_context(mock.patch.object(of, "suits", return_value=True))
            stack.enter_context(mock.patch.object(of, "far_pairs", return_value=0.0))
        yield
