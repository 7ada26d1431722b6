"""A gallery on disk that is searched one query at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext._arrays import returner, to_tensor
from vareid_ext._labels import NAMED, UNKNOWN, Labels, joined, numbered
from vareid_ext._text import VIEWPOINTS
from vareid_ext.files.gallery_folder import StoredGallery, check_new, read_gallery, write_gallery
from vareid_ext.files.lock import locked
from vareid_ext.ops._checks import check_count, check_dtype, check_values
from vareid_ext.ops._features import check_features, row_magnitudes
from vareid_ext.ops._filter import contiguous_rows
from vareid_ext.ops._progress import listen
from vareid_ext.retrieval.rerank.k_reciprocal import K1, K2, LAMBDA_VALUE, check_parameters
from vareid_ext.retrieval.rerank.one_query import KnownGallery, OneQuery, list_width

_LABELS = ("identity", "camera", "viewpoint")
_LISTS = {
    "index": np.int32, "distance": np.float64, "row_max": np.float32, "set_indptr": np.int64, "set_index": np.int32,
    "set_distance": np.float32,
}  # fmt: skip


class GalleryIndex:
    """A gallery in a folder with its neighbour lists, which are made once and not for every search.

    Opening takes milliseconds whatever its size, as everything is memory-mapped. Images can be added; an index that is
    open goes on with those that it had. Everything is computed on the CPU.

    Args:
        folder: what :meth:`build` or ``vareid index`` has written.

    Attributes:
        folder: the folder.
        feature: [G, D], read-only, a memory map.
        labels: a :class:`vareid_ext._labels.Labels` of the G images, -1 where something is not known; ``labels.names``
            holds what identities and cameras are called that were given as texts.
        k1: size of the k-reciprocal neighbour sets.
        k2: neighbours averaged in query expansion.
        about: what :meth:`build` was given.

    Raises:
        FileNotFoundError: there is no index, or it was not finished.
        ValueError: it is damaged, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._use(read_gallery(self.folder))

    def _use(self, stored: StoredGallery) -> None:
        found, arrays, G = stored.description, stored.arrays, len(stored.feature)
        try:
            self.k1, self.k2, _ = check_parameters(found["k1"], found["k2"], LAMBDA_VALUE)
            width, sets = list_width(G, self.k1, self.k2), len(arrays["set_index"])
            shapes = dict(zip(_LISTS, ((G, width), (G, width), (G,), (G + 1,), (sets,), (sets,)), strict=True))
            for name, shape in shapes.items():
                if arrays[name].shape != shape or arrays[name].dtype != _LISTS[name]:
                    raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}; {shape} is needed")
            indptr = arrays["set_indptr"]
            ordered = indptr[0] == 0 and indptr[-1] == sets and (np.diff(indptr) >= 0).all()
            if not ordered or len(arrays["path"]) not in (0, G) or arrays["path"].dtype.kind != "S":
                raise ValueError("its arrays do not fit each other")
            names = {label: tuple(map(str, texts)) for label, texts in found.get("names", {}).items() if label in NAMED}
            known: dict[str, Any] = {label: arrays[label] for label in _LABELS}
            self.labels = Labels(**known, viewpoints=tuple(map(str, found["viewpoints"])), names=names)
            self.labels.check_lengths(features=stored.feature)
            lists = {name: to_tensor(arrays[name], name) for name in _LISTS}
            self._gallery = KnownGallery(
                to_tensor(stored.feature, "feature"), **lists, scale=float(found["scale"]),
                largest=float(found["largest"]), k1=self.k1, k2=self.k2,
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"index: {str(self.folder)!r} is damaged: {error}") from error
        self.feature, self._paths, self.about = stored.feature, arrays["path"], found.get("about")

    def __len__(self) -> int:
        """G."""
        return len(self.feature)

    @property
    def has_paths(self) -> bool:
        """Whether the images' paths are known."""
        return len(self._paths) > 0

    def path(self, row: int) -> str:
        """The path of an image, "" if it is not known."""
        return os.fsdecode(self._paths[row]) if self.has_paths else ""

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        feature: Any,
        *,
        identity: Any = None,
        camera: Any = None,
        viewpoint: Any = None,
        viewpoints: Sequence[str] = VIEWPOINTS,
        paths: Sequence[str] = (),
        k1: int = K1,
        k2: int = K2,
        about: Any = None,
        progress: bool = False,
    ) -> GalleryIndex:
        """Write a gallery into a folder.

        Args:
            folder: is made; it must not hold anything else. Where writing fails, it holds no index.
            feature: [G, D], float32, float16, bfloat16 (kept as float32) or float64; G at least 1, D at most 16,384.
            identity: whole numbers, -1 where unknown, or texts, "" where unknown, [G]; None: not known.
            camera: likewise.
            viewpoint: whole numbers, likewise.
            viewpoints: what the viewpoints 0, 1, ... are called.
            paths: of the images, [G], or none.
            k1: as in :func:`k_reciprocal_rerank`.
            k2: as in :func:`k_reciprocal_rerank`.
            about: what else is to be kept, anything that JSON can hold.
            progress: show a progress bar on standard error.

        Raises:
            TypeError: not an array, or a dtype that is not floating.
            ValueError: shapes, lengths or parameters do not fit; a row with NaN or Inf.
            FileExistsError: the folder holds an index or other files.
            BlockingIOError: another process writes it.
            OSError: it cannot be written.
        """
        k1, k2, _ = check_parameters(k1, k2, LAMBDA_VALUE)
        new = _checked(feature)
        given = {"identity": identity, "camera": camera, "viewpoint": viewpoint}
        labels = _labels(len(new), given, viewpoints, paths)
        target = Path(folder)
        check_new(target)
        made = not target.exists()
        target.mkdir(exist_ok=True)
        try:
            with locked(target):
                check_new(target)  # another process may have finished it
                gallery = KnownGallery.empty(new.shape[1], new.dtype, k1, k2)
                _write(target, None, gallery, new, labels, _encoded(paths), about, progress)
        except BlockingIOError:
            raise
        except BaseException:
            if made and not (target / "index.json").exists():
                shutil.rmtree(target, ignore_errors=True)
            raise
        return cls(target)

    def add(
        self,
        feature: Any,
        *,
        identity: Any = None,
        camera: Any = None,
        viewpoint: Any = None,
        viewpoints: Sequence[str] = VIEWPOINTS,
        paths: Sequence[str] = (),
        skip_known: bool = False,
        progress: bool = False,
    ) -> int:
        """Add images; the index is then the one that :meth:`build` would have made of all.

        The distances of the new images to all are computed, those between the old ones are not. What other processes
        have added since this index was opened is kept. Identities and cameras of the same name are the same, whatever
        their numbers; where the index or what is added has numbers, a number is the name that is written like it.

        Args:
            feature: [A, D] of the index's D and dtype (float32 where bfloat16 was given).
            identity: as in :meth:`build`, as the others.
            camera: [A].
            viewpoint: [A].
            viewpoints: as in :meth:`build`; those of other names than the index's come behind them.
            paths: [A] if the index has paths, else none.
            skip_known: leave out images whose path the index has by now.
            progress: show a progress bar on standard error.

        Returns:
            how many images were added.

        Raises:
            As :meth:`build`; the folder then holds what it did.
        """
        new = _checked(feature, self._gallery.feature)
        given = {"identity": identity, "camera": camera, "viewpoint": viewpoint}
        labels = _labels(len(new), given, viewpoints, paths)
        if self.has_paths != bool(paths):
            raise ValueError(
                f"paths: {len(paths)} were given, but the index has {'' if self.has_paths else 'no '}paths"
            )
        with locked(self.folder):
            stored = read_gallery(self.folder)
            self._use(stored)
            added = _encoded(paths)
            if skip_known:
                fresh = np.isin(added, self._paths, invert=True)
                new, labels, added = new[torch.from_numpy(fresh)], labels.select(fresh), added[fresh]
                if not len(new):
                    return 0
            encoded = np.concatenate([self._paths, added])
            both = joined(self.labels, labels)
            _write(self.folder, stored, self._gallery, new, both, encoded, self.about, progress)
            self._use(read_gallery(self.folder))
        return len(new)

    def search(
        self,
        query: Any,
        *,
        topk: int = 10,
        rerank: bool = True,
        lambda_value: float = LAMBDA_VALUE,
        exclude: Any = None,
        progress: bool = False,
    ) -> tuple[Any, Any]:
        """The best images for each of some queries, of which each is searched by itself.

        Args:
            query: features [Q, D] of the index's dtype (bfloat16 counts as float32); Q at least 1.
            topk: how many images, at least 1; all G, if it is more.
            rerank: the images of ``k_reciprocal_rerank(query[i : i + 1], feature, topk=topk)`` in the same order, at
                distances that may differ in float32's last bits; else those of
                ``nearest_neighbors(query, feature, k=topk)``.
            lambda_value: weight of the original distance in the former, 0 to 1.
            exclude: bool [G] or [Q, G], images that are in no result, or not in a query's; they stay in the
                neighbourhoods of re-ranking.
            progress: show a progress bar on standard error.

        Returns:
            distance float32 [Q, min(topk, G)], ascending, in [0, 1] or squared Euclidean, and index int64, ties by the
            lower index; where too much is excluded, rows end with distance Inf and index -1. NumPy, PyTorch or CuPy as
            query was.

        Raises:
            TypeError: not arrays, or of another dtype.
            ValueError: shapes or parameters do not fit; a row with NaN or Inf; the index turns out to be damaged.
        """
        back = returner(query)
        device = to_tensor(query, "query").device
        rows = _checked(query, self._gallery.feature, "query")
        Q, G = len(rows), len(self)
        topk = min(G, check_count("topk", topk, 1, 2**63 - 1))
        check_parameters(self.k1, self.k2, lambda_value)
        allowed = None if exclude is None else ~_mask(exclude, Q, G)
        distance = torch.full((Q, topk), torch.inf)
        index = torch.full((Q, topk), -1)
        for i in _shown(range(Q), "search", progress):
            one = OneQuery(self._gallery, rows[i : i + 1])
            of_query = None if allowed is None else allowed[i]
            if rerank:
                found, best = one.reranked(topk, float(lambda_value), of_query)
            else:
                best = one.nearest(topk, of_query)
                found = (one.original[best].double() / one.scale**2).float()
            distance[i, : len(best)], index[i, : len(best)] = found, best
        return back(distance.to(device)), back(index.to(device))


