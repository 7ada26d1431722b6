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

_WRAPPER = re.compile(r"^module\.")  # of torch's moving average
_PREFIXES = re.compile(r"((module|_orig_mod|base|model|backbone)\.)*")


def load_backbone_weights(trunk: nn.Module, path: str) -> tuple[str, ...]:
    """Load a file of weights into a network without its head.

    Args:
        trunk: the network.
        path: .safetensors, or a file that ``torch.load(weights_only=True)`` reads: the weights, or a dictionary with
            them under "state_dict" or "model". Prefixes "module.", "_orig_mod.", "base.", "model." and "backbone." are
            removed; batch norms may come without "num_batches_tracked". A checkpoint of a run is left to
            :func:`load_method_weights`.

    Returns:
        The file's entries that the network has no place for, such as its classifier.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged or holds other than tensors; weights are missing, have another shape or are not
            finite numbers, and the first ones are named beside what the file holds.
    """
    found = _read_weights(path)
    if _is_checkpoint(found):
        return ()
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"weights: {path!r} holds {type(found).__name__}, not a dictionary of weights")
    weights = {_PREFIXES.sub("", str(key), count=1): value for key, value in found.items()}
    if len(weights) < len(found):
        raise ValueError(f"weights: {path!r} holds several networks: {_describe(found)}")
    return _fill(trunk, weights, path, found)


def load_method_weights(method: nn.Module, path: str, *, heads: tuple[str, ...], settings: Mapping[str, Any]) -> bool:
    """Load a run's checkpoint, of a run with a moving average that, into a method; other files change nothing.

    Args:
        method: all of it is filled, but for the heads.
        path: the file.
        heads: names of the parts that belong to the training identities; they stay as they are.
        settings: section `model` of the configuration, which that of the checkpoint must equal.

    Returns:
        Whether the file is a checkpoint.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or the checkpoint is of another network.
    """
    found = _read_weights(path)
    if not _is_checkpoint(found):
        return False
    _check_settings(settings, found["config"].get("model"), path)
    weights = found.get("average") or found["method"]
    weights = {_WRAPPER.sub("", str(key)): value for key, value in weights.items() if key != "n_averaged"}
    left_out = _fill(method, weights, path, weights, skip=heads)
    if left_out:
        raise ValueError(f"weights: {path!r} is of another network, with {left_out[0]!r}")
    return True


def _is_checkpoint(found: Any) -> bool:
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        return False
    return all(isinstance(found.get(name), Mapping) for name in ("config", "method"))


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

    def kept(key: str) -> bool:
        return not any(key == part or key.startswith(f"{part}.") for part in skip)

    expected = {key: value for key, value in module.state_dict().items() if kept(key)}
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
    return tuple(sorted(key for key in weights.keys() - expected.keys() if kept(key)))


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
    """What a file of weights holds; FileNotFoundError, or ValueError where it cannot be read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights: {path!r} cannot be read: {error}") from error
    return read_tensors(Path(path), "weights")
