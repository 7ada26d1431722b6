"""The public retrieval functions: kinds of arrays, outputs, memory plans, progress, and what they refuse."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.factories import feature_array
from tests.large.memory import peak_memory
from tests.reranking_truth import squared_distances
from vareid_ext import (
    KReciprocal,
    _native,
    k_reciprocal_rerank,
    nearest_neighbors,
    pairwise_distance,
    re_ranking,
    reference_backend,
)
from vareid_ext.ops import _progress
from vareid_ext.ops import k_reciprocal as stages
from vareid_ext.ops._filter import Filter, row_blocks
from vareid_ext.retrieval import Reranker, rerank_plan

ROOT = Path(__file__).resolve().parent.parent


class OwnArray:
    """An array library of its own that speaks DLPack, as CuPy does."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return type(self)

    @classmethod
    def from_dlpack(cls, tensor):
        return cls(np.from_dlpack(tensor))


class Plain(Reranker):
    """The least that a re-ranker is."""

    def distances(self, begin, end):
        return (self.query[begin:end, None] - self.gallery).square().sum(2)


def matrices(Q=8, G=20):
    x = feature_array(Q + G).astype(np.float64)
    d = np.sqrt(((x[:, None] - x) ** 2).sum(-1))
    return d[:Q, Q:].copy(), d[:Q, :Q].copy(), d[Q:, Q:].copy()


def calls():
    q, g = feature_array(8), feature_array(20, seed=1)
    return [
        (pairwise_distance, (q, g), {}),
        (nearest_neighbors, (q, g), {"k": 3}),
        (k_reciprocal_rerank, (q, g), {"k1": 5, "k2": 3}),
        (k_reciprocal_rerank, (q, g), {"k1": 5, "k2": 3, "topk": 2}),
        (re_ranking, matrices(), {"k1": 5, "k2": 3}),
    ]


@pytest.mark.parametrize(("function", "arrays", "keywords"), calls())
def test_what_goes_in_comes_out(function, arrays, keywords):
    expected = function(*arrays, **keywords)
    kinds = {torch.Tensor: torch.from_numpy, OwnArray: OwnArray, np.ndarray: np.asarray}
    for kind, make in kinds.items():
        got = function(*map(make, arrays), **keywords)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for value, truth in pairs:
            assert type(value) is kind
            np.testing.assert_array_equal(value.array if kind is OwnArray else np.asarray(value), truth)


def test_read_only_and_reversed_arrays_are_taken():
    q, g = feature_array(8), feature_array(20, seed=1)
    expected = pairwise_distance(q, g)
    frozen = g.copy()
    frozen.flags.writeable = False
    assert np.array_equal(pairwise_distance(q, frozen), expected)
    assert np.array_equal(pairwise_distance(q[::-1], g), expected[::-1])
    assert np.array_equal(pairwise_distance(q.astype(">f4"), g), expected)


class Failing:
    def __dlpack__(self, **keywords):
        raise BufferError("not on this device")

    def __dlpack_device__(self):
        return 1, 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(4).to_sparse(), "x: a tensor of layout torch.sparse_coo was given"),
        (np.ma.masked_array(feature_array(4), feature_array(4) > 0), "x: a masked array was given"),
        (Failing(), "x: Failing was given, but its __dlpack__ fails: not on this device"),
        (feature_array(4).astype(np.longdouble), "x: dtype float128 was given"),
    ],
)
@pytest.mark.parametrize("function", [lambda x: nearest_neighbors(x, k=1), pairwise_distance])
def test_arrays_that_cannot_be_taken_are_named(function, value, message):
    with pytest.raises(TypeError, match=message):
        function(value)


