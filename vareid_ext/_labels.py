"""What is known of images: the one carrier of labels through data, features, metrics and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from vareid_ext._text import VIEWPOINTS, viewpoint_name

UNKNOWN = -1
"""Label that is not known."""

COLUMN = "column_"
"""What a further column's name begins with where it stands among other things: in a manifest, in a file of features."""

NAMED = ("identity", "camera")
"""The labels, beside further columns, that may have names instead of numbers."""

Self = TypeVar("Self", bound="Labels")


def _whole(name: str, values: Any) -> np.ndarray:
    """`values` as int64. Raises ValueError, naming them, where that would change one."""
    given = np.asarray(values)
    try:
        with np.errstate(invalid="ignore"):
            whole = given.astype(np.int64)
    except (OverflowError, TypeError, ValueError):
        whole = None
    if whole is None or not np.array_equal(whole, given):
        raise ValueError(f"{name}: values of type {given.dtype} were given; allowed are whole numbers of 64 bits")
    return whole


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def _vector(name: str, values: Any) -> np.ndarray:
    array = _whole(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {list(array.shape)} was given; [N] is needed")
    return _frozen(array)


def check_column(name: object) -> None:
    """ValueError unless `name` can be that of a further column."""
    if not isinstance(name, str) or not name.isidentifier() or name in ("identity", "camera", "viewpoint", "none"):
        raise ValueError(
            f"columns: {name!r} was given; allowed are names of letters, digits and _ (clothes), but for identity, "
            "camera, viewpoint and none"
        )


def one_of_each(identity: Any, generator: np.random.Generator) -> np.ndarray:
    """Which of N images are drawn, bool [N]: one random image of each identity."""
    order = generator.permutation(len(identity))
    drawn = np.zeros(len(order), dtype=bool)
    drawn[order[np.unique(np.asarray(identity)[order], return_index=True)[1]]] = True
    return drawn


@dataclass(frozen=True, eq=False)
class Labels:
    """Who is on each of N images, by which camera, from which side. All arrays are read-only.

    Attributes:
        identity: whole numbers, int64 [N].
        camera: int64 [N], -1 where unknown.
        viewpoint: int64 [N], 0..V-1, -1 where unknown.
        viewpoint_weight: float32 [N, V] with soft labels, else None. Every row is a distribution over the viewpoints;
            where the viewpoint is unknown it is uniform over those that occur for the identity.
        viewpoints: what the V viewpoints are called, in the order of their numbers.
        columns: further labels by name (clothes, say), int64 [N] each, -1 where unknown.
        names: of "identity", "camera" and columns, where they have names: what the numbers 0, 1, ... are called.
            Where others have other names, their numbers mean something else (see `same_numbers`).
    """

    identity: np.ndarray
    camera: np.ndarray
    viewpoint: np.ndarray
    viewpoint_weight: np.ndarray | None = None
    viewpoints: tuple[str, ...] = VIEWPOINTS
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("identity", "camera", "viewpoint"):
            object.__setattr__(self, name, _vector(name, getattr(self, name)))
        for name in self.columns:
            check_column(name)
        columns = {name: _vector(name, values) for name, values in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        for name, texts in self.names.items():
            values = self.label(name)
            if values is not None and len(values) and not (values.min() >= UNKNOWN and values.max() < len(texts)):
                raise ValueError(
                    f"{name}: numbers {values.min()} to {values.max()} were given; {len(texts)} have names"
                )
        if self.viewpoint_weight is not None:
            weight = np.asarray(self.viewpoint_weight, dtype=np.float32)
            if weight.ndim != 2:
                raise ValueError(f"viewpoint_weight: shape {list(weight.shape)} was given; [N, V] is needed")
            object.__setattr__(self, "viewpoint_weight", _frozen(weight))
        self.check_lengths(camera=self.camera, viewpoint=self.viewpoint, viewpoint_weight=self.viewpoint_weight)
        self.check_lengths(**columns)

    def check_lengths(self, **values: Sized | None) -> None:
        """ValueError, naming it, for one that is not None and has not N entries."""
        for name, value in values.items():
            if value is not None and len(value) != len(self):
                raise ValueError(f"{name}: {len(value)} entries were given; {len(self)} are needed, one per identity")

    def __len__(self) -> int:
        return len(self.identity)

    def rows(self, chosen: np.ndarray) -> dict[str, Any]:
        """What of the images at the indices `chosen` differs from what is known of all, by field."""
        weight = self.viewpoint_weight
        labels = {name: getattr(self, name)[chosen] for name in ("identity", "camera", "viewpoint")}
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return {**labels, "viewpoint_weight": None if weight is None else weight[chosen], "columns": columns}

    def label(self, name: str) -> np.ndarray | None:
        """Identities, cameras or a further column; None where there is no such column."""
        return getattr(self, name) if name in NAMED else self.columns.get(name)

    def _numbered(self: Self, label: str, values: np.ndarray, names: Sequence[str]) -> Self:
        changes = {label: values} if label in NAMED else {"columns": {**self.columns, label: values}}
        return replace(self, **changes, names={**self.names, label: tuple(names)})

    def viewpoint_classes(self) -> np.ndarray:
        """What the viewpoint of each image is called, text [N]; "" where it is unknown."""
        names = np.array([*(viewpoint_name(v, self.viewpoints) for v in range(self.viewpoint.max(initial=-1) + 1)), ""])
        return names[self.viewpoint]

    def called(self, label: str) -> np.ndarray:
        """What a label of each image is called: text [N], "" where it is unknown; numbers where it has no names."""
        values = getattr(self, label) if label in NAMED else self.columns[label]
        return np.array([*self.names[label], ""])[values] if label in self.names else values

    def called_by_key(self) -> dict[str, np.ndarray]:
        """What labels with names are called, text [N], by their key in a file: identity_name, column_NAME_name."""
        there = [label for label in self.names if self.label(label) is not None]
        return {f"{'' if label in NAMED else COLUMN}{label}_name": self.called(label) for label in there}

    def number_of(self, label: str, name: int | None) -> int | None:
        """The number of the identity or camera that is called as the number `name` is written.

        -1 and None stay what they are. Where none is called so, a number that no image has.
        """
        if label not in self.names or name in (None, UNKNOWN):
            return name
        texts = self.names[label]
        return texts.index(str(name)) if str(name) in texts else len(texts)

    def named(self: Self, label: str) -> Self:
        """The same with names of a label, where there is such a label; numbers are called as they are written."""
        values = self.label(label)
        if label in self.names or values is None:
            return self
        found = np.unique(values[values != UNKNOWN])
        number = np.where(values == UNKNOWN, UNKNOWN, np.searchsorted(found, values))
        return self._numbered(label, number, tuple(map(str, found.tolist())))

    def with_names(self: Self, label: str, names: Sequence[str]) -> Self:
        """The same with a label numbered as in `names`, which hold all that occur, where there is such a label."""
        values = self.label(label)
        if values is None:
            return self
        place = {name: number for number, name in enumerate(names)}
        number = np.array([place.get(name, UNKNOWN) for name in self.names[label]] + [UNKNOWN])
        return self._numbered(label, number[values], names)

    def with_viewpoints(self: Self, names: Sequence[str]) -> Self:
        """The same with viewpoints numbered as in `names`, which hold all that occur."""
        if tuple(names) == self.viewpoints:
            return self
        place = {name: number for number, name in enumerate(names)}
        number = np.array([place.get(name, UNKNOWN) for name in self.viewpoints] + [UNKNOWN])
        weight = self.viewpoint_weight
        if weight is not None:
            weight = np.zeros((len(self), len(names)), np.float32)
            weight[:, number[: len(self.viewpoints)]] = self.viewpoint_weight
        changes = {"viewpoint": number[self.viewpoint], "viewpoint_weight": weight, "viewpoints": tuple(names)}
        return replace(self, **changes)

    def select(self: Self, indices: Sequence[int] | np.ndarray) -> Self:
        """The images at `indices` (integers or a boolean mask [N]), in that order, labels unchanged."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"indices: a mask of shape {chosen.shape} was given; ({len(self)},) is needed")
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64).reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"indices must be in [0, {len(self)}), got {chosen.min()}..{chosen.max()}")
        return replace(self, **self.rows(chosen))


def numbered(texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers of the texts of N images, int64 [N], -1 where one is "", and what 0, 1, ... are called."""
    names = tuple(sorted(set(texts) - {""}))
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(text, UNKNOWN) for text in texts], dtype=np.int64), names


def same_numbers(*parts: Self) -> tuple[Self, ...]:
    """The parts, where identities, cameras, columns and viewpoints of the same names have the same numbers.

    Where a label has names in one part and numbers in another, a number is called as it is written.
    """
    views = tuple(dict.fromkeys(name for part in parts for name in part.viewpoints))
    parts = tuple(part.with_viewpoints(views) for part in parts)
    for label in dict.fromkeys(label for part in parts for label in part.names):
        parts = tuple(part.named(label) for part in parts)
        names = tuple(dict.fromkeys(name for part in parts for name in part.names.get(label, ())))
        parts = tuple(part.with_names(label, names) for part in parts)
    return parts


def joined(*parts: Labels) -> Labels:
    """Identities, cameras and viewpoints of the images of all parts, one after the other."""
    parts = same_numbers(*parts)
    labels: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("identity", "camera", "viewpoint")
    }
    names = {label: names for label, names in parts[0].names.items() if label in NAMED}
    return Labels(**labels, viewpoints=parts[0].viewpoints, names=names)
