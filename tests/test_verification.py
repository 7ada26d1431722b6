"""The verification ops and the metrics on top of them, against loops over all pairs and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import people
from tests.test_ranking import DTYPES, Foreign, in_common, problem
from vareid_ext import KReciprocal, evaluate_verification, pairwise_distance, verify_features
from vareid_ext.ops.verification import verification_accepted, verification_histogram, verification_refine
from vareid_ext.reference.verification import distances_of, keys_of


def pairs_of(
    distances, query_identity, gallery_identity, query_camera=None, gallery_camera=None, junk=-1, left_out=None
):
    """Every pair as (query, gallery index, distance, whether it is a match), by the rule word by word."""
    for q, row in enumerate(distances.double().tolist()):
        for g, distance in enumerate(row):
            match = bool(query_identity[q] == gallery_identity[g])
            own = match and query_camera is not None and in_common(query_camera[q], gallery_camera[g])
            if left_out is not None:
                own = left_out[q][g]
            if gallery_identity[g] != junk and not own:
                yield q, g, distance, match


def assert_counted(distances, *labels, junk=-1):
    """The operators' results, against the pairs one by one."""
    tensors = [None if label is None else torch.as_tensor(label) for label in labels]
    tensors[2:] = [codes if codes is None else codes.reshape(len(codes), -1) for codes in tensors[2:]]
    pairs = list(pairs_of(distances, *labels, junk=junk))
    counts, nearest, index = (result.numpy() for result in verification_histogram(distances, *tensors, junk))
    total = counts.cumsum(1)
    median = float(distances.double().median())
    accepted = verification_accepted(distances, *tensors, junk, median)
    first, low = keys_of(distances) >> (8 * distances.element_size() - 16), 8 * distances.element_size() - 16
    occupied = [int(digit) for digit in first.unique()]
    if low:
        prefixes = [*dict.fromkeys([occupied[0], 0, -1, *occupied[len(occupied) // 2 :]])][:8]
        refined = verification_refine(distances, *tensors, junk, prefixes, 1).numpy()
    for kind, match in enumerate((True, False)):
        mine = [pair for pair in pairs if pair[3] == match]
        values = np.array([distance for _, _, distance, _ in mine])
        for digit in occupied:  # the number of pairs up to the end of each occupied digit
            end = float(distances_of(torch.tensor([((digit + 1) << low) - 1]), distances.dtype)) if digit + 1 else -0.0
            below = (values < end).sum() if digit == -1 else (values <= end).sum()
            assert total[kind, digit + 32768] == below, (match, digit)
        assert total[kind, -1] == len(mine)
        for q in range(len(distances)):
            own = min(((d, g) for p, g, d, _ in mine if p == q), default=(math.inf, -1))
            assert (nearest[kind, q], index[kind, q]) == own
            assert int(accepted[kind, q]) == sum(d <= median for p, _, d, _ in mine if p == q)
        if low:
            inside = [keys_of(torch.tensor(d, dtype=distances.dtype)).item() for *_, d, _ in mine]
            for place, prefix in enumerate(prefixes):
                digits = [(key >> (low - 16)) & 65535 for key in inside if key >> low == prefix]
                assert (refined[kind, place] == np.bincount(np.array(digits, dtype=int), minlength=65536)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_order_as_distances_do(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.min, -2, -1.5, -limits.tiny, -0.0, 0.0, limits.tiny, 0.1, 1.0, 1.5, limits.max])
    values = torch.cat([values.to(dtype), torch.nextafter(torch.zeros(2), torch.tensor([1.0, -1.0])).to(dtype)])
    keys = keys_of(values)
    assert torch.equal(distances_of(keys, dtype), values.double())
    assert torch.equal(keys[:, None] < keys, values[:, None] < values)
    assert torch.equal(keys[:, None] == keys, values[:, None] == values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("Q", "G", "identities", "levels"), [(1, 1, 1, None), (3, 150, 9, 7), (2, 301, 2, None)])
def test_pairs_are_counted_one_by_one(backend, dtype, Q, G, identities, levels):
    distances, *labels = problem(Q * G, Q, G, identities, levels=levels, dtype=dtype)
    assert_counted(distances, *labels)
    assert_counted(distances * 2 - 1, *labels[:2], None, None, junk=None)


def test_any_range_of_distances_is_counted(backend):
    distances, *labels = problem(3, 2, 300, 4, dtype=torch.float64)
    for scale in (1e-45, 3e38):
        scaled = ((distances - 0.5) * 2 * scale).float()
        scaled[:, ::7], scaled[:, 3::50] = 0.0, -0.0
        assert_counted(scaled, *labels)


@pytest.mark.parametrize("codes", [2, 3])
def test_pairs_with_any_code_in_common_are_no_matches(backend, codes):
    distances, *identity = problem(15, 5, 300, 4, levels=50)[:3]
    rng = np.random.default_rng(codes)
    of_query, of_gallery = (rng.integers(-1, 3, (n, codes)) for n in (5, 300))
    of_query[0] = -1
    of_query[1] = of_gallery[identity[1] == identity[0][1]] = 2
    assert_counted(distances, *identity, of_query, of_gallery)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bad", "column"), [(math.nan, 0), (math.inf, 299), (-math.inf, 150)])
def test_nan_and_inf_are_refused_by_row(backend, dtype, bad, column):
    distances, *labels = problem(4, 5, 300, 4, dtype=dtype)
    distances[3, column] = bad
    with pytest.raises(ValueError, match=rf"distances: row 3 holds .*column {column}"):
        evaluate_verification([distances[:2], distances[2:]], *labels)


def test_the_operators_pass_opcheck():
    distances, *labels = problem(10, 3, 40, 3)
    tensors = [torch.from_numpy(label) for label in labels]
    tensors[2:] = [torch.stack([camera, camera // 2], 1) for camera in tensors[2:]]
    torch.library.opcheck(verification_histogram, (distances, *tensors, -1))
    torch.library.opcheck(verification_refine, (distances, *tensors[:2], None, None, None, [3, 16000], 1))
    torch.library.opcheck(verification_accepted, (distances.t().contiguous().t(), *tensors, -1, 0.5))


def test_threads_change_nothing():
    distances, *labels = problem(5, 60, 14000, 9)  # enough pairs for three threads
    labels[2:] = [camera[:, None] for camera in labels[2:]]
    arguments = distances, *map(torch.from_numpy, labels), -1
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((*verification_histogram(*arguments), verification_refine(*arguments, [16128], 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


TARGETS, ALARMS = (0.3, 0.1, 1e-4), (0.5, 0.1)


def assert_follows_the_definition(distances, *labels, junk=-1, left_out=None, **rule):
    """All metrics, by trying every threshold on a list of all pairs."""
    pairs = [pair for pair in pairs_of(distances, *labels, junk=junk, left_out=left_out) if labels[0][pair[0]] != junk]
    values = sorted({distance for _, _, distance, _ in pairs})
    matches, others = (np.array([d for *_, d, match in pairs if match == kind]) for kind in (True, False))
    rates = [(0.0, 0.0), *((float((others <= t).mean()), float((matches <= t).mean())) for t in values)]
    got = evaluate_verification(distances, *labels, **rule, fpr_targets=TARGETS, far_targets=ALARMS, junk_identity=junk)
    assert (got.num_matches, got.num_non_matches) == (len(matches), len(others))
    for target, point in zip(TARGETS, got.points, strict=True):
        assert (point.fpr, point.tpr) == max(rate for rate in rates if rate[0] <= target)
        assert ((others <= point.threshold).mean(), (matches <= point.threshold).mean()) == (point.fpr, point.tpr)
        wider = min((d for d in others if d > point.threshold), default=None)
        assert wider is None or (others <= wider).mean() > target
    at = next(i for i, (fpr, tpr) in enumerate(rates) if fpr + tpr > 1 - 1e-9)
    (f0, t0), (f1, t1) = rates[at - 1], rates[at]
    assert got.eer_threshold == values[at - 1]
    share = (1 - t0 - f0) / ((1 - t0 - f0) + (f1 + t1 - 1))
    assert got.eer == pytest.approx(f0 + share * (f1 - f0), abs=1e-12)
    for t, fpr, tpr in zip(*got.roc, strict=True):
        assert ((others <= t).mean(), (matches <= t).mean()) == (fpr, tpr)
    assert (got.roc[1][-1], got.roc[2][-1]) == (1, 1)
    assert set(got.roc[0]) >= {got.eer_threshold, *(point.threshold for point in got.points)}

    queries = {q for q in range(len(distances)) if labels[0][q] != junk}
    mated = {q for q, _, _, match in pairs if match}
    probes = queries - mated or queries
    alarms = np.array([min((d for p, _, d, match in pairs if p == q and not match), default=np.inf) for q in probes])
    nearest = [min((d, g, match) for p, g, d, match in pairs if p == q) for q in mated]
    assert (got.num_mated, got.num_unmated, got.matches_taken_out) == (len(mated), len(probes), not queries - mated)
    for target, point in zip(ALARMS, got.open_set, strict=True):
        t = max(t for t in (-np.inf, *values) if (alarms <= t).mean() <= target)
        assert point.far == (alarms <= t).mean() == (alarms <= point.threshold).mean()
        assert point.dir == sum(match and d <= t for d, _, match in nearest) / len(mated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [None, 1, 5], ids=["distinct", "all tied", "many ties"])
def test_metrics_follow_the_definition(dtype, levels):
    distances, *labels = problem(1, 9, 70, 6, levels=levels, dtype=dtype)
    assert_follows_the_definition(distances - 0.4, *labels)
    labels[0][4:] += 100  # of whom the gallery has none
    assert_follows_the_definition(distances, *labels[:2], junk=None)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 40), st.integers(2, 5), st.integers(1, 30))
def test_any_small_problem_follows_the_definition(seed, Q, G, identities, levels):
    distances, *labels = problem(seed, Q, G, identities, levels=levels)
    labels[0][0], labels[1][:2] = 0, (0, 1)  # a match and a non-match at least
    labels[2][0] = -1
    assert_follows_the_definition(distances, *labels)


def test_rates_are_those_of_scikit_learn():
    from sklearn.metrics import roc_curve

    rng = np.random.default_rng(0)
    query, gallery = rng.integers(0, 8, 40), rng.integers(0, 8, 250)
    match = query[:, None] == gallery
    distances = rng.gamma(9, size=match.shape).astype(np.float32) - 3 * match
    got = evaluate_verification(distances, query, gallery, fpr_targets=[0.2, 1e-2, 1e-3])
    fpr, tpr, score = roc_curve(match.ravel(), -distances.ravel(), drop_intermediate=False)
    for point in got.points:
        assert point.tpr == pytest.approx(tpr[fpr <= point.target].max(), abs=1e-15)
        assert point.fpr == pytest.approx(fpr[fpr <= point.target].max(), abs=1e-15)
    assert np.interp(got.eer, fpr, tpr) == pytest.approx(1 - got.eer, abs=1e-12)
    place = np.searchsorted(-score, got.roc[0], side="right") - 1  # the first score is infinite
    np.testing.assert_allclose(got.roc[1:], (fpr[place], tpr[place]), atol=1e-15)


def test_intervals_are_those_of_drawing_identities_again():
    distances, *labels = problem(6, 20, 90, 7)
    got = evaluate_verification(distances, *labels, recommend_fpr=0.1, resamples=50, seed=3).recommended
    pairs = [pair for pair in pairs_of(distances, *labels) if labels[0][pair[0]] != -1]
    names = np.unique([labels[0][q] for q, *_ in pairs])
    rng, rates = np.random.default_rng(3), []
    for _ in range(50):
        drawn = [
            pair
            for name in rng.integers(len(names), size=len(names))
            for pair in pairs
            if labels[0][pair[0]] == names[name]
        ]
        rates.append(
            [
                np.mean([(d <= got.point.threshold) == match for *_, d, match in drawn if match == kind])
                for kind in (False, True)
            ]
        )
    ends = np.percentile(1 - np.array(rates), [2.5, 97.5], axis=0)
    np.testing.assert_allclose(np.array([got.fmr_interval, got.fnmr_interval]).T, ends, atol=1e-12)
    assert got.fmr_interval[0] <= got.point.fpr <= got.fmr_interval[1]
    assert (got.point.target, got.resamples) == (0.1, 50)


def test_blocks_functions_and_kinds_of_arrays_give_what_the_matrix_gives():
    distances, *labels = problem(7, 30, 80, 6, levels=20)
    expected = evaluate_verification(distances, *labels, recommend_fpr=0.01).as_dict()
    done = []
    for blocks, options in (
        (lambda begin, end: distances[begin:end], {"block_rows": 7, "progress": done.append}),
        ([distances[:11], distances[11:]], {}),
        (distances.numpy(), {}),
        (Foreign(distances), {}),
        (distances.t().contiguous().t(), {"fpr_targets": (1e-2, 1e-3, 1e-4, 1e-5)}),
    ):
        assert evaluate_verification(blocks, *labels, recommend_fpr=0.01, **options).as_dict() == expected
    assert sum(done) == 3 * 30
    many = evaluate_verification(distances, *labels, fpr_targets=np.linspace(0.01, 0.99, 40))  # several calls
    assert all(point.fpr <= point.target for point in many.points)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_features_give_what_their_distances_give(metric):
    query, gallery, *labels = people(0, 23, 60)
    expected = evaluate_verification(pairwise_distance(query, gallery, metric=metric), *labels)
    got = verify_features(query, gallery, *labels, metric=metric)
    assert (got.eer, got.points) == (pytest.approx(expected.eer), pytest.approx(expected.points))


def test_reranked_distances_have_their_own_thresholds():
    query, gallery, *labels = people(1, 20, 50)
    labels[1][:5] = -1  # in nobody's neighbourhood
    options = {"k1": 6, "k2": 3}
    fit = KReciprocal(query, gallery[5:], **options)
    of_kept = labels[0], labels[1][5:], labels[2], labels[3][5:]
    expected = evaluate_verification(fit.matrix(), *of_kept).as_dict()
    assert verify_features(query, gallery, *labels, rerank=options).as_dict() == expected
    assert verify_features(query, gallery, *labels, rerank=fit, block_rows=6).as_dict() == expected


def test_what_is_said_about_the_results():
    distances = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.2, 0.6]])
    got = evaluate_verification(distances, [1, 2], [1, 2, 3, 3], fpr_targets=[0.5, 1e-2], far_targets=[0.4])
    assert got.cells() == {"EER": "0.00", "TPR@FPR=5e-1": "100.00", "TPR@FPR=1e-2": "100.00", "DIR@FAR=4e-1": "100.00"}
    assert list(got.threshold_cells()) == list(got.cells())
    assert "pairs: 2 matches, 6 non-matches" in str(got)
    assert "TPR@FPR=0.01: rests on no accepted non-match" in str(got)
    assert "2 queries without its matches" in str(got)
    unmated = evaluate_verification(distances, [1, 9], [1, 2, 3, 3], recommend_fpr=0.5, resamples=9)
    assert "1 queries without a match" in str(unmated)
    assert "9 bootstrap draws" in str(unmated)


D34, L3, L4 = torch.arange(12.0).view(3, 4), [1, 2, 3], [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((D34, L3, [5] * 4), {}, ValueError, "query_identity: none of the 3 queries has a match"),
        ((D34, L3, [-1] * 4), {}, ValueError, "query_identity: none of the 3 queries has a match"),
        ((D34, L3, L4, [0] * 3, [0] * 4), {}, ValueError, "query_identity: none of the 3 queries has a match"),
        ((D34, [-1] * 3, L4), {}, ValueError, "query_identity: none of the 0 queries has a match"),
        ((D34, [1] * 3, [1] * 4), {}, ValueError, "gallery_identity: there are no non-matches"),
        ((D34, [1] * 3, L4), {"recommend_fpr": 0.1}, ValueError, "query_identity: one identity was given"),
        ((D34, L3, L4), {"recommend_fpr": 2}, ValueError, "recommend_fpr: 2 was given"),
        ((D34, L3, L4), {"fpr_targets": [0.1, 0]}, ValueError, "fpr_targets: 0 was given"),
        ((D34, L3, L4), {"far_targets": [math.nan]}, ValueError, "far_targets: nan was given"),
        ((D34, L3, L4), {"fpr_targets": ["x"]}, TypeError, "fpr_targets: str was given"),
        ((D34, L3, L4), {"resamples": 0}, ValueError, "resamples: 0 was given"),
        ((D34, L3, L4), {"seed": -1}, ValueError, "seed: -1 was given"),
        ((D34, L3, L4), {"block_rows": 0}, ValueError, "block_rows: 0 was given"),
        ((D34, L3, L4), {"junk_identity": 0.5}, TypeError, "junk_identity: float"),
        ((D34, L3, L4[:3]), {}, ValueError, "gallery_identity: length 3"),
        ((D34.long(), L3, L4), {}, TypeError, "distances: dtype"),
        ((iter([D34]), L3, L4), {}, TypeError, "distances: list_iterator was given, which can be read once only"),
        (([D34[:1], D34[1:].double()], L3, L4), {}, TypeError, "distances: blocks of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        evaluate_verification(*arguments, **keywords)


def test_distances_that_change_between_readings_are_refused():
    readings = iter([D34, D34 + 100])
    with pytest.raises(ValueError, match="distances: differ from one reading to the next"):
        evaluate_verification(lambda begin, end: next(readings), L3, L4)
