"""A plane picture of features: PCA, t-SNE or UMAP of a few identities, with centres; and the angles of centres."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vareid_ext._labels import Labels

METHODS = {"pca": "", "tsne": "sklearn", "umap": "umap"}
"""Ways to a plane, and the library each needs."""

MOST_IDENTITIES, MOST_IMAGES = 8, 40
"""Identities that a map shows, and images of each."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Points in a plane.

    Attributes:
        points: [n, 2].
        identity, viewpoint: int64 [n].
        kind: [n], "image", "identity centre" or "viewpoint centre".
        note: how it was made and what it leaves out.
        viewpoints: what the viewpoints are called.
        names: what the identities are called, where they have names.
    """

    points: np.ndarray
    identity: np.ndarray
    viewpoint: np.ndarray
    kind: np.ndarray
    note: str
    viewpoints: tuple[str, ...]
    names: tuple[str, ...] = ()


def check_method(name: str) -> None:
    """ValueError where the library of a way to a plane is not installed."""
    library = METHODS[name]
    if library and importlib.util.find_spec(library) is None:
        package = {"sklearn": "scikit-learn", "umap": "umap-learn"}[library]
        raise ValueError(f"--map: {name} was given, which needs {package}; type: pip install {package}; or choose pca")


def chosen_images(labels: Labels, of: np.ndarray | None = None) -> np.ndarray:
    """Images of the identities with the most of them, up to ``MOST_IDENTITIES`` and ``MOST_IMAGES`` of each.

    Args:
        labels: of all images.
        of: identities to choose from, None for all.
    """
    names, counts = np.unique(labels.identity, return_counts=True)
    if of is not None:
        counts = np.where(np.isin(names, of), counts, 0)
    chosen = names[np.argsort(-counts, kind="stable")[:MOST_IDENTITIES]][: int((counts > 0).sum())]
    images = [np.flatnonzero(labels.identity == name) for name in np.sort(chosen)]
    return np.concatenate(
        [some[np.linspace(0, len(some) - 1, min(len(some), MOST_IMAGES)).astype(int)] for some in images]
    )


def mean_centers(feature: Tensor, labels: Labels) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The mean feature of each identity and of each (identity, viewpoint): [n, D], identities, viewpoints (-1: all)."""
    keys = sorted(
        {(i, -1) for i in labels.identity.tolist()}
        | {(i, v) for i, v in zip(labels.identity.tolist(), labels.viewpoint.tolist(), strict=True) if v >= 0}
    )
    centers = []
    for identity, viewpoint in keys:
        some = labels.identity == identity
        if viewpoint >= 0:
            some &= labels.viewpoint == viewpoint
        centers.append(feature[torch.from_numpy(some)].mean(0))
    return torch.stack(centers), *(np.array(column) for column in zip(*keys, strict=True))  # type: ignore[return-value]


def feature_map(
    feature: Tensor, labels: Labels, centers: tuple[Tensor, np.ndarray, np.ndarray], *, method: str, what: str
) -> FeatureMap:
    """A plane picture of images and centres.

    Args:
        feature: [N, D] of the images.
        labels: of the images.
        centers: [n, D], their identities and viewpoints (-1: the identity's own).
        method: out of ``METHODS``. t-SNE and UMAP place images and centres together, PCA is fitted to the images.
        what: what is shown, in words.
    """
    center, identity, viewpoint = centers
    images = feature.detach().cpu().float()
    together = torch.cat([images, center.detach().cpu().float()])
    too_few = method == "umap" and len(together) < 4
    if method == "pca" or too_few:
        points, share = _pca(images, together)
        how = "PCA, as UMAP needs four points" if too_few else "PCA"
        how += f"; the plane holds {100 * share:.0f} % of the variance of the images"
    else:
        points, how = _embedding(together.numpy(), method), {"tsne": "t-SNE", "umap": "UMAP"}[method]
    kinds = ["image"] * len(images) + ["identity centre" if v < 0 else "viewpoint centre" for v in viewpoint]
    return FeatureMap(
        points,
        np.concatenate([labels.identity, identity]),
        np.concatenate([labels.viewpoint, viewpoint]),
        np.array(kinds),
        f"{what}. {how}.",
        labels.viewpoints,
        labels.names.get("identity", ()),
    )


def _pca(images: Tensor, points: Tensor) -> tuple[np.ndarray, float]:
    mean = images.mean(0)
    _, values, directions = torch.linalg.svd((images - mean).double(), full_matrices=False)
    plane = (points - mean).double() @ directions[:2].T
    if plane.shape[1] < 2:  # one image, or features of one number
        plane = F.pad(plane, (0, 2 - plane.shape[1]))
    energy = values.square()
    return plane.numpy(), float(energy[:2].sum() / energy.sum()) if energy.sum() > 0 else 1.0


def _embedding(points: np.ndarray, method: str) -> np.ndarray:
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        # On equal points the faster method ends in a segmentation fault, and an initial PCA is not finite.
        return TSNE(perplexity=perplexity, init="random", random_state=0, method="exact").fit_transform(points)
    import umap

    return umap.UMAP(random_state=0, n_jobs=1, n_neighbors=min(15, len(points) - 1)).fit_transform(points)


def centers_of(method: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """The centres that a method has learned, W [K, D], U [K, V, D], and which pairs occur, bool [K, V]; or None."""
    for module in method.modules():
        W, U = (getattr(module, name, None) for name in ("identity_centers", "viewpoint_centers"))
        if isinstance(W, Tensor) and isinstance(U, Tensor):
            mask: Any = getattr(module, "mask", None)
            mask = torch.ones(U.shape[:2], dtype=torch.bool) if mask is None else mask
            return W.detach().cpu(), U.detach().cpu(), mask.cpu()
    return None


def center_angles(centers: Sequence[Tensor]) -> list[np.ndarray]:
    """By viewpoint, the angles in degrees between the centre of each identity and that of its view from there.

    Args:
        centers: as :func:`centers_of` returns them.
    """
    W, U, mask = centers
    cosine = F.cosine_similarity(W.double()[:, None], U.double(), dim=2).clamp(-1, 1)
    angle = torch.rad2deg(torch.arccos(cosine))
    return [angle[mask[:, v], v].numpy() for v in range(U.shape[1])]


def learned_centers(centers: Sequence[Tensor], identities: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The centres of some identities as :func:`feature_map` takes them, brought to length 1."""
    W, U, mask = centers
    vectors, labels = [], []
    for k in identities.tolist():
        vectors.append(W[k])
        labels.append((k, -1))
        for v in mask[k].nonzero()[:, 0].tolist():
            vectors.append(U[k, v])
            labels.append((k, v))
    identity, viewpoint = (np.array(column) for column in zip(*labels, strict=True))
    return F.normalize(torch.stack(vectors), dim=1), identity, viewpoint
