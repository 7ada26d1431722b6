"""The formulas in plain PyTorch: one module for each op, the place where its mathematics stands."""

from __future__ import annotations

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