def test_arrays_at_odd_addresses_are_taken():
    """Fields of packed records, and views into bytes: strides and addresses that are no multiple of an element."""
    q = feature_array(8)
    records = np.zeros(8, dtype=[("tag", "i1"), ("feature", np.float32, 6)])
    records["feature"] = q
    shifted = np.frombuffer(b"x" + q.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(8, 6)
    expected = pairwise_distance(q)
    assert np.array_equal(pairwise_distance(records["feature"]), expected)
    assert np.array_equal(pairwise_distance(shifted), expected)


def test_whole_numbers_of_numpy_are_whole_numbers():
    q, g = feature_array(8), feature_array(20, seed=1)
    assert np.array_equal(nearest_neighbors(q, g, k=np.int64(3))[1], nearest_neighbors(q, g, k=3)[1])
    numbers = {"k1": 5, "k2": 3, "lambda_value": 0.5, "block_rows": 200}
    small = {"k1": np.int64(5), "k2": np.int32(3), "lambda_value": np.float32(0.5), "block_rows": np.uint8(200)}
    assert np.array_equal(k_reciprocal_rerank(q, g, **small), k_reciprocal_rerank(q, g, **numbers))


def test_out_receives_the_result(tmp_path):
    q, g = feature_array(8), feature_array(20, seed=1)
    expected = k_reciprocal_rerank(q, g)
    mapped = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.float32, shape=(8, 20))
    assert k_reciprocal_rerank(q, g, out=mapped) is mapped
    mapped.flush()
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    wide = torch.full((8, 30), -1.0)
    k_reciprocal_rerank(q, g, out=wide[:, 5:25])
    assert np.array_equal(wide[:, 5:25].numpy(), expected)
    assert bool((wide[:, :5] == -1).all())
    assert bool((wide[:, 25:] == -1).all())


def test_topk_are_the_first_of_the_whole_row():
    q, g = feature_array(8), feature_array(20, seed=1)
    g[10:] = g[:10]
    whole = k_reciprocal_rerank(q, g, k1=5, k2=3)
    distance, index = k_reciprocal_rerank(q, g, k1=5, k2=3, topk=20)
    np.testing.assert_allclose(np.take_along_axis(whole, index, 1), distance, rtol=0, atol=1e-6)
    assert np.array_equal(np.sort(index, 1), np.tile(np.arange(20), (8, 1)))
    assert index.dtype == np.int64


def test_the_plan_takes_smaller_blocks_where_memory_is_short():
    plan = rerank_plan(3368, 15913, 2048)
    assert plan.peak < 100 * 2**20
    assert rerank_plan(11659, 82161, 2048, topk=100).peak < 200 * 2**20
    wide = rerank_plan(3368, 15913, 8192)
    smaller = rerank_plan(3368, 15913, 8192, max_memory=wide.peak - 1)
    assert smaller.block_rows < wide.block_rows
    assert smaller.peak < wide.peak
    with pytest.raises(ValueError, match=r"max_memory: 1000000 bytes were given, but the least needed is \d+"):
        rerank_plan(3368, 15913, 2048, max_memory=1_000_000)


@pytest.mark.parametrize("name", ["processes", "element_size"])
@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [(0, ValueError, "0 was"), (-1, ValueError, "-1 was"), (1.5, TypeError, "float was"), ("2", TypeError, "str was")],
)
def test_a_plan_counts_processes_and_bytes(name, value, kind, message):
    with pytest.raises(kind, match=f"{name}: {message}"):
        rerank_plan(100, 900, 64, **{name: value})


def test_a_plan_for_a_gpu_counts_products_side_by_side_and_rows_of_bfloat16():
    plan = rerank_plan(3368, 15913, 2048, block_rows=4096, on_gpu=True)
    assert plan.block > 4 * 4096 * 4 * 4096 + (4 + 2) * 5 * 4096 * 2048
    assert plan.candidates > 19281 * 8 * (64 + 32)


def test_a_plan_says_what_is_sent_where_there_are_others():
    plan = rerank_plan(1000, 9000, 64, processes=2)
    assert f"peak {plan.peak / 2**20:.1f} MiB; sends at most {plan.sent / 2**20:.1f} MiB" in str(plan)
    assert "sends" not in str(rerank_plan(1000, 9000, 64))


