"""What importing the package and the first call of each public function bring along: nothing but torch and numpy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch._dynamo", "torch._inductor", "torchvision", "timm", "matplotlib", "jinja2", "sympy")
CALLS = """
import sys
import torch
import vareid_ext as v

N, K, V, D = 6, 3, 3, 8
y, view = torch.arange(N) % K, torch.arange(N) % V
f, W, U, z, s = (torch.randn(n).requires_grad_() for n in ((N, D), (K, D), (K, V, D), (N, K), (N, K, V)))
losses = [
    v.identity_cross_entropy(z, y),
    v.viewpoint_cross_entropy(s, y, view),
    *v.viewpoint_aware_cross_entropy(z, s, y, view),
    *v.linear_viewpoint_aware_cross_entropy(f, W, U, y, view),
    v.angular_center_regularizer(W, U),
    v.ViewpointAwareLoss(K, D)(f, y, view).total,
    v.pairwise_distance(f, f.detach()).sum(),
]
sum(losses).backward()
v.raise_label_errors()
x, gallery = f.detach(), torch.randn(20, D)
rows = torch.arange(20)
ids, cameras, views = rows % K, rows // 5, rows // 4 % V
labels = y, ids, torch.full((N,), 5), cameras
distance = v.pairwise_distance(x, gallery)
v.nearest_neighbors(x, gallery, k=3)
near, index = v.nearest_neighbors(gallery, k=6)
v.k_reciprocal_from_neighbors(index, near, 5, k1=4, k2=2, topk=3)
v.k_reciprocal_rerank(x, gallery, k1=4, k2=2)
v.re_ranking(distance.numpy(), v.pairwise_distance(x).numpy(), v.pairwise_distance(gallery).numpy(), k1=4, k2=2)
v.rank_queries(distance, *labels)
v.evaluate_ranking(distance, *labels)
v.rank_features(x, gallery, *labels)
v.evaluate_features(x, gallery, *labels)
v.evaluate_cross_viewpoint(gallery, ids, views, cameras)
v.evaluate_single_viewpoint(gallery, ids, views, cameras, repeats=1)
v.backends()
with v.reference_backend():
    v.pairwise_distance(x, gallery)
print([name for name in HEAVY if name in sys.modules])
"""


def test_neither_the_import_nor_a_first_call_brings_a_compiler_or_a_heavy_library() -> None:
    code = f"HEAVY = {HEAVY}\n{CALLS}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
