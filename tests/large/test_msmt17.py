"""MSMT17's size: evaluation and re-ranking of a run take little beyond the features."""

from __future__ import annotations

from tests.large.memory import RERANKED_METRICS, RERANKING, need, peak_memory


def test_evaluation_and_reranking_stay_below_a_gibibyte_beyond_the_features():
    need(1.5)
    *_, used = peak_memory(RERANKING.format(Q=11_659, G=82_161, D=64), RERANKED_METRICS)
    assert used < 1 << 30
