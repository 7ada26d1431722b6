"""Every barrier of every kernel of csrc/cuda is removed in turn, and the checker must notice.

A barrier whose removal goes unnoticed is either redundant (delete it), not reached by the row's tests (add a case), or
a hole in the checker (fix it).
"""

from __future__ import annotations

import functools
import re

import pytest

from tests.cuda_on_cpu import build, rows
from tests.cuda_on_cpu.harness import KernelDefect, Launcher, package

pytestmark = pytest.mark.skipif(bool(build.missing_reason()), reason=build.missing_reason() or "g++ is here")


def barriers() -> list[tuple[str, int]]:
    """File (as messages name it) and line of each barrier in the kernels' sources."""
    found = []
    for path in sorted([*build.KERNELS.glob("*.cu"), *build.KERNELS.glob("*.cuh")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            calls = re.findall(r"__sync(?:threads|warp)\w*\s*\(", line.split("//")[0])
            assert len(calls) <= 1, f"{path.name}:{number}: one barrier a line, so that each can be removed alone"
            if calls:
                found.append((str(path.relative_to(build.ROOT)), number))
    return found


@functools.cache
def calls(row: str) -> list[rows.Call]:
    return rows.recorded_calls(row)


def _own_row_first(file: str) -> list[str]:
    """All rows: one row's tests may run another row's kernels."""
    stem = file.rsplit("/", 1)[-1].removesuffix(".cu")
    return sorted(rows.row_names(), key=lambda row: row != stem)


def _noticed(site: tuple[str, int], recorded: list[rows.Call]) -> bool:
    library = package("checker")
    library.disable_barrier(site)
    try:
        for order in ("forward", "reverse"):
            for call in recorded:
                try:
                    with Launcher(library, order) as launcher:
                        call.replay(launcher)
                except KernelDefect:
                    return True
    finally:
        library.disable_barrier(None)
    return False


@pytest.mark.parametrize("site", barriers() if not build.missing_reason() else [], ids=lambda s: f"{s[0]}:{s[1]}")
def test_a_removed_barrier_is_noticed(site: tuple[str, int]) -> None:
    reached = False
    for row in _own_row_first(site[0]):
        recorded = [call for call in calls(row) if any(_is(site, s) for s in call.sites)]
        if not recorded:
            continue
        reached = True
        own = next(s for call in recorded for s in call.sites if _is(site, s))
        if _noticed(own, recorded):
            return
    assert reached, f"no test of a row runs the barrier at {site[0]}:{site[1]}"
    pytest.fail(f"the barrier at {site[0]}:{site[1]} can be removed unnoticed")


def _is(site: tuple[str, int], executed: tuple[str, int]) -> bool:
    """Whether a barrier that ran is the one of the source; headers are named by absolute path at run time."""
    return executed[1] == site[1] and executed[0].endswith(site[0])
