"""Some processes that tests run functions in, all of them at once, as torchrun's would."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

MOST = 3
_SECONDS = 60


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(process: int, port: int, calls: Connection) -> None:
    """Runs the functions it is sent, with a group of the first so many processes, until it is sent None."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=process,
        world_size=MOST,
        timeout=timedelta(seconds=_SECONDS),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    # Pickled here: multiprocessing would send tensors as handles of shared memory, which the receiver may outlive.
    while (call := pickle.loads(calls.recv_bytes())) is not None:
        function, size, arguments = call
        try:
            outcome = function(groups[size], *arguments)
        except Exception as error:
            outcome = error
        calls.send_bytes(pickle.dumps(outcome))


class Processes:
    """`MOST` processes of one group; they live as long as this object is not closed, and begin with its first call."""

    def __init__(self) -> None:
        self._calls: list[Connection] = []
        self._processes: list[Any] = []

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` gives in each of `size` processes, an error where it raises one.

        Args:
            size: 1 to `MOST`.
            function: of a module; tensors in what it takes and gives are copied.
            arguments: can be pickled.
        """
        if not self._processes:
            self._start()
        for calls in self._calls[:size]:
            calls.send_bytes(pickle.dumps((function, size, arguments)))
        return [pickle.loads(calls.recv_bytes()) for calls in self._calls[:size]]

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same; the first error is raised."""
        outcomes = self(size, function, *arguments)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def _start(self) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        for process in range(MOST):
            here, there = context.Pipe()
            self._processes.append(context.Process(target=serve, args=(process, port, there), daemon=True))
            self._processes[-1].start()
            self._calls.append(here)

    def close(self) -> None:
        """End the processes."""
        for calls, process in zip(self._calls, self._processes, strict=True):
            calls.send_bytes(pickle.dumps(None))
            process.join(10)
            process.kill()
