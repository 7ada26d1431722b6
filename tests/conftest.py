"""What the tests of the operators share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vareid_ext import _native, reference_backend


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test twice: with the compiled kernels (skipped where they are missing), and as plain PyTorch."""
    if request.param == "reference":
        with reference_backend():
            yield request.param
        return
    if not _native.available("cpu"):
        pytest.skip(_native.backends()["cpu"])
    yield request.param
