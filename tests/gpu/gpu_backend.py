"""Runs the package's operators on a GPU while the tests keep their tensors on the CPU: each call of an operator gets
copies of its tensors there, and what it returns or writes comes back.

With ``VAREID_GPU_DRY_RUN=1`` the copies stay on the CPU: everything here and in the tests runs but the GPU's part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vareid_ext import _native
from vareid_ext.ops import linear_viewpoint_aware_cross_entropy, viewpoint_aware_cross_entropy
from vareid_ext.ops._checks import has_memory
from vareid_ext.ops._labels import check_label_values

DRY_RUN = os.environ.get("VAREID_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu") if DRY_RUN else torch.device("cuda", 0)


def missing_reason() -> str:
    """Why the CUDA kernels cannot run here, or ""."""
    if DRY_RUN:
        return ""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    reason = _native.backends()["cuda"]
    return "" if reason == "native" else reason


def synchronize() -> None:
    """Waits for the GPU; raises what went wrong there."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _to_device(tensor: Tensor) -> Tensor:
    """A copy with the same strides and offset: what lies between the elements goes along."""
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return storage.to(DEVICE, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _OnGpu(TorchDispatchMode):
    """Runs the package's operators on copies of their tensors on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, Tensor)]
        if func.namespace != "vareid" or not all(type(a) is Tensor and has_memory(a) for a in tensors):
            return func(*args, **kwargs)
        moved = [_to_device(a) if isinstance(a, Tensor) else a for a in args]
        result = func(*moved, **kwargs)
        synchronize()
        for argument, tensor, copy in zip(func._schema.arguments, args, moved, strict=False):
            if isinstance(tensor, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                tensor.copy_(copy)
        return tree_map_only(Tensor, lambda t: t.cpu(), result)


def _check_on_host(*arguments: Any) -> None:
    """Bad labels are refused at once, as the rows' tests expect: on a GPU they would be noted and told later."""
    check_label_values(*(a.cpu() if isinstance(a, Tensor) else a for a in arguments))


@contextmanager
def on_gpu() -> Iterator[None]:
    """Inside the block, operators on CPU tensors run on the GPU."""
    with ExitStack() as stack:
        for op in (linear_viewpoint_aware_cross_entropy, viewpoint_aware_cross_entropy):
            stack.enter_context(mock.patch.object(op, "check_label_values", _check_on_host))
        stack.enter_context(_OnGpu())
        yield


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays what ``run`` did as one CUDA graph; on the CPU, ``run`` itself."""
    if DEVICE.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def busy_stream() -> Iterator[None]:
    """A side stream on which a long wait comes first: what runs on another stream does not wait for its inputs."""
    if DEVICE.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        yield
    stream.synchronize()
