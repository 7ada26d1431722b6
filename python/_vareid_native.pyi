"""Types of the compiled module. Arrays are DLPack capsules of PyTorch tensors (0.x protocol), borrowed for the call."""

from typing import Any

version: str
interface: int
with_cuda: bool
cuda_architectures: str

def cuda_unusable_reason() -> str: ...
def angular_center_forward(
    W: Any,
    U: Any,
    mask: Any | None,
    loss: Any,
    cosine: Any,
    identity_norm: Any,
    viewpoint_norm: Any,
    threads: int,
    stream: int,
    /,
) -> None: ...
def angular_center_backward(
    upstream: Any,
    W: Any,
    U: Any,
    mask: Any | None,
    cosine: Any,
    identity_norm: Any,
    viewpoint_norm: Any,
    grad_W: Any | None,
    grad_U: Any | None,
    threads: int,
    stream: int,
    /,
) -> None: ...
def viewpoint_aware_cross_entropy_workspace_bytes(
    N: int, K: int, V: int, has_identity: bool, has_viewpoint: bool, cuda: bool, threads: int, /
) -> int: ...
def viewpoint_aware_cross_entropy_forward(
    identity_logits: Any | None,
    viewpoint_logits: Any | None,
    identity: Any,
    viewpoint: Any | None,
    mask: Any | None,
    identity_loss: Any,
    viewpoint_loss: Any,
    statistics: Any,
    adaptive: bool,
    alpha: float,
    epsilon: float,
    reduction: int,
    label_error: Any | None,
    workspace: Any,
    threads: int,
    stream: int,
    /,
) -> None: ...
def viewpoint_aware_cross_entropy_backward(
    identity_upstream: Any | None,
    viewpoint_upstream: Any | None,
    identity_logits: Any | None,
    viewpoint_logits: Any | None,
    identity: Any,
    viewpoint: Any | None,
    mask: Any | None,
    statistics: Any,
    identity_grad: Any | None,
    viewpoint_grad: Any | None,
    reduction: int,
    threads: int,
    stream: int,
    /,
) -> None: ...
def ranking_workspace_bytes(max_group: int, threads: int, /) -> int: ...
def ranking_forward(
    distances: Any,
    gallery_order: Any,
    group_begin: Any,
    group_end: Any,
    junk: Any | None,
    query_camera: Any | None,
    gallery_camera: Any | None,
    average_precision: Any,
    inverse_negative_penalty: Any,
    first_match_rank: Any,
    num_matches: Any,
    workspace: Any | None,
    max_group: int,
    threads: int,
    stream: int,
    /,
) -> None: ...
def linear_viewpoint_aware_cross_entropy_parts(N: int, columns: int, cuda: bool, threads: int, /) -> int: ...
def linear_viewpoint_aware_cross_entropy_summarise(
    logits: Any,
    scale: Any | None,
    identity: Any,
    mask: Any | None,
    summaries: Any,
    own_logits: Any,
    K: int,
    V: int,
    first: int,
    first_part: int,
    threads: int,
    stream: int,
    /,
) -> None: ...
def linear_viewpoint_aware_cross_entropy_finish(
    summaries: Any,
    own_logits: Any,
    identity: Any,
    viewpoint: Any | None,
    mask: Any | None,
    loss: Any,
    statistics: Any,
    adaptive: bool,
    alpha: float,
    epsilon: float,
    K: int,
    label_error: Any | None,
    stream: int,
    /,
) -> None: ...
def linear_viewpoint_aware_cross_entropy_gradient(
    logits: Any,
    scale: Any | None,
    identity: Any,
    viewpoint: Any | None,
    mask: Any | None,
    statistics: Any,
    upstream: Any,
    share: float,
    K: int,
    V: int,
    first: int,
    threads: int,
    stream: int,
    /,
) -> None: ...
def linear_viewpoint_aware_cross_entropy_inverse_norms(x: Any, inverse: Any, threads: int, stream: int, /) -> None: ...
def linear_viewpoint_aware_cross_entropy_project(
    x: Any, inverse: Any, grad: Any, threads: int, stream: int, /
) -> None: ...
