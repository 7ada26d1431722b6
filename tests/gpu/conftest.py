"""Under ``.ci/gpu`` each test leaves a record as it ends, and a process whose GPU is lost ends at once: the program
starts another one for the tests that are left.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from benchmarks.gpu.records import LOST, Records, device_is_lost

_records = Records()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if item.nodeid not in _records.done]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, None]:
    report = (yield).get_result()
    if _records.path is None:
        return
    if report.when == "setup" and report.passed:
        _records.put(item.nodeid, "begun")
    elif report.when == "call" or not report.passed:
        why = {} if call.excinfo is None else {"why": call.excinfo.exconly().splitlines()[0][:300]}
        _records.put(item.nodeid, report.outcome, seconds=round(report.duration, 2), **why)
        if report.failed and device_is_lost():
            pytest.exit("the GPU is lost", returncode=LOST)
