"""VA-reID: viewpoint-aware losses, exact re-ranking and evaluation for person re-identification, on PyTorch."""

from vareid_ext import _interrupt  # noqa: F401, first of all: the next lines take seconds
from vareid_ext._load import load
from vareid_ext._native import backends, reference_backend
from vareid_ext._version import __version__
from vareid_ext.losses import LossParts, ViewpointAwareLoss
from vareid_ext.metrics import (
    ByViewpoint,
    QueryRanking,
    RankingMetrics,
    RepeatedMetrics,
    VerificationMetrics,
    evaluate_cross_viewpoint,
    evaluate_features,
    evaluate_ranking,
    evaluate_single_viewpoint,
    evaluate_verification,
    rank_features,
    rank_queries,
    ranked_lists,
    verify_features,
)
from vareid_ext.ops._labels import raise_label_errors
from vareid_ext.ops.angular_center import angular_center_regularizer
from vareid_ext.ops.linear_viewpoint_aware_cross_entropy import linear_viewpoint_aware_cross_entropy
from vareid_ext.ops.viewpoint_aware_cross_entropy import (
    identity_cross_entropy,
    viewpoint_aware_cross_entropy,
    viewpoint_cross_entropy,
)
from vareid_ext.retrieval import (
    GalleryIndex,
    KReciprocal,
    k_reciprocal_from_neighbors,
    k_reciprocal_rerank,
    nearest_neighbors,
    pairwise_distance,
    re_ranking,
)

__all__ = [
    "ByViewpoint",
    "GalleryIndex",
    "KReciprocal",
    "LossParts",
    "QueryRanking",
    "RankingMetrics",
    "RepeatedMetrics",
    "VerificationMetrics",
    "ViewpointAwareLoss",
    "__version__",
    "angular_center_regularizer",
    "backends",
    "evaluate_cross_viewpoint",
    "evaluate_features",
    "evaluate_ranking",
    "evaluate_single_viewpoint",
    "evaluate_verification",
    "identity_cross_entropy",
    "k_reciprocal_from_neighbors",
    "k_reciprocal_rerank",
    "linear_viewpoint_aware_cross_entropy",
    "load",
    "nearest_neighbors",
    "pairwise_distance",
    "raise_label_errors",
    "rank_features",
    "rank_queries",
    "ranked_lists",
    "re_ranking",
    "reference_backend",
    "verify_features",
    "viewpoint_aware_cross_entropy",
    "viewpoint_cross_entropy",
]
