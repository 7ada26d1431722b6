"""What viewpoints a data set knows, by name, and what its labels say of an image: one class, several, or an angle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vareid_ext._labels import UNKNOWN
from vareid_ext._text import VIEWPOINTS
from vareid_ext.data.text_files import shown

MOST_BINS = 360
_MOST_FOUND = 36  # different names in data that declares none; more are angles, or not viewpoints at all
_SUM_TOLERANCE = 0.01  # of the weights in a label, which people round
_NAME = re.compile(r"[^\s:,]{1,40}")
_NAMES_ARE = "names have 1 to 40 characters, without blanks, commas and colons"


@dataclass(frozen=True)
class ViewpointClasses:
    """The V viewpoints of a data set, and what its labels mean.

    A label is the name of a class; a name in `between`; weights of classes, such as `front:0.7 side:0.3`; or with
    `angles` a number of degrees.

    Attributes:
        names: the classes in the order of their numbers, each without blanks, commas and colons.
        between: label -> classes that it lies between, equally far from each; the first is its class where labels are
            hard.
        angles: whether labels are degrees in [0, 360). Class i then has its middle at i * 360 / V; a soft label is
            shared by the two nearest classes, in proportion.
    """

    names: tuple[str, ...]
    between: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    angles: bool = False

    @classmethod
    def of_angles(cls, bins: int) -> ViewpointClasses:
        """`bins` classes of equal width, named by the degrees of their middles."""
        return cls(tuple(f"{360 * i / bins:g}°" for i in range(bins)), angles=True)

    def __len__(self) -> int:
        return len(self.names)

    def weights(self, label: str) -> tuple[float, ...]:
        """The share of each class in an image with this label, V numbers that sum to 1.

        Raises ValueError, which says what is allowed, for a label that means nothing here.
        """
        if self.angles:
            return self._of_angle(label)
        if label in self.names:
            shares = {label: 1.0}
        elif label in self.between:
            shares = dict.fromkeys(self.between[label], 1 / len(self.between[label]))
        elif ":" in label:
            shares = _mixture(label, self.names)
        else:
            raise ValueError(f"{shown(label)} was given; allowed are {', '.join((*self.names, *self.between))}")
        return tuple(shares.get(name, 0.0) for name in self.names)

    def number(self, label: str) -> int:
        """The class of a label: the first of those it lies between, or the one with the largest weight; -1 for ""."""
        if not label:
            return UNKNOWN
        if label in self.between and not self.angles:
            return self.names.index(self.between[label][0])
        weights = self.weights(label)
        return weights.index(max(weights))

    def know(self, labels: Iterable[str]) -> bool:
        """Whether all labels mean something here."""
        try:
            self.columns(labels)
        except ValueError:
            return False
        return True

    def columns(self, labels: Iterable[str]) -> dict[str, Any]:
        """What `Labels` hold of images with these labels: `viewpoint` [N], and `viewpoints`, the names."""
        labels = tuple(labels)
        number = {label: self.number(label) for label in set(labels)}
        viewpoint = np.array([number[label] for label in labels], dtype=np.int64)
        return {"viewpoint": viewpoint, "viewpoints": self.names}

    def _of_angle(self, label: str) -> tuple[float, ...]:
        try:
            degrees = float(label)
        except ValueError:
            degrees = math.nan
        if not 0 <= degrees < 360:
            raise ValueError(f"{shown(label)} was given; allowed are degrees from 0 to below 360")
        place, V = degrees * len(self) / 360, len(self)
        share = place - math.floor(place)
        weights = [0.0] * V
        weights[math.floor(place) % V] += 1 - share
        weights[(math.floor(place) + 1) % V] += share
        return tuple(weights)


def mirrored_viewpoints(names: Sequence[str]) -> tuple[int, ...]:
    """The number of what each viewpoint becomes in a mirrored image.

    Left and right in a name are exchanged, in any case (left, Left, LEFT); the classes of `ViewpointClasses.of_angles`
    count the other way round; where no viewpoint has that name, and for all others, it is the viewpoint itself.
    """
    V = len(names)
    if V and tuple(names) == ViewpointClasses.of_angles(V).names:
        return tuple((V - place) % V for place in range(V))
    places = {name: place for place, name in enumerate(names)}
    return tuple(places.get(_mirrored_name(name), place) for place, name in enumerate(names))


def _mirrored_name(name: str) -> str:
    sides = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
    sides |= {right: left for left, right in sides.items()}
    return re.sub("|".join(sides), lambda side: sides[side[0]], name)


PERSON = ViewpointClasses(
    VIEWPOINTS,
    {"front_side": ("front", "side"), "back_side": ("back", "side"), "noise": ("side", "front", "back")},
)
"""The viewpoints of the paper: front, side, back, and what its annotators could not tell apart."""


def _mixture(label: str, names: Sequence[str]) -> dict[str, float]:
    """The weights in `front:0.7 side:0.3`."""
    shares: dict[str, float] = {}
    for part in label.split():
        name, _, weight = part.rpartition(":")
        if name not in names or name in shares:
            what = "twice" if name in shares else f"; allowed are {', '.join(names)}"
            raise ValueError(f"{shown(label)} was given, with {shown(name)} {what}".replace(" ;", ";"))
        try:
            shares[name] = float(weight)
        except ValueError:
            shares[name] = math.nan
    total = sum(shares.values())
    if not all(0 <= share <= 1 for share in shares.values()) or not abs(total - 1) <= _SUM_TOLERANCE:
        raise ValueError(f"{shown(label)} was given; the weights must be 0 to 1 and sum to 1")
    return {name: share / total for name, share in shares.items()}


def declared_classes(
    names: Sequence[str] = (),
    between: Mapping[str, Sequence[str]] | None = None,
    bins: int | None = None,
    prefix: str = "",
) -> ViewpointClasses | None:
    """The viewpoints that a user declares, None where nothing is.

    Args:
        names: the classes; the paper's three come with its names between them.
        between: as in :class:`ViewpointClasses`.
        bins: number of classes where labels are angles.
        prefix: of these arguments' names in errors.

    Raises:
        ValueError: names that are given twice or not allowed; classes in `between` that are not among them; `bins`
            beside names.
    """
    between = between or {}
    if bins is not None:
        if names or between:
            raise ValueError(f"{prefix}viewpoint_bins: {bins} was given beside names; angles have none")
        if not 2 <= bins <= MOST_BINS:
            raise ValueError(f"{prefix}viewpoint_bins: {bins} was given; allowed are 2 to {MOST_BINS}")
        return ViewpointClasses.of_angles(bins)
    if not names and not between:
        return None
    if tuple(names) == PERSON.names and not between:
        return PERSON
    for where, name in (*(("viewpoints", n) for n in names), *(("viewpoints_between", n) for n in between)):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{prefix}{where}: {shown(name)} was given; {_NAMES_ARE}")
        if [*names, *between].count(name) > 1:
            raise ValueError(f"{prefix}{where}: {name!r} was given twice")
    for name, ends in between.items():
        other = [end for end in ends if end not in names]
        if other or len(set(ends)) < 2:
            raise ValueError(
                f"{prefix}viewpoints_between: {name}: {list(ends)} was given; two or more of {', '.join(names)} are "
                "needed"
            )
    return ViewpointClasses(tuple(names), {name: tuple(ends) for name, ends in between.items()})


def checked_classes(labels: Sequence[tuple[str, str]], declared: ViewpointClasses | None) -> ViewpointClasses:
    """The viewpoints of data: those declared, or else those found.

    Args:
        labels: (where it stands, label) of images whose viewpoint is known.
        declared: by the user or by the data set's reader.

    Raises:
        ValueError: a label that means nothing among them; the message says where it stands.
    """
    classes = found_classes(labels) if declared is None else declared
    for label, where in {label: where for where, label in reversed(labels)}.items():
        try:
            classes.number(label)
        except ValueError as error:
            raise ValueError(f"{where}: viewpoint {error}") from None
    return classes


def found_classes(labels: Iterable[tuple[str, str]]) -> ViewpointClasses:
    """The viewpoints of data that declares none: those of the paper where all labels are among its names, else the
    names that occur, in order.

    Args:
        labels: (where it stands, label) of images whose viewpoint is known.

    Raises:
        ValueError: names that differ in small and capital letters alone; names that are the paper's beside names that
            are not, which is a slip of the pen or needs to be declared; more than 36 names.
    """
    first: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for where, label in labels:
        for part in label.split():
            name = part.rpartition(":")[0] or part
            if not _NAME.fullmatch(name):
                raise ValueError(f"{where}: viewpoint {shown(label)} was given; {_NAMES_ARE}")
            first.setdefault(name, where)
            before = spelled.setdefault(name.casefold(), name)
            if before != name:
                raise ValueError(
                    f"{where}: viewpoint {name!r} was given, but {before!r} in {first[before]}; a viewpoint is written "
                    "one way, in small or in capital letters"
                )
    known = (*PERSON.names, *PERSON.between)
    other = [name for name in first if name not in known]
    if not other:
        return PERSON
    if any(name in first for name in PERSON.between) or all(name in first for name in PERSON.names):
        raise ValueError(
            f"{first[other[0]]}: viewpoint {shown(other[0])} was given beside names out of {', '.join(known)}; "
            "viewpoints of any other names are declared: --data.viewpoints front,side,..."
        )
    if len(first) > _MOST_FOUND:
        raise ValueError(
            f"{first[other[-1]]}: viewpoint {shown(other[-1])} was given, the {len(first)}th name; at most "
            f"{_MOST_FOUND} are allowed unless they are declared (--data.viewpoints), or angles (--viewpoint-bins 8)"
        )
    whole = all(name.isdecimal() for name in first)
    return ViewpointClasses(tuple(sorted(first, key=lambda name: (int(name) if whole else 0, name))))
