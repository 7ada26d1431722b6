"""Step: every op's time beside what bytes and arithmetic predict, plain PyTorch (eager and compiled), and its memory.

The prediction is written before the measurement: the larger of the bytes that must move over the measured copy and the
operations over the measured product. Bytes are counted so: for the losses each input read
and each result written once in each pass; for the kernels of the retrieval functions by tests/cuda_on_cpu/minima.py,
from the arguments and results of the very calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from torch.utils.dlpack import to_dlpack

import vareid_ext
from benchmarks.gpu.records import Records
from benchmarks.gpu.step import DEVICE, DRY_RUN, Clock, Mark, check_native, peak_mebibytes, synchronize
from benchmarks.retrieval import features
from tests.cuda_on_cpu.backend import adapters
from tests.cuda_on_cpu.minima import Counting
from tests.gpu.gpu_backend import capture
from vareid_ext import _native
from vareid_ext.ops._bfloat16_filter import BFloat16Filter
from vareid_ext.reference.angular_center import angular_center
from vareid_ext.reference.viewpoint_aware_cross_entropy import soft_target


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    ``eager`` is plain PyTorch as one would write it and also what is compiled; None where there is no such counterpart.
    ``bytes_moved`` and ``operations`` are the least for ours; the latter run as products of ``product``.
    """

    operator: str
    size: str
    ours: Callable[[], Any]
    eager: Callable[[], Any] | None
    bytes_moved: int
    operations: int = 0
    product: str = "float32"
    compiled: bool = True
    leaves: tuple[Tensor, ...] = field(default=())

    def run(self, loss: Callable[[], Any]) -> Callable[[], Any]:
        """Calls it; a loss with its backward pass."""
        if not self.leaves:
            return loss

        def both_passes() -> None:
            for leaf in self.leaves:
                leaf.grad = None
            loss().backward()

        return both_passes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def _labels(N: int, K: int, V: int) -> tuple[Tensor, Tensor]:
    return torch.randint(K, (N,), device=DEVICE), torch.randint(V, (N,), device=DEVICE)


def _angular_center(K: int, V: int, D: int, dtype: torch.dtype) -> Case:
    W, U = (_normal(*size, dtype=dtype).requires_grad_() for size in ((K, D), (K, V, D)))
    return Case(
        "angular_center_regularizer", f"K {K}, V {V}, D {D}, {_name(dtype)}",
        lambda: vareid_ext.angular_center_regularizer(W, U), lambda: angular_center(W, U),
        3 * (W.nbytes + U.nbytes), leaves=(W, U),
    )  # fmt: skip


def _dense_loss(z: Tensor, s: Tensor, identity: Tensor, viewpoint: Tensor) -> Tensor:
    with torch.no_grad():
        identity_target = soft_target(z[:, :, None], identity)[:, :, 0]
        joint_target = soft_target(s, identity, viewpoint).flatten(1)
    joint = functional.cross_entropy(s.flatten(1).float(), joint_target)
    return functional.cross_entropy(z.float(), identity_target) + joint


def _cross_entropy(N: int, K: int, V: int, dtype: torch.dtype) -> Case:
    z, s = (_normal(*size, dtype=dtype).requires_grad_() for size in ((N, K), (N, K, V)))
    labels = _labels(N, K, V)
    return Case(
        "viewpoint_aware_cross_entropy", f"N {N}, K {K}, V {V}, {_name(dtype)}",
        lambda: sum(vareid_ext.viewpoint_aware_cross_entropy(z, s, *labels)), lambda: _dense_loss(z, s, *labels),
        3 * (z.nbytes + s.nbytes), leaves=(z, s),
    )  # fmt: skip


def _linear_cross_entropy(N: int, K: int, V: int, D: int, dtype: torch.dtype) -> Case:
    feature, W, U = (_normal(*size, dtype=dtype).requires_grad_() for size in ((N, D), (K, D), (K, V, D)))
    labels = _labels(N, K, V)

    def eager() -> Tensor:
        return _dense_loss(feature @ W.T, (feature @ U.flatten(0, 1).T).view(N, K, V), *labels)

    return Case(
        "linear_viewpoint_aware_cross_entropy", f"N {N}, K {K}, V {V}, D {D}, {_name(dtype)}",
        lambda: sum(vareid_ext.linear_viewpoint_aware_cross_entropy(feature, W, U, *labels)), eager,
        3 * (W.nbytes + U.nbytes), 6 * N * D * K * (1 + V), _name(dtype), leaves=(feature, W, U),
    )  # fmt: skip


def _pairwise_distance(x: Tensor, y: Tensor) -> Case:
    (M, D), N = x.shape, y.shape[0]
    return Case(
        "pairwise_distance", f"{M} x {N}, D {D}, float32", lambda: vareid_ext.pairwise_distance(x, y),
        lambda: torch.cdist(x, y), 4 * (3 * M * N + (M + N) * D), 2 * M * N * D,
    )  # fmt: skip


