"""Distances, nearest neighbours and re-ranking: functions of features or of distance matrices.

Every function takes NumPy arrays, PyTorch tensors, CuPy arrays or anything else that speaks DLPack, also of several
kinds on one device, and returns the kind of its first argument.
"""

from vareid_ext.retrieval.distance import pairwise_distance
from vareid_ext.retrieval.gallery_index import GalleryIndex
from vareid_ext.retrieval.neighbors import nearest_neighbors
from vareid_ext.retrieval.plan import RerankPlan, rerank_plan
from vareid_ext.retrieval.rerank import RERANKERS, Reranker, fit_reranker
from vareid_ext.retrieval.rerank.k_reciprocal import KReciprocal, check_parameters, k_reciprocal_rerank
from vareid_ext.retrieval.rerank.matrices import re_ranking
from vareid_ext.retrieval.rerank.neighbor_lists import k_reciprocal_from_neighbors

__all__ = [
    "RERANKERS",
    "GalleryIndex",
    "KReciprocal",
    "RerankPlan",
    "Reranker",
    "check_parameters",
    "fit_reranker",
    "k_reciprocal_from_neighbors",
    "k_reciprocal_rerank",
    "nearest_neighbors",
    "pairwise_distance",
    "re_ranking",
    "rerank_plan",
]
