"""The ranking op and the metrics on top of it, against a loop that follows the definition word by word."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vareid_ext import evaluate_ranking, rank_queries, reference_backend
from vareid_ext.metrics import QueryRanking
from vareid_ext.ops.ranking import ranking_forward


def in_common(code, other):
    """Whether two cameras, or one of several codes, are the same and known."""
    return any(a == b != -1 for a, b in zip(np.atleast_1d(code), np.atleast_1d(other), strict=True))


def by_definition(distances, query_identity, gallery_identity, query_camera=None, gallery_camera=None, junk=-1):
    """Per query (AP, INP, first rank, matches), by sorting and walking the list, in exact fractions."""
    rows = []
    for q, row in enumerate(np.asarray(distances)):
        hits, rank, precision, first = 0, 0, Fraction(0), 0
        inp = Fraction(0)
        for g in sorted(range(len(row)), key=lambda g: (row[g], g)):
            same = query_identity[q] == gallery_identity[g]
            if gallery_identity[g] == junk:
                continue
            if query_camera is not None and same and in_common(query_camera[q], gallery_camera[g]):
                continue
            rank += 1
            if same:
                hits += 1
                first = first or rank
                precision += Fraction(hits, rank)
                inp = Fraction(hits, rank)
        rows.append((float(precision / max(hits, 1)), float(inp), first, hits))
    return [np.array(column) for column in zip(*rows, strict=True)]


def problem(seed, Q, G, identities, cameras=3, levels=None, dtype=torch.float32):
    """Distances (drawn from `levels` values, so that ties abound, or from all) with identities and cameras."""
    rng = np.random.default_rng(seed)
    values = rng.random((Q, G)) if levels is None else rng.integers(0, levels, (Q, G)) / levels
    return (
        torch.from_numpy(values).to(dtype),
        rng.integers(-1, identities, Q),
        rng.integers(-1, identities, G),
        rng.integers(0, cameras, Q),
        rng.integers(0, cameras, G),
    )


def assert_same(got, distances, *labels, junk=-1):
    expected = by_definition(distances.double().cpu().numpy(), *labels, junk=junk)
    np.testing.assert_allclose(got.average_precision, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.inverse_negative_penalty, expected[1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(got.first_match_rank, expected[2])
    np.testing.assert_array_equal(got.num_matches, expected[3])


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


# The last three have 64 to 2,000 matches for each query: other code paths than a few.
SIZES = [(7, 1, 1), (1, 13, 2), (9, 129, 4), (2, 1031, 40), (2, 300, 3), (1, 2100, 3), (1, 2100, 1)]


@pytest.mark.parametrize("levels", [None, 1, 7], ids=["distinct", "all tied", "many ties"])
@pytest.mark.parametrize(("Q", "G", "identities"), SIZES)
def test_every_query_follows_the_definition(backend, Q, G, identities, levels):
    distances, *labels = problem(Q * 1000 + G, Q, G, identities, levels=levels)
    labels[0][0] = labels[1][0]
    assert_same(rank_queries(distances, *labels), distances, *labels)
    assert_same(rank_queries(distances - 0.5, *labels[:2]), distances, *labels[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("identities", [1, 9])
def test_every_dtype_follows_the_definition(backend, dtype, identities):
    distances, *labels = problem(12, 3, 150, identities, dtype=dtype)
    for shifted in (distances, distances - 0.5):
        assert_same(rank_queries(shifted, *labels), shifted, *labels)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e30, 3e38])
def test_any_range_of_distances_follows_the_definition(backend, scale):
    distances, *labels = problem(13, 2, 300, 2, dtype=torch.float64)
    distances = ((distances - 0.5) * 2 * scale).float()
    distances[:, ::7] = 0
    distances[:, 3] = 1.0
    assert_same(rank_queries(distances, *labels), distances, *labels)


MANY_MATCHES = {
    "nearer": lambda u, same: u + 0.7 * ~same,
    "signed zeros": lambda u, same: np.where(u < 0.3, 0.0, np.where(u < 0.6, -0.0, u - 0.8)),
    "steps of the smallest number": lambda u, same: np.floor(u * 9 - 4) * 2.0**-149,
    "few far matches": lambda u, same: np.where(same & (u > 0.97), 6e4 * u, u),
    "a span that overflows": lambda u, same: np.where(u < 0.5, -3.3e38, 3.3e38) * u,
    "of every magnitude": lambda u, same: np.exp(160 * u - 80) * np.where(same, 1, -1) ** np.arange(u.size),
    "clusters": lambda u, same: np.floor(4 * u) + 1e-6 * np.floor(4000 * u % 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MANY_MATCHES)
def test_many_matches_follow_the_definition(backend, kind, dtype):
    distances, *labels = problem(15, 1, 1013, 4, dtype=torch.float64)
    labels[0][0] = 2
    values = MANY_MATCHES[kind](distances.numpy(), labels[0][:, None] == labels[1])
    largest = torch.finfo(dtype).max
    distances = torch.from_numpy(values).clamp(-largest, largest).to(dtype)
    assert_same(rank_queries(distances, *labels), distances, *labels)
    assert_same(rank_queries(-distances, *labels), -distances, *labels)


@pytest.mark.parametrize("G", [63, 64, 65, 1024, 1025, 2111])
def test_many_matches_in_any_number_of_images_follow_the_definition(backend, G):
    for seed, levels in enumerate((None, 30)):
        distances, *labels = problem(seed, 1, G, 2, levels=levels)
        labels[0][0] = 0
        assert_same(rank_queries(distances, *labels[:2]), distances, *labels[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_matches_among_more_images_than_16_bits_count(dtype):
    rng, G = np.random.default_rng(16), 140_003
    identity = (rng.random(G) < 0.997).astype(np.int64)
    for others in (0.5, rng.random(G)):  # all in one bucket, or in all
        distances = torch.from_numpy(np.where(identity == 0, rng.random(G), others))[None].to(dtype)
        assert_same(rank_queries(distances, [0], identity), distances, [0], identity)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 90), st.integers(1, 5), st.integers(1, 30))
def test_any_small_problem_with_ties_follows_the_definition(seed, Q, G, identities, levels):
    distances, *labels = problem(seed, Q, G, identities, levels=levels)
    assert_same(rank_queries(distances, *labels), distances, *labels)


def test_signed_zeros_and_negative_distances_tie_as_numbers_do(backend):
    distances = torch.tensor([[0.0, -0.0, -1.5, 0.0, -0.0, 1e-45, -1e-45, 3.0]])
    for identity in np.eye(8, dtype=np.int64):
        labels = ([1], identity)
        assert_same(rank_queries(distances, *labels), distances, *labels)
        both = (1 - identity) * (np.arange(8) % 2)
        assert_same(rank_queries(distances, [1], both), distances, [1], both)


def test_a_worked_example_has_its_value(backend):
    # Ranks of the matches: 1, 3 and 6, after the image by the query's own camera (at index 0) has been left out.
    distances = np.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    gallery = [5, 5, 9, 5, 9, 9, 5, 9]
    got = evaluate_ranking(distances, [5], gallery, [2], [2, 0, 2, 1, 2, 2, 0, 1], max_rank=10)
    assert got.mAP == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3, abs=1e-15)
    assert got.mINP == pytest.approx(3 / 6, abs=1e-15)
    np.testing.assert_array_equal(got.cmc, np.ones(10))
    assert (got.num_queries, got.num_valid_queries) == (1, 1)


def test_cmc_is_padded_and_counts_queries_with_a_match_only():
    distances = torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    got = evaluate_ranking(distances, [1, 1, 7], [1, 2, 3], max_rank=5)
    torch.testing.assert_close(got.cmc, torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert (got.num_queries, got.num_valid_queries) == (3, 2)
    assert got.rank1 == 0.5
    assert got.rank5 == 1.0
    with pytest.raises(IndexError, match="max_rank"):
        _ = got.rank10
    assert got.as_dict() == {"mAP": got.mAP, "mINP": got.mINP, "rank1": 0.5, "rank5": 1.0}
    assert evaluate_ranking(distances, [1, 1, 7], [1, 2, 3], max_rank=2).cmc.tolist() == [0.5, 0.5]


def test_junk_is_left_out_and_can_be_kept(backend):
    distances = torch.tensor([[0.1, 0.2, 0.3]])
    assert evaluate_ranking(distances, [4], [-1, 9, 4]).mAP == 0.5
    assert evaluate_ranking(distances, [4], [-1, 9, 4], junk_identity=9).mAP == 0.5
    assert evaluate_ranking(distances, [4], [-1, 9, 4], junk_identity=None).mAP == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="none of the 1 queries"):
        evaluate_ranking(distances, [-1], [-1, 9, 4])


def test_an_unknown_camera_equals_no_camera(backend):
    distances = torch.tensor([[0.1, 0.2]])
    assert evaluate_ranking(distances, [1], [1, 2], [-1], [-1, 0]).mAP == 1.0
    with pytest.raises(ValueError, match="none of the 1 queries"):
        evaluate_ranking(distances, [1], [1, 2], [0], [0, 0])


# As in SIZES: few matches for each query, and many.
@pytest.mark.parametrize(("G", "identities"), [(60, 5), (1031, 40), (2100, 3)])
@pytest.mark.parametrize("codes", [2, 3])
def test_an_image_with_any_code_of_the_query_is_left_out(backend, codes, G, identities):
    Q, rng = 4, np.random.default_rng(codes)
    distances, *identity = problem(14, Q, G, identities, levels=50)[:3]
    of_query, of_gallery = (rng.integers(-1, 4, (n, codes)) for n in (Q, G))
    of_query[0] = -1
    of_gallery[identity[1] == identity[0][1]] = of_query[1] = 2  # nothing is left
    labels = (*identity, of_query, of_gallery)
    got = QueryRanking(*ranking_forward(distances, *map(torch.from_numpy, labels), -1))
    assert_same(got, distances, *labels)
    assert got.num_matches[1] == 0


@pytest.mark.parametrize(
    "cut", [lambda d: d.t().contiguous().t(), lambda d: d[:, ::2], lambda d: d[::2], lambda d: d[:, 3:]]
)
def test_strided_distances_follow_the_definition(backend, cut):
    distances = cut(problem(3, 40, 60, 5, levels=9)[0])
    _, *labels = problem(4, *distances.shape, 5)
    assert_same(rank_queries(distances, *labels), distances, *labels)


def test_the_result_does_not_depend_on_the_number_of_threads():
    distances, *labels = problem(5, 33, 700, 9, levels=50)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(rank_queries(distances, *labels))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in vars(results[0]).items():
            assert torch.equal(value, getattr(other, name))


def test_blocks_and_functions_give_what_the_matrix_gives():
    distances, *labels = problem(6, 50, 80, 6, levels=20)
    whole = rank_queries(distances, *labels)
    asked = []

    def rows(begin, end):
        asked.append((begin, end))
        return distances[begin:end]

    done = []
    for streamed in (
        rank_queries(rows, *labels, block_rows=16, progress=done.append),
        rank_queries(rows, *labels),
        rank_queries((distances[i : i + 7] for i in range(0, 50, 7)), *labels),
        rank_queries([distances[:1], distances[1:]], *labels),
    ):
        for name, value in vars(whole).items():
            assert torch.equal(value, getattr(streamed, name))
    distances[44, 9] = float("nan")
    with pytest.raises(ValueError, match="distances: row 44 holds nan"):
        rank_queries(rows, *labels, block_rows=16)
    del asked[5:]
    assert asked == [(0, 16), (16, 32), (32, 48), (48, 50), (0, 50)]
    assert sum(done) == 50


def test_a_subset_gives_what_its_queries_alone_give():
    distances, *labels = problem(7, 30, 200, 5, levels=40)
    each = rank_queries(distances.numpy(), *labels)
    assert all(isinstance(value, np.ndarray) for value in vars(each).values())
    odd = np.arange(30) % 2 == 1
    part = each.metrics(10, subset=odd)
    alone = evaluate_ranking(
        distances[1::2], *(label[1::2] if len(label) == 30 else label for label in labels), max_rank=10
    )
    assert part.mAP == alone.mAP
    np.testing.assert_array_equal(part.cmc, alone.cmc)
    assert each.metrics(10, subset=np.flatnonzero(odd)).mINP == alone.mINP
    with pytest.raises(ValueError, match="subset: shape"):
        each.metrics(subset=odd[:-1])
    with pytest.raises(ValueError, match="subset: index 900 was given, but there are 30 queries"):
        each.metrics(subset=[0, 900])
    with pytest.raises(TypeError, match="subset: dtype"):
        each.metrics(subset=[0.5])
    with pytest.raises(ValueError, match="none of the 0 queries"):
        each.metrics(subset=[])


class Foreign:
    """An array of another library: it speaks DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self, api_version=None):
        return Foreign

    @staticmethod
    def from_dlpack(array):
        return Foreign(torch.from_dlpack(array))


