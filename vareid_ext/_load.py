"""The door to trained models, which imports what they need when it is called."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vareid_ext.trained import TrainedModel


def load(run: str | os.PathLike[str], device: str | torch.device = "auto") -> TrainedModel:
    """The trained model of a run, ready for use: ``load("runs/mine").embed(paths)`` gives features [N, D].

    Args:
        run: a run folder, whose last weights are taken (those that its metrics.json is about), or a checkpoint. Of a
            run with a moving average of the weights, the average. Or a folder that ``save_pretrained`` has written,
            here or on the Hugging Face Hub: hf://owner/name, hf://owner/name@revision.
        device: where it computes; "auto" is the GPU if there is one.

    Returns:
        A :class:`vareid_ext.trained.TrainedModel`.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint and no model in the folder.
        ValueError: what is there is damaged, or not of this program or of this version.
        OSError: the Hub has no such model, or cannot be reached.
    """
    from vareid_ext.trained import load_trained

    return load_trained(run, device)
