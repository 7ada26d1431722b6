"""The ranking op: every query's average precision, inverse negative penalty, first hit and number of matches."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Per-query results; see :func:`vareid_ext.reference.ranking.ranking_forward`."""
    return reference.ranking_forward(
        distances, query_identity, gallery_identity, query_camera, gallery_camera, junk_identity
    )


@ranking_forward.register_fake
def _(
    distances: Tensor,
    query_identity: Tensor,
    gallery_identity: Tensor,
    query_camera: Tensor | None,
    gallery_camera: Tensor | None,
    junk_identity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Q = distances.shape[0]
    return (
        distances.new_empty(Q, dtype=torch.float64),
        distances.new_empty(Q, dtype=torch.float64),
        distances.new_empty(Q, dtype=torch.int64),
        distances.new_empty(Q, dtype=torch.int64),
    )
