"""Weights of a file into a network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vareid_ext.files.checkpoint import FORMAT, read_tensors

_WRAPPERS = re.compile(r"((module|_orig_mod)\.)*")
_PREFIXES = re.compile(r"((module|_orig_mod|base|model|backbone|trunk)\.)*")


def load_weights(
    network: nn.Module,
    path: str,
    *,
    trunk: str = "backbone.trunk",
    heads: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Load a file of weights into a network.

    A run's checkpoint, or the weights of a whole network of this package, fill the network completely, but for the
    heads: of a run with a moving average, the average. Any other file fills the trunk.

    Args:
        network: what is trained, heads included.
        path: .safetensors, or a file that ``torch.load(weights_only=True)`` reads: the weights, or a dictionary with
            them under "state_dict" or "model". Prefixes "module.", "_orig_mod.", "base.", "model.", "backbone." and
            "trunk." are removed; batch norms may come without "num_batches_tracked".
        trunk: name of the network's part that weights of other programs are for.
        heads: names of the parts that belong to the training identities; they stay as they are.
        settings: section `model` of the configuration, which that of a checkpoint must equal.

    Returns:
        The file's entries that the trunk has no place for, such as its classifier.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged or holds other than tensors; weights are missing, have another shape or are not
            finite numbers, and the first ones are named beside what the file holds; the checkpoint is of another
            network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    found = _read_weights(path)
    if isinstance(found, Mapping) and found.get("format") == FORMAT and isinstance(found.get("config"), Mapping):
        _check_settings(settings or {}, found["config"].get("model"), path)
        found = found.get("average") or found
    for key in ("state_dict", "method", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"weights: {path!r} holds {type(found).__name__}, not a dictionary of weights")
    whole = {_WRAPPERS.sub("", str(key), count=1): value for key, value in found.items()}
    if any(key.startswith(f"{trunk}.") for key in whole):
        whole.pop("n_averaged", None)
        left_out = _fill(network, whole, path, found, skip=heads)
        if left_out:
            raise ValueError(f"weights: {path!r} is of another network, with {left_out[0]!r}")
        return ()
    weights = {_PREFIXES.sub("", str(key), count=1): value for key, value in found.items()}
    if len(weights) < len(found):
        raise ValueError(f"weights: {path!r} holds several networks: {_describe(found)}")
    return _fill(network.get_submodule(trunk), weights, path, found)


def _check_settings(settings: Mapping[str, Any], trained: Any, path: str) -> None:
    """ValueError if a checkpoint's network computes something else from its weights than this one would."""
    for name, value in settings.items() if isinstance(trained, Mapping) else ():
        if name not in ("pretrained", "weights") and json.dumps(trained.get(name)) != json.dumps(value):
            raise ValueError(
                f"weights: {path!r} was trained with model.{name} {trained.get(name)!r}; {value!r} was given, and a "
                "checkpoint is loaded as a whole"
            )


def _fill(
    module: nn.Module, weights: Mapping[str, Any], path: str, held: Mapping[Any, Any], skip: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Load weights into a module, all of whose entries must be there; returns those it has no place for.

    Args:
        module, weights: both with the module's own names.
        path, held: the file and what is in it, for the error.
        skip: names of parts that are left as they are.
    """
    fitting = {}
    prefixes = tuple(f"{part}." for part in skip)
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith(prefixes)}
    for key, value in expected.items():
        given = weights.get(key)
        if given is None and key.endswith("num_batches_tracked"):  # which batch norms once did not have
            given = value
        if isinstance(given, Tensor) and given.numel() == value.numel() == 1:
            given = given.reshape(value.shape)
        if isinstance(given, Tensor) and given.shape == value.shape and _is_finite(given):
            fitting[key] = given
    wrong = [key for key in expected if key not in fitting]
    if wrong:
        raise ValueError(
            f"weights: {path!r} does not fit the network: {len(wrong)} of {len(expected)} entries are missing, have "
            f"another shape or are not finite numbers, the first are {', '.join(wrong[:3])}; the file holds "
            f"{_describe(held)}"
        )
    module.load_state_dict(fitting, strict=not skip)
    return tuple(sorted(key for key in weights.keys() - expected.keys() if not key.startswith(prefixes)))


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds a finite value at each place: a sparse one does not, one on the meta device has none."""
    return tensor.layout == torch.strided and not tensor.is_meta and bool(torch.isfinite(tensor).all())


def _describe(weights: Mapping[Any, Any]) -> str:
    """The first entries of a dictionary with their shapes."""

    def kind(value: Any) -> str:
        return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    first = [f"{str(key)[:80]} {kind(value)}" for key, value in list(weights.items())[:5]]
    return ", ".join(first + [f"and {len(weights) - 5:,} more"] * (len(weights) > 5)) or "nothing"


def _read_weights(path: str) -> Any:
    """What a file of weights holds; ValueError where it cannot be read."""
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights: {path!r} cannot be read: {error}") from error
    return read_tensors(Path(path), "weights")
