"""PyTorch operators: one schema each, and the functions that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vareid_ext import _native

_library = torch.library.Library("vareid", "FRAGMENT")


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a copy of it, whose elements lie one after another in memory; None stays."""
    return None if tensor is None else tensor.contiguous()


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    native: Callable[..., Any] | None = None,
) -> Any:
    """The operator ``vareid::<schema>``.

    Args:
        schema: name, arguments and results, as ``torch.library.Library.define`` takes them.
        fake: makes empty results, for tracing.
        reference: plain PyTorch, for every device.
        native: the kernels of CPUs and of CUDA GPUs, if there are any; see
            :func:`vareid_ext._native.with_fallback`.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if native is not None:
        for key in ("CPU", "CUDA"):
            _library.impl(name, _native.with_fallback(native, reference), key)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vareid::{name}", fake, lib=_library)
    return getattr(torch.ops.vareid, name).default


def add_gradient(operator: Any, setup_context: Callable[..., None], differentiate: Callable[..., Any]) -> None:
    """Gives an operator its gradient; it cannot be differentiated twice, in forward mode or by ``torch.func.grad``.

    ``torch.library.register_autograd`` does the same through more layers: 16 us a call, a tenth of a loss.

    Args:
        operator: what :func:`define` returned.
        setup_context: ``(ctx, inputs, output)``, keeps what the gradient needs.
        differentiate: ``(ctx, *upstreams)``, the gradient of each input or None.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstreams: Any) -> Any:
            if not torch.is_grad_enabled():
                return differentiate(ctx, *upstreams)
            with torch.no_grad():
                gradients = differentiate(ctx, *upstreams)
            return tuple(g if g is None else _Last.apply(g.requires_grad_()) for g in gradients)

    _library.impl(operator.name().partition("::")[2], Gradient.apply, "Autograd")


class _Last(torch.autograd.Function):
    """The identity, for a gradient that has none itself."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_upstreams: Any) -> None:
        raise RuntimeError("double backward is not supported: the gradient is a closed form")
