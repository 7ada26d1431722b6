"""How good probabilities of classes are: accuracy, confusion, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vareid_ext._text import table

_BINS = 15


@dataclass(frozen=True)
class ClassificationMetrics:
    """``print`` shows the numbers and the confusion as a table.

    Attributes:
        accuracy: share of the images whose likeliest class is the true one.
        ece: expected calibration error, the mean distance of confidence and accuracy over 15 bins of confidence.
        confusion: int64 [V, V], images by true class (rows) and likeliest class.
        names: of the classes.
    """

    accuracy: float
    ece: float
    confusion: np.ndarray
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The numbers by name, the confusion as a list of rows."""
        return {
            "images": int(self.confusion.sum()), "accuracy": self.accuracy, "ece": self.ece,
            "classes": list(self.names), "confusion": self.confusion.tolist(),
        }  # fmt: skip

    def __str__(self) -> str:
        recall = self.confusion.diagonal() / np.maximum(self.confusion.sum(axis=1), 1)
        rows = [
            (name, *(f"{count:,}" for count in row), f"{100 * share:.1f} %")
            for name, row, share in zip(self.names, self.confusion, recall, strict=True)
        ]
        return (
            f"accuracy {100 * self.accuracy:.1f} % of {self.confusion.sum():,} images, calibration error (ECE) "
            f"{self.ece:.3f}\n{table(('is, labelled as', *self.names, 'right'), rows)}"
        )


def evaluate_classification(probability: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> ClassificationMetrics:
    """What probabilities [N, V] are worth where the truth [N], whole numbers from 0 to V - 1, is known.

    Raises:
        ValueError: there are no images.
    """
    if not len(truth):
        raise ValueError("truth: no images were given; at least one is needed")
    confidence, chosen = probability.max(axis=1), probability.argmax(axis=1)
    right = chosen == truth
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    excess = np.bincount(bins, weights=confidence - right, minlength=_BINS)
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (truth, chosen), 1)
    return ClassificationMetrics(float(right.mean()), float(np.abs(excess).sum() / len(truth)), confusion, tuple(names))
