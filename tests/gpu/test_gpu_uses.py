"""What users do with a GPU beside calling an operator: CuPy, streams, CUDA graphs, mixed precision, compilation."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vareid_ext
from tests.cuda_on_cpu.representative import REPRESENTATIVE
from tests.gpu import gpu_backend
from tests.gpu.gpu_backend import DEVICE
from vareid_ext import ViewpointAwareLoss, metrics

pytestmark = pytest.mark.skipif(
    bool(gpu_backend.missing_reason()), reason=gpu_backend.missing_reason() or "a GPU is here"
)
N, K, V, D = 16, 50, 3, 32
Q, G = 20, 100


# ---- CuPy ----------------------------------------------------------------------------------------------------------
def _array_module() -> Any:
    if gpu_backend.DRY_RUN:
        return np
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not here")
    import cupy

    return cupy


def _cupy_stream(xp: Any) -> AbstractContextManager[Any]:
    return nullcontext() if xp is np else xp.cuda.Stream(non_blocking=True)


def _images(xp: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    identity, camera, viewpoint = (rng.integers(high, size=Q + G) for high in (12, 3, V))
    person = rng.standard_normal((12, D))
    feature = (person[identity] + rng.standard_normal((Q + G, D))).astype(np.float32)
    squared = ((feature[:, None].astype(np.float64) - feature[None]) ** 2).sum(2)
    distance = np.sqrt(squared).astype(np.float32)
    arrays = {
        "feature": feature, "query": feature[:Q], "gallery": feature[Q:], "q_g": distance[:Q, Q:],
        "q_q": distance[:Q, :Q], "g_g": distance[Q:, Q:], "identity": identity, "camera": camera,
        "viewpoint": viewpoint, "query_identity": identity[:Q], "gallery_identity": identity[Q:],
        "query_camera": camera[:Q], "gallery_camera": camera[Q:],
    }  # fmt: skip
    return {name: xp.asarray(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _labels(a: dict[str, Any]) -> list[Any]:
    return [a[name] for name in ("query_identity", "gallery_identity", "query_camera", "gallery_camera")]


def _verification(result: Any) -> dict[str, Any]:
    values = result.as_dict()
    del values["roc"]  # as many points as there are different distances, which rounding may make equal
    return values


def _searched(gallery: Any, query: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return vareid_ext.GalleryIndex.build(folder, gallery).search(query, topk=5)


FUNCTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pairwise_distance": lambda a: vareid_ext.pairwise_distance(a["query"], a["gallery"]),
    "pairwise_distance, one set": lambda a: vareid_ext.pairwise_distance(a["feature"], metric="cosine"),
    "nearest_neighbors": lambda a: vareid_ext.nearest_neighbors(a["query"], a["gallery"], k=5),
    "k_reciprocal_rerank": lambda a: vareid_ext.k_reciprocal_rerank(a["query"], a["gallery"]),
    "k_reciprocal_rerank, topk": lambda a: vareid_ext.k_reciprocal_rerank(a["query"], a["gallery"], topk=10),
    "k_reciprocal_from_neighbors": lambda a: vareid_ext.k_reciprocal_from_neighbors(
        *reversed(vareid_ext.nearest_neighbors(a["feature"], k=30)), Q, topk=10
    ),
    "re_ranking": lambda a: vareid_ext.re_ranking(a["q_g"], a["q_q"], a["g_g"]),
    "evaluate_ranking": lambda a: vareid_ext.evaluate_ranking(a["q_g"], *_labels(a)),
    "rank_queries": lambda a: vareid_ext.rank_queries(a["q_g"], *_labels(a)),
    "evaluate_features": lambda a: vareid_ext.evaluate_features(a["query"], a["gallery"], *_labels(a)),
    "evaluate_features, rerank": lambda a: vareid_ext.evaluate_features(
        a["query"], a["gallery"], *_labels(a), rerank=True, block_rows=7
    ),
    "rank_features": lambda a: vareid_ext.rank_features(a["query"], a["gallery"], *_labels(a)),
    "GalleryIndex, search": lambda a: _searched(a["gallery"], a["query"]),
    "KReciprocal, rows": lambda a: vareid_ext.KReciprocal(a["query"], a["gallery"]).rows(1, 4),
    "evaluate_verification": lambda a: _verification(vareid_ext.evaluate_verification(a["q_g"], *_labels(a))),
    "verify_features": lambda a: _verification(vareid_ext.verify_features(a["query"], a["gallery"], *_labels(a))),
    "evaluate_by_group": lambda a: metrics.evaluate_by_group(
        a["query"], a["gallery"], *_labels(a), query_group=a["query_camera"], gallery_group=a["gallery_camera"]
    ).mAP.tolist(),
    "compare_rankings": lambda a: {
        name: difference.as_dict()
        for name, difference in metrics.compare_rankings(
            vareid_ext.rank_features(a["query"], a["gallery"], *_labels(a)),
            vareid_ext.rank_features(a["query"], a["gallery"], *_labels(a), metric="cosine"),
        ).items()
    },
    "ranked_lists": lambda a: vareid_ext.ranked_lists(a["query"], a["gallery"], *_labels(a), queries=[0, 3]),
    "ranked_lists, rerank": lambda a: vareid_ext.ranked_lists(
        a["query"], a["gallery"], *_labels(a), queries=[0, 3], rerank=True
    ),
    "evaluate_drawn_gallery": lambda a: metrics.evaluate_drawn_gallery(
        a["feature"], a["identity"], a["camera"], repeats=2
    ).mean(),
    "evaluate_single_viewpoint": lambda a: {
        view: metrics.mean()
        for view, metrics in vareid_ext.evaluate_single_viewpoint(
            a["feature"], a["identity"], a["viewpoint"], a["camera"], repeats=2
        ).items()
    },
    "evaluate_cross_viewpoint": lambda a: {
        view: metrics.as_dict()
        for view, metrics in vareid_ext.evaluate_cross_viewpoint(
            a["feature"], a["identity"], a["viewpoint"], a["camera"]
        ).items()
    },
}


def _leaves(result: Any) -> Iterator[Any]:
    """The arrays and numbers of a result."""
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        for part in result:
            yield from _leaves(part)
    else:
        yield result


def _compare(got: Any, xp: Any, expected: Any) -> None:
    for ours, theirs in zip(_leaves(got), _leaves(expected), strict=True):
        if isinstance(theirs, np.ndarray):
            assert isinstance(ours, xp.ndarray)
            ours = ours if xp is np else xp.asnumpy(ours)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_every_function_of_arrays_is_among_them() -> None:
    public = {name for name in (*vareid_ext.__all__, *metrics.__all__) if name.islower()}
    modules = ("vareid_ext.metrics", "vareid_ext.retrieval")
    found = {name: getattr(vareid_ext, name, None) or getattr(metrics, name) for name in public}
    of_arrays = {name for name, value in found.items() if getattr(value, "__module__", "").startswith(modules)}
    assert of_arrays <= {name.partition(",")[0] for name in FUNCTIONS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_cupy_arrays_give_what_numpy_arrays_give(name: str) -> None:
    xp = _array_module()
    _compare(FUNCTIONS[name](_images(xp)), xp, FUNCTIONS[name](_images(np)))


def test_result_goes_into_a_given_cupy_array() -> None:
    xp = _array_module()
    a, out = _images(xp), xp.zeros((Q, G), dtype=np.float32)
    assert vareid_ext.k_reciprocal_rerank(a["query"], a["gallery"], out=out) is out
    _compare(out, xp, FUNCTIONS["k_reciprocal_rerank"](_images(np)))


def test_arrays_from_a_busy_cupy_stream_are_waited_for() -> None:
    xp = _array_module()
    with _cupy_stream(xp):
        busy, a = xp.ones((64, 64) if xp is np else (4096, 4096), dtype=np.float32), _images(xp)
        for _ in range(10):
            busy = busy @ busy * 0
        late = a["query"] + busy[:1, :1]
        got = vareid_ext.pairwise_distance(late, a["gallery"])
        _compare(got, xp, FUNCTIONS["pairwise_distance"](_images(np)))


# ---- the losses ----------------------------------------------------------------------------------------------------
def _batch(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    sizes = {"feature": (N, D), "W": (K, D), "U": (K, V, D), "z": (N, K), "s": (N, K, V)}
    leaves = {name: torch.randn(*size, generator=rng).to(DEVICE).requires_grad_() for name, size in sizes.items()}
    labels = {
        "identity": torch.randint(K, (N,), generator=rng).to(DEVICE),
        "viewpoint": torch.randint(-1, V, (N,), generator=rng).to(DEVICE),
    }
    return leaves | labels


@functools.cache
def _module() -> ViewpointAwareLoss:
    torch.manual_seed(0)
    return ViewpointAwareLoss(K, D).to(DEVICE)


LOSSES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "angular_center_regularizer": lambda t: vareid_ext.angular_center_regularizer(t["W"], t["U"]),
    "identity_cross_entropy": lambda t: vareid_ext.identity_cross_entropy(t["z"], t["identity"]),
    "viewpoint_cross_entropy": lambda t: vareid_ext.viewpoint_cross_entropy(t["s"], t["identity"], t["viewpoint"]),
    "viewpoint_aware_cross_entropy": lambda t: sum(
        vareid_ext.viewpoint_aware_cross_entropy(t["z"], t["s"], t["identity"], t["viewpoint"])
    ),
    "linear_viewpoint_aware_cross_entropy": lambda t: sum(
        vareid_ext.linear_viewpoint_aware_cross_entropy(t["feature"], t["W"], t["U"], t["identity"], t["viewpoint"])
    ),
    "linear_viewpoint_aware_cross_entropy, cosines": lambda t: sum(
        vareid_ext.linear_viewpoint_aware_cross_entropy(
            t["feature"], t["W"], t["U"], t["identity"], t["viewpoint"], normalize=True, scale=16.0
        )
    ),
    "ViewpointAwareLoss": lambda t: _module()(t["feature"], t["identity"], t["viewpoint"]).total,
}


def _step(loss: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor]) -> list[Tensor]:
    """The loss and the gradients of a batch."""
    leaves = [x for x in (*t.values(), *_module().parameters()) if x.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    value = loss(t)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_loss_follows_its_inputs(name: str) -> None:
    """Forward and backward in one CUDA graph, replayed on other values."""
    static, results = _batch(0), []

    def run() -> None:
        results[:] = _step(LOSSES[name], static)

    replay = gpu_backend.capture(run)
    for seed in (1, 2):
        fresh = _batch(seed)
        with torch.no_grad():
            for key, tensor in static.items():
                tensor.copy_(fresh[key])
        replay()
        gpu_backend.synchronize()
        _assert_close([r.clone() for r in results], [r.clone() for r in _step(LOSSES[name], fresh)])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients_stay_on_a_side_stream(name: str) -> None:
    expected = [r.clone() for r in _step(LOSSES[name], _batch(0))]
    t = _batch(0)
    gpu_backend.synchronize()
    with gpu_backend.busy_stream():
        got = [r.clone() for r in _step(LOSSES[name], t)]
    _assert_close(got, expected)


@pytest.mark.skipif(gpu_backend.DRY_RUN, reason="labels on the CPU are refused at once")
def test_a_bad_label_is_told_after_the_call() -> None:
    t = _batch(0)
    t["identity"][3] = K
    assert bool(LOSSES["viewpoint_aware_cross_entropy"](t).isnan())
    with pytest.raises(IndexError, match="identity"):
        vareid_ext.raise_label_errors()
    assert bool(LOSSES["viewpoint_aware_cross_entropy"](_batch(0)).isfinite())


# ---- training ------------------------------------------------------------------------------------------------------
class _Network(nn.Module):
    """Images [N, 3, 16, 16] -> the loss's total."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, D, 3, 2),
            nn.BatchNorm2d(D),
            nn.ReLU(),
            nn.Conv2d(D, D, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.loss = ViewpointAwareLoss(K, D)

    def forward(self, image: Tensor, identity: Tensor, viewpoint: Tensor) -> Tensor:
        return self.loss(self.features(image), identity, viewpoint).total


def _network() -> tuple[_Network, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    network, t = _Network().to(DEVICE), _batch(0)
    return network, (torch.randn(N, 3, 16, 16).to(DEVICE), t["identity"], t["viewpoint"])


def _gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.bfloat16, {2.0**10: True}), (torch.float16, {2.0**10: True, 2.0**127: False})],  # the last one overflows
    ids=str,
)
def test_a_scaled_step_in_mixed_precision(dtype: torch.dtype, scales: dict[float, bool]) -> None:
    network, inputs = _network()
    network(*inputs).backward()
    expected = _gradient(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for init_scale, taken in scales.items():
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=init_scale)
        optimizer.zero_grad()
        before = torch.cat([p.detach().flatten() for p in network.parameters()])
        with torch.autocast(DEVICE.type, dtype):
            total = network(*inputs)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        if taken:
            assert _relative_error(_gradient(network), expected) < 0.1
        scaler.step(optimizer)
        scaler.update()
        after = torch.cat([p.detach().flatten() for p in network.parameters()])
        assert torch.equal(before, after) != taken
        assert (scaler.get_scale() == init_scale) == taken


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model_and_loss_train_as_eager_ones(mode: str) -> None:
    network, inputs = _network()
    network(*inputs).backward()
    expected = _gradient(network)
    options: dict[str, Any] = {"backend": "aot_eager"} if gpu_backend.DRY_RUN else {"mode": mode}
    compiled = torch.compile(network, fullgraph=True, **options)
    for _ in range(3):  # with graphs: warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        network.zero_grad()
        compiled(*inputs).backward()
        assert _relative_error(_gradient(network), expected) < 5e-3  # convolutions may use TF32