def test_the_list_of_single_row_blocks_is_planned():
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    filtered = Filter([torch.ones(1000, 4), torch.ones(2000, 4)], ["query", "gallery"], "sqeuclidean")
    tracemalloc.start()
    blocks = row_blocks(filtered, [0, 1], 1)
    rest = blocks[1:]  # held while the first row's blocks go by
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rest) == 2999
    single, larger = (rerank_plan(1000, 2000, 4, block_rows=rows).block for rows in (1, 64))
    assert peak <= single - larger + 256 * 47  # beside the list for blocks of 64


def test_encodings_beyond_the_plan_are_refused():
    """What they need is known only when the sets are: it depends on the features."""
    neighbor = torch.arange(12, dtype=torch.int32).repeat(12, 1)  # all rows are neighbours of each other
    indptr, index = stages.k_reciprocal_robust_sets(neighbor, 11)
    assert index.numel() == 144
    value = torch.full((144,), 1 / 12)
    for most in (143, -5):
        message = f"max_memory: .* have 144 entries, but what was given suffices for {max(most, 0)}"
        with pytest.raises(ValueError, match=message):
            stages.k_reciprocal_robust_sets(neighbor, 11, most)
        with pytest.raises(ValueError, match=message):
            stages.k_reciprocal_query_expansion(neighbor, 3, indptr, index, value, most)
    assert torch.equal(stages.k_reciprocal_query_expansion(neighbor, 3, indptr, index, value, 144)[1], index)
    plan = rerank_plan(100, 900, 64)
    exactly = plan.copies + plan.lists + plan.sparse
    assert plan.entry_limit(exactly) == plan.entries
    assert plan.entry_limit(exactly - 160) == plan.entries - 10


@pytest.mark.parametrize(
    ("D", "kind", "dtype"), [(256, "random", "float32"), (256, "twins", "float32"), (1024, "twins", "float64")]
)
def test_the_plan_is_kept(D, kind, dtype):
    """Also by rows that are done again, of which twins make thousands."""
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    limit, used = peak_memory(
        f"""
import torch
from vareid_ext import k_reciprocal_rerank
from vareid_ext.retrieval import rerank_plan

Q, G, D = 300, 5700, {D}
small = torch.randn(60, D, dtype=torch.{dtype})
k_reciprocal_rerank(small[:20], small[20:])
torch.randn(600, D) @ torch.randn(D, 600)
x = torch.randn(Q + G, D)
if {kind!r} == "twins":
    x = x[torch.randint(0, 30, (Q + G,))]
x = x.to(torch.{dtype})
query, gallery, out = x[:Q].clone(), x[Q:].clone(), torch.ones(Q, G)
limit = rerank_plan(Q, G, D).peak
print(limit)
""",
        "k_reciprocal_rerank(query, gallery, out=out, max_memory=limit)",
    )
    assert used <= limit + (4 << 20)  # the buffers of the vendor's product differ between processors


def test_memory_limit_is_kept_before_any_work(capsys):
    q, g = feature_array(8), feature_array(20, seed=1)
    with pytest.raises(ValueError, match="max_memory"):
        k_reciprocal_rerank(q, g, max_memory=10, out=np.zeros((8, 20), np.float32))
    k_reciprocal_rerank(q, g, max_memory=10**9, show_plan=True)
    shown = capsys.readouterr().err
    assert "re-ranking in blocks of" in shown
    if _native.available("cpu"):
        assert (
            "neighbours: 28 rows filtered by products of float32, 0 with candidates measured early, 0 done again\n"
            in shown
        )


@pytest.mark.parametrize("block_rows", [None, 1, 5, 64])
def test_progress_ends_at_the_number_of_pairs(block_rows):
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    done = []
    with _progress.listen(done.append):
        k_reciprocal_rerank(feature_array(30), feature_array(150, seed=1), block_rows=block_rows)
    assert sum(done) == 180 * 181 // 2


def test_progress_is_shown_where_it_is_asked_for(capsys):
    q, g = feature_array(8), feature_array(20, seed=1)
    k_reciprocal_rerank(q, g, progress=True)
    assert "re-ranking" in capsys.readouterr().err
    k_reciprocal_rerank(q, g)
    assert capsys.readouterr() == ("", "")