def _nearest_neighbors(x: Tensor, y: Tensor, k: int) -> Case:
    (M, D), N = x.shape, y.shape[0]
    product = "bfloat16" if BFloat16Filter.pays(x, M * N) else "float32"
    return Case(
        "nearest_neighbors", f"{M} x {N}, D {D}, k {k}, float32", lambda: vareid_ext.nearest_neighbors(x, y, k=k),
        lambda: torch.cdist(x, y).topk(k, largest=False), 4 * (2 * M * N + (M + N) * D), 2 * M * N * D, product,
        compiled=False,
    )  # fmt: skip


def _of_distances(
    function: str, distances: Tensor, labels: tuple[Tensor, ...], *, reference: bool = True, readings: int = 1
) -> Case:
    def ours() -> Any:
        return getattr(vareid_ext, function)(distances, *labels)

    def eager() -> Any:
        with vareid_ext.reference_backend():
            return ours()

    size = f"{distances.shape[0]} x {distances.shape[1]}, {_name(distances.dtype)}"
    return Case(function, size, ours, eager if reference else None, readings * distances.nbytes, compiled=False)


def cases() -> Iterator[Case]:
    """The operators at the sizes of the report; each case's arrays live until the next is asked for."""
    f32, bf16 = torch.float32, torch.bfloat16
    N, D = (8, 64) if DRY_RUN else (256, 2048)
    for dtype in (f32, bf16):
        for K in (20, 30) if DRY_RUN else (751, 10_000):
            yield _angular_center(K, 3, D, dtype)
        for K in (20, 30) if DRY_RUN else (751, 25_000):
            yield _cross_entropy(N, K, 3, dtype)
        yield _linear_cross_entropy(N, 100 if DRY_RUN else 100_000, 3, D, dtype)
    Q, G, D = market_size()
    data = features(Q, G, D)
    query, gallery = data.feature[:Q].to(DEVICE), data.feature[Q:].to(DEVICE)
    yield _pairwise_distance(query, gallery)
    yield _nearest_neighbors(query, gallery, 50)
    labels = tuple(x.to(DEVICE) for x in (data.identity[:Q], data.identity[Q:], data.camera[:Q], data.camera[Q:]))
    distances = vareid_ext.pairwise_distance(query, gallery)
    yield _of_distances("rank_queries", distances, labels)
    yield _of_distances("rank_queries", distances.bfloat16(), labels, reference=False)
    yield _of_distances("evaluate_verification", distances, labels, readings=2)


def market_size() -> tuple[int, int, int]:
    """Queries, gallery images and elements of a feature, as in Market-1501."""
    return (30, 120, 32) if DRY_RUN else (3368, 15913, 2048)


class Ceilings:
    """What the step before has measured, and the times that follow from it."""

    def __init__(self, records: Records) -> None:
        found = records.neighbour("ceilings")
        self._value = {name: record["value"] for name, record in found.items() if record["status"] == "passed"}

    def predict(self, bytes_moved: int, operations: int = 0, product: str = "float32") -> dict[str, Any]:
        """``predicted ms``, and which of the two decides it; empty where the ceilings are not known."""
        if "copy" not in self._value or f"{product} product" not in self._value:
            return {}
        moving = bytes_moved / (self._value["copy"] * 1e9)
        computing = operations / (self._value[f"{product} product"] * 1e12)
        return {"predicted ms": max(moving, computing) * 1e3, "bound": "bytes" if moving >= computing else "product"}


def measure(case: Case, clock: Clock, predicted: float | None) -> dict[str, Any]:
    """Times of a case and of plain PyTorch, and its memory."""
    contenders = {"ms": case.run(case.ours)}
    if case.eager is not None:
        contenders["eager ms"] = case.run(case.eager)
    times = clock.medians(list(contenders.values()), 1.0)
    record: dict[str, Any] = {name: seconds * 1e3 for name, seconds in zip(contenders, times, strict=True)}
    if case.leaves:  # a graph's replay is what is left where the host does nothing
        record["device ms"] = clock.medians([capture(contenders["ms"])], 0.5)[0] * 1e3
    if predicted:
        record["share of the ceiling"] = predicted / record.get("device ms", record["ms"])
    record["MiB at the peak"] = peak_mebibytes(contenders["ms"])
    return record


def measure_compiled(case: Case, clock: Clock) -> dict[str, Any]:
    """Times of a case and of plain PyTorch compiled."""
    assert case.eager is not None
    compiled = torch.compile(case.eager, dynamic=False, backend="eager" if DRY_RUN else "inductor")
    ours, theirs = clock.medians([case.run(case.ours), case.run(compiled)], 0.5)
    return {"ms": ours * 1e3, "compiled ms": theirs * 1e3}


