"""Matrix products in full float32, whatever TF32, the matmul precision or autocast say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_FULL = ("none", "ieee")  # "none" is the default, which is full float32 for products
_lock = threading.Lock()
_users = 0
_found: list[tuple[Any, str]] = []


class _OneForAll:
    """The one setting of PyTorch before 2.9, under the name that the settings of each backend have since."""

    @property
    def fp32_precision(self) -> str:
        precision = torch.get_float32_matmul_precision()
        return "ieee" if precision == "highest" else precision

    @fp32_precision.setter
    def fp32_precision(self, precision: str) -> None:
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else precision)


def _settings() -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn
    return (torch.backends.cuda.matmul, mkldnn.matmul) if hasattr(mkldnn, "matmul") else (_OneForAll(),)


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Inside, float32 products use float32 throughout; the process's settings come back when the last user leaves."""
    global _users
    with _lock:
        if _users == 0:
            _found[:] = [
                (setting, setting.fp32_precision) for setting in _settings() if setting.fp32_precision not in _FULL
            ]
            for setting, _ in _found:
                setting.fp32_precision = "ieee"
        _users += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for setting, precision in _found:
                    setting.fp32_precision = precision