def test_each_kind_of_array_comes_back_as_it_came():
    distances, *labels = problem(8, 12, 40, 3)
    expected = evaluate_ranking(distances, *labels)
    assert isinstance(expected.cmc, torch.Tensor)
    from_numpy = evaluate_ranking(distances.numpy(), *labels)
    assert isinstance(from_numpy.cmc, np.ndarray)
    from_foreign = evaluate_ranking(Foreign(distances), *(Foreign(torch.from_numpy(label)) for label in labels))
    assert isinstance(from_foreign.cmc, Foreign)
    np.testing.assert_array_equal(from_numpy.cmc, expected.cmc)
    np.testing.assert_array_equal(from_foreign.cmc.tensor, expected.cmc)
    small = [label.astype(np.int16) for label in labels]
    read_only = distances.numpy().copy()
    read_only.flags.writeable = False
    assert evaluate_ranking(read_only, *small).mAP == expected.mAP
    assert evaluate_ranking(distances, *(label.tolist() for label in labels)).mAP == expected.mAP


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("column", "identities"), [(0, 40), (77, 1000), (1029, 40), (1029, 2)])
def test_nan_and_inf_are_refused_by_row(backend, bad, column, identities, dtype):
    distances, *labels = problem(9, 6, 1030, identities, dtype=dtype)
    distances[4, column] = bad
    with pytest.raises(ValueError, match=rf"distances: row 4 .*column {column}"):
        evaluate_ranking(distances, *labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_of_one_of_many_matches_are_refused(backend, bad, dtype):
    distances, *labels = problem(17, 2, 300, 2, dtype=dtype)
    labels[1][7] = labels[0][1] = 1
    distances[1, 7] = bad
    with pytest.raises(ValueError, match=r"distances: row 1 .*column 7"):
        evaluate_ranking(distances, *labels[:2])


def test_the_largest_finite_distances_are_allowed(backend):
    for dtype in DTYPES:
        distances = torch.full((1, 70), torch.finfo(dtype).max, dtype=dtype)
        distances[0, 40] = torch.finfo(dtype).min
        identity = np.arange(70)
        assert evaluate_ranking(distances, [40], identity).mAP == 1.0
        assert evaluate_ranking(distances, [69], identity).mAP == pytest.approx(1 / 70)


D34 = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((D34, [1, 1], [1] * 4), {}, ValueError, "query_identity: length 2"),
        ((D34, [1] * 3, [1] * 5), {}, ValueError, "gallery_identity: length 5"),
        ((D34, [1] * 3, [1] * 4, [0] * 3), {}, ValueError, "gallery_camera: is missing"),
        ((D34, [1] * 3, [1] * 4, None, [0] * 4), {}, ValueError, "query_camera: is missing"),
        ((D34, [1] * 3, [1] * 4, [0] * 2, [0] * 4), {}, ValueError, "query_camera: length 2"),
        ((D34, [1] * 3, [1] * 4, [0] * 3, [0] * 5), {}, ValueError, "gallery_camera: length 5"),
        ((D34[:0], [], [1] * 4), {}, ValueError, "query set is empty"),
        ((D34[:, :0], [1] * 3, []), {}, ValueError, "gallery is empty"),
        ((D34[0], [1] * 3, [1] * 4), {}, ValueError, "distances: shape"),
        ((D34.long(), [1] * 3, [1] * 4), {}, TypeError, "distances: dtype"),
        ((3.0, [1] * 3, [1] * 4), {}, TypeError, "distances: float"),
        ((D34, [1.0] * 3, [1] * 4), {}, TypeError, "query_identity: dtype"),
        ((D34, [1] * 3, torch.ones(4)), {}, TypeError, "gallery_identity: dtype"),
        ((D34, [1] * 3, [[1] * 4]), {}, ValueError, "gallery_identity: shape"),
        ((D34, ["a", "b", "c"], [1] * 4), {}, TypeError, "query_identity"),
        ((D34, [1] * 3, [2] * 4), {}, ValueError, "none of the 3 queries"),
        ((D34, [1] * 3, [1] * 4), {"max_rank": 0}, ValueError, "max_rank"),
        ((D34, [1] * 3, [1] * 4), {"max_rank": 2.5}, ValueError, "max_rank"),
        ((D34, [1] * 3, [1] * 4), {"max_rank": 2**31}, ValueError, "max_rank"),
        ((D34, [1] * 3, [1] * 4), {"max_rank": 2**70}, ValueError, "max_rank"),
        ((D34, [1] * 3, [1] * 4), {"block_rows": 2**70}, ValueError, "block_rows"),
        ((D34, [1] * 3, [1] * 4), {"junk_identity": 2**70}, ValueError, "junk_identity"),
        ((D34.to("meta"), [1] * 3, [1] * 4), {}, ValueError, "distances"),
        ((D34, torch.ones(3, dtype=torch.int64, device="meta"), [1] * 4), {}, ValueError, "query_identity"),
        ((D34, [1] * 3, torch.ones(4, dtype=torch.int64).to_sparse()), {}, TypeError, "gallery_identity"),
        ((torch.nested.nested_tensor([D34]), [1] * 3, [1] * 4), {}, TypeError, "distances"),
        ((D34, [1] * 3, [1] * 4), {"block_rows": 0}, ValueError, "block_rows"),
        ((D34, [1] * 3, [1] * 4), {"block_rows": 1.5}, TypeError, "block_rows: float"),
        ((D34, [1] * 3, [1] * 4), {"junk_identity": -1.0}, TypeError, "junk_identity: float"),
        ((D34, None, [1] * 4), {}, TypeError, "query_identity: None"),
        ((D34, [1, [2], 3], [1] * 4), {}, ValueError, "query_identity: lists of different lengths"),
        ((D34, [1] * 3, np.full(4, 2**64 - 1, dtype=np.uint64)), {}, ValueError, "gallery_identity: holds numbers of"),
        ((D34.to_sparse(), [1] * 3, [1] * 4), {}, TypeError, "distances: a tensor of layout torch.sparse_coo"),
        ((lambda b, e: D34[b:e].tolist(), [1] * 3, [1] * 4), {}, TypeError, "distances: the function's result: list"),
        ((lambda b, e: D34[0], [1] * 3, [1] * 4), {}, ValueError, r"distances: shape \(4,\)"),
        ((lambda b, e: D34[: e - b - 1], [1] * 3, [1] * 4), {}, ValueError, "the function gave 2 rows"),
        (([D34, D34], [1] * 3, [1] * 4), {}, ValueError, "distances has 6 rows"),
        (([D34], [1] * 4, [1] * 4), {}, ValueError, "distances has 3 rows"),
        (([], [1] * 4, [1] * 4), {}, ValueError, "distances has 0 rows"),
    ],
)
def test_bad_arguments_are_named(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        evaluate_ranking(*arguments, **keywords)


def test_a_block_without_rows_changes_nothing(backend):
    distances, *labels = problem(8, 12, 40, 3)
    expected = evaluate_ranking(distances, *labels)
    wide = torch.zeros(3, 80)
    got = evaluate_ranking([wide[:0, ::2], distances, wide[:0, ::2]], *labels)
    assert (got.mAP, got.mINP) == (expected.mAP, expected.mINP)


def test_the_operator_passes_opcheck_and_compiles():
    distances, *labels = problem(10, 5, 40, 3)
    tensors = [torch.from_numpy(label) for label in labels]
    tensors[2:] = [torch.stack([camera, camera // 2], 1) for camera in tensors[2:]]
    torch.library.opcheck(ranking_forward, (distances, *tensors, -1))
    torch.library.opcheck(ranking_forward, (distances, *tensors[:2], None, None, None))

    @torch.compile(fullgraph=True, backend="eager")
    def mean_ap(d):
        return ranking_forward(d, *tensors, -1)[0].mean()

    assert mean_ap(distances) == ranking_forward(distances, *tensors, -1)[0].mean()


def test_native_and_reference_agree():
    distances, *labels = problem(11, 60, 500, 12, levels=200)
    native = rank_queries(distances, *labels)
    with reference_backend():
        plain = rank_queries(distances, *labels)
    torch.testing.assert_close(native.average_precision, plain.average_precision, rtol=0, atol=1e-14)
    torch.testing.assert_close(native.inverse_negative_penalty, plain.inverse_negative_penalty, rtol=0, atol=1e-15)
    assert torch.equal(native.first_match_rank, plain.first_match_rank)
    assert torch.equal(native.num_matches, plain.num_matches)


def test_threads_that_begin_late_do_not_change_results():
    """More threads than cores, from two Python threads at once, so that some wait."""
    labels = problem(7, 256, 40_000, 50)  # enough for two threads
    expected, before = rank_queries(*labels), torch.get_num_threads()

    def measure(_):
        torch.set_num_threads(16)  # of this Python thread
        return [rank_queries(*labels) for _ in range(10)]

    try:
        with ThreadPoolExecutor(2) as pool:
            for got in itertools.chain(*pool.map(measure, range(2))):
                for one, other in zip(vars(got).values(), vars(expected).values(), strict=True):
                    assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