def _checked(value: Any, like: Tensor | None = None, name: str = "feature") -> Tensor:
    """Features on the CPU, as an index keeps them."""
    tensor = to_tensor(value, name)
    check_values(name, tensor)
    check_features(name, tensor)
    tensor = contiguous_rows(tensor.cpu())
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    if len(tensor) == 0:
        raise ValueError(f"{name}: no rows were given; at least one is needed")
    if like is not None:
        if tensor.shape[1] != like.shape[1]:
            raise ValueError(
                f"{name}: features of {tensor.shape[1]} elements were given, but the index's have {like.shape[1]}"
            )
        check_dtype(name, tensor, like.dtype)
    row_magnitudes(name, tensor)
    return tensor


def _labels(rows: int, labels: Mapping[str, Any], viewpoints: Sequence[str], paths: Sequence[str]) -> Labels:
    """The labels of some images, which have these paths or none."""
    given: dict[str, Any] = {}
    names: dict[str, tuple[str, ...]] = {}
    for label, values in labels.items():
        found = np.full(rows, UNKNOWN) if values is None else np.asarray(values)
        if label in NAMED and found.dtype.kind in "UO" and found.ndim == 1:
            texts = np.asarray(values, dtype=object).tolist()  # before NumPy makes texts of what is none
            others = [text for text in texts if not isinstance(text, str)]
            if others:
                raise TypeError(
                    f"{label}: {others[-1]!r} was given in an array of objects; allowed are texts or integers"
                )
            given[label], names[label] = numbered(texts)
        else:
            given[label] = to_tensor(found, label).numpy()
    checked = Labels(**given, viewpoints=tuple(viewpoints), names=names)
    checked.check_lengths(feature=range(rows), paths=paths or None)
    return checked


