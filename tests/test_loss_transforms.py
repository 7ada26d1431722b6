"""The losses under torch.compile, opcheck and dispatch modes: the same values and gradients as without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vareid_ext import (
    ViewpointAwareLoss,
    angular_center_regularizer,
    identity_cross_entropy,
    linear_viewpoint_aware_cross_entropy,
    viewpoint_aware_cross_entropy,
    viewpoint_cross_entropy,
)

N, K, V, D = 5, 7, 3, 8
RNG = torch.Generator().manual_seed(0)
Z, S = torch.randn(N, K, generator=RNG), torch.randn(N, K, V, generator=RNG)
F, W, U = (torch.randn(shape, generator=RNG) for shape in ((N, D), (K, D), (K, V, D)))
Y, VIEW = torch.randint(K, (N,), generator=RNG), torch.randint(-1, V, (N,), generator=RNG)
MASK = torch.rand(K, V, generator=RNG) < 0.5
MASK[:, 1] = True
MASK[Y[VIEW >= 0], VIEW[VIEW >= 0]] = True


def both(z: Tensor, s: Tensor) -> Tensor:
    L_y, L_v = viewpoint_aware_cross_entropy(z, s, Y, VIEW, mask=MASK)
    return L_y + 0.3 * L_v


def linear(f: Tensor, w: Tensor, u: Tensor) -> Tensor:
    L_y, L_v = linear_viewpoint_aware_cross_entropy(f, w, u, Y, VIEW, normalize=True, scale=5.0)
    return L_y + 0.3 * L_v


def soft(s: Tensor) -> Tensor:
    return viewpoint_cross_entropy(s, Y, torch.full((N, V), 1 / V), reduction="sum")


def uniform(z: Tensor) -> Tensor:
    return identity_cross_entropy(z, Y, smoothing="uniform", reduction="none").square().sum()


def regularizer(w: Tensor, u: Tensor) -> Tensor:
    return angular_center_regularizer(w, u, mask=MASK, reduction="mean")


CASES: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
    (both, (Z, S)), (linear, (F, W, U)), (soft, (S,)), (uniform, (Z,)), (regularizer, (W, U))
]  # fmt: skip


def leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in inputs)


def value_and_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    variables = leaves(inputs)
    value = function(*variables)
    return value.detach(), *torch.autograd.grad(value, variables)


@pytest.mark.parametrize(("function", "inputs"), CASES)
def test_compiled_without_a_graph_break(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(function, inputs))


class Seen(TorchDispatchMode):
    """Notes the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("function", "inputs"), CASES)
def test_modes_see_the_operators(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    want = value_and_gradients(function, inputs)
    with Seen() as seen:
        have = value_and_gradients(function, inputs)
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    name = {linear: "linear_viewpoint_aware_cross_entropy", regularizer: "angular_center"}.get(
        function, "viewpoint_aware_cross_entropy"
    )
    assert f"vareid::{name}_forward" in seen.names
    assert function is linear or f"vareid::{name}_backward" in seen.names  # its gradient is made in forward


def test_fake_tensors_give_shapes_without_values() -> None:
    with FakeTensorMode():
        z, s = torch.empty(N, K, requires_grad=True), torch.empty(N, K, V, requires_grad=True)
        y = torch.empty(N, dtype=torch.int64)
        L_y, L_v = viewpoint_aware_cross_entropy(z, s, y, y, reduction="none")
        assert L_y.shape == L_v.shape == (N,)
        (L_y + L_v).sum().backward()
        assert z.grad is not None
        assert s.grad is not None
        assert (z.grad.shape, s.grad.shape) == (z.shape, s.shape)


def test_module_compiled_with_the_default_backend_and_sizes_that_change() -> None:
    torch._dynamo.reset()
    loss = ViewpointAwareLoss(K, D, mask=MASK)
    with torch.no_grad():
        for centers in loss.parameters():
            centers.mul_(300)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count in (N, N - 1):
        loss.zero_grad()
        parts = compiled(F[:count], Y[:count], VIEW[:count])
        parts.total.backward()
        gradients = [centers.grad.clone() for centers in loss.parameters()]
        loss.zero_grad()
        want = loss(F[:count], Y[:count], VIEW[:count])
        want.total.backward()
        torch.testing.assert_close(parts, want)
        torch.testing.assert_close(gradients, [centers.grad for centers in loss.parameters()])


OPS = torch.ops.vareid
LABELS = (Y, VIEW, MASK)
SOFT = torch.full((N, V), 1 / V, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("viewpoint_aware_cross_entropy_forward", (Z, S, *LABELS, True, 0.2, 0.1, "mean")),
        ("viewpoint_aware_cross_entropy_forward", (Z, None, Y, None, None, False, 0.2, 0.1, "none")),
        ("viewpoint_aware_cross_entropy_forward", (None, S.double(), Y, SOFT, None, True, 0.2, 0.0, "sum")),
        (
            "linear_viewpoint_aware_cross_entropy_forward",
            (F, W, U, *LABELS, False, 0.2, 0.0, "mean", False, 1.0, 0, 2**20, True, True, True),
        ),
        (
            "linear_viewpoint_aware_cross_entropy_forward",
            (F, W, U, *LABELS, True, 0.2, 0.0, "none", True, 4.0, 2, 2**20, False, False, False),
        ),
    ],
)
def test_operators_are_well_formed(name: str, arguments: tuple[Any, ...]) -> None:
    floating = [
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and x is not SOFT else x
        for x in arguments
    ]
    torch.library.opcheck(getattr(OPS, name).default, tuple(floating))


