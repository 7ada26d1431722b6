"""Types of the compiled module. Arrays are DLPack capsules of PyTorch tensors (0.x protocol), borrowed for the call."""

from collections.abc import Sequence
from typing import Any

_Place = tuple[int, int, int]  # threads, device, stream

version: str
interface: int
with_cuda: bool
cuda_architectures: str

def cuda_unusable_reason(device: int) -> str: ...
def angular_center_forward(
    W: Any, U: Any, mask: Any | None, loss: Any, cosine: Any, identity_norm: Any, viewpoint_norm: Any, place: _Place, /
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
    place: _Place,
    /,
) -> None: ...
def viewpoint_aware_cross_entropy_label_error(
    identity: Any, viewpoint: Any | None, mask: Any | None, K: int, V: int, /
) -> tuple[int, int]: ...
def viewpoint_aware_cross_entropy_workspace_bytes(
    N: int, K: int, V: int, has_identity: bool, has_viewpoint: bool, cuda: bool, /
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
    place: _Place,
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
    place: _Place,
    /,
) -> None: ...
def ranking_workspace_bytes(max_group: int, threads: int, /) -> int: ...
def ranking_forward(
    distances: Any,
    labels: Sequence[Any | None],
    results: Sequence[Any],
    workspace: Any | None,
    max_group: int,
    place: _Place,
    /,
) -> None: ...
def ranking_features_workspace_bytes(max_group: int, G: int, threads: int, /) -> int: ...
def ranking_features(
    products: Any,
    x: tuple[Any, Any | None, Any, Any],
    y: tuple[Any, Any | None, Any, Any],
    labels: Sequence[Any | None],
    results: Sequence[Any],
    workspace: Any,
    max_group: int,
    place: _Place,
    /,
) -> None: ...
def verification_workspace_bytes(prefixes: int, Q: int, G: int, threads: int, /) -> int: ...
def verification_histogram(
    distances: Any,
    labels: Sequence[Any | None],
    counts: Any,
    nearest_distance: Any,
    nearest_index: Any,
    workspace: Any | None,
    place: _Place,
    /,
) -> None: ...
def verification_refine(
    distances: Any,
    labels: Sequence[Any | None],
    prefixes: Sequence[int],
    digits: int,
    counts: Any,
    workspace: Any | None,
    place: _Place,
    /,
) -> None: ...
def verification_accepted(
    distances: Any, labels: Sequence[Any | None], threshold: float, accepted: Any, place: _Place, /
) -> None: ...
def linear_viewpoint_aware_cross_entropy_parts(N: int, columns: int, cuda: bool, /) -> int: ...
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
    place: _Place,
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
    place: _Place,
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
    place: _Place,
    /,
) -> None: ...
def linear_viewpoint_aware_cross_entropy_inverse_norms(x: Any, inverse: Any, place: _Place, /) -> None: ...
def linear_viewpoint_aware_cross_entropy_project(x: Any, inverse: Any, grad: Any, place: _Place, /) -> None: ...
def linear_viewpoint_aware_cross_entropy_scale(grad: Any, factor: Any, place: _Place, /) -> None: ...
def pairwise_distance_max_abs(x: Any, out: Any, place: _Place, /) -> None: ...
def pairwise_distance_norm(x: Any, factor: Any | None, out: Any, place: _Place, /) -> None: ...
def pairwise_distance_prepare(
    x: Any, factor: Any | None, center: Any | None, out: Any, out_norm: Any, place: _Place, /
) -> None: ...
def pairwise_distance_block(
    products: Any,
    x: Any,
    x_factor: Any | None,
    y: Any,
    y_factor: Any | None,
    x_norm: Any,
    y_norm: Any,
    metric: int,
    unscale: float,
    mirror: Any | None,
    place: _Place,
    /,
) -> None: ...
def pairwise_distance_strip_bytes(D: int, /) -> int: ...
def pairwise_distance_strips(
    x_prepared: Any,
    y_prepared: Any,
    out: Any,
    x: Any,
    x_factor: Any | None,
    y: Any,
    y_factor: Any | None,
    x_norm: Any,
    y_norm: Any,
    metric: int,
    unscale: float,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def pairwise_distance_tiled(
    x_prepared: Any,
    y_prepared: Any,
    out: Any,
    x: Any,
    x_factor: Any | None,
    y: Any,
    y_factor: Any | None,
    x_norm: Any,
    y_norm: Any,
    metric: int,
    unscale: float,
    place: _Place,
    /,
) -> None: ...
def nearest_neighbors_scan(
    block: Any,
    row_begin: int,
    column_begin: int,
    left_bounds: Any,
    right_bounds: Any,
    candidates: Any,
    k: int,
    both: bool,
    write: bool,
    place: _Place,
    /,
) -> None: ...
def nearest_neighbors_select(
    x: Any,
    y: Any,
    metric: int,
    unscale: float,
    left_bounds: Any,
    right_bounds: Any,
    candidates: Any,
    k: int,
    index: Any,
    distance: Any | None,
    unsure: Any,
    kth_upper: Any,
    place: _Place,
    /,
) -> None: ...
def nearest_neighbors_rescan(
    block: Any,
    rows: Any,
    x: Any,
    y: Any,
    metric: int,
    unscale: float,
    left_bounds: Any,
    right_bounds: Any,
    kth_upper: Any,
    same: Any | None,
    k: int,
    index: Any,
    distance: Any | None,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...

packed_scan_bytes: int

def use_large_pages(array: Any, /) -> None: ...
def byte_products() -> tuple[int, int]: ...
def packed_elements(D: int, /) -> int: ...
def nearest_neighbors_round(x: Any, scale: Any, rounded: Any, place: _Place, /) -> None: ...
def nearest_neighbors_pack(x: Any, scale: Any, left: bool, packed: Any, place: _Place, /) -> None: ...
def nearest_neighbors_scan_packed(
    left: Any,
    rows: int,
    right: Any,
    columns: int,
    D: int,
    row_begin: int,
    column_begin: int,
    left_bounds: Any,
    right_bounds: Any,
    candidates: Any,
    k: int,
    both: bool,
    sets: Any,
    farthest: Any | None,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def nearest_neighbors_scan_farthest(
    block: Any,
    row_begin: int,
    column_begin: int,
    left_bounds: Any,
    right_bounds: Any,
    candidates: Any,
    k: int,
    both: bool,
    sets: Any,
    farthest: Any,
    place: _Place,
    /,
) -> None: ...
def nearest_neighbors_scan_written(
    x: Any,
    y: Any,
    row_begin: int,
    column_begin: int,
    left_bounds: Any,
    right_bounds: Any,
    candidates: Any,
    k: int,
    sets: Any,
    farthest: Any,
    out: Any,
    panels: Any,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def nearest_neighbors_farthest(sets: Any, farthest: Any, row_max: Any, place: _Place, /) -> None: ...
def k_reciprocal_sets(neighbor: Any, k: int, out: Any, size: Any, place: _Place, /) -> None: ...
def k_reciprocal_robust_sets(
    sets: Any, size: Any, half: Any, half_size: Any, indptr: Any, index: Any | None, workspace: Any, place: _Place, /
) -> None: ...
def k_reciprocal_listed_distance(
    x: Any,
    x_factor: Any | None,
    y: Any,
    y_factor: Any | None,
    neighbor: Any,
    neighbor_distance: Any,
    indptr: Any,
    index: Any,
    out: Any,
    place: _Place,
    /,
) -> None: ...
def k_reciprocal_encode(indptr: Any, distance: Any, row_max: Any, value: Any, place: _Place, /) -> None: ...
def k_reciprocal_query_expansion(
    neighbor: Any,
    k2: int,
    indptr: Any,
    index: Any,
    value: Any,
    new_indptr: Any,
    new_index: Any | None,
    new_value: Any | None,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def k_reciprocal_invert(
    indptr: Any,
    index: Any,
    value: Any,
    first: int,
    columns: int,
    start: Any,
    owner: Any,
    weight: Any,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def k_reciprocal_blend(
    distance: Any,
    row_max: Any,
    indptr: Any,
    index: Any,
    value: Any,
    start: Any,
    owner: Any,
    weight: Any,
    lambda_value: float,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def k_reciprocal_topk(
    query: Any,
    query_factor: Any | None,
    gallery: Any,
    gallery_factor: Any | None,
    nearest: Any,
    original: Any,
    row_max: Any,
    indptr: Any,
    index: Any,
    value: Any,
    start: Any,
    owner: Any,
    weight: Any,
    lambda_value: float,
    distance: Any,
    gallery_index: Any,
    workspace: Any,
    place: _Place,
    /,
) -> None: ...
def k_reciprocal_matrix_neighbors(
    q_g: Any, q_q: Any, g_g: Any, k: int, neighbor: Any, row_max: Any, workspace: Any, place: _Place, /
) -> None: ...
