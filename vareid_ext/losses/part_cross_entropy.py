"""The identity loss of the parts of an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vareid_ext.ops.viewpoint_aware_cross_entropy import identity_cross_entropy


def part_cross_entropy(logits: Tensor, identity: Tensor, *, smoothing: str = "none", **options: Any) -> Tensor:
    """Mean over images and parts of the cross-entropy of the identity; the sum of P heads' losses is P times it.

    Args:
        logits: floating point [N, P, K].
        identity: integer [N] in [0, K), the same for all parts of an image.
        smoothing, options: as in :func:`vareid_ext.ops.viewpoint_aware_cross_entropy.identity_cross_entropy`.

    Returns:
        Scalar tensor.

    Raises:
        TypeError, ValueError, IndexError: as that function.
    """
    labels = identity.repeat_interleave(logits.shape[1])
    return identity_cross_entropy(logits.flatten(0, 1), labels, smoothing=smoothing, **options)
