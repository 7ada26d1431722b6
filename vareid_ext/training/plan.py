"""What a training will take and send, before it begins: memory of each process, bytes and operations of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vareid_ext.data import Batch
from vareid_ext.losses import ViewpointAwareLoss
from vareid_ext.methods import Method, TrainingClasses
from vareid_ext.ops._sharded_cross_entropy import largest_shard
from vareid_ext.ops.linear_viewpoint_aware_cross_entropy import MEMORY_BUDGET
from vareid_ext.training.config import Config
from vareid_ext.training.optimizers import build_optimizer
from vareid_ext.training.state import build_method, check_shards

_FLOAT = 4  # bytes; weights, gradients and optimizers are float32 at every precision
_PROBES = (2, 3)  # identities of the methods that are built to see what grows with them
_SUMMARY = 8  # bytes of each number that is exchanged of a row
_IMAGES = 2
_PASSES = 3  # a forward pass, and two for its gradients


@dataclass(frozen=True)
class Machine:
    """What a process computes and sends; the defaults are an H200's float32 with TF32 off, its memory, and NVLink."""

    flops: float = 60e12
    """operations a second"""
    memory: float = 4e12
    """bytes a second that it reads and writes"""
    network: float = 300e9
    """bytes a second that it sends while it receives as many"""


