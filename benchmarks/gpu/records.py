"""What a step tells the program that started it: a line of JSON when a check begins and one when it ends, in a file
that outlives the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LOST = 75  # the exit status of a process whose GPU answers nothing any more


class Skip(Exception):  # noqa: N818
    """Raised by a check that cannot be made here; says why."""


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record: its ``name``, its ``status`` ("begun", "passed", "failed" or "skipped") and more."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Each check's records put together, by name, in the order in which they began; a line cut short is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["name"]] = {**found.get(record["name"], {}), **record}
    return found


def device_is_lost() -> bool:
    """Whether an earlier fault makes every further call of this process to its GPU fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


class Records:
    """A step's checks and their records, in the file that VAREID_GPU_RECORDS names; without it they are only printed.

    A check that the file holds already is left out: the step has been started again.
    """

    def __init__(self) -> None:
        path = os.environ.get("VAREID_GPU_RECORDS")
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        found = {} if self.path is None else read_records(self.path)
        self.done = {name for name, record in found.items() if record["status"] != "begun"}

    def put(self, name: str, status: str, **values: Any) -> None:
        """Append a record; status "begun", "passed", "failed" or "skipped"."""
        with self._lock:
            print(name, status, *(f"{key}: {value}" for key, value in values.items()), sep="; ", flush=True)
            if self.path is not None:
                append_record(self.path, {"name": name, "status": status, **values})

    def check(self, name: str, run: Callable[[], dict[str, Any] | None], **predicted: Any) -> None:
        """Make a check that is not done yet: it fails if ``run`` raises, else its record holds what that returns."""
        if name in self.done:
            return
        self.put(name, "begun", **predicted)
        start = time.monotonic()
        try:
            values, status = run() or {}, "passed"
        except Skip as reason:
            values, status = {"why": str(reason)}, "skipped"
        except Exception as error:
            traceback.print_exc()
            values, status = {"why": first_line(error)}, "failed"
        self.put(name, status, **values, seconds=round(time.monotonic() - start, 2))
        if status == "failed" and device_is_lost():
            sys.exit(LOST)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What prepares some checks and makes them: if that raises, it is a failed record, and the step goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.put(name, "failed", why=first_line(error))
            if device_is_lost():
                sys.exit(LOST)

    def neighbour(self, step: str) -> dict[str, dict[str, Any]]:
        """The records of another step of the same run; none where there is no such file."""
        return {} if self.path is None else read_records(self.path.with_name(f"{step}.jsonl"))


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"
