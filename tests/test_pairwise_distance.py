"""All pairs' distances against float64 sums, their gradients, and full float32 products."""

from __future__ import annotations

import pytest
import torch

from tests.factories import features
from tests.reranking_truth import squared_distances
from vareid_ext import _native, pairwise_distance
from vareid_ext.ops import _matmul
from vareid_ext.ops import pairwise_distance as op
from vareid_ext.ops._filter import Filter

METRICS = ["euclidean", "sqeuclidean", "cosine"]
SIZES = [(1, 1, 1), (3, 5, 2), (17, 9, 33), (40, 70, 64), (33, 1, 7), (0, 4, 3), (4, 0, 3)]


def truth(x, y, metric):
    x, y = x.double(), y.double()
    if metric == "cosine":
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        return 1 - x @ y.T
    squared = (x[:, None] - y[None]).square().sum(-1)
    return squared.sqrt() if metric == "euclidean" else squared


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "N", "D"), SIZES)
def test_distances_are_those_of_float64(backend, metric, M, N, D):
    x, y = features(M, D), features(N, D, 1)
    got = pairwise_distance(x, y, metric=metric)
    assert got.shape == (M, N)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth(x, y, metric), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("offset", [0, -3, 100_000])
def test_distances_of_small_whole_numbers_are_exact(backend, offset):
    x = torch.randint(0, 256, (90, 34), generator=torch.Generator().manual_seed(1)).float() + offset
    assert torch.equal(
        pairwise_distance(x[:20], x[20:], metric="sqeuclidean").double(), truth(x[:20], x[20:], "sqeuclidean")
    )


@pytest.mark.parametrize("metric", METRICS)
def test_a_set_against_itself_has_a_zero_diagonal(backend, metric):
    x = features(37, 20)
    x[5] = x[30]
    got = pairwise_distance(x, metric=metric)
    assert torch.equal(got, got.T)
    assert bool((got.diagonal() == 0).all())
    assert got[5, 30] == 0
    torch.testing.assert_close(got.double(), truth(x, x, metric), rtol=2e-5, atol=2e-6)


def test_a_set_against_itself_is_symmetric_whatever_the_product_is(monkeypatch):
    """Which kernels the vendor's library runs, and how they round at a block's edges, depends on the processor."""
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    product = torch.mm

    def uneven(a, b, *, out):
        product(a, b, out=out)
        return out.add_(out.tril(-1), alpha=2.0**-22)

    x = features(70, 20)
    monkeypatch.setattr(torch, "mm", uneven)
    monkeypatch.setattr(op, "block_side", lambda device: 32)
    for metric in METRICS:
        got = pairwise_distance(x, metric=metric)
        assert torch.equal(got, got.T)
        torch.testing.assert_close(got.double(), truth(x, x, metric), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_has_its_distances(backend, dtype):
    x, y = features(9, 24, dtype=dtype), features(11, 24, 1, dtype)
    got = pairwise_distance(x, y)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), truth(x, y, "euclidean"), rtol=2e-5, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "N", "D"), [(1, 1, 1), (3, 70, 5), (65, 66, 33)])
def test_small_blocks_by_the_own_kernel_are_right(backend, metric, M, N, D):
    """On a GPU, and where its kernels are executed, small blocks are one kernel's work; elsewhere it does not exist."""
    x, y = features(M, D), features(N, D, 1)
    y[0] = x[0]
    native = _native.module() if backend != "reference" else None
    if not hasattr(native, "pairwise_distance_tiled"):
        assert backend != "cuda_on_cpu"
        return
    if not (x.is_cuda or backend == "cuda_on_cpu"):
        return
    filtered = Filter([x, y], ["x", "y"], metric)
    out = torch.empty(M, N)
    _native.launch(
        "pairwise_distance_tiled", filtered.block(0, 0, M, 0), filtered.block(1, 0, N, 1), out, x, filtered.factors[0],
        y, filtered.factors[1], *filtered.norms, METRICS.index(metric), filtered.unscale, on=x,
    )  # fmt: skip
    assert out[0, 0] == 0
    torch.testing.assert_close(out.double(), truth(x, y, metric), rtol=2e-5, atol=2e-6)


