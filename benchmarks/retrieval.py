"""Re-ranking as a whole: time by stage, ratio to one matrix product, measured peak memory, mAP, and other tools.

``python -m benchmarks.retrieval`` runs the sizes of Market-1501 with three feature widths and a small set;
``--only small`` and the like choose, ``--size Q G D`` runs one size of your own, ``--msmt17`` adds that data set's size
(minutes), and ``--features QUERY GALLERY`` takes files of features with identities and cameras. Other features are
random with the structure that features of people have (identities in a low-rank space, a bias for each camera, noise);
their seed is fixed.

The product is written to memory that is there. Re-ranking is measured so, too, and as it is called: then the system
gives it the result's memory, 0.2 s for 200 MiB where a virtual machine has given its free memory back to the host.

Public tools are compared where they are installed: ``pip install --no-deps fastreid torchreid`` (they ask for old
releases of PyTorch; only their re-ranking module is loaded). They run at the small sizes, and at all with ``--peers``,
where they need minutes and 10 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its OpenMP

import numpy as np
import torch

from benchmarks.harness import environment, write_atomically
from vareid_ext import KReciprocal, evaluate_ranking, k_reciprocal_rerank, pairwise_distance, reference_backend
from vareid_ext.files.features import read_features
from vareid_ext.ops._byte_filter import ByteFilter
from vareid_ext.ops._progress import counted
from vareid_ext.retrieval.rerank import k_reciprocal

_RANK = 64
_STAGES = (
    "joint_neighbors", "k_reciprocal_robust_sets", "listed_distance", "k_reciprocal_encode",
    "k_reciprocal_query_expansion", "k_reciprocal_invert", "k_reciprocal_blend",
)  # fmt: skip
_INTO = "ours, into memory"
SIZES = {
    "market1501 D=2048": (3368, 15913, 2048),
    "market1501 D=512": (3368, 15913, 512),
    "market1501 D=256": (3368, 15913, 256),
    "small D=2048": (500, 3000, 2048),
    "small D=256": (500, 3000, 256),
}
MSMT17 = (11659, 82161, 2048)


class Data(NamedTuple):
    """Unit features [Q + G, D], queries first, with their labels."""

    feature: torch.Tensor
    identity: torch.Tensor
    camera: torch.Tensor


def features(Q: int, G: int, D: int, seed: int = 0) -> Data:
    """Features with realistic structure: about 20 images an identity, 6 cameras."""
    generator = torch.Generator().manual_seed(seed)
    rows, identities = Q + G, max(2, (Q + G) // 20)
    basis = torch.randn(_RANK, D, generator=generator) / _RANK**0.5
    person = torch.randn(identities, _RANK, generator=generator)
    bias = 0.4 * torch.randn(6, _RANK, generator=generator)
    identity = torch.randint(0, identities, (rows,), generator=generator)
    camera = torch.randint(0, 6, (rows,), generator=generator)
    out = torch.empty(rows, D)
    for begin in range(0, rows, 4096):
        at = slice(begin, min(begin + 4096, rows))
        size = at.stop - begin
        low = person[identity[at]] + bias[camera[at]] + 0.9 * torch.randn(size, _RANK, generator=generator)
        out[at] = torch.nn.functional.normalize(low @ basis + 0.6 * torch.randn(size, D, generator=generator))
    return Data(out, identity, camera)


def data_of(source: Sequence[str]) -> tuple[Data, int]:
    """The features of a size (three numbers) or of two files, and how many of them are queries."""
    if len(source) == 3:
        Q, G, D = map(int, source)
        return features(Q, G, D), Q
    query, gallery = (read_features(path, side) for path, side in zip(source, ("query", "gallery"), strict=True))
    joined = (torch.cat([query.feature.float(), gallery.feature.float()]),)
    labels = (
        torch.as_tensor(np.concatenate([getattr(query, label), getattr(gallery, label)]))
        for label in ("identity", "camera")
    )
    return Data(*joined, *labels), len(query.feature)


def dense_numpy(query: np.ndarray, gallery: np.ndarray, k1: int = 20, k2: int = 6, weight: float = 0.3) -> np.ndarray:
    """The usual way: dense M x M matrices, a sort of every row, a Python loop over the rows."""
    x = np.concatenate([query, gallery])
    squares = (x * x).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * (x @ x.T), 0)
    distance /= distance.max(1, keepdims=True)
    rank = np.argsort(distance, axis=1).astype(np.int32)
    M, Q, half = len(x), len(query), int(np.around(k1 / 2))

    def mutual(i: int, k: int) -> np.ndarray:
        forward = rank[i, : k + 1]
        return forward[(rank[forward, : k + 1] == i).any(1)]

    V = np.zeros((M, M), np.float32)
    for i in range(M):
        base = mutual(i, k1)
        members = base
        for candidate in base:
            theirs = mutual(int(candidate), half)
            if 3 * len(np.intersect1d(theirs, base)) > 2 * len(theirs):
                members = np.append(members, theirs)
        members = np.unique(members)
        near = np.exp(-distance[i, members])
        V[i, members] = near / near.sum()
    V = np.stack([V[rank[i, :k2]].mean(0) for i in range(M)])
    owners = [np.nonzero(V[:, j])[0] for j in range(M)]
    final = np.empty((Q, M), np.float32)
    for q in range(Q):
        shared = np.zeros(M, np.float32)
        for j in np.nonzero(V[q])[0]:
            shared[owners[j]] += np.minimum(V[q, j], V[owners[j], j])
        final[q] = (1 - weight) * (1 - shared / (2 - shared)) + weight * distance[q]
    return final[:, Q:]


_PEERS = {"fastreid": "evaluation/rerank.py", "torchreid": "reid/utils/rerank.py"}


def peer_tools() -> Iterator[tuple[str, Callable[..., Any]]]:
    """re_ranking functions of installed packages that take three rooted distance matrices.

    The packages themselves are not imported: they need much that re-ranking does not.
    """
    for package, path in _PEERS.items():
        installed = importlib.util.find_spec(package)
        for folder in (installed and installed.submodule_search_locations) or ():
            if (file := Path(folder) / path).exists():
                yield package, runpy.run_path(str(file))["re_ranking"]


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def stage_seconds(query: torch.Tensor, gallery: torch.Tensor) -> dict[str, float]:
    """Seconds of each operator of a whole re-ranking, in the order in which they are called."""
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            seconds[name], result = _timed(lambda: stage(*arguments))
            return result

        return run

    with contextlib.ExitStack() as stack:
        for name in _STAGES:
            module = k_reciprocal if name == "joint_neighbors" else k_reciprocal.stages
            stack.enter_context(mock.patch.object(module, name, timed(name, getattr(module, name))))
        KReciprocal(query, gallery).matrix()
    return seconds


def mean_average_precision(distance: Any, data: Data, Q: int) -> float:
    """mAP of a result."""
    labels = (data.identity[:Q], data.identity[Q:], data.camera[:Q], data.camera[Q:])
    return float(evaluate_ranking(torch.as_tensor(distance), *labels).mAP)


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_memory(topk: int, folder: str, *source: str) -> None:
    """In a process of its own: prints the peak beyond input and result in MiB, and the seconds."""
    data, Q = data_of(source)
    query, gallery = data.feature[:Q], data.feature[Q:]
    k_reciprocal_rerank(query[:200], gallery[:200])  # libraries' own buffers exist
    torch.mm(gallery[:1024], gallery[:1024].T)
    out = None
    if not topk:
        path = Path(folder) / "result.npy"
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(Q, len(gallery)))
        out[:] = 0
    peak, seconds, _ = _peak_of(lambda: k_reciprocal_rerank(query, gallery, topk=topk or None, out=out))
    print(peak, seconds)


def _peak_of(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """MiB at the peak of a call beyond what was there before, its seconds and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    seconds, result = _timed(run)
    return (_memory("VmHWM") - before) / 2**20, seconds, result


