"""Weights of a file into a network."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vareid_ext.files import pretrained
from vareid_ext.files.checkpoint import FORMAT, check_zip, in_short
from vareid_ext.files.entries import MAX_UNPACKED, Entry, Limit
from vareid_ext.files.pickles import Unread
from vareid_ext.files.torch_files import read_pt

HEADS = ("global_pool", "fc", "last_linear", "classifier", "head", "head_drop")
"""What stands behind the feature map in networks of timm and torchvision; not part of a trunk."""

_WRAPPER = re.compile(r"^module\.")  # of torch's moving average
_PREFIXES = re.compile(r"((module|_orig_mod|base|model|backbone)\.)*")
_CONTAINERS = ("state_dict", "model")
_SHOWN = 3


def load_backbone_weights(trunk: nn.Module, path: str) -> tuple[str, ...]:
    """Load a file of weights into a network without its head.

    Args:
        trunk: the network.
        path: .safetensors, or a file of ``torch.save``, of which nothing is run: the weights, a whole network, or a
            dictionary with either under "state_dict" or "model". Prefixes "module.", "_orig_mod.", "base.", "model."
            and "backbone." are removed; batch norms may come without "num_batches_tracked". So come the ResNets of
            fast-reid, torchreid, reid-strong-baseline, torchvision and timm. A checkpoint of a run is left to
            :func:`load_method_weights`.

    Returns:
        The file's entries, under its own names, that stand outside the trunk, such as its classifier.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged or holds no weights; entries of the trunk are missing, have another shape or are
            not finite numbers, or the file's trunk has some that this one has not: the first are named with what is
            here and what is there.
    """
    found = _read_weights(path)
    if _is_checkpoint(found):
        return ()
    found = _as_weights(found)
    for key in _CONTAINERS:
        if isinstance(found, Mapping) and isinstance(inner := _as_weights(found.get(key)), Mapping):
            found = inner
    if not isinstance(found, Mapping):
        raise ValueError(f"weights: {path!r} holds {_kind(found)}, not a dictionary of weights")
    prefixes = {str(key): _PREFIXES.match(str(key))[0] for key in found}  # type: ignore[index]
    weights = {str(key)[len(prefixes[str(key)]) :]: (str(key), value) for key, value in found.items()}
    if len(weights) < len(found):
        raise ValueError(f"weights: {path!r} holds several networks: {', '.join(_described(weights.values()))}")
    children = [name for name, _ in trunk.named_children()]

    def in_trunk(key: str) -> bool:
        first, prefix = key.partition(".")[0], prefixes[weights[key][0]].split(".")
        return first not in HEADS and (first in children or "base" in prefix or "backbone" in prefix)

    return _fill(trunk, weights, path, needed=in_trunk)


def load_method_weights(method: nn.Module, path: str, *, heads: tuple[str, ...], settings: Mapping[str, Any]) -> bool:
    """Load a run's checkpoint, of a run with a moving average that, into a method; other files change nothing.

    Args:
        method: all of it is filled, but for the heads.
        path: the file; a run folder, for its last.pt; or the folder of a model that was saved to share it.
        heads: names of the parts that belong to the training identities; they stay as they are.
        settings: section `model` of the configuration, which that of the checkpoint must equal.

    Returns:
        Whether it is one of these.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or of another network.
    """
    found = _read_weights(path)
    if not _is_checkpoint(found):
        return False
    _check_settings(settings, found["config"].get("model"), path)
    weights = found.get("average") or found["method"]
    named = {_WRAPPER.sub("", str(key)): (str(key), value) for key, value in weights.items() if key != "n_averaged"}
    once = {id(value): key for key, value in method.state_dict(keep_vars=True).items() if key in named}
    for key, value in method.state_dict(keep_vars=True).items():
        if key not in named and id(value) in once:  # parts that share a tensor, which a shared model has once
            named[key] = named[once[id(value)]]
    _fill(method, named, path, skip=heads)
    return True


def forget_weights() -> None:
    """Let go of the file that was read last, which is kept because a run takes weights from it several times."""
    _read_version.cache_clear()


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
    module: nn.Module,
    weights: Mapping[str, tuple[str, Any]],
    path: str,
    *,
    skip: tuple[str, ...] = (),
    needed: Callable[[str], bool] = lambda _: True,
) -> tuple[str, ...]:
    """Load weights into a module, all of whose entries must be there.

    Args:
        module: the module.
        weights: the module's own name of an entry -> the file's name, and the value.
        path: the file, for the error.
        skip: names of parts that are left as they are.
        needed: of a name that the module does not have, whether it should.

    Returns:
        The file's names of what the module has no place for and does not need.
    """

    def kept(key: str) -> bool:
        return not any(key == part or key.startswith(f"{part}.") for part in skip)

    expected = {key: value for key, value in module.state_dict().items() if kept(key)}
    fitting, wrong = {}, []
    for key, value in expected.items():
        name, given = weights.get(key, (key, None))
        given = given.read() if isinstance(given, Entry) else given
        if given is None and key.endswith("num_batches_tracked"):  # which batch norms once did not have
            given = value
        if isinstance(given, Tensor) and given.numel() == value.numel() == 1:
            given = given.reshape(value.shape)
        if isinstance(given, Tensor) and given.shape == value.shape and _is_finite(given):
            fitting[key] = given
        else:
            wrong.append(f"{name} is {list(value.shape)} here and {_kind(given)} in the file")
    rest = {key: entry for key, entry in weights.items() if key not in expected and kept(key)}
    lacking = [entry for key, entry in rest.items() if needed(key)]
    if wrong or lacking:
        problems = []
        if wrong:
            problems.append(
                f"{len(wrong)} of {len(expected)} entries are missing, have another shape or are not finite numbers: "
                f"{'; '.join(wrong[:_SHOWN])}"
            )
        if lacking or rest:
            others = lacking or list(rest.values())
            problems.append(f"{len(others)} of the file's are missing here: {', '.join(_described(others))}")
        raise ValueError(f"weights: {path!r} does not fit the network; {'; '.join(problems)}")
    module.load_state_dict(fitting, strict=not skip)
    return tuple(sorted(name for name, _ in rest.values()))


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds a finite value at each place: a sparse one does not, one on the meta device has none."""
    return tensor.layout == torch.strided and not tensor.is_meta and bool(torch.isfinite(tensor).all())