@pytest.mark.parametrize(("function", "inputs"), CASES)
def test_a_vectorised_backward_pass_is_a_loop(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    scales = torch.tensor([0.5, 1.0, 2.0])
    got = torch.autograd.grad(function(*leaves), leaves, scales, is_grads_batched=True)
    _, *want = value_and_gradients(function, inputs)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, torch.stack([scale * expected for scale in scales]))


def test_meta_tensors_give_shapes_without_values() -> None:
    with torch.device("meta"):
        loss = ViewpointAwareLoss(K, D)
    parts = loss(F.to("meta"), Y.to("meta"), VIEW.to("meta"))
    parts.total.backward()
    assert parts.total.shape == ()
    assert loss.identity_centers.grad is not None
    L_y, L_v = linear_viewpoint_aware_cross_entropy(*(x.to("meta") for x in (F, W, U, Y, VIEW)), reduction="none")
    assert L_y.shape == L_v.shape == (N,)


@pytest.mark.parametrize(("function", "inputs"), CASES)
def test_vmap_is_a_loop(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    scales = torch.tensor([0.5, 1.0, 2.0])
    batches = [scales.view(-1, *[1] * x.dim()) * x for x in inputs]
    want = torch.stack([function(*(scale * x for x in inputs)) for scale in scales])
    torch.testing.assert_close(torch.func.vmap(function)(*batches), want)


def test_vmap_over_labels() -> None:
    identities, viewpoints = torch.stack([Y, Y.flip(0)]), torch.stack([VIEW, VIEW.flip(0)])

    def total(identity: Tensor, viewpoint: Tensor) -> Tensor:
        L_y, L_v = viewpoint_aware_cross_entropy(Z, S, identity, viewpoint)
        return L_y + L_v

    want = torch.stack([total(y, v) for y, v in zip(identities, viewpoints, strict=True)])
    torch.testing.assert_close(torch.func.vmap(total)(identities, viewpoints), want)


@pytest.mark.parametrize(("identity", "viewpoint"), [(Y - K, VIEW), (Y, VIEW - V)])
def test_batched_labels_out_of_range_are_refused(identity: Tensor, viewpoint: Tensor) -> None:
    labels = torch.stack([Y, identity], 1), torch.stack([VIEW, viewpoint], 1)
    with pytest.raises(IndexError, match="identity: -" if identity is not Y else "viewpoint: -"):
        torch.func.vmap(lambda y, v: viewpoint_cross_entropy(S, y, v), in_dims=1)(*labels)


@pytest.mark.parametrize(("function", "inputs"), CASES)
def test_func_grad_is_refused(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(function)(*inputs)


def test_forward_mode_is_refused() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Z, Z)
        with pytest.raises(RuntimeError, match="forward mode"):
            identity_cross_entropy(dual, Y)
        with pytest.raises(RuntimeError, match="forward mode"):
            viewpoint_aware_cross_entropy(Z, torch.autograd.forward_ad.make_dual(S, S), Y, VIEW)
