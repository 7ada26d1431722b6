"""CMC, mAP and mINP, protocols on both sides together and verification metrics, from distances or from features."""

from vareid_ext.metrics.comparison import PairedDifference, compare_rankings
from vareid_ext.metrics.features import evaluate_features, rank_features, ranked_lists
from vareid_ext.metrics.groups import GroupMetrics, evaluate_by_group
from vareid_ext.metrics.protocols import (
    ByViewpoint,
    RepeatedMetrics,
    evaluate_cross_viewpoint,
    evaluate_drawn_gallery,
    evaluate_single_viewpoint,
)
from vareid_ext.metrics.ranking import METRIC_NAMES, QueryRanking, RankingMetrics, evaluate_ranking, rank_queries
from vareid_ext.metrics.verification import evaluate_verification, verify_features
from vareid_ext.metrics.verification_results import (
    OpenSetPoint,
    OperatingPoint,
    RecommendedThreshold,
    VerificationMetrics,
)

__all__ = [
    "METRIC_NAMES",
    "ByViewpoint",
    "GroupMetrics",
    "OpenSetPoint",
    "OperatingPoint",
    "PairedDifference",
    "QueryRanking",
    "RankingMetrics",
    "RecommendedThreshold",
    "RepeatedMetrics",
    "VerificationMetrics",
    "compare_rankings",
    "evaluate_by_group",
    "evaluate_cross_viewpoint",
    "evaluate_drawn_gallery",
    "evaluate_features",
    "evaluate_ranking",
    "evaluate_single_viewpoint",
    "evaluate_verification",
    "rank_features",
    "rank_queries",
    "ranked_lists",
    "verify_features",
]
