"""Checkpoints: written atomically, readable with ``torch.load(weights_only=True)``, with all that a run is made of."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vareid_ext.files.atomic import atomic_file

FORMAT = 2
"""Raised whenever the entries of a checkpoint change their meaning."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; the folder must exist.

    Args:
        path: the file.
        state: nested dictionaries and lists of tensors, numbers, strings, booleans and None.
    """
    # To memory first: torch's writer turns what a write raises, a full disk or a signal, into an error of its own.
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    with atomic_file(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`save_checkpoint` to the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of this program or of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {str(path)!r}")
    state = read_tensors(path, "checkpoint")
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint: {str(path)!r} has format {found!r}; this program reads format {FORMAT}")
    return state


def read_tensors(path: Path, what: str) -> Any:
    """A file of ``torch.save``, to the CPU, without running code; a ValueError that begins with `what` if damaged."""
    try:
        check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch fail with whatever it runs into
        raise ValueError(f"{what}: {str(path)!r} cannot be read: {in_short(error)}") from error


def check_zip(path: Path) -> None:
    """An error if a zip file of ``torch.save`` is not as it was written: ``torch.load`` looks at no checksum."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's own criterion: the format before PyTorch 1.6 has no checksums
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes; allowed are uncompressed files")
        # A folder's members are not read by torch, which then takes whatever the memory holds for them.
        folders = (member.filename for member in members if member.external_attr & 0x10)
        # A writer may leave the checksums out, and has then left out all.
        if any(member.CRC for member in members) and (damaged := archive.testzip() or next(folders, None)):
            raise ValueError(f"{damaged!r} in it is not what was written")


def in_short(error: Exception) -> str:
    """The first line of an error. Of torch's long one, which advises to run what the file holds, what is wrong."""
    _, unpickling, wrong = str(error).partition("WeightsUnpickler error:")
    if unpickling:
        wrong = wrong.strip().partition("\n")[0].partition(". ")[0]
        return f"it holds more than tensors and plain values ({wrong})"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def random_state() -> dict[str, Any]:
    """The state of every random number generator of the process, as a checkpoint can hold it."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words_of_numpy = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), words_of_numpy, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to a state of :func:`random_state`; CUDA's where as many devices are there as then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
