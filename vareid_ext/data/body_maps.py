"""Maps of a person's body in files: which part of the body or of the clothing a pixel shows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vareid_ext.data.extras import read_array

CLASSES = 20
"""Classes of LIP (Look into Person): 0 background, 1 hat, 2 hair, 3 glove, 4 sunglasses, 5 upper clothes, 6 dress,
7 coat, 8 socks, 9 trousers, 10 jumpsuit, 11 scarf, 12 skirt, 13 face, 14, 15 arms, 16, 17 legs, 18, 19 shoes."""

GROUPS = {
    "foreground": tuple(range(1, CLASSES)),
    "head": (1, 2, 4, 13),
    "upper body": (3, 5, 6, 7, 10, 11, 14, 15),
    "lower body": (9, 12, 16, 17),
    "shoes": (8, 18, 19),
}
"""The groups of classes that SPReID (Kalayeh et al., CVPR 2018) pools over."""

_GROUP_OF = np.array([[label in classes for label in range(CLASSES)] for classes in GROUPS.values()], np.float32)
_LARGEST_PART = 24


def group_classes(classes: np.ndarray) -> np.ndarray:
    """Whole numbers [H, W] from 0 to 19 -> float32 [5, H, W], 1 where a pixel is of a group. ValueError for others."""
    if classes.ndim != 2 or classes.dtype.kind not in "ui" or not classes.size:
        raise ValueError(f"{classes.dtype} {list(classes.shape)} was given; allowed is a class for every pixel, [H, W]")
    if classes.min() < 0 or classes.max() >= CLASSES:
        outside = classes.max() if classes.max() >= CLASSES else classes.min()
        raise ValueError(f"class {outside} was given; allowed are those of LIP, 0 to {CLASSES - 1}")
    return _GROUP_OF[:, classes]


def group_scores(scores: np.ndarray) -> np.ndarray:
    """Probabilities or logits [20, H, W] or [H, W, 20] -> the probabilities of the groups, float32 [5, H, W].

    Probabilities are what lies in [0, 1] and adds up to 1 over the classes (within 0.01); all else is logits.
    """
    if scores.ndim != 3 or CLASSES not in (scores.shape[0], scores.shape[2]) or not scores.size:
        raise ValueError(
            f"{scores.dtype} {list(scores.shape)} was given; allowed are scores [{CLASSES}, H, W] or [H, W, {CLASSES}]"
        )
    scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise ValueError("infinite or undefined scores were given; allowed are finite ones")
    if len(scores) != CLASSES:
        scores = scores.transpose(2, 0, 1)
    if scores.min() < 0 or np.abs(scores.sum(axis=0) - 1).max() > 0.01:
        scores = np.exp(scores - scores.max(axis=0))
        scores /= scores.sum(axis=0)
    return np.einsum("gc,chw->ghw", _GROUP_OF, scores)


def load_parsing(entry: str | os.PathLike[str], *_: int) -> np.ndarray:
    """The parsing extra of a file: classes (.png, .npy, .npz) or scores of classes (.npy, .npz)."""
    value = read_array(Path(entry))
    return group_scores(value) if value.dtype.kind == "f" else group_classes(value)


def load_iuv(entry: str | os.PathLike[str], *_: int) -> np.ndarray:
    """The iuv extra of a file: DensePose's picture of I, U, V, or an array [3, H, W].

    OpenCV writes I as blue, other programs as red: it is the channel of small numbers, blue where both are.
    """
    value = read_array(Path(entry))
    if value.ndim != 3 or len(value) != 3 or not value.size:
        raise ValueError(f"{value.dtype} {list(value.shape)} was given; [3, H, W] or a picture with colours is needed")
    is_picture = str(entry).lower().endswith(".png")
    return value[::-1] if is_picture and value[2].max() <= _LARGEST_PART else value