def _memory_of_new_process(source: Sequence[str], topk: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.retrieval", "--memory", str(topk), folder, *source]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    peak, seconds = map(float, output.split())
    print(f"  measured peak beyond input and result: {peak:.0f} MiB ({seconds:.1f} s)")
    return peak, seconds


def run_case(name: str, source: Sequence[str], rounds: int, peers: bool) -> dict[str, Any]:
    """One size: the comparison with the product, the stages, the memory, the quality, and other tools.

    Returns:
        The case's record, as the harness's; ``mAP`` and ``mebibytes_beyond`` (input and result) by contender.
    """
    data, Q = data_of(source)
    (M, D), query, gallery = data.feature.shape, data.feature[:Q], data.feature[Q:]
    print(f"\n{name}: Q={Q} G={M - Q} D={D}")
    product, there = torch.empty(M, M), torch.empty(Q, M - Q)
    contenders: dict[str, Callable[[], Any]] = {
        "product": lambda: torch.mm(data.feature, data.feature.T, out=product),
        "ours": lambda: k_reciprocal_rerank(query, gallery),
        _INTO: lambda: k_reciprocal_rerank(query, gallery, out=there),
    }
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds + 1):
        for contender, run in contenders.items():
            seconds[contender].append(_timed(run)[0])
    product.resize_(0)  # gives its memory back
    seconds = {contender: times[1:] for contender, times in seconds.items()}  # the first round warms up
    for contender, times in seconds.items():
        print(f"  {contender:<28}{median(times):9.3f} s  ({min(times):.3f} to {max(times):.3f})")
    ours = median(seconds["ours"])
    for contender in ("ours", _INTO):
        ratio = median(seconds[contender]) / median(seconds["product"])
        print(f"  {contender}: {ratio:.2f}x the product of {M} x {M} x {D}")
    with counted() as counts:
        by_stage = stage_seconds(query, gallery)
    print("  neighbours: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    with mock.patch.object(ByteFilter, "pays", return_value=False):
        by_float32 = stage_seconds(query, gallery)
    print(f"  joint_neighbors filtered in float32 takes {by_float32['joint_neighbors']:.3f} s")
    print("  by stage: " + ", ".join(f"{stage} {value:.3f} s" for stage, value in by_stage.items()))
    results = {"original": pairwise_distance(query, gallery), "ours": there}
    mAP = {contender: mean_average_precision(distance, data, Q) for contender, distance in results.items()}
    print(f"  mAP {100 * mAP['original']:.2f}% before, {100 * mAP['ours']:.10f}% after")
    others: dict[str, Callable[[], Any]] = {}
    if M <= 4000:
        others["dense NumPy"] = lambda: dense_numpy(query.numpy(), gallery.numpy())
        others["plain PyTorch"] = lambda: _by_reference(query, gallery)
    if peers or M <= 4000:
        others |= {tool: functools.partial(_by_peer, function, query, gallery) for tool, function in peer_tools()}
    peaks = {}
    for contender, run in others.items():
        peaks[contender], elapsed, theirs = _peak_of(run)
        elapsed, theirs = theirs if isinstance(theirs, tuple) else (elapsed, theirs)
        peaks[contender] -= theirs.nbytes / 2**20
        seconds[contender] = [elapsed]
        mAP[contender] = mean_average_precision(theirs, data, Q)
        difference = float(np.abs(np.asarray(theirs) - np.asarray(there)).max())
        print(f"  {contender:<28}{elapsed:9.3f} s  {elapsed / ours:.0f}x ours, {peaks[contender]:.0f} MiB, "
              f"largest difference {difference:.1e}, mAP {100 * mAP[contender]:.10f}%")  # fmt: skip
        del theirs
    peaks["ours"], _ = _memory_of_new_process(source, 0)
    peaks[_INTO] = peaks["ours"]
    measured = {
        contender: {"median_s": median(times), "min_s": min(times), "max_s": max(times)}
        for contender, times in seconds.items()
    }
    case = {"case": f"{name} Q={Q} G={M - Q} D={D}", "rounds": rounds, "contenders": measured}
    return {**case, "neighbours": dict(counts), "stages_s": by_stage, "mAP": mAP, "mebibytes_beyond": peaks}


def _by_reference(query: torch.Tensor, gallery: torch.Tensor) -> Any:
    with reference_backend():
        return k_reciprocal_rerank(query, gallery)


def _by_peer(tool: Callable[..., Any], query: torch.Tensor, gallery: torch.Tensor) -> tuple[float, Any]:
    """Seconds and result of a tool that takes three distance matrices: these count as memory, not as time."""
    matrices = [pairwise_distance(*pair).numpy() for pair in ((query, gallery), (query,), (gallery,))]
    return _timed(lambda: tool(*matrices, 20, 6, 0.3))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds for each size, after one to warm up (default 5)")
    parser.add_argument("--only", default="", help="run the sizes whose name contains this text")
    parser.add_argument("--size", nargs=3, metavar=("Q", "G", "D"), help="run this size alone")
    parser.add_argument("--features", nargs=2, metavar=("QUERY", "GALLERY"), help="run these files alone")
    parser.add_argument("--msmt17", action="store_true", help="also MSMT17's size: time and memory with topk=100")
    parser.add_argument("--peers", action="store_true", help="public tools at every size (minutes, 10 GiB)")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to see that it runs")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        topk, folder, *source = arguments.memory
        measure_memory(int(topk), folder, *source)
        return
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds} was given; at least 1 is needed")
    facts = environment(torch.device("cpu"))
    print(f"retrieval: {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
          f"load {facts['load_average'][0]}")  # fmt: skip
    if facts["load_average"][0] > 0.5:
        print("warning: the machine is not idle; medians may be off", file=sys.stderr)
    sources = {name: size for name, size in SIZES.items() if arguments.only in name}
    if arguments.quick:
        sources = {"quick": (40, 160, 32)}
    for chosen in filter(None, (arguments.size, arguments.features)):
        sources = {"chosen": chosen}
    texts = {name: [str(part) for part in source] for name, source in sources.items()}
    cases = [run_case(name, source, arguments.rounds, arguments.peers) for name, source in texts.items()]
    if arguments.msmt17:
        print(f"\nmsmt17, topk=100: Q={MSMT17[0]} G={MSMT17[1]} D={MSMT17[2]}")
        peak, seconds = _memory_of_new_process([str(number) for number in MSMT17], 100)
        ours = {"median_s": seconds, "min_s": seconds, "max_s": seconds}
        cases.append(
            {"case": "msmt17, topk=100", "rounds": 1, "contenders": {"ours": ours}, "mebibytes_beyond": {"ours": peak}}
        )
    if arguments.output is not None:
        report = {"benchmark": "retrieval", "environment": facts, "cases": cases}
        write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")
        print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