def test_questions_that_do_not_fit_a_reranker_are_refused():
    q, g = feature_array(8), feature_array(20, seed=1)
    for fit in (KReciprocal(q, g), Plain(q, g)):
        for begin, end, message in (
            (0, 9, "end: 9"),
            (3, 2, "begin: 3 .* allowed are 0 to 2"),
            (-1, 2, "begin"),
        ):
            with pytest.raises(ValueError, match=message):
                fit.rows(begin, end)
        for k in (0, 21):
            with pytest.raises(ValueError, match=f"k: {k} was given; allowed are 1 to 20"):
                fit.topk(k)
        with pytest.raises(ValueError, match=r"out: shape \[8, 19\]"):
            fit.matrix(np.zeros((8, 19), np.float32))
    with pytest.raises(ValueError, match="query: no rows"):
        Plain(q[:0], g)
    q[3, 2] = np.inf
    with pytest.raises(ValueError, match="query: row 3 holds NaN or Inf"):
        Plain(q, g)


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray, OwnArray])
def test_every_reranker_answers_all_questions(kind):
    q, g = feature_array(8), feature_array(20, seed=1)
    g[10:] = g[:10]
    distance = Plain(q, g).rows(0, 8)
    np.testing.assert_allclose(distance, squared_distances(q, g), rtol=1e-6)
    order = np.argsort(distance, axis=1, kind="stable")
    fit = Plain(kind(q), kind(g))
    out = np.zeros((8, 20), np.float32)
    assert fit.matrix(out) is out
    best = fit.topk(7)
    expected = distance, distance[2:5], np.take_along_axis(distance, order, 1)[:, :7], order[:, :7], distance
    for got, want in zip((out, fit.rows(2, 5), *best, fit.matrix()), expected, strict=True):
        assert got is out or type(got) is type(kind(q))
        np.testing.assert_array_equal(getattr(got, "array", got), want)


def test_questions_in_any_order_have_one_answer():
    q, g = feature_array(8), feature_array(20, seed=1)
    matrix, best = k_reciprocal_rerank(q, g, k1=5), k_reciprocal_rerank(q, g, k1=5, topk=4)
    fit = KReciprocal(q, g, k1=5)
    for _ in range(2):
        np.testing.assert_array_equal(fit.topk(4), best)
        np.testing.assert_allclose(fit.rows(0, 8), matrix, rtol=0, atol=1e-6)
        np.testing.assert_allclose(fit.matrix(), matrix, rtol=0, atol=1e-6)
        fit.prepare()
    with reference_backend():
        np.testing.assert_allclose(fit.rows(0, 8), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"k1": 0}, ValueError, "k1: 0"),
        ({"k2": 0}, ValueError, "k2: 0"),
        ({"k1": 2**70}, ValueError, "k1"),
        ({"k2": 2**31}, ValueError, "k2"),
        ({"topk": 2**70}, ValueError, "topk"),
        ({"block_rows": 2**70}, ValueError, "block_rows"),
        ({"max_memory": 2**70}, ValueError, "max_memory"),
        ({"out": torch.zeros(8, 20, device="meta")}, ValueError, "out"),
        ({"k1": 2.5}, TypeError, "k1: float was given"),
        ({"lambda_value": -0.1}, ValueError, "lambda_value: -0.1 was given"),
        ({"lambda_value": 1.1}, ValueError, "lambda_value: 1.1 was given"),
        ({"lambda_value": math.nan}, ValueError, "lambda_value: nan was given"),
        ({"topk": 21}, ValueError, "topk: 21 was given; allowed are 1 to 20"),
        ({"block_rows": 0}, ValueError, "block_rows: 0"),
        ({"out": np.zeros((8, 19), np.float32)}, ValueError, r"out: shape \[8, 19\]"),
        ({"out": np.zeros((8, 20))}, TypeError, "out: dtype float64"),
        ({"out": np.zeros((20, 8), np.float32).T}, ValueError, "out: rows must be contiguous"),
        ({"out": np.zeros((8, 20), np.float32), "topk": 1}, ValueError, "out: was given together with topk"),
        ({"out": torch.zeros(1, 20).expand(8, 20)}, ValueError, "out: rows that overlap"),
        ({"out": torch.zeros(100).as_strided((8, 20), (7, 1))}, ValueError, "out: rows that overlap"),
        ({"max_memory": "1G"}, TypeError, "max_memory: str was given"),
        ({"lambda_value": "much"}, TypeError, "lambda_value: str was given"),
        ({"lambda_value": np.array([0.1, 0.2])}, TypeError, "lambda_value: ndarray was given"),
    ],
)
def test_parameters_that_do_not_fit_are_named(keywords, error, message):
    with pytest.raises(error, match=message):
        k_reciprocal_rerank(feature_array(8), feature_array(20, seed=1), **keywords)


