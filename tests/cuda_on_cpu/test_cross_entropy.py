"""Facts of the cross-entropy kernels that no result shows: bad labels, and the bytes they move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import vareid_ext
from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.backend import cuda_on_cpu
from tests.cuda_on_cpu.harness import Launcher, Partial, package

pytestmark = pytest.mark.skipif(bool(build.missing_reason()), reason=build.missing_reason())

N, K, V = 4, 7, 3


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher(package("checker")) as launch:
        yield launch


def forward(launch: Launcher, identity: torch.Tensor, viewpoint: torch.Tensor, mask: torch.Tensor) -> tuple:
    """(losses [2, N], statistics [2, 5, N], what was noted [2]) of random logits, reduction none."""
    rng = torch.Generator().manual_seed(0)
    z, s = torch.randn(N, K, generator=rng), torch.randn(N, K, V, generator=rng)
    losses, statistics = torch.empty(2, N), torch.empty(2, 5, N, dtype=torch.float64)
    noted = torch.zeros(2, dtype=torch.int64)
    soft = viewpoint.is_floating_point()
    workspace = torch.empty(launch("cross_entropy_workspace_flat", N, K, 1, V), dtype=torch.uint8)
    launch(
        "cross_entropy_forward_flat", True, z, K, True, s, K * V, V, identity, None if soft else viewpoint,
        viewpoint if soft else None, mask, losses[0], losses[1], statistics, True, 0.2, 0.1, 0, N, K, 2, Partial(noted),
        Partial(workspace),
    )  # fmt: skip
    return losses, statistics, noted


GOOD = torch.tensor([0, 3, 6, 3])
VIEWS = torch.tensor([0, -1, 2, 1])
EMPTY = torch.ones(K, V, dtype=torch.bool)
EMPTY[6] = False
WITHOUT = torch.ones(K, V, dtype=torch.bool)
WITHOUT[3, 1] = False
ALL = torch.ones(K, V, dtype=torch.bool)
SOFT = torch.full((N, V), 1 / 3, dtype=torch.float64)
NEGATIVE = SOFT.clone()
NEGATIVE[2] = torch.tensor([1.5, -0.5, 0])
SHORT = SOFT.clone()
SHORT[1, 0] = 0.2


@pytest.mark.parametrize(
    ("identity", "viewpoint", "mask", "code", "bad_of_heads"),
    [
        (torch.tensor([0, 3, K, 3]), VIEWS, ALL, 1, ([2], [2])),
        (torch.tensor([0, -1, 2, -(2**62)]), VIEWS, ALL, 1, ([1, 3], [1, 3])),
        (torch.tensor([2**62, 3, 2, 3]), VIEWS, WITHOUT, 1, ([0], [0, 3])),
        (GOOD, torch.tensor([0, -1, V, 1]), ALL, 2, ([], [2])),
        (GOOD, torch.tensor([-2, -1, 0, 1]), ALL, 2, ([], [0])),
        (GOOD, VIEWS, WITHOUT, 3, ([], [3])),
        (GOOD, SOFT, WITHOUT, 3, ([], [1, 3])),
        (GOOD, NEGATIVE, ALL, 4, ([], [2])),
        (GOOD, SHORT, ALL, 4, ([], [1])),
        (GOOD, VIEWS, EMPTY, 5, ([], [2])),
        (GOOD, VIEWS, ALL, 0, ([], [])),
    ],
)
def test_bad_labels_make_their_row_nan_and_are_noted(launcher, identity, viewpoint, mask, code, bad_of_heads):
    losses, statistics, noted = forward(launcher, identity, viewpoint, mask)
    for head, bad in enumerate(bad_of_heads):
        assert losses[head].isnan().nonzero().flatten().tolist() == bad
        assert statistics[head].isnan().all(0).nonzero().flatten().tolist() == bad
        assert int(noted[head]) == (8 * bad[0] + code if bad else -1)


def test_a_noted_label_is_raised_by_the_next_call(monkeypatch: pytest.MonkeyPatch):
    from vareid_ext.ops import _labels

    slot = torch.tensor([0, 8 * 5 + 3])
    device = torch.device("cuda", 0)
    monkeypatch.setitem(_labels._label_errors, device, slot)
    with pytest.raises(ValueError, match="viewpoint: one that the mask excludes, at row 5 of an earlier batch"):
        _labels.label_error_slot(device)
    assert slot.tolist() == [0, 0]
    assert _labels.label_error_slot(device) is slot
    slot[0] = 8 * 2 + 1
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    vareid_ext.raise_label_errors("cpu")
    with pytest.raises(IndexError, match="identity: out of range, at row 2"):
        vareid_ext.raise_label_errors(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [5003, 12000])
def test_bytes_moved_and_coalescing(dtype: torch.dtype, K: int):
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(4, K, generator=rng).to(dtype).requires_grad_()
    s = torch.randn(4, K, V, generator=rng).to(dtype).requires_grad_()
    library = package("checker")
    with Launcher(library) as launch, cuda_on_cpu(launch), library.measuring() as traffic:
        L_y, L_v = vareid_ext.viewpoint_aware_cross_entropy(z, s, GOOD, VIEWS)
        (L_y + L_v).backward()
    moved = {name: t for name, t in traffic.items() if "forward_kernel" in name or "backward_kernel" in name}
    assert len(moved) == 2
    for name, t in moved.items():
        logits = (z.numel() + s.numel()) * z.element_size()
        least = logits * (2 if "backward" in name else 1)
        assert t.bytes_loaded + t.bytes_stored <= 1.05 * least, name
        assert t.coalescing >= 0.95, name
        assert t.wavefront_ratio <= 1.1, name
