"""Models to share: a folder of weights (safetensors), their description (JSON) and a model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
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
    text = json.dumps({"library": LIBRARY, "format": FORMAT, **description}, indent=2)
    with atomic_folder(folder) as draft:
        (draft / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")
        (draft / CARD).write_text(card, encoding="utf-8")
        try:
            # Each tensor once, also where parts share it; safetensors' own save_model fails on those in channels_last.
            once = {id(value): (name, value) for name, value in module.state_dict(keep_vars=True).items()}
            save_file({name: value.detach().contiguous() for name, value in once.values()}, draft / WEIGHTS)
        except SafetensorError as error:  # a full disk
            raise OSError(f"folder: {str(folder)!r} cannot be written: {error}") from error
        # safetensors gives its file to the user alone.
        (draft / WEIGHTS).chmod((draft / DESCRIPTION).stat().st_mode)


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a model's folder.

    Raises:
        FileNotFoundError: the description or the weights are missing.
        ValueError: the description is damaged, of another program, or of a newer version of this one.
    """
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model: {str(folder)!r} holds no {name}")
    path = str(folder / DESCRIPTION)
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model: {path!r} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("library") != LIBRARY:
        raise ValueError(f'model: {path!r} is of another program: it does not say "library": "{LIBRARY}"')
    if found.get("format") != FORMAT:
        raise ValueError(
            f"model: {path!r} has format {found.get('format')!r} of {LIBRARY} {found.get('version')!s:.20}; this is "
            f"{LIBRARY} {__version__}, which reads format {FORMAT}"
        )
    return found


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
