"""What the tests of the operators share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import Processes
from vareid_ext import _native, reference_backend


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules that compute when they are imported start no threads, whose pool would hang in a forked process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that run in a forked process come before those that start threads in this one."""
    items.sort(key=lambda item: item.path.parent.name != "cuda_on_cpu")


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


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Processes that run a function each, as one group."""
    with contextlib.closing(Processes()) as processes:
        yield processes


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run on rendered images, with stripes, a moving average and its features."""
    from tests.test_train import SMALL
    from vareid_ext.cli import train

    output = tmp_path_factory.mktemp("runs") / "small"
    arguments = [*SMALL, "--ema-decay=0.9", "--local", "--save-features", "--baselines=false"]
    assert train.main([*arguments, "--output", str(output)]) == 0
    return output
