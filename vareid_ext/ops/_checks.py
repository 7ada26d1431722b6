"""Checks of arguments: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without the module's name: ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    """TypeError unless ``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {type(value).__name__} was given; a torch.Tensor is needed")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: {kind} was given; a dense tensor is needed")


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in memory; not so for "meta" and fake tensors and for those that vmap batches."""
    try:
        return not tensor.is_meta and tensor.untyped_storage().device == tensor.device
    except NotImplementedError:  # a batch has no storage
        return False


def check_values(name: str, value: Tensor) -> None:
    """:func:`check_tensor`, and ValueError for one without values to look at."""
    check_tensor(name, value)
    if not has_memory(value):
        kind = "is on the device meta" if value.is_meta else f"{type(value).__name__} without memory was given"
        raise ValueError(f"{name}: {kind}; a tensor with values is needed")


def check_floating(name: str, value: Tensor) -> None:
    """TypeError unless ``value`` is a dense tensor of a supported floating type."""
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        allowed = ", ".join(map(dtype_name, FLOATING))
        raise TypeError(f"{name}: dtype {dtype_name(value.dtype)} was given; allowed are {allowed}")


def check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """TypeError unless ``value`` is a tensor of this dtype."""
    check_tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name}: dtype {dtype_name(value.dtype)} was given; {dtype_name(dtype)} is needed")


def check_shape(name: str, value: Tensor, shape: Sequence[int | str]) -> None:
    """ValueError unless ``value`` has this shape; a string stands for any size and names it in the message."""
    check_tensor(name, value)
    have = value.shape
    if len(have) != len(shape) or any(w != h and not isinstance(w, str) for w, h in zip(shape, have, strict=True)):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: shape {list(value.shape)} was given; [{wanted}] is needed")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: is on {value.device}, but {other_name} is on {other.device}; one device is needed")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} was given; allowed are {', '.join(map(repr, allowed))}")


def check_count(name: str, value: object, minimum: int, maximum: int = (1 << 31) - 1) -> int:
    """``value`` as an int; TypeError unless it is a whole number, ValueError unless it is in range."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: {type(value).__name__} was given; an int is needed")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name}: {value} was given; allowed are {minimum} to {maximum}")
    return int(value)


def check_number(name: str, value: object) -> None:
    """TypeError unless ``value`` is a real number (a compiler's symbol of one, too)."""
    numbers = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name}: {type(value).__name__} was given; a number is needed")


def check_flag(name: str, value: object) -> None:
    """TypeError unless ``value`` is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: {type(value).__name__} was given; a bool is needed")


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; PyTorch knows none for "meta"."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
