"""Runs the tests of kernels in a forked worker process: a defect that ends the process fails its own test only.

What the worker has loaded and recorded serves the tests that follow. When it ends, the next test forks another one.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from multiprocessing.connection import Connection

import pytest
import torch
from _pytest.runner import runtestprotocol

LIMIT = 3600  # seconds for a test: the first one compiles the kernels


def _serve(session: pytest.Session, pipe: Connection) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the run
    to_plain = session.config.hook.pytest_report_to_serializable
    while True:
        place, filters = pipe.recv()
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            warnings.filters[:] = filters
            reports = runtestprotocol(session.items[place], log=False)
        plain = [to_plain(config=session.config, report=report) for report in reports]
        pipe.send((plain, [(str(w.message), w.category, w.filename, w.lineno) for w in caught]))


class Worker:
    def __init__(self, session: pytest.Session) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(session, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, item: pytest.Item) -> list[pytest.TestReport]:
        try:
            self.pipe.send((item.session.items.index(item), warnings.filters))
            if not self.pipe.poll(LIMIT):
                self.process.kill()
            plain, warned = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            text = f"the test's process ended by {reason}"
            return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]
        for warning in warned:
            warnings.warn_explicit(*warning)
        from_plain = item.config.hook.pytest_report_from_serializable
        return [from_plain(config=item.config, data=data) for data in plain]


_worker: Worker | None = None


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """The hook of ``conftest.py`` in the folders whose tests run kernels of the harness."""
    global _worker
    folder = item.path.parent.name
    runs_kernels = folder == "cuda_on_cpu" or (folder == "large" and "cuda" in item.nodeid)
    if not runs_kernels or item.config.option.usepdb:
        return None
    if _worker is None or not _worker.process.is_alive():
        _worker = Worker(item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _worker.run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # what the test before it left for this one
    return True
