"""More rows than a grid holds: launchers refuse them before they touch anything, and leave none of them out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.harness import Launcher, LauncherError, package

pytestmark = pytest.mark.skipif(bool(build.missing_reason()), reason=build.missing_reason())

GRID, SAMPLES = 1 << 31, (1 << 29) + 1
# Launcher, place of the size among its arguments, the size, what the error says.
TOO_MANY = [
    ("angular_center_forward_cuda", 8, GRID, r"identity_centers: at most 2\^31 - 1 rows"),
    ("angular_center_forward_cuda", 9, 2049, "viewpoint_centers: at most 2048"),
    ("angular_center_backward_cuda", 10, GRID, r"identity_centers: at most 2\^31 - 1 rows"),
    ("cross_entropy_forward_flat", 18, SAMPLES, r"identity: at most 2\^29 samples"),
    ("cross_entropy_backward_flat", 17, SAMPLES, r"identity: at most 2\^29 samples"),
    ("linear_summarise_flat", 3, SAMPLES, r"identity: at most 2\^29 samples"),
    ("linear_gradient_flat", 3, SAMPLES, r"identity: at most 2\^29 samples"),
    ("linear_viewpoint_aware_cross_entropy_inverse_norms_cuda", 2, GRID, r"at most 2\^31 - 1 centres"),
    ("linear_viewpoint_aware_cross_entropy_project_cuda", 3, GRID, r"at most 2\^31 - 1 centres"),
    ("pairwise_distance_block_cuda", 4, 2_097_121, "block: more rows than a grid holds"),
    ("pairwise_distance_tiled_cuda", 6, 4_194_241, "block: more rows than a grid holds"),
    ("ranking_forward_cuda", 15, GRID, r"distances: at most 2\^31 - 1 rows"),
    ("k_reciprocal_blend_cuda", 2, GRID, r"launch: 2147483648 blocks"),
    ("nearest_neighbors_rescan_cuda", 3, GRID, r"launch: 2147483648 blocks"),
]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher(package("checker")) as launch:
        yield launch


@pytest.mark.parametrize(("function", "place", "size", "what"), TOO_MANY)
def test_too_many(launcher: Launcher, function: str, place: int, size: int, what: str) -> None:
    """With null pointers: a launch would not end in an exception."""
    _, parameters, _ = launcher.library.launchers[function]
    arguments = [None if parameter.endswith("*") else 1 for parameter in parameters[:-2]]
    arguments[place] = size
    with pytest.raises(LauncherError, match=what):
        launcher(function, *arguments)
