"""NumPy, PyTorch, CuPy or anything else that speaks DLPack: in as a tensor that shares the memory, out as it came.

The arguments of one call may be of several kinds, as long as they are on one device; its result is of the kind of the
first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def to_tensor(value: Any, name: str) -> torch.Tensor:
    """A tensor over the same memory as an array.

    Args:
        value: a ``torch.Tensor``, a ``numpy.ndarray`` (a read-only one and a memory map too) or any object with
            ``__dlpack__``.
        name: how errors call the argument.

    Raises:
        TypeError: ``value`` is none of these, is sparse, nested or masked, or holds a type that PyTorch does not know.
    """
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else f"of layout {value.layout}"
            raise TypeError(f"{name}: a tensor {kind} was given; a dense one is needed")
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array was given; a plain one is needed (its mask would be lost)")
    if isinstance(value, np.ndarray):
        odd = any(stride < 0 or stride % max(1, value.itemsize) for stride in value.strides)
        if odd or not value.dtype.isnative or not value.flags.aligned:
            value = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
        with warnings.catch_warnings():  # the package writes to no input, so a read-only array is fine
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            try:
                return torch.from_numpy(value)
            except TypeError:
                raise TypeError(f"{name}: dtype {value.dtype} was given, which PyTorch does not know") from None
    if hasattr(value, "__dlpack__"):
        try:
            return torch.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name}: {type(value).__name__} was given, but its __dlpack__ fails: {error}") from error
    raise TypeError(
        f"{name}: {type(value).__name__} was given; allowed are NumPy arrays, PyTorch tensors and objects with "
        "__dlpack__"
    )


def returner(value: Any) -> Callable[[torch.Tensor], Any]:
    """The function that turns a result into the kind of array that ``value`` is.

    An object that came through DLPack gets its own library's array back: that library's ``from_dlpack`` is called. A
    kind without one gets a tensor. Only a tensor keeps the gradient's history.
    """
    if isinstance(value, torch.Tensor):
        return lambda tensor: tensor
    if isinstance(value, np.ndarray):
        return lambda tensor: tensor.detach().cpu().numpy()
    if hasattr(value, "__array_namespace__"):
        namespace: Any = value.__array_namespace__()
    else:
        namespace = sys.modules.get(type(value).__module__.partition(".")[0])
    from_dlpack = getattr(namespace, "from_dlpack", None)
    return (lambda tensor: from_dlpack(tensor.detach())) if callable(from_dlpack) else lambda tensor: tensor
