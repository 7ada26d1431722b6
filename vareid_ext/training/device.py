"""Where a model computes, and in which precision."""

from __future__ import annotations

import torch

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of automatic mixed precision by its name in the configuration; None: off."""


def device_named(name: str, argument: str) -> torch.device:
    """The device of a name; ValueError, which begins with `argument`, where it does not exist.

    Args:
        name: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        argument: what the name was given as.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument}: {name!r} was given; allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{argument}: {name!r} was given; PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    return device
