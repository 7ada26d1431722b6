"""Models to share: a folder of weights (safetensors), their description (JSON) and a model card."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from vareid_ext._version import __version__
from vareid_ext.files.atomic import atomic_folder

FORMAT = 1
"""Raised whenever the entries of a description change their meaning."""
LIBRARY = "vareid_ext"
DESCRIPTION, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (DESCRIPTION, WEIGHTS, CARD)
HUB = "hf://"
"""What the name of a model on the Hugging Face Hub begins with."""

_HUB_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(.+))?")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds_numbers(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, dict) and all(map(_holds_numbers, value.values())))


def _is_list_of(kind: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(kind, value))


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda v: isinstance(v, str),
    "a text or null": lambda v: v is None or isinstance(v, str),
    "a text of 64 hexadecimal digits": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None,
    "true or false": lambda v: isinstance(v, bool),
    "a whole number from 0 on": lambda v: type(v) is int and v >= 0,
    "a whole number from 1 on": lambda v: type(v) is int and v >= 1,
    "a number": _is_number,
    "a list of numbers": lambda v: _is_list_of(_is_number, v),
    "a list of texts": lambda v: _is_list_of(lambda t: isinstance(t, str), v),
    "a list of objects of numbers": lambda v: _is_list_of(lambda o: isinstance(o, dict) and _holds_numbers(o), v),
    "an object of numbers and such objects": lambda v: isinstance(v, dict) and _holds_numbers(v),
    "an object": lambda v: isinstance(v, dict),
    "a list of objects": lambda v: _is_list_of(lambda o: isinstance(o, dict), v),
}
_ENTRIES: Mapping[str, Any] = {
    "library": "a text",
    "format": "a whole number from 1 on",
    "sha256": "a text of 64 hexadecimal digits",
    "version": "a text",
    "license": "a text or null",
    "preprocessing": {
        "height": "a whole number from 1 on",
        "width": "a whole number from 1 on",
        "mean": "a list of numbers",
        "std": "a list of numbers",
        "flip": "true or false",
        "normalize": "a text",
    },
    "feature_dim": "a whole number from 1 on",
    "identity_names": "a list of texts",
    "num_viewpoints": "a whole number from 1 on",
    "progress": {
        "step": "a whole number from 0 on",
        "stage": "a whole number from 0 on",
        "seconds": "a number",
        "baselines": "an object of numbers and such objects",
        "evaluations": "a list of objects of numbers",
    },
    "training_data": {"name": "a text", "license": "a text or null"},
    "metrics": "an object of numbers and such objects",
    "config": {
        "data": "an object",
        "sampler": "an object",
        "model": "an object",
        "method": "an object",
        "loss": "an object",
        "optimizer": "an object",
        "stages": "a list of objects",
        "evaluation": "an object",
        "run": "an object",
    },
}
"""What a description holds: of each entry what it must be, or its own entries."""


def is_pretrained(folder: Path) -> bool:
    """Whether a folder may be one of :func:`write_pretrained`: it has the description or the weights."""
    return any((folder / name).is_file() for name in (DESCRIPTION, WEIGHTS))


def check_target(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder as a Path, or an error if no model can be written there.

    Raises:
        FileExistsError: it holds a model and `overwrite` is off, or it holds other files.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"folder: {str(path)!r} is a file; a folder is needed")
    held = sorted(os.listdir(path)) if path.is_dir() else []
    others = [name for name in held if name not in FILES]
    if others:
        raise FileExistsError(f"folder: {str(path)!r} holds {others[0]!r}, which is no part of a model; choose another")
    if held and not overwrite:
        raise FileExistsError(
            f"folder: {str(path)!r} holds {held[0]!r} already; overwrite=True (--overwrite) replaces the model; or "
            "choose another folder"
        )
    return path


def write_pretrained(folder: Path, module: nn.Module, description: Mapping[str, Any], card: str) -> None:
    """Write a model's folder as a whole, in place of what :func:`check_target` allows to be there.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_folder(folder) as draft:
        (draft / CARD).write_text(card, encoding="utf-8")
        try:
            # Each tensor once, also where parts share it; safetensors' own save_model fails on those in channels_last.
            once = {id(value): (name, value) for name, value in module.state_dict(keep_vars=True).items()}
            save_file({name: value.detach().contiguous() for name, value in once.values()}, draft / WEIGHTS)
        except SafetensorError as error:  # a full disk
            raise OSError(f"folder: {str(folder)!r} cannot be written: {error}") from error
        begin = {"library": LIBRARY, "format": FORMAT, "sha256": _sha256(draft / WEIGHTS)}
        text = json.dumps({**begin, **description}, indent=2)
        (draft / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")
        # safetensors gives its file to the user alone.
        (draft / WEIGHTS).chmod((draft / DESCRIPTION).stat().st_mode)


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a model's folder.

    Raises:
        FileNotFoundError: the description or the weights are missing.
        ValueError: the description is damaged, of another program, or of a newer version of this one; an entry is
            missing, unknown or not what it must be; the weights are not those that it was written for.
    """
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model: {str(folder)!r} holds no {name}")
    path = str(folder / DESCRIPTION)
    if not is_of_this_program(folder):
        raise ValueError(f'model: {path!r} is of another program: it does not say "library": "{LIBRARY}"')
    found = _parse(folder / DESCRIPTION)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"model: {path!r} has format {found.get('format')!r} of {LIBRARY} {found.get('version')!s:.20}; this is "
            f"{LIBRARY} {__version__}, which reads format {FORMAT}"
        )
    _check_entries(found, _ENTRIES, path)
    if _sha256(folder / WEIGHTS) != found["sha256"]:
        raise ValueError(
            f"model: {str(folder / WEIGHTS)!r} is not the file that {path!r} was written with: its SHA-256 is another; "
            "copy or download the folder again"
        )
    return found


def is_of_this_program(folder: Path) -> bool:
    """Whether a folder has the description of a model of :func:`write_pretrained`; ValueError where it is no JSON."""
    found = _parse(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else None
    return isinstance(found, dict) and found.get("library") == LIBRARY


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model: {str(path)!r} is not JSON: {error}") from error


def _check_entries(found: Mapping[str, Any], entries: Mapping[str, Any], path: str, section: str = "") -> None:
    """ValueError where an entry is missing, unknown, or not what it must be."""
    for name in [*entries, *found]:
        key = f"model: {path!r}: {section}{name:.60}"
        if name not in entries:
            raise ValueError(f"{key} was given; allowed are {', '.join(section + known for known in entries)}")
        if name not in found:
            raise ValueError(f"{key}: nothing was given; {_allowed(entries[name])} is needed")
        value, kind = found[name], entries[name]
        if not (isinstance(value, dict) if isinstance(kind, dict) else _KINDS[kind](value)):
            raise ValueError(f"{key}: {json.dumps(value):.60} was given; {_allowed(kind)} is needed")
        if isinstance(kind, dict):
            _check_entries(value, kind, path, f"{section}{name}.")


def _allowed(kind: Any) -> str:
    return f"an object of {', '.join(kind)}" if isinstance(kind, dict) else kind


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_weights(folder: Path, module: nn.Module) -> None:
    """Fill a module with the weights of a model's folder.

    Raises:
        ValueError: they are damaged, or of another network.
    """
    try:
        load_model(module, folder / WEIGHTS)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: {str(folder / WEIGHTS)!r} cannot be loaded: {reason:.300}") from error


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub, from the cache of its library where it is there already.

    Args:
        name: hf://owner/name, and @revision (a branch, tag or commit) where it is not to be the newest.

    Raises:
        ValueError: the name is not of this form.
        OSError: there is no such model or revision, it may not be read, or the Hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"run: {name!r} was given; a model of the Hub is hf://owner/name or hf://owner/name@revision")
    repository, revision = match.groups()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[DESCRIPTION, WEIGHTS]))
    except errors.HFValidationError as error:
        raise ValueError(f"run: {name!r} was given, which the Hub does not take as a name: {error}") from error
    except errors.GatedRepoError as error:
        reason = "its owner must give you access first; ask on its page, then log in (hf auth login)"
        raise OSError(f"{name}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "the Hub has no such model, or it is private and you are not logged in (hf auth login)"
        raise OSError(f"{name}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{name}: the model has no revision {revision!r}") from error
    except OSError as error:
        cause = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{name}: the Hub cannot be reached, and the model was not downloaded before ({cause})"
        ) from error