def test_features_that_do_not_fit_are_named():
    q, g = feature_array(8), feature_array(20, seed=1)
    with pytest.raises(ValueError, match="query: no rows"):
        k_reciprocal_rerank(q[:0], g)
    with pytest.raises(ValueError, match="gallery: no rows"):
        k_reciprocal_rerank(q, g[:0])
    many = torch.zeros(1, 6).expand((1 << 31) - 1, 6)
    with pytest.raises(ValueError, match="query, gallery: 1 and 2147483647 rows were given; together less than"):
        k_reciprocal_rerank(many[:1], many)
    with pytest.raises(ValueError, match="gallery: features of 5 elements were given, but query's have 6"):
        k_reciprocal_rerank(q, g[:, :5])
    with pytest.raises(TypeError, match="gallery: dtype float64"):
        k_reciprocal_rerank(q, g.astype(np.float64))
    with pytest.raises(TypeError, match="query: list was given"):
        k_reciprocal_rerank([[1.0]], g)
    g[17, 2] = np.nan
    target = np.zeros((8, 20), np.float32)
    with pytest.raises(ValueError, match="gallery: row 17 holds NaN or Inf"):
        k_reciprocal_rerank(q, g, out=target)
    assert not target.any()


def test_read_only_out_is_refused():
    target = np.zeros((8, 20), np.float32)
    target.flags.writeable = False
    with pytest.raises(ValueError, match="out: a read-only array"):
        k_reciprocal_rerank(feature_array(8), feature_array(20, seed=1), out=target)


@pytest.mark.parametrize("name", ["query", "gallery"])
def test_out_over_the_features_is_refused(name):
    memory = torch.from_numpy(feature_array(60, D=20))
    arguments = {"query": memory[:8], "gallery": memory[20:40]}
    before = memory.clone()
    target = memory[4:12] if name == "query" else memory[36:44]
    with pytest.raises(ValueError, match=f"out: lies in the memory between {name}'s first"):
        k_reciprocal_rerank(*arguments.values(), out=target)
    assert torch.equal(memory, before)
    k_reciprocal_rerank(*arguments.values(), out=memory[8:16])  # between the two


def test_matrices_that_do_not_fit_are_named():
    q_g, q_q, g_g = matrices()
    with pytest.raises(TypeError, match="q_q_dist: dtype float32 was given; float64 is needed"):
        re_ranking(q_g, q_q.astype(np.float32), g_g)
    with pytest.raises(ValueError, match=r"q_q_dist: shape \[7, 7\] was given; \[8, 8\]"):
        re_ranking(q_g, q_q[:7, :7], g_g)
    with pytest.raises(ValueError, match="q_g_dist: shape"):
        re_ranking(q_g[:0], q_q[:0, :0], g_g)
    with pytest.raises(ValueError, match="lambda_value"):
        re_ranking(q_g, q_q, g_g, lambda_value=2)
    with pytest.raises(ValueError, match="k1"):
        re_ranking(q_g, q_q, g_g, k1=2**70)
    with pytest.raises(ValueError, match="q_g_dist: is on"):
        re_ranking(*(torch.from_numpy(m).to("meta") for m in (q_g, q_q, g_g)))
    with pytest.raises(TypeError, match="g_g_dist: dtype"):
        re_ranking(q_g, q_q, g_g.astype(np.int64))
    for at, name in enumerate(("q_g_dist", "q_q_dist", "g_g_dist")):
        for value, message in ((np.nan, f"{name}: row 3 holds NaN or Inf"), (-0.5, f"{name}: row 3 holds a negative")):
            broken = [m.copy() for m in (q_g, q_q, g_g)]
            broken[at][3, 5] = value
            if at:
                broken[at][5, 3] = value
            with pytest.raises(ValueError, match=message):
                re_ranking(*broken)


