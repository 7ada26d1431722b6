"""What networks are put together from: backbones of timm, poolings, necks, parts."""

from vareid_ext.models.backbone import Backbone, ModelConfig
from vareid_ext.models.neck import batch_norm_neck
from vareid_ext.models.pooling import POOLING, AveragePooling, GeneralizedMeanPooling
from vareid_ext.models.stripes import STRIPES, StripeBranch
from vareid_ext.models.warp import Localizer, affine_crop, uv_table, warp_quad

__all__ = [
    "POOLING",
    "STRIPES",
    "AveragePooling",
    "Backbone",
    "GeneralizedMeanPooling",
    "Localizer",
    "ModelConfig",
    "StripeBranch",
    "affine_crop",
    "batch_norm_neck",
    "uv_table",
    "warp_quad",
]
