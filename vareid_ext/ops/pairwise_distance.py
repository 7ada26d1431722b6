"""All pairs' distances as an operator; the formulas are in :mod:`vareid_ext.reference.pairwise_distance`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vareid_ext.ops._checks import check_choice
from vareid_ext.ops._features import check_features, check_rows, check_same_features
from vareid_ext.reference import pairwise_distance as reference


def _check_rows(x: Tensor, y: Tensor | None, metric: str) -> None:
    check_rows("x", x, nonzero=metric == "cosine")
    if y is not None:
        check_rows("y", y, nonzero=metric == "cosine")


@torch.library.custom_op("vareid::pairwise_distance_forward", mutates_args=())
def _forward(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    _check_rows(x, y, metric)
    return reference.pairwise_distance_forward(x, y, metric)


@torch.library.custom_op("vareid::pairwise_distance_backward", mutates_args=())
def _backward(upstream: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return reference.pairwise_distance_backward(upstream, x, y, distance, metric)


@_forward.register_fake
def _(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    other = x if y is None else y
    return x.new_empty((x.shape[0], other.shape[0]), dtype=reference.result_dtype(x.dtype))


@_backward.register_fake
def _(upstream: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x if y is None else y).shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, distance = ctx.saved_tensors
    grad_x, grad_y = _backward(upstream, x, y, distance, ctx.metric)
    return (grad_x + grad_y, None, None) if y is None else (grad_x, grad_y, None)


def _refuse_double_backward(ctx: Any, *_grads: Tensor) -> None:
    raise RuntimeError("pairwise_distance: double backward is not supported (its gradient is a closed form)")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_double_backward)


def pairwise_distance(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """Distances between tensors of features; :func:`vareid_ext.retrieval.pairwise_distance` says what it takes."""
    check_features("x", x)
    if y is not None:
        check_same_features("y", y, "x", x)
    check_choice("metric", metric, reference.METRICS)
    return _forward(x, y, metric)
