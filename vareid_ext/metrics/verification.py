"""Verification metrics: are two images of one person? ROC, TPR@FPR, EER and open-set DIR@FAR, from all pairs.

A pair is a query and a gallery image, without those that :func:`vareid_ext.evaluate_ranking` leaves out; queries of the
junk identity are left out, too. A pair is accepted when its distance is at most the threshold. No list of pairs is
held: they are counted by distance, and again where a result lies between two counts, so thresholds and rates are exact.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext.metrics.exclusion import Columns, RankingLabels, check_labels
from vareid_ext.metrics.features import check_retrieval, query_bar
from vareid_ext.metrics.ranking import check_junk_identity, labelled_blocks, refuse_not_finite
from vareid_ext.metrics.verification_results import (
    CONFIDENCE,
    OpenSetPoint,
    OperatingPoint,
    RecommendedThreshold,
    VerificationMetrics,
)
from vareid_ext.ops._checks import check_count, check_number
from vareid_ext.ops.pairwise_distance import pairwise_distance
from vareid_ext.ops.verification import (
    MOST_PREFIXES,
    verification_accepted,
    verification_histogram,
    verification_refine,
)
from vareid_ext.reference.verification import DIGIT_VALUES, distances_of, keys_of
from vareid_ext.retrieval.rerank import Rerank
from vareid_ext.retrieval.rerank.base import progress_bar

FPR_TARGETS = (1e-2, 1e-3, 1e-4, 1e-5)
FAR_TARGETS = (1e-1, 1e-2)


def check_rates(name: str, rates: Sequence[float]) -> tuple[float, ...]:
    """Rates as floats; TypeError or ValueError unless all are numbers above 0 and below 1."""
    for rate in rates:
        check_number(name, rate)
        if not 0 < rate < 1:  # NaN fails too
            raise ValueError(f"{name}: {rate} was given; allowed are rates above 0 and below 1")
    return tuple(map(float, rates))


def _largest_count(rate: float, total: int) -> int:
    """The largest count whose share of the total is at most the rate."""
    count = int(rate * total)
    while (count + 1) / total <= rate:
        count += 1
    while count / total > rate:
        count -= 1
    return count


class _Search:
    """Looks for the first key, among those of all pairs, at which a condition on the accepted pairs holds.

    Args:
        reached: the condition on the numbers of accepted matches and non-matches; once it holds, it holds for more.
    """

    def __init__(self, reached: Callable[[int, int], bool]) -> None:
        self.reached = reached
        self.key = 0  # as many digits of it as are known
        self.below = (0, 0)  # accepted matches and non-matches before it
        self.accepted = (0, 0)  # and with it

    def step(self, counts: np.ndarray, first: bool) -> None:
        """Finds the next digit from the counts [2, 65536] of the pairs that have those before."""
        parts = counts.reshape(2, 256, 256)
        part = self._walk(parts.sum(2))
        digit = 256 * part + self._walk(parts[:, part])
        self.key = (self.key << 16) + digit - (DIGIT_VALUES // 2 if first else 0)

    def _walk(self, counts: np.ndarray) -> int:
        """The first place in counts [2, n] at which the condition holds."""
        sums = np.cumsum(counts, axis=1) + np.array(self.below)[:, None]
        place = bisect.bisect_left(range(sums.shape[1]), True, key=lambda place: self.reached(*sums[:, place].tolist()))
        if place == sums.shape[1]:
            raise ValueError("distances: differ from one reading to the next; they must be the same")
        self.accepted = tuple(sums[:, place].tolist())
        if place > 0:
            self.below = tuple(sums[:, place - 1].tolist())
        return place


def _distance_of(key: int, dtype: torch.dtype) -> float:
    """The largest distance of a dtype whose key is at most this."""
    return float(distances_of(torch.tensor([key if key != -1 else -2]), dtype)[0])  # no distance has -1


class _Pairs:
    """All pairs of an evaluation, read as often as is needed.

    Args:
        distances: as in :func:`evaluate_verification`.
        labels: of queries and gallery, checked, on the CPU.
        junk_identity: queries and gallery images to leave out.
        block_rows: rows asked of a function at a time.
        progress: called with the number of further queries read.
    """

    def __init__(
        self,
        distances: Any,
        labels: RankingLabels,
        junk_identity: int | None,
        block_rows: int | None,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.distances, self.labels, self.junk_identity = distances, labels, junk_identity
        self.block_rows, self.progress = block_rows, progress
        self.kept = torch.ones_like(labels.query_identity, dtype=torch.bool)
        if junk_identity is not None:
            self.kept = labels.query_identity != junk_identity
        self.identity = labels.query_identity[self.kept]
        self.dtype: torch.dtype | None = None

    def read(self) -> Iterator[tuple[np.ndarray, Tensor, tuple[Any, ...]]]:
        """Which of the queries that are kept, their distances, and what the operators take behind these."""
        first = 0
        for begin, _, tensor, labels in labelled_blocks(self.distances, self.labels, self.block_rows):
            self.dtype = self.dtype or tensor.dtype
            if tensor.dtype != self.dtype:
                raise TypeError(f"distances: blocks of {self.dtype} and {tensor.dtype} were given; one is needed")
            rows = len(tensor)
            kept = self.kept[begin : begin + rows].to(tensor.device)
            if labels.query_marks is not None or not bool(kept.all()):
                refuse_not_finite(tensor, ~torch.isfinite(tensor).all(1), begin)  # whose rows are numbered as given
            if not bool(kept.all()):
                tensor, labels = tensor[kept], labels.of_queries(kept)
            self.begin = begin
            queries = torch.arange(first, first + len(tensor), device=tensor.device)
            for some, operands in labels.parts(self.junk_identity):
                yield queries[some].cpu().numpy(), tensor[some], operands
            first += len(tensor)
            del tensor
            if self.progress is not None:
                self.progress(rows)


def evaluate_verification(
    distances: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    fpr_targets: Sequence[float] = FPR_TARGETS,
    far_targets: Sequence[float] = FAR_TARGETS,
    recommend_fpr: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> VerificationMetrics:
    """ROC, TPR@FPR, EER and open-set DIR@FAR of a retrieval, from all its pairs, exact.

    The distances are read twice (float32; once for 16-bit types, four times for float64, once more for a recommended
    threshold), and memory beyond them does not grow with their number.

    Args:
        distances: smaller is nearer. A ``[Q, G]`` array (NumPy, PyTorch or DLPack; float32, float64, float16 or
            bfloat16), a list of its row blocks in order, or a function of ``(begin, end)`` that returns the rows of
            these queries, the same whenever it is asked.
        query_identity: ``[Q]`` whole numbers; labels may be on any device.
        gallery_identity: ``[G]`` whole numbers.
        query_camera: ``[Q]`` whole numbers, or None if cameras are not known; -1: this one is not known.
        gallery_camera: ``[G]`` whole numbers; given if and only if ``query_camera`` is.
        exclude: which pairs are left out, as in :func:`vareid_ext.evaluate_ranking`.
        columns: what ``exclude`` can name, as in :func:`vareid_ext.evaluate_ranking`.
        fpr_targets: false positive rates above 0 and below 1 of :attr:`VerificationMetrics.points`.
        far_targets: false alarm rates above 0 and below 1 of :attr:`VerificationMetrics.open_set`.
        recommend_fpr: a false positive rate for whose threshold confidence intervals are made, or None.
        resamples: draws of that bootstrap, at least 1: as many of the queries' identities as there are, with
            replacement, as pairs of one identity are not independent. The intervals are percentiles.
        seed: of these draws.
        junk_identity: the identity of images to leave out; None for none.
        block_rows: rows asked of a function at a time (default: as many as make 2^23 distances, more on a large GPU).
        progress: called with the number of further queries read after each block, in every reading.

    Raises:
        ValueError: as :func:`vareid_ext.evaluate_ranking`; no match or no non-match; a rate out of range; distances
            that change between two readings; queries of one identity only where a threshold is recommended.
        TypeError: an array of a wrong kind or dtype; an iterator, which can be read once only.

    Sources: ISO/IEC 19795-1:2021 (FMR, FNMR, EER, detection and identification rate); Grother et al., "Face Recognition
    Vendor Test", NIST IR 8238 (FNMR at fixed FMR); Phillips, Grother and Micheals, "Evaluation Methods in Face
    Recognition", Handbook of Face Recognition, 2011 (open-set identification).
    """
    return _verify_labelled(
        distances, check_labels(query_identity, gallery_identity, query_camera, gallery_camera, exclude, columns),
        fpr_targets, far_targets, recommend_fpr, resamples, seed, junk_identity, block_rows, progress,
    )  # fmt: skip


def _verify_labelled(
    distances: Any,
    labels: RankingLabels,
    fpr_targets: Sequence[float],
    far_targets: Sequence[float],
    recommend_fpr: float | None,
    resamples: int,
    seed: int,
    junk_identity: int | None,
    block_rows: int | None,
    progress: Callable[[int], object] | None,
) -> VerificationMetrics:
    fpr_targets, far_targets = check_rates("fpr_targets", fpr_targets), check_rates("far_targets", far_targets)
    if recommend_fpr is not None:
        (recommend_fpr,) = check_rates("recommend_fpr", [recommend_fpr])
    resamples, seed = check_count("resamples", resamples, 1), check_count("seed", seed, 0)
    if block_rows is not None:
        block_rows = check_count("block_rows", block_rows, 1)
    check_junk_identity(junk_identity)
    if isinstance(distances, Iterator):
        raise TypeError(
            f"distances: {type(distances).__name__} was given, which can be read once only; allowed are a [Q, G] "
            "array, a list of row blocks and a function of (begin, end)"
        )
    pairs = _Pairs(distances, labels.on(torch.device("cpu")), junk_identity, block_rows, progress)
    if recommend_fpr is not None and len(pairs.identity.unique()) < 2:
        raise ValueError("query_identity: one identity was given; a confidence interval needs two or more")

    counts, nearest_distance, nearest_index = _histogram(pairs)
    assert pairs.dtype is not None
    M, N = counts.sum(1).tolist()
    if M == 0:
        raise ValueError(
            f"query_identity: none of the {len(pairs.identity)} queries has a match in the gallery (an image of its "
            "identity that is not left out: by default those by its camera are)"
        )
    if N == 0:
        raise ValueError("gallery_identity: there are no non-matches; images of two identities or more are needed")
    targets = [*fpr_targets, *([] if recommend_fpr is None else [recommend_fpr])]
    searches = [_Search(_exceeds(_largest_count(target, N))) for target in targets]
    crossing = _Search(lambda match, non_match: non_match * M + match * N >= M * N)
    _refine(pairs, counts, [*searches, crossing])

    points = [
        OperatingPoint(target, _distance_of(search.key - 1, pairs.dtype), search.below[1] / N, search.below[0] / M)
        for target, search in zip(targets, searches, strict=True)
    ]
    (m0, n0), (m1, n1) = crossing.below, crossing.accepted
    gap_before, gap_after = 1 - m0 / M - n0 / N, n1 / N - (1 - m1 / M)
    eer_threshold = _distance_of(crossing.key, pairs.dtype)
    exact = [(point.threshold, point.fpr, point.tpr) for point in points] + [(eer_threshold, n1 / N, m1 / M)]
    unmated = nearest_index[0] < 0
    alarms = nearest_distance[1, unmated] if unmated.any() else nearest_distance[1]
    recommended = None
    if recommend_fpr is not None:
        recommended = _with_intervals(pairs, points.pop(), resamples, seed)
    return VerificationMetrics(
        num_matches=M,
        num_non_matches=N,
        eer=n0 / N + gap_before / (gap_before + gap_after) * (n1 - n0) / N,
        eer_threshold=eer_threshold,
        points=tuple(points),
        open_set=tuple(
            _open_set(target, nearest_distance, nearest_index, alarms, pairs.dtype) for target in far_targets
        ),
        num_mated=int((~unmated).sum()),
        num_unmated=len(alarms),
        matches_taken_out=not unmated.any(),
        roc=_roc(counts, exact, M, N, pairs.dtype),
        recommended=recommended,
    )


def _exceeds(count: int) -> Callable[[int, int], bool]:
    return lambda _match, non_match: non_match > count


def _histogram(pairs: _Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first reading: counts [2, 65536] by first digit, and each query's nearest pairs, [2, queries] twice."""
    counts = np.zeros((2, DIGIT_VALUES), dtype=np.int64)
    nearest_distance, nearest_index = np.empty((2, len(pairs.identity))), np.empty((2, len(pairs.identity)), np.int64)
    for queries, block, arguments in pairs.read():
        found, distance, index = verification_histogram(block, *arguments)
        refuse_not_finite(block, distance[0].isnan(), pairs.begin)
        counts += found.cpu().numpy()
        nearest_distance[:, queries], nearest_index[:, queries] = distance.cpu().numpy(), index.cpu().numpy()
        del block
    return counts, nearest_distance, nearest_index


