"""The losses, one file each: modules and functions of features and labels."""

from vareid_ext.losses.distillation import distillation
from vareid_ext.losses.part_cross_entropy import part_cross_entropy
from vareid_ext.losses.smoothed_viewpoint import smoothed_viewpoint_cross_entropy
from vareid_ext.losses.triplet import batch_hard_triplet
from vareid_ext.losses.viewpoint_aware import LossParts, ViewpointAwareLoss

__all__ = [
    "LossParts",
    "ViewpointAwareLoss",
    "batch_hard_triplet",
    "distillation",
    "part_cross_entropy",
    "smoothed_viewpoint_cross_entropy",
]
