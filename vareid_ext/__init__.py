"""VA-reID: viewpoint-aware losses, exact re-ranking and evaluation for person re-identification, on PyTorch."""

from vareid_ext._native import backends, reference_backend
from vareid_ext._version import __version__
from vareid_ext.metrics import QueryRanking, RankingMetrics, evaluate_ranking, rank_queries
from vareid_ext.ops.angular_center import angular_center_regularizer
from vareid_ext.retrieval import k_reciprocal_rerank, nearest_neighbors, pairwise_distance, re_ranking

__all__ = [
    "QueryRanking",
    "RankingMetrics",
    "__version__",
    "angular_center_regularizer",
    "backends",
    "evaluate_ranking",
    "rank_queries",
    "k_reciprocal_rerank",
    "nearest_neighbors",
    "pairwise_distance",
    "re_ranking",
    "reference_backend",
]