@dataclass(frozen=True)
class TrainingPlan:
    """A step of one process, of `processes` that share a batch of `images`. Made by :func:`training_plan`."""

    processes: int
    identities: int
    viewpoints: int
    images: int
    """of the whole batch"""
    divided: bool
    """whether the viewpoint-aware loss's centres are divided (loss.shard_identities)"""
    memory: Mapping[str, float]
    """bytes of each part"""
    sent: Mapping[str, float]
    """bytes that the process sends in a step, of each part"""
    seconds: Mapping[str, float]
    """of each part of a step on `machine`, if it did nothing else"""
    notes: tuple[str, ...]
    """what is assumed, and what is not known"""

    @property
    def bound(self) -> str:
        """The part of a step that takes the longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "bound": self.bound}

    def __str__(self) -> str:
        centres = "divided among the processes" if self.divided else "whole on every process"
        several = "process" if self.processes == 1 else "processes"
        lines = [
            f"{self.processes} {several}, {self.images:,} images in a batch, {self.identities:,} identities, "
            f"{self.viewpoints} viewpoints; centres {centres}",
            "",
            "memory of a process",
            *_table(self.memory, 2**20, "MiB"),
            "sent by a process in a step",
            *_table(self.sent, 2**20, "MiB"),
            "a step, each part by itself",
            *_table(self.seconds, 1e-3, "ms", total=False),
            f"{self.bound} bound the step, if nothing of it is done at the same time",
            *self.notes,
        ]
        return "\n".join(lines)


def _table(parts: Mapping[str, float], unit: float, name: str, *, total: bool = True) -> list[str]:
    rows = {**parts, **({"together": sum(parts.values())} if total else {})}
    return [*(f"  {part:<34} {value / unit:>12,.1f} {name}" for part, value in rows.items()), ""]


def training_plan(
    config: Config, *, processes: int, identities: int, viewpoints: int, machine: Machine | None = None
) -> TrainingPlan:
    """What a step takes of one process, of the first stage.

    Networks are built with few identities, and what grows with them is multiplied; a pass of two images on the CPU says
    what a pass keeps and computes. All-reduces are counted as rings, which send 2 (N - 1) / N of the bytes, the least
    that there is.

    Args:
        config: the training.
        processes: N, at least 1.
        identities: K, at least as many as processes.
        viewpoints: V, at least 2.
        machine: what a process computes and sends; None: :class:`Machine`.

    Raises:
        ValueError: a number outside of what is allowed.
    """
    machine = machine or Machine()
    for name, given, least in (
        ("processes", processes, 1), ("viewpoints", viewpoints, 2), ("identities", identities, processes),
    ):  # fmt: skip
        if given < least:
            raise ValueError(f"{name}: {given} was given; allowed are values from {least}")
    sampler, N = config.resolved_stages[0].sampler, processes
    images = sampler.images_per_batch
    shared = images if sampler.kind == "shuffled" else images // sampler.instances
    if shared < N:
        of_what = "images" if sampler.kind == "shuffled" else "identities"
        raise ValueError(f"processes: {N} was given; a batch has {shared} {of_what} for them, and each needs one")
    divided = config.loss.shard_identities and N > 1
    quiet = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False, weights=None))
    classes = (TrainingClasses(K, viewpoints, torch.ones(K, viewpoints, dtype=torch.bool)) for K in _PROBES)
    method, larger = (build_method(quiet, few) for few in classes)
    check_shards(config, method)
    centres = {
        f"{name}.{parameter}"
        for name, part in method.named_modules()
        if isinstance(part, ViewpointAwareLoss)
        for parameter, _ in part.named_parameters()
    }
    weights = {"weights of the network": 0, "weights of heads": 0, "weights of the centres": 0}
    owned = largest_shard(identities, N) if divided else identities
    trained = averaged = 0
    for (name, few), (_, more) in zip(method.named_parameters(), larger.named_parameters(), strict=True):
        growth = (more.numel() - few.numel()) // (_PROBES[1] - _PROBES[0])
        own = owned if name in centres else identities
        numbers = few.numel() + growth * (own - _PROBES[0])
        part = "centres" if name in centres else "heads" if growth else "network"
        weights[f"weights of {part}" if part == "heads" else f"weights of the {part}"] += numbers * _FLOAT
        trained += numbers * few.requires_grad
        averaged += numbers * (few.requires_grad and not (divided and name in centres))
    dim = max((p.shape[-1] for n, p in method.named_parameters() if n in centres), default=0)
    share = -(-images // N)
    state, average = _optimizer_numbers(config), int(config.optimizer.ema_decay is not None)
    kept, computed = _pass(method, config) if not method.test_inputs else (0.0, 0.0)
    rows = images if divided else share
    columns = owned * (1 + viewpoints)
    logits = min(rows * columns * _FLOAT, MEMORY_BUDGET) if centres else 0
    memory = {
        **weights,
        "gradients": trained * _FLOAT,
        "buffers that gradients are sent from": averaged * _FLOAT if N > 1 else 0,
        "optimizer": trained * _FLOAT * state,
        "moving average of the weights": trained * _FLOAT * average,
        "what a pass keeps (float32)": kept * share,
        "logits at a time, at most": logits,
        "features of the batch": 3 * images * dim * _FLOAT if divided else 0,
    }
    ring = (N - 1) / N
    norms = sum(part.num_features for part in method.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    sync = config.run.sync_batch_norm
    sent = {
        "gradients, averaged": 2 * ring * averaged * _FLOAT,
        "batch norms": 2 * ring * 4 * norms * _FLOAT if sync else 0.0,
        "features of the batch": ring * images * dim * _FLOAT if divided else 0.0,
        "gradients of the features": 2 * ring * images * dim * _FLOAT if divided else 0.0,
        "summaries of the rows": ring * images * N * (4 + 1 + 4 + viewpoints) * _SUMMARY if divided else 0.0,
    }
    # Tiles of logits that do not fit are computed a second time for their gradient.
    passes = _PASSES + (rows * columns * _FLOAT > MEMORY_BUDGET)
    seconds = {
        "operations of the network": _PASSES * computed * share / machine.flops,
        "operations of the centres' heads": 2.0 * passes * rows * columns * dim / machine.flops if centres else 0.0,
        "bytes of the optimizer": trained * _FLOAT * (3 + 2 * state) / machine.memory,
        "bytes that are sent": sum(sent.values()) / machine.network,
    }
    notes = [
        f"assumed: a process computes {machine.flops / 1e12:g} TFLOP/s, reads and writes {machine.memory / 1e9:g} GB/s "
        f"and sends {machine.network / 1e9:g} GB/s"
    ]
    if method.test_inputs:
        notes.append(f"not known: what a pass keeps and computes, which needs {', '.join(method.test_inputs)}")
    return TrainingPlan(
        N, identities, viewpoints, images, divided, {k: float(v) for k, v in memory.items()}, sent, seconds,
        tuple(notes),
    )  # fmt: skip


def _optimizer_numbers(config: Config) -> float:
    """Numbers that the optimizer keeps of each weight."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(dataclasses.replace(config.resolved_stages[0].optimizer, lr_factors={}), layer)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    kept = sum(
        value.numel() for value in optimizer.state[layer.weight].values() if isinstance(value, Tensor) and value.dim()
    )
    return kept / layer.weight.numel()


def _pass(method: Method, config: Config) -> tuple[float, float]:
    """Bytes that a training pass keeps for its gradients, and operations of a forward pass, of each image."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    label = torch.zeros(_IMAGES, dtype=torch.long)
    image = torch.zeros(_IMAGES, 3, config.data.height, config.data.width)
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        features = method.train().features(Batch(image, label, label, label, label))
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    del features
    size = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    return size / _IMAGES, counter.get_total_flops() / _IMAGES
