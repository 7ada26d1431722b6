"""Step: whole jobs. Neighbours, re-ranking and evaluation at the sizes of Market-1501 and MSMT17, filtered by products
of bfloat16 and of float32, beside one product of each and a dense PyTorch re-ranking on the same GPU; a training step
of the Market recipe; the default training run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vareid_ext
from benchmarks import train_step
from benchmarks.gpu.records import Records, Skip
from benchmarks.gpu.step import DEVICE, DRY_RUN, Clock, check_native, peak_mebibytes
from benchmarks.harness import Suite
from benchmarks.retrieval import MSMT17, Data, features
from tests.bfloat16 import multiply
from vareid_ext.ops import _bfloat16_filter
from vareid_ext.ops._matmul import full_float32
from vareid_ext.ops._progress import counted
from vareid_ext.training.command_line import parse

MARKET = (3368, 15913, 2048)
_DIFFERENT = 1e-3  # beyond this a result is another one; in float32 near ties may change a few neighbour sets


def dense_reranking(query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3) -> Tensor:
    """The usual way on a GPU: dense M x M matrices in float32, and a loop over the queries."""
    x = torch.cat([query, gallery])
    squares = x.square().sum(1)
    distance = (squares[:, None] + squares).addmm_(x, x.T, alpha=-2).clamp_(min=0)
    distance /= distance.amax(1, keepdim=True)
    M, Q, half = len(x), len(query), round(k1 / 2)
    rank = distance.topk(min(M, k1 + 1), largest=False).indices

    def mutual(k: int) -> Tensor:
        near = rank[:, : k + 1]
        return (near[near] == torch.arange(M, device=x.device)[:, None, None]).any(2)

    base, half_base = mutual(k1), mutual(half)
    member = torch.zeros(M, M, dtype=torch.bool, device=x.device).scatter_(1, rank, base)
    theirs = rank[:, : half + 1][rank]  # [M, k1 + 1, half + 1]: the half lists of the candidates
    valid = half_base[rank]
    shared = (member.gather(1, theirs.flatten(1)).view_as(theirs) & valid).sum(2)
    joined = base & (3 * shared > 2 * valid.sum(2))
    add = (valid & joined[:, :, None]).flatten(1)
    rows = torch.arange(M, device=x.device)[:, None].expand_as(add)
    member[rows[add], theirs.flatten(1)[add]] = True
    V = torch.where(member, torch.exp(-distance), 0)
    V /= V.sum(1, keepdim=True)
    if k2 > 1:
        V = torch.cat([V[some].mean(1) for some in rank[:, :k2].split(256)])
    owners = V[Q:].T.contiguous()  # [M, G]
    final = distance[:Q, Q:] * weight
    for q in range(Q):
        columns = V[q].nonzero()[:, 0]
        total = torch.minimum(owners[columns], V[q, columns, None]).sum(0)
        final[q] += (1 - weight) * (1 - total / (2 - total))
    return final


class Sized:
    """One data set's size: its features and labels on the device."""

    def __init__(self, name: str, size: tuple[int, int, int]) -> None:
        self.name, (self.Q, G, D) = name, (20, 100, 32) if DRY_RUN else size
        self.data: Data = features(self.Q, G, D)
        self.feature = self.data.feature.to(DEVICE)
        self.query, self.gallery = self.feature[: self.Q], self.feature[self.Q :]
        labels = (self.data.identity, self.data.camera)
        self.labels = [part.to(DEVICE) for x in labels for part in (x[: self.Q], x[self.Q :])]
        self.result: Tensor | None = None

    def product(self) -> None:
        """One float32 product of all rows with all, what the distances alone would take."""
        with full_float32(DEVICE.type):
            torch.mm(self.feature, self.feature.T)

    def rounded_product(self) -> None:
        """The same of the rows rounded to bfloat16, with a result of float32."""
        rounded = self.feature.bfloat16()
        multiply(rounded, rounded, self.feature.new_empty(len(rounded), len(rounded)))

    def timed(self, clock: Clock, run: Callable[[], Any]) -> dict[str, Any]:
        """Milliseconds of a job and of the products, in turn; its memory, and how many rows were filtered by which
        products and done again.
        """
        needed = 4 * len(self.feature) ** 2
        if not DRY_RUN and needed > 0.8 * torch.cuda.mem_get_info()[0]:
            raise Skip(f"the product takes {needed >> 30} GiB")
        product, rounded, ours = clock.medians([self.product, self.rounded_product, run], 6, most=5)
        with counted() as counts:
            run()
        return {
            "ms": ours * 1e3, "product ms": product * 1e3, "over the product": ours / product,
            "bfloat16 product ms": rounded * 1e3, "over that": ours / rounded, "MiB at the peak": peak_mebibytes(run),
            "rows": ", ".join(f"{number} {what}" for what, number in counts.items()),
        }  # fmt: skip

    def check(self, records: Records, clock: Clock) -> None:
        """The jobs of this size."""
        jobs: dict[str, Callable[[], Any]] = {
            "nearest_neighbors, k 21": lambda: vareid_ext.nearest_neighbors(self.feature, k=21),
            "k_reciprocal_rerank": lambda: vareid_ext.k_reciprocal_rerank(self.query, self.gallery),
            "k_reciprocal_rerank, topk 100": lambda: vareid_ext.k_reciprocal_rerank(self.query, self.gallery, topk=100),
            "evaluate_features, rerank": lambda: vareid_ext.evaluate_features(
                self.query, self.gallery, *self.labels, rerank=True
            ),
            "evaluate_features": lambda: vareid_ext.evaluate_features(self.query, self.gallery, *self.labels),
        }
        for job, run in jobs.items():
            records.check(f"{self.name}: {job}", lambda run=run: self.timed(clock, run))
        with mock.patch.object(_bfloat16_filter.BFloat16Filter, "pays", return_value=False):
            for job, run in list(jobs.items())[:3]:
                records.check(f"{self.name}: {job}, by float32 products", lambda run=run: self.timed(clock, run))

    def against_dense(self) -> dict[str, Any]:
        """The dense re-ranking once: how long, and how far its result is from ours."""
        ours = vareid_ext.k_reciprocal_rerank(self.query, self.gallery)
        results: list[Tensor] = []
        with full_float32(DEVICE.type):
            dense_reranking(self.query[:200], self.gallery[:800])
            seconds = Clock().seconds(lambda: results.append(dense_reranking(self.query, self.gallery)))
        difference = (ours - results[0]).abs()
        share = float((difference > _DIFFERENT).double().mean())
        assert share < 0.01, f"{share:.1%} of the distances differ by more than {_DIFFERENT}"
        return {"dense ms": seconds * 1e3, "largest difference": float(difference.max()), "share that differs": share}


