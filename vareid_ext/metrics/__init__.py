"""Ranking metrics: CMC, mAP and mINP from distances or from features, and the viewpoint protocols."""

from vareid_ext.metrics.features import evaluate_features, rank_features
from vareid_ext.metrics.ranking import QueryRanking, RankingMetrics, evaluate_ranking, rank_queries
from vareid_ext.metrics.viewpoints import (
    ByViewpoint,
    RepeatedMetrics,
    evaluate_cross_viewpoint,
    evaluate_single_viewpoint,
)

__all__ = [
    "ByViewpoint",
    "QueryRanking",
    "RankingMetrics",
    "RepeatedMetrics",
    "evaluate_cross_viewpoint",
    "evaluate_features",
    "evaluate_ranking",
    "evaluate_single_viewpoint",
    "rank_features",
    "rank_queries",
]
