"""Distillation of features: a student's feature is drawn to a teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch of the squared distance between the two features brought to length 1: ``2 - 2 cos``.

    Args:
        student: floating point [..., D], N of them in all; computed in float32 or wider.
        teacher: of the same shape; no gradient flows into it.

    Returns:
        Scalar tensor in [0, 4]; 0 for an empty batch. A feature of zeros stays one: it is 1 from any other.

    Raises:
        ValueError: shapes that differ.
    """
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            f"student and teacher [..., D] were expected, got {list(student.shape)}, {list(teacher.shape)}"
        )
    student, teacher = (x if x.dtype.itemsize == 8 else x.float() for x in (student, teacher.detach()))
    distance = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)
    return distance.sum() / max(distance.numel(), 1)