def market_step() -> dict[str, Any]:
    """A training step of the Market recipe, its own network and batch: images a second and each part's share."""
    small = ["--model.backbone=resnet18", "--data.height=64", "--data.width=32"] if DRY_RUN else []
    batch = ["--sampler.identities=2", "--sampler.instances=2"] if DRY_RUN else []
    config = parse(["--recipe=market1501-va-reid", "--root=unused", *small, *batch]).config
    suite = Suite("train_step", arguments=["--device", str(DEVICE), "--rounds", "1" if DRY_RUN else "5"])
    train_step.run_case(suite, "recipe market1501-va-reid", config, 751)
    record = suite.results[0]
    whole = record["contenders"]["whole step"]["median_s"]
    images = config.sampler.identities * config.sampler.instances
    shares = {f"share of the {part}": share for part, share in record["shares"].items()}
    return {"ms": whole * 1e3, "images/s": images / whole, **shares}


def default_run() -> dict[str, Any]:
    """``python -m vareid_ext.train`` on the GPU: seconds and what was reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vareid_ext.train", "--output", f"{folder}/run", "--run.device", DEVICE.type]
        if DRY_RUN:
            command += ["--optimizer.epochs=1", "--data.synthetic.identities_train=16", "--sampler.identities=4",
                        "--data.synthetic.identities_test=4", "--data.synthetic.distractors=2",
                        "--sampler.batches_per_epoch=2", "--evaluation.baselines=false"]  # fmt: skip
        else:
            command += [f"--data.workers={min(8, os.cpu_count() or 1)}"]
        start = time.monotonic()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        metrics = json.loads(Path(folder, "run", "metrics.json").read_text())
    return {"s": seconds, "mAP": metrics["trained"]["mAP"], "re-ranked mAP": metrics["reranked"]["mAP"]}


def main() -> None:
    check_native()
    torch.manual_seed(0)
    records, clock = Records(), Clock()
    with records.section("Market-1501"):
        market = Sized("Market-1501", MARKET)
        market.check(records, clock)
        records.check("Market-1501: against a dense re-ranking", market.against_dense)
        del market
    records.check("training step of the Market recipe", market_step)
    records.check("default training run", default_run)
    with records.section("MSMT17"):
        Sized("MSMT17", MSMT17).check(records, clock)


if __name__ == "__main__":
    main()