def test_asymmetry_is_refused_beyond_a_thousandth():
    q_g, q_q, g_g = matrices()
    largest = max(m.max() for m in (q_g, q_q, g_g))
    for at, name in ((1, "q_q_dist"), (2, "g_g_dist")):
        broken = [m.copy() for m in (q_g, q_q, g_g)]
        broken[at][2, 5] += 2e-3 * largest
        with pytest.raises(ValueError, match=f"{name}: is not symmetric"):
            re_ranking(*broken)
        broken[at][2, 5] -= 1.5e-3 * largest
        assert np.isfinite(re_ranking(*broken)).all()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


SIMILARITIES = {
    "cosine": lambda x: unit(x) @ unit(x).T,
    "100 x cosine": lambda x: 100 * (unit(x) @ unit(x).T),
    "cosine of non-negative features": lambda x: unit(abs(x)) @ unit(abs(x)).T,
    "dot products": lambda x: x @ x.T,
    "non-negative dot products": lambda x: abs(x) @ abs(x).T,
    "dot products of very different lengths": lambda x: (x * x[:, :1] ** 4) @ (x * x[:, :1] ** 4).T,
    "8 normalised parts": lambda x: np.einsum("ipd,jpd->ij", *[unit(x.reshape(len(x), 8, -1))] * 2),
    "a Gaussian kernel": lambda x: np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 24),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("Q", [1, 8, 27])
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_similarities_are_refused(kind, Q, dtype):
    s = SIMILARITIES[kind](feature_array(28, D=24)).astype(dtype)
    with pytest.raises(ValueError, match="q_q_dist"):
        re_ranking(s[:Q, Q:], s[:Q, :Q], s[Q:, Q:])


@pytest.mark.parametrize("Q", [1, 8, 27])
def test_distances_are_not_taken_for_similarities(Q):
    """Also where all queries are one image, where rounding left diagonals, and where all images are equal."""
    x = feature_array(28, D=24)
    x[:Q] = x[0]
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    for matrix in (d, d**2, d + 3e-2 * np.eye(28, dtype=d.dtype) * d.max(), np.zeros_like(d)):
        assert np.isfinite(re_ranking(matrix[:Q, Q:], matrix[:Q, :Q], matrix[Q:, Q:])).all()


def test_small_diagonals_of_real_products_are_fine():
    q_g, q_q, g_g = matrices()
    np.fill_diagonal(q_q, 1e-3)
    np.fill_diagonal(g_g, 2e-3)
    assert np.isfinite(re_ranking(q_g, q_q, g_g)).all()


def test_fake_tensors_outside_their_mode_are_refused():
    with FakeTensorMode():
        fake = torch.rand(20, 6)
    real = torch.rand(20, 6)
    with pytest.raises(ValueError, match="query: FakeTensor without memory was given"):
        k_reciprocal_rerank(fake, real, k1=5, k2=2)
    with pytest.raises(ValueError, match="gallery: FakeTensor without memory was given"):
        k_reciprocal_rerank(real, fake, k1=5, k2=2)
    q_g, q_q, g_g = map(torch.from_numpy, matrices(6, 6))
    with pytest.raises(ValueError, match="g_g_dist: FakeTensor without memory was given"):
        re_ranking(q_g, q_q, FakeTensorMode().from_tensor(g_g))