def _encoded(paths: Sequence[str]) -> np.ndarray:
    """Paths as an index keeps them."""
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def _mask(exclude: Any, Q: int, G: int) -> Tensor:
    mask = to_tensor(exclude, "exclude").cpu()
    check_dtype("exclude", mask, torch.bool)
    if mask.shape not in ((G,), (Q, G)):
        raise ValueError(f"exclude: shape {list(mask.shape)} was given; [{G}] or [{Q}, {G}] is needed")
    return mask.expand(Q, G)


def _write(
    folder: Path,
    before: StoredGallery | None,
    gallery: KnownGallery,
    new: Tensor,
    labels: Labels,
    paths: np.ndarray,
    about: Any,
    progress: bool,
) -> None:
    A, M = len(new), len(gallery.feature) + len(new)
    with contextlib.ExitStack() as stack:
        if progress:
            from tqdm.auto import tqdm

            total = A * (M - A) + A * (A + 1) // 2
            bar = tqdm(total=total, desc="neighbours", unit="pair", unit_scale=True, leave=False)
            stack.enter_context(listen(stack.enter_context(bar).update))
        grown = gallery.extended(new)
    arrays = {name: getattr(grown, name).numpy() for name in _LISTS}
    known = {name: getattr(labels, name) for name in _LABELS} | {"path": paths}
    description = {"k1": grown.k1, "k2": grown.k2, "scale": grown.scale, "largest": grown.largest, "about": about}
    description |= {"viewpoints": list(labels.viewpoints), "names": {k: list(v) for k, v in labels.names.items()}}
    write_gallery(folder, before, new.numpy(), {**arrays, **known}, description)


def _shown(rows: range, name: str, progress: bool) -> Iterator[int]:
    if not progress or len(rows) == 1:
        return iter(rows)
    from tqdm.auto import tqdm

    return iter(tqdm(rows, desc=name, unit="query", leave=False))
