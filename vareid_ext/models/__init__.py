"""What networks are put together from: backbones of timm, poolings, necks, parts."""

from vareid_ext.models.backbone import Backbone, ModelConfig
from vareid_ext.models.masks import pool_masks
from vareid_ext.models.neck import batch_norm_neck
from vareid_ext.models.parts import PartHeads, embedding, identity_head
from vareid_ext.models.pooling import POOLING, AveragePooling, GeneralizedMeanPooling
from vareid_ext.models.rows import equal_rows, pool_rows, row_runs
from vareid_ext.models.warp import Localizer, affine_crop, uv_table, warp_quad

__all__ = [
    "POOLING",
    "AveragePooling",
    "Backbone",
    "GeneralizedMeanPooling",
    "Localizer",
    "ModelConfig",
    "PartHeads",
    "affine_crop",
    "batch_norm_neck",
    "embedding",
    "equal_rows",
    "identity_head",
    "pool_masks",
    "pool_rows",
    "row_runs",
    "uv_table",
    "warp_quad",
]
