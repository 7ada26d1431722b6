"""Re-ranking of neighbour lists beside re-ranking of their features, and memory for each image.

"sum" reads the lists and does nothing else, the machine's ceiling. Lists by shards are made of the same products as
those of one process, each pair's twice: "lists, 8 shards" beside "lists".
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks.harness import Suite
from benchmarks.retrieval import features
from vareid_ext import k_reciprocal_from_neighbors, k_reciprocal_rerank
from vareid_ext.retrieval.joint_lists import JointLists, rerank_with_lists

_MEMORY = """
import torch
from benchmarks.lists import circle
from benchmarks.retrieval import _peak_of
from vareid_ext import k_reciprocal_from_neighbors

k_reciprocal_from_neighbors(*circle(300, {k}), 30, topk=100)
lists = circle({M}, {k})
print(_peak_of(lambda: k_reciprocal_from_neighbors(*lists, {Q}, topk=100))[0])
"""


def circle(M: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact lists of M points on a circle: index int32 [M, k] and squared distance float32 [M, k]."""
    step = torch.arange(1, k // 2 + 1, dtype=torch.int32)
    index = (torch.arange(M, dtype=torch.int32)[:, None] + torch.cat([step, -step])) % M
    return index, torch.cat([step, step]).float().square().expand(M, k).contiguous()


def run_case(suite: Suite, Q: int, G: int, D: int, k: int) -> None:
    """Times at one size."""
    data = features(Q, G, D).feature
    query, gallery = data[:Q], data[Q:]

    def lists(shards: int = 1) -> list[torch.Tensor]:
        made = []
        for shard in range(1, shards + 1):
            share = JointLists(query, gallery, k=k, shard=(shard, shards))
            made.append(share.rows(share.begin, share.end))
        return [torch.cat(part) for part in zip(*made, strict=True)]

    index, distance, row_max = lists()
    known = {"topk": 100, "k1": 20, "k2": 6, "lambda_value": 0.3}
    suite.case(
        f"Q={Q} G={G} D={D} k={k}",
        {
            "ours": lambda: k_reciprocal_from_neighbors(index, distance, Q, row_max=row_max, topk=100),
            "from features": lambda: k_reciprocal_rerank(query, gallery, topk=100),
            "from both": lambda: rerank_with_lists(query, gallery, index, distance, row_max, queries=(0, Q), **known),
            "lists": lists,
            "lists, 8 shards": lambda: lists(8),
            "sum": lambda: (index.sum(), distance.sum()),
        },
        bytes_moved={name: index.nbytes + distance.nbytes for name in ("ours", "sum")},
    )


def memory(M: int, k: int) -> None:
    """Prints the peak of re-ranking lists in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _MEMORY.format(M=M, k=k, Q=M // 10)]
    peak = float(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout)
    print(f"lists of {k} of {M} images: {peak:.0f} MiB beyond them and the result, {peak * 2**20 / M:.0f} B an image")


def main() -> None:
    suite = Suite("lists", description=__doc__ or "", rounds=5)
    for Q, G, D, k in [(100, 400, 64, 50)] if suite.quick else [(3368, 15913, 512, 100)]:
        run_case(suite, Q, G, D, k)
    for M, k in [(2000, 50)] if suite.quick else [(100_000, 100), (200_000, 100), (100_000, 200)]:
        memory(M, k)
    suite.finish()


if __name__ == "__main__":
    main()