@pytest.fixture
def own_products(monkeypatch):
    if not _native.available("cpu") or not _native.module().pairwise_distance_strip_bytes(1):
        pytest.skip("needs the compiled module and AVX-512")
    monkeypatch.setattr(op, "_STRIP_ROWS", 1)
    monkeypatch.setattr(torch, "mm", lambda *_arguments, **_named: pytest.fail("the vendor's product was taken"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("M", "N", "D"), [*SIZES, (65, 66, 33), (9, 130, 257), (130, 31, 600), (1030, 1100, 2)])
def test_own_products_are_those_of_float64(own_products, metric, dtype, M, N, D):
    x, y = features(M, D, dtype=dtype), features(N, D, 1, dtype)
    if M and N:
        y[-1] = x[-1]
    got = pairwise_distance(x, y, metric=metric)
    torch.testing.assert_close(got.double(), truth(x, y, metric), rtol=2e-5, atol=2e-6)
    if M and N:
        assert got[-1, -1] == 0


def test_own_products_depend_on_neither_layout_nor_threads(own_products):
    x, y = features(300, 70), features(3000, 70, 1)
    want = pairwise_distance(x, y)
    wide, threads = torch.full((3000, 90), torch.nan), torch.get_num_threads()
    wide[:, :70] = y
    assert torch.equal(pairwise_distance(x, wide[:, :70]), want)
    assert torch.equal(pairwise_distance(x[:1].expand(150, 70), y), want[:1].expand(150, 3000))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(pairwise_distance(x, y), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_small_distances_of_long_rows_are_right(backend, metric):
    """Near-duplicates far from the origin: the digits that a product loses come back, nothing is negative or NaN."""
    x = 1000 + features(20, 16)
    y = x + 1e-2 * features(20, 16, 1)
    got = pairwise_distance(x, y, metric=metric)
    assert bool((got >= 0).all())
    torch.testing.assert_close(got.double(), truth(x, y, metric), rtol=1e-4, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("small", [1e-16, 1e-30])
def test_rows_of_very_different_length_are_right(backend, metric, small):
    """Distances between short rows beside long ones: their products vanish in float32, they do not."""
    x = features(90, 7)
    x[5:75] *= small
    x[80:] *= 1e6
    x[20] = x[60]
    for y in (x, None):
        got = pairwise_distance(x, y, metric=metric)
        expected = truth(x, x, metric).float()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-44)
        assert got[20, 60] == 0


@pytest.mark.parametrize(("constant", "unit"), [(1.0, 1e-25), (-1e30, 1e-4), (0.1, 2.0**-148)])
def test_a_large_constant_element_does_not_matter(backend, constant, unit):
    x = torch.cat([features(50, 6) * unit, torch.full((50, 1), constant)], dim=1)
    torch.testing.assert_close(pairwise_distance(x), truth(x, x, "euclidean").float(), rtol=1e-4, atol=2e-45)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_values_far_from_one_are_right(backend, factor):
    x, y = features(6, 8) * factor, features(7, 8, 1) * factor
    torch.testing.assert_close(
        pairwise_distance(x, y).double() / factor, truth(x / factor, y / factor, "euclidean"), rtol=3e-5, atol=0
    )


def test_rows_that_are_not_contiguous_are_right(backend):
    x, y = features(12, 18), features(18, 10).T
    expected = truth(x[:, ::3], y[:, ::3], "euclidean")
    torch.testing.assert_close(pairwise_distance(x[:, ::3], y[:, ::3]).double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        pairwise_distance(x[::2], y).double(), truth(x[::2], y, "euclidean"), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_pass_gradcheck(metric):
    x, y = (features(n, 4, n, torch.float64).requires_grad_() for n in (5, 6))
    torch.autograd.gradcheck(lambda a, b: pairwise_distance(a, b, metric=metric), (x, y))
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    torch.autograd.gradcheck(lambda a: pairwise_distance(a, metric=metric)[off_diagonal], (x,))


@pytest.mark.parametrize("metric", METRICS)
def test_float32_gradients_are_the_closed_form(metric):
    x, y = features(8, 32).requires_grad_(), features(9, 32, 1).requires_grad_()
    upstream = features(8, 9, 2)
    got = torch.autograd.grad(pairwise_distance(x, y, metric=metric), (x, y), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = torch.autograd.grad(truth(*wide, metric), wide, upstream.double())
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-5)


def test_equal_rows_have_no_gradient():
    x = torch.ones(3, 4, requires_grad=True)
    pairwise_distance(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 4))


def test_double_backward_is_refused():
    x = features(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(pairwise_distance(x, metric="sqeuclidean").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_full_float32_whatever_the_precision_says(precision):
    x, y = features(64, 512), features(64, 512, 1)
    expected = pairwise_distance(x, y)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(pairwise_distance(x, y), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_are_full_float32_under_autocast():
    x, y = features(64, 512), features(64, 512, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_distance(x, y), pairwise_distance(x, y))
        got = pairwise_distance(x, y)
    torch.testing.assert_close(got.double(), truth(x, y, "euclidean"), rtol=1e-5, atol=0)


def test_the_precision_comes_back_after_an_error():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ZeroDivisionError), _matmul.full_float32("cpu"):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
        assert _matmul._settings()[-1].fp32_precision in ("bf16", "medium")  # "medium" before PyTorch 2.9
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("y_given", [True, False])
def test_the_operators_pass_opcheck(y_given):
    x = features(5, 8).requires_grad_()
    y = features(6, 8, 1).requires_grad_() if y_given else None
    torch.library.opcheck(op._forward, (x, y, "euclidean"))


def test_the_function_compiles_whole():
    def loss(x, y):
        return pairwise_distance(x, y).mean()

    x, y = features(5, 8).requires_grad_(), features(6, 8, 1)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(got, loss(x, y))


def test_bad_input_is_named(backend):
    x = features(4, 3)
    poisoned = x.clone()
    poisoned[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"x: row 2 holds NaN or Inf"):
        pairwise_distance(poisoned, x)
    poisoned[2, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"y: row 2 holds NaN or Inf"):
        pairwise_distance(x, poisoned.to(torch.float32))
    zero = x.clone()
    zero[3] = 0
    with pytest.raises(ValueError, match=r"y: row 3 is all zeros"):
        pairwise_distance(x, zero, metric="cosine")
    assert torch.isfinite(pairwise_distance(x, zero)).all()


def test_arguments_that_do_not_fit_are_named():
    x = features(4, 3)
    with pytest.raises(ValueError, match=r"y: features of 5 elements were given, but x's have 3"):
        pairwise_distance(x, features(4, 5))
    with pytest.raises(ValueError, match=r"metric: 'manhattan' was given"):
        pairwise_distance(x, metric="manhattan")
    with pytest.raises(TypeError, match=r"y: dtype float64"):
        pairwise_distance(x, x.double())
    with pytest.raises(TypeError, match=r"x: dtype int64"):
        pairwise_distance(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: shape \[3\]"):
        pairwise_distance(torch.ones(3))
    with pytest.raises(ValueError, match=r"x: features of 20000 elements"):
        pairwise_distance(torch.ones(2, 20000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (50.0, 1.0), (0.0, 2.0**-40)])
def test_rows_of_a_prepared_pair_are_those_of_the_whole(backend, dtype, offset, scale):
    generator = torch.Generator().manual_seed(0)
    x, y = ((torch.randn(rows, 24, generator=generator) + offset).to(dtype) for rows in (13, 1100))
    y[1099] = x[12]
    expected = torch.from_numpy(squared_distances(x.double() * scale, y.double() * scale))
    of_rows = op.RowDistances(x, y, scale)
    for begin, end in ((0, 13), (12, 13), (4, 9), (7, 7)):
        got = of_rows(begin, end)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected[begin:end], rtol=2e-6, atol=0)
