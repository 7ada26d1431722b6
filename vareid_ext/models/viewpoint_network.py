"""A small network that tells from which side a person is seen, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vareid_ext.files.atomic import atomic_file

HEIGHT, WIDTH = 64, 32
_FORMAT = "vareid viewpoint network 1"
_MEAN, _SCALE = 114.0, 60.0  # of pixels, roughly


def _block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = _block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ViewpointNetwork(nn.Module):
    """Images uint8 or float [N, 3, 64, 32] of 0 to 255 -> logits [N, V], 0.29 million parameters.

    Args:
        names: of the V viewpoints.

    Attributes:
        temperature: what the logits are divided by, so that their softmax are probabilities.
    """

    temperature: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.trunk = nn.Sequential(
            _block(3, 16, 2), _block(16, 32, 2), _Residual(32), _block(32, 64, 2), _Residual(64), _block(64, 128, 2),
            _Residual(128), nn.Flatten(), nn.Dropout(0.3),
        )  # fmt: skip
        self.head = nn.Linear(128 * (HEIGHT // 16) * (WIDTH // 16), len(names))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.trunk((images.float() - _MEAN) / _SCALE))


def save_viewpoint_network(network: ViewpointNetwork, path: Path) -> None:
    """Write a network and the names of its viewpoints as one safetensors file."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with atomic_file(path) as file:
        file.write(save(weights, {"format": _FORMAT, "viewpoints": json.dumps(network.names)}))


def load_viewpoint_network(path: str) -> ViewpointNetwork:
    """The network of a file, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; one that vareid label-viewpoints --train has written is needed")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError("no network of viewpoints")
            network = ViewpointNetwork(tuple(json.loads(about["viewpoints"])))
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a file that vareid label-viewpoints --train has written: {error}") from error
    return network.eval()