def _refine(pairs: _Pairs, counts: np.ndarray, searches: Sequence[_Search]) -> None:
    """Finds the keys of all searches, digit by digit: one reading for each digit but the first."""
    for search in searches:
        search.step(counts, first=True)
    assert pairs.dtype is not None
    for digits in range(1, pairs.dtype.itemsize // 2):
        prefixes = sorted({search.key for search in searches})
        parts = [prefixes[first : first + MOST_PREFIXES] for first in range(0, len(prefixes), MOST_PREFIXES)]
        tables: list[Any] = [0] * len(parts)
        for _, block, arguments in pairs.read():
            for number, part in enumerate(parts):
                tables[number] += verification_refine(block, *arguments, part, digits).cpu().numpy()
            del block
        found = np.concatenate(tables, axis=1)
        for search in searches:
            search.step(found[:, prefixes.index(search.key)], first=False)


def _roc(
    counts: np.ndarray, exact: Sequence[tuple[float, float, float]], M: int, N: int, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Threshold, FPR and TPR at the end of every first digit that occurs, and at the exact points."""
    digit = np.flatnonzero(counts.any(0))
    end = ((torch.from_numpy(digit) - DIGIT_VALUES // 2 + 1) << (8 * dtype.itemsize - 16)) - 1
    threshold = distances_of(torch.where(end == -1, -2, end), dtype).numpy()  # no distance has the key -1
    tpr, fpr = np.cumsum(counts[:, digit], axis=1) / np.array([[M], [N]])
    points = np.concatenate([np.stack([threshold, fpr, tpr], 1), np.array(exact)])
    threshold, fpr, tpr = np.unique(points, axis=0).T
    return threshold, fpr, tpr


def _open_set(
    target: float, distance: np.ndarray, index: np.ndarray, alarms: np.ndarray, dtype: torch.dtype
) -> OpenSetPoint:
    """DIR at the largest threshold at which at most the target's share of the alarms is raised."""
    refused = np.sort(alarms)[_largest_count(target, len(alarms))]
    threshold = _distance_of(int(keys_of(torch.tensor([refused]).to(dtype))[0]) - 1, dtype)
    mated = index[0] >= 0
    first = (distance[0] < distance[1]) | ((distance[0] == distance[1]) & (index[0] < index[1]))
    found = mated & first & (distance[0] <= threshold)
    return OpenSetPoint(target, threshold, float((alarms <= threshold).mean()), float(found.sum() / mated.sum()))


def _with_intervals(pairs: _Pairs, point: OperatingPoint, resamples: int, seed: int) -> RecommendedThreshold:
    """Percentile intervals from draws of identities, whose pairs are counted together."""
    names, identity = torch.unique(pairs.identity, return_inverse=True)
    of_identity = torch.zeros((len(names), 4), dtype=torch.float64)
    for queries, block, arguments in pairs.read():
        accepted = verification_accepted(block, *arguments, point.threshold)
        # All pairs do not depend on the distances: one row for all of them stays in the cache.
        everything = verification_accepted(block[:1].expand_as(block), *arguments, np.inf)
        of_query = torch.cat([accepted, everything]).cpu().T.double()
        of_identity.index_add_(0, identity[torch.from_numpy(queries)], of_query)
        del block
    rng = np.random.default_rng(seed)
    rates = np.empty((resamples, 2))
    for draw in range(resamples):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        match, non_match, matches, non_matches = times @ of_identity.numpy()
        rates[draw] = non_match / non_matches, 1 - match / matches if matches else np.nan
    tail = 50 * (1 - CONFIDENCE)
    ends = np.nanpercentile(rates, [tail, 100 - tail], axis=0)
    (fmr_low, fnmr_low), (fmr_high, fnmr_high) = ends.tolist()
    return RecommendedThreshold(point, (fmr_low, fmr_high), (fnmr_low, fnmr_high), resamples)


def verify_features(
    query: Any,
    gallery: Any,
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any = None,
    gallery_camera: Any = None,
    *,
    exclude: str | None = None,
    columns: Columns | None = None,
    metric: str = "sqeuclidean",
    rerank: Rerank = False,
    fpr_targets: Sequence[float] = FPR_TARGETS,
    far_targets: Sequence[float] = FAR_TARGETS,
    recommend_fpr: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    junk_identity: int | None = -1,
    block_rows: int | None = None,
    progress: bool = False,
) -> VerificationMetrics:
    """:func:`evaluate_verification` from features, without holding the Q x G distances.

    The distances are those of :func:`vareid_ext.pairwise_distance` or, re-ranked, of the re-ranker, made block by block
    in every reading. Thresholds belong to the metric, and re-ranked ones to their own scale.

    Args:
        query: features [Q, D]; this, the other arrays, ``metric``, ``rerank``, ``junk_identity`` and ``progress`` as in
            :func:`vareid_ext.evaluate_features`.
        gallery: features [G, D].
        query_identity: ``[Q]``.
        gallery_identity: ``[G]``.
        query_camera: ``[Q]`` or None.
        gallery_camera: ``[G]`` or None.
        exclude: as in :func:`vareid_ext.evaluate_features`.
        columns: as in :func:`vareid_ext.evaluate_features`.
        metric: "sqeuclidean", "euclidean" or "cosine"; without effect on re-ranked distances.
        rerank: False, True, a name, a mapping or a fitted re-ranker.
        fpr_targets: this and what follows as in :func:`evaluate_verification`.
        far_targets: rates.
        recommend_fpr: a rate or None.
        resamples: draws of the bootstrap.
        seed: of these draws.
        junk_identity: the identity of images to leave out; None for none.
        block_rows: queries handled at once (default: as many as make 2^23 distances).
        progress: show progress bars on standard error.

    Raises:
        TypeError: as :func:`vareid_ext.evaluate_features`.
        ValueError: as :func:`vareid_ext.evaluate_features` and :func:`evaluate_verification`.
    """
    labels = check_labels(query_identity, gallery_identity, query_camera, gallery_camera, exclude, columns)
    query, gallery, labels, fit, _ = check_retrieval(
        query, gallery, labels, metric, rerank, junk_identity, drop_junk=rerank is not False
    )

    def rows(begin: int, end: int) -> Tensor:
        return pairwise_distance(query[begin:end], gallery, metric) if fit is None else fit.distances(begin, end)

    if fit is not None:
        with progress_bar(progress, fit):
            fit.prepare()
    readings = (4 if query.dtype == torch.float64 and fit is None else 2) + (recommend_fpr is not None)
    with query_bar(progress, readings * len(query)) as advance:
        return _verify_labelled(
            rows, labels, fpr_targets, far_targets, recommend_fpr, resamples, seed, junk_identity, block_rows, advance
        )
