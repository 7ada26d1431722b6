"""Types of the compiled module. Arrays are DLPack capsules of PyTorch tensors (0.x protocol), borrowed for the call."""

from typing import Any

version: str
interface: int
with_cuda: bool
cuda_architectures: str

def cuda_unusable_reason() -> str: ...
def angular_center_forward(
    W: Any, U: Any, mask: Any | None, loss: Any, cosine: Any, identity_norm: Any, viewpoint_norm: Any,
    threads: int, stream: int, /,
) -> None: ...
def angular_center_backward(
    upstream: Any, W: Any, U: Any, mask: Any | None, cosine: Any, identity_norm: Any, viewpoint_norm: Any,
    grad_W: Any | None, grad_U: Any | None, threads: int, stream: int, /,
) -> None: ...