class Watched:
    """Stands for the compiled module: adds up, by function, the calls and what ``after`` makes of each."""

    def __init__(self, module: Any, watch: Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]) -> None:
        self._module, self._watch = module, watch

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function):
            return function
        return lambda *arguments: self._watch(name, lambda: function(*map(_capsules, arguments)), arguments)


def _capsules(value: Any) -> Any:
    """Arguments of the compiled module: tensors become DLPack capsules, in lists and tuples too."""
    return tree_map_only(Tensor, to_dlpack, value)


@contextmanager
def _watching(watch: Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    module = Watched(_native.module(), watch)
    with (
        mock.patch.object(_native, "_module", module),
        mock.patch.object(_native, "capsule", lambda value: tree_map_only(Tensor, Tensor.detach, value)),
    ):
        yield


def least_bytes(job: Callable[[], Any]) -> Counter[str]:
    """Bytes that the kernels of a job must move, by function of the compiled module."""
    least: Counter[str] = Counter()

    def watch(name: str, call: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        result = call()
        if name == "nearest_neighbors_scan":  # the block; the rows' lists are small beside it
            both, write = arguments[7:9]
            least[name] += 4 * arguments[0].numel() * (1 + both + write)
        elif name in adapters() and name != "k_reciprocal_topk":  # its formula walks over sets in Python
            counting = Counting(lambda *_: None)
            adapters()[name](counting, *tree_map_only(Tensor, Tensor.cpu, arguments))
            least[name] += sum(counting.least.values())
        return result

    with _watching(watch):
        job()
    return least


def kernel_times(job: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """Calls and milliseconds of a job's kernels, by function of the compiled module; it runs once to warm up."""
    calls: Counter[str] = Counter()
    spans: list[tuple[str, Mark, Mark]] = []

    def watch(name: str, call: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        calls[name] += 1
        begin, end = Mark(), Mark()
        begin.record()
        result = call()
        end.record()
        spans.append((name, begin, end))
        return result

    job()
    with _watching(watch):
        job()
    synchronize()
    times: Counter[str] = Counter()
    for name, begin, end in spans:
        times[name] += begin.elapsed_time(end)
    return calls, times


def _kernels_of(records: Records, ceilings: Ceilings, name: str, job: Callable[[], Any]) -> None:
    """One record for each function of the compiled module that a job calls."""
    bytes_of: Counter[str] = Counter()
    records.check(f"{name}: bytes", lambda: bytes_of.update(least_bytes(job)))
    predicted = {function: ceilings.predict(size) for function, size in bytes_of.items()}
    for function, values in predicted.items():
        records.put(f"{name}: {function}", "begun", **values)
    found: list[Counter[str]] = []
    records.check(f"{name}: kernels", lambda: found.extend(kernel_times(job)))
    for function, calls in found[0].items() if found else ():
        milliseconds, expected = found[1][function], predicted.get(function, {}).get("predicted ms")
        share = {"share of the ceiling": expected / milliseconds} if expected and milliseconds else {}
        records.put(f"{name}: {function}", "passed", calls=calls, ms=milliseconds, **share)


def main() -> None:
    check_native()
    torch.manual_seed(0)
    records, clock = Records(), Clock()
    ceilings = Ceilings(records)
    with records.section("operators"):
        for case in cases():
            values = ceilings.predict(case.bytes_moved, case.operations, case.product)
            records.check(
                f"{case.operator}, {case.size}",
                lambda case=case, values=values: measure(case, clock, values.get("predicted ms")), **values,
            )  # fmt: skip
    with records.section("kernels of re-ranking"):
        Q, G, D = market_size()
        data = features(Q, G, D).feature.to(DEVICE)
        query, gallery = data[:Q], data[Q:]
        _kernels_of(records, ceilings, "rerank", lambda: vareid_ext.k_reciprocal_rerank(query, gallery))
        _kernels_of(records, ceilings, "topk", lambda: vareid_ext.k_reciprocal_rerank(query, gallery, topk=100))
        whole = vareid_ext.pairwise_distance(data)
        matrices = [part.contiguous() for part in (whole[:Q, Q:], whole[:Q, :Q], whole[Q:, Q:])]
        _kernels_of(records, ceilings, "matrices", lambda: vareid_ext.re_ranking(*matrices))
    with records.section("compiled PyTorch"):  # takes the longest and is worth the least
        for case in cases():
            if case.compiled:
                name = f"{case.operator}, {case.size}, against compiled PyTorch"
                records.check(name, lambda case=case: measure_compiled(case, clock))


if __name__ == "__main__":
    main()
