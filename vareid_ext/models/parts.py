"""From the pooled vectors of an image's parts to its features and identity logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

INITIALISATIONS = ("default", "fan_in", "fan_out")
"""Of a reduction: torch's, or He's normal distribution of variance 2 / inputs or 2 / outputs (He et al., ICCV 2015)."""


def reduction(inputs: int, outputs: int, *, bias: bool = False, init: str = "default") -> nn.Linear:
    """The linear map that shortens a feature, [N, inputs] -> [N, outputs]; a 1x1 convolution of pooled vectors.

    Raises:
        ValueError: an `init` that is not in ``INITIALISATIONS``.
    """
    if init not in INITIALISATIONS:
        raise ValueError(f"init: {init!r} was given; allowed are {', '.join(INITIALISATIONS)}")
    linear = nn.Linear(inputs, outputs, bias=bias)
    if init != "default":
        nn.init.normal_(linear.weight, std=(2 / (inputs if init == "fan_in" else outputs)) ** 0.5)
        if bias:
            nn.init.zeros_(linear.bias)
    return linear


def embedding(
    inputs: int, outputs: int, *, bias: bool = False, relu: bool = True, init: str = "default"
) -> nn.Sequential:
    """:func:`reduction`, batch norm and, with `relu`, ReLU: [N, inputs] -> [N, outputs]."""
    layers = [reduction(inputs, outputs, bias=bias, init=init), nn.BatchNorm1d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def identity_head(inputs: int, identities: int, *, bias: bool = False, std: float = 0.001) -> nn.Linear:
    """A classifier of identities, [N, inputs] -> logits [N, K]: weights of standard deviation `std`, biases 0."""
    head = nn.Linear(inputs, identities, bias=bias)
    nn.init.normal_(head.weight, std=std)
    if bias:
        nn.init.zeros_(head.bias)
    return head


class PartHeads(nn.Module):
    """A feature and identity logits of each of P parts: reduction, batch norm and ReLU, then a head.

    Args:
        parts: P.
        inputs: length C of a part's pooled vector.
        dim: length d of its feature.
        identities: K.
        shared: one reduction and batch norm for all parts, whose statistics are over all of them then; the heads are
            never shared.
        bias, init: of the reductions, see :func:`reduction`.
        relu: end the feature with a ReLU.
        head_bias: give the heads a bias.

    Attributes:
        reduce, norm: P modules each, or one.
        head: P heads.

    Raises:
        ValueError: as :func:`reduction`.
    """

    def __init__(
        self,
        parts: int,
        inputs: int,
        dim: int,
        identities: int,
        *,
        shared: bool = False,
        bias: bool = False,
        init: str = "default",
        relu: bool = True,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        embeddings = 1 if shared else parts
        self.reduce = nn.ModuleList(reduction(inputs, dim, bias=bias, init=init) for _ in range(embeddings))
        self.norm = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(embeddings))
        self.head = nn.ModuleList(identity_head(dim, identities, bias=head_bias) for _ in range(parts))
        self.relu = relu

    def forward(self, pooled: Tensor) -> list[Tensor]:
        """The parts' vectors [N, P, C] -> their features, P of [N, d]."""
        if len(self.reduce) == 1:
            features = self.norm[0](self.reduce[0](pooled.flatten(0, 1))).unflatten(0, pooled.shape[:2]).unbind(1)
        else:
            embeddings = zip(pooled.unbind(1), self.reduce, self.norm, strict=True)
            features = [norm(reduce(part)) for part, reduce, norm in embeddings]
        return [feature.relu() if self.relu else feature for feature in features]

    def logits(self, features: Iterable[Tensor]) -> Tensor:
        """The parts' features, P of [N, d] -> their identity logits [N, P, K]."""
        return torch.stack([head(feature) for head, feature in zip(self.head, features, strict=True)], dim=1)
