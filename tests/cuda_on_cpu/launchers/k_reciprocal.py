"""The functions of the compiled module for this row, over the CUDA launchers."""

from __future__ import annotations

from typing import Any

from tests.cuda_on_cpu.harness import InOut, Partial, Workspace, dtype_code, spanned
from vareid_ext.ops.k_reciprocal import invert_workspace


def k_reciprocal_sets(launch: Any, neighbor: Any, k: int, out: Any, size: Any, place: Any) -> None:
    rows, width = neighbor.shape
    launch("k_reciprocal_sets_cuda", neighbor, rows, width, k, Partial(out), size)


def k_reciprocal_robust_sets(
    launch: Any, sets: Any, size: Any, half: Any, half_size: Any, indptr: Any, index: Any, workspace: Any,
    place: Any,
) -> None:  # fmt: skip
    (rows, width), half_width = sets.shape, half.shape[1]
    launch(
        "k_reciprocal_robust_sets_cuda", sets, size, width, half, half_size, half_width, rows,
        indptr if index is None else InOut(indptr), index, None,
    )  # fmt: skip


def k_reciprocal_listed_distance(
    launch: Any, x: Any, x_factor: Any, y: Any, y_factor: Any, neighbor: Any, near: Any, indptr: Any, index: Any,
    out: Any, place: Any,
) -> None:  # fmt: skip
    (x_memory, x_stride), (y_memory, y_stride) = spanned(x), spanned(y)
    launch(
        "k_reciprocal_listed_distance_cuda", x_memory, x_factor, x.shape[0], x_stride, y_memory, y_factor, y.shape[0],
        y_stride, dtype_code(x), x.shape[1], neighbor, near, neighbor.shape[1], indptr, index, out,
    )  # fmt: skip


def k_reciprocal_encode(launch: Any, indptr: Any, distance: Any, row_max: Any, value: Any, place: Any) -> None:
    launch("k_reciprocal_encode_cuda", indptr, distance, row_max, indptr.numel() - 1, value)


def k_reciprocal_query_expansion(
    launch: Any, neighbor: Any, k2: int, indptr: Any, index: Any, value: Any, new_indptr: Any, new_index: Any,
    new_value: Any, workspace: Any, place: Any,
) -> None:  # fmt: skip
    rows, width = neighbor.shape
    launch(
        "k_reciprocal_query_expansion_cuda", neighbor, rows, width, k2, indptr, index, value,
        new_indptr if new_index is None else InOut(new_indptr), new_index, new_value, None,
    )  # fmt: skip


def k_reciprocal_invert(
    launch: Any, indptr: Any, index: Any, value: Any, first: int, columns: int, start: Any, owner: Any, weight: Any,
    workspace: Any, place: Any,
) -> None:  # fmt: skip
    entries = owner.numel()
    launch(
        "k_reciprocal_invert_cuda", indptr, index, value, indptr.numel() - 1, first, columns, entries, start, owner,
        weight, Workspace(invert_workspace("cuda", columns, entries)),
    )  # fmt: skip


def k_reciprocal_blend(
    launch: Any, distance: Any, row_max: Any, indptr: Any, index: Any, value: Any, start: Any, owner: Any, weight: Any,
    lambda_value: float, workspace: Any, place: Any,
) -> None:  # fmt: skip
    queries, gallery = distance.shape
    dense = distance.contiguous()
    launch(
        "k_reciprocal_blend_cuda", InOut(dense), gallery, queries, gallery, row_max, indptr, index, value, start, owner,
        weight, lambda_value, None,
    )  # fmt: skip
    distance.copy_(dense)


def k_reciprocal_topk(
    launch: Any, query: Any, query_factor: Any, gallery: Any, gallery_factor: Any, nearest: Any, original: Any,
    row_max: Any, indptr: Any, index: Any, value: Any, start: Any, owner: Any, weight: Any, lambda_value: float,
    distance: Any, gallery_index: Any, workspace: Any, place: Any,
) -> None:  # fmt: skip
    (Q, D), G = query.shape, gallery.shape[0]
    (query_memory, query_stride), (gallery_memory, gallery_stride) = spanned(query), spanned(gallery)
    launch(
        "k_reciprocal_topk_cuda", query_memory, query_factor, Q, query_stride, gallery_memory, gallery_factor, G,
        gallery_stride, dtype_code(query), D, nearest, original, nearest.shape[1], row_max, indptr, index, value, start,
        owner, weight, lambda_value, distance.shape[1], distance, gallery_index, None,
    )  # fmt: skip


def k_reciprocal_matrix_neighbors(
    launch: Any, q_g: Any, q_q: Any, g_g: Any, k: int, neighbor: Any, row_max: Any, workspace: Any, place: Any,
) -> None:  # fmt: skip
    Q, G = q_g.shape
    launch("k_reciprocal_matrix_neighbors_cuda", q_g, q_q, g_g, dtype_code(q_g), Q, G, k, neighbor, row_max, None)