def _described(entries: Any) -> list[str]:
    """The first of some entries (name, value) with their shapes, and how many more there are."""
    entries = list(entries)
    first = [f"{name[:80]} {_kind(value)}" for name, value in entries[:_SHOWN]]
    return first + [f"and {len(entries) - _SHOWN:,} more"] * (len(entries) > _SHOWN)


def _kind(value: Any) -> str:
    """What a value of a file is, in a word: of a tensor its shape."""
    if isinstance(value, Entry):
        value = value.read()
    if isinstance(value, Tensor):
        return str(list(value.shape)) + ("" if _is_finite(value) else " with other than finite numbers")
    if isinstance(value, Unread):
        return f"a pickled {value.name}"
    return "missing" if value is None else type(value).__name__


def _as_weights(value: Any) -> Any:
    """The entries of a pickled network by their names, where a value is one."""
    return dict(_entries(value, "", set())) if _is_network(value) else value


def _is_network(value: Any) -> bool:
    return isinstance(value, Unread) and isinstance(value.state, Mapping) and "_modules" in value.state


def _entries(network: Unread, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The parameters and buffers of a pickled nn.Module and the modules in it, each module once."""
    seen.add(id(network))
    state: Any = network.state
    for kind in ("_parameters", "_buffers"):
        for name, value in dict(state.get(kind) or {}).items():
            if value is not None:
                yield f"{prefix}{name}", value
    for name, child in dict(state["_modules"]).items():
        if _is_network(child) and id(child) not in seen:
            yield from _entries(child, f"{prefix}{name}.", seen)


def _read_weights(path: str) -> Any:
    """What a file of weights holds, or that of a folder; FileNotFoundError, or ValueError where it cannot be read."""
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in ("last.pt", pretrained.WEIGHTS) if (file / name).is_file()), file)
    if not file.is_file():
        nothing = f"which holds no last.pt and no {pretrained.WEIGHTS}" if file.is_dir() else "which does not exist"
        raise FileNotFoundError(f"weights: {path!r} was given, {nothing}; a file, a run or a shared model is needed")
    stat = file.stat()
    return _read_version(str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read_version(path: str, *_: int) -> Any:
    return _read_file(path)


def _read_file(path: str) -> Any:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            file = Path(path)
            if file.name != pretrained.WEIGHTS or not pretrained.is_of_this_program(file.parent):
                return load_file(path)
            config = pretrained.read_description(file.parent)["config"]
            return {"format": FORMAT, "config": config, "method": load_file(path)}
        check_zip(Path(path))
        return read_pt(Path(path), Limit(Path(path), MAX_UNPACKED), unread=True)
    except Exception as error:  # a damaged file makes its reader fail with whatever it runs into
        raise ValueError(f"weights: {path!r} cannot be read: {in_short(error)}") from error
