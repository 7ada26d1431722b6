"""Ranking metrics of each query as an operator; the definition is in :mod:`vareid_ext.reference.ranking`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext import _native
from vareid_ext.reference import ranking as reference


@torch.library.custom_op("vareid::ranking_forward", mutates_args=())
def ranking_forward(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_camera: Tensor | None,
    gallery_camera: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-query results; arguments and results are those of :func:`vareid_ext.reference.ranking.ranking_forward`."""
    return reference.ranking_forward(
        distances, query_identity, gallery_identity, query_camera, gallery_camera, junk_identity
    )


@ranking_forward.register_fake
def _(distances: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(distances)


def _empty_results(distances: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Q = distances.shape[0]
    return (
        distances.new_empty(Q, dtype=torch.float64),
        distances.new_empty(Q, dtype=torch.float64),
        distances.new_empty(Q, dtype=torch.int64),
        distances.new_empty(Q, dtype=torch.int64),
    )


def _native_forward(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_camera: Tensor | None,
    gallery_camera: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if distances.shape[1] > 1 and distances.stride(1) != 1:
        distances = distances.contiguous()
    # The gallery grouped by identity, so that a query's matches are found without reading all identities again.
    identity, order = torch.sort(gallery_identity, stable=True)
    group_begin = torch.searchsorted(identity, query_identity.contiguous())
    group_end = torch.searchsorted(identity, query_identity.contiguous(), right=True)
    junk = None
    if junk_identity is not None:
        junk = gallery_identity == junk_identity
        junk = junk if bool(junk.any()) else None
        group_end = torch.where(query_identity == junk_identity, group_begin, group_end)
    results = _empty_results(distances)
    workspace, max_group, threads = None, 0, torch.get_num_threads()
    if not distances.is_cuda:
        max_group = int((group_end - group_begin).max()) if len(query_identity) else 0
        needed = _native.module().ranking_workspace_bytes(max_group, threads)
        workspace = torch.empty(needed, dtype=torch.uint8)
    view = _native.view
    _native.module().ranking_forward(
        view(distances), view(order), view(group_begin), view(group_end), view(junk),
        view(None if query_camera is None else query_camera.contiguous()),
        view(None if gallery_camera is None else gallery_camera.contiguous()),
        *map(view, results), view(workspace), max_group, threads,
        _native.stream(distances) if distances.is_cuda else 0,
    )  # fmt: skip
    return results


for _device_type in ("cpu", "cuda"):
    _native.register(ranking_forward, _device_type)(_native_forward)
