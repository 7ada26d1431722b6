"""Training and use of the small network that tells viewpoints from images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vareid_ext.data.types import ImageList
from vareid_ext.data.viewpoint_classes import mirrored_viewpoints
from vareid_ext.models.viewpoint_network import HEIGHT, WIDTH, ViewpointNetwork

_BATCH, _RATE, _DECAY, _WARM_UP = 128, 4e-3, 0.05, 0.15
_SHIFT, _ZOOM, _TINT, _LIGHT = 0.12, 0.12, 0.15, 0.3  # of the random changes, at most
_AT_ONCE = 512


def small_pictures(images: ImageList, *, progress: bool) -> Tensor:
    """The images as the network takes them, uint8 [N, 3, 64, 32]. Raises OSError where one cannot be read."""

    def load(index: int) -> np.ndarray:
        return np.asarray(images.load(index).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(load, range(len(images)))
        bar = tqdm(found, total=len(images), desc="images", unit="image", disable=not progress, leave=False)
        pictures = np.stack(list(bar))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _logits(network: ViewpointNetwork, pictures: Tensor) -> Tensor:
    """Of each picture and its mirror image, the mean, float64 [N, V] on the CPU."""
    mirror = list(mirrored_viewpoints(network.names))
    device = network.temperature.device
    network.eval()
    with torch.inference_mode():
        parts = [part.to(device) for part in pictures.split(_AT_ONCE)]
        both = [(network(part) + network(part.flip(3))[:, mirror]) / 2 for part in parts]
    return torch.cat(both).double().cpu()


def viewpoint_probabilities(network: ViewpointNetwork, pictures: Tensor) -> np.ndarray:
    """float64 [N, V] of :func:`small_pictures`."""
    return (_logits(network, pictures) / network.temperature.double().cpu()).softmax(dim=1).numpy()


def split_people(identity: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [N] of the images to learn from, to find the temperature by, and to measure on: of 8, 1 and 1 tenths of the
    people, at least of one.

    Raises:
        ValueError: there are fewer than three people.
    """
    people, number = np.unique(identity, return_inverse=True)
    if len(people) < 3:
        raise ValueError(f"identity: {len(people)} people were given; three are needed, two of whom are held out")
    place = np.random.default_rng(seed).permutation(len(people))[number]
    tenth = max(1, len(people) // 10)
    return place >= 2 * tenth, place < tenth, (place >= tenth) & (place < 2 * tenth)


def _changed(pictures: Tensor, viewpoint: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures, half of them mirrored, all moved, scaled and tinted at random, float32; and their viewpoints."""
    n, device = len(pictures), pictures.device
    x = pictures.float()
    flip = torch.rand(n, device=device) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    move = torch.zeros(n, 2, 3, device=device)
    move[:, [0, 1], [0, 1]] = 1 + _ZOOM * (2 * torch.rand(n, 2, device=device) - 1)
    move[:, :, 2] = _SHIFT * (2 * torch.rand(n, 2, device=device) - 1)
    grid = F.affine_grid(move, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    for channels, size in ((3, _TINT), (1, _LIGHT)):
        x = x * (1 + size * (2 * torch.rand(n, channels, 1, 1, device=device) - 1))
    return x, torch.where(flip, mirror[viewpoint], viewpoint)


def train_viewpoint_network(
    pictures: Tensor,
    viewpoint: np.ndarray,
    held_out: np.ndarray,
    names: tuple[str, ...],
    *,
    epochs: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> ViewpointNetwork:
    """A network that has learned the viewpoints of images; its temperature is that of the images held out.

    Args:
        pictures: uint8 [N, 3, 64, 32], of :func:`small_pictures`.
        viewpoint: int64 [N], 0 to V - 1.
        held_out: bool [N], the images that the temperature is found by; the network learns from the others.
        names: of the V viewpoints.
        epochs: passes over the images, at least 1.
        device: where to compute.
        seed: of weights and of the random order and changes, which depend on nothing else.
        progress: show a bar.
    """
    learned = torch.from_numpy(np.flatnonzero(~held_out))
    label = torch.from_numpy(viewpoint).to(device)
    mirror = torch.tensor(mirrored_viewpoints(names), device=device)
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        network = ViewpointNetwork(names).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=_DECAY)
        per_epoch = max(1, len(learned) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _RATE, total_steps=epochs * per_epoch + 1, pct_start=_WARM_UP
        )
        network.train()
        with tqdm(total=epochs * per_epoch, desc="training", unit="step", disable=not progress, leave=False) as bar:
            for _ in range(epochs):
                order = learned[torch.randperm(len(learned))]
                for batch in order.split(_BATCH)[:per_epoch]:
                    x, y = _changed(pictures[batch].to(device), label[batch.to(device)], mirror)
                    loss = F.cross_entropy(network(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    logits = _logits(network, pictures[torch.from_numpy(held_out)])
    network.temperature.fill_(fit_temperature(logits, torch.from_numpy(viewpoint[held_out])))
    return network


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The T from 0.05 to 20 for which softmax(logits / T) makes labels [N] most likely (Guo et al., ICML 2017)."""
    low, high = np.log(0.05), np.log(20.0)

    def loss(x: float) -> float:
        return float(F.cross_entropy(logits.double() / np.exp(x), label))

    while high - low > 1e-4:  # it has one minimum in 1 / T
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return float(np.exp((low + high) / 2))
