"""VA-reID: viewpoint-aware losses, exact re-ranking and evaluation for person re-identification, on PyTorch."""

from vareid_ext._native import backends, reference_backend
from vareid_ext._version import __version__
from vareid_ext.losses import LossParts, ViewpointAwareLoss
from vareid_ext.ops.angular_center import angular_center_regularizer
from vareid_ext.ops.viewpoint_aware_cross_entropy import (
    identity_cross_entropy,
    viewpoint_aware_cross_entropy,
    viewpoint_cross_entropy,
)

__all__ = [
    "LossParts",
    "ViewpointAwareLoss",
    "__version__",
    "angular_center_regularizer",
    "backends",
    "identity_cross_entropy",
    "reference_backend",
    "viewpoint_aware_cross_entropy",
    "viewpoint_cross_entropy",
]