# ---- the operators' registration -----------------------------------------------------------------------------------
class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the first call of each of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "vareid" and func._schema.name not in self.calls:
            self.calls[func._schema.name] = func, tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        return func(*args, **(kwargs or {}))


@functools.cache
def _recorded() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    with _Recorder() as recorder:
        for shapes in REPRESENTATIVE.values():
            for shape in shapes:
                shape.call(DEVICE)
        t = _batch(0)
        arguments = t["feature"], t["W"], t["U"], t["identity"], t["viewpoint"]
        rows = vareid_ext.linear_viewpoint_aware_cross_entropy(*arguments, reduction="none")
        (rows[0] + rows[1]).sum().backward()
        images = {name: torch.from_numpy(x).to(DEVICE) for name, x in _images(np).items()}
        FUNCTIONS["rank_features"](images)
        new = images["gallery"]
        none = [new.new_empty(shape, dtype=dtype) for shape, dtype in _NO_LISTS]
        torch.ops.vareid.extended_neighbors(new[:0], new, 1.0, 5, *none)
        torch.ops.vareid.neighbors_of_rows(new, new, 1.0, 5, "sqeuclidean", 0, 2 * len(new), 1024)
    return recorder.calls


_NO_LISTS = (((0, 0), torch.int32), ((0, 0), torch.float64), ((0,), torch.float32))
_OPERATORS = [f"vareid::{name}" for name in sorted(torch.ops.vareid)]


@pytest.mark.parametrize("name", [n for n in _OPERATORS if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")])
def test_opcheck_on_the_device(name: str) -> None:
    func, arguments = _recorded()[name]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(func, arguments, test_utils=utils)
