"""Which images an evaluation leaves out for a query: the rule, and the labels of an evaluation under a rule.

A rule is terms joined by ``|``, a term is names of columns joined by ``&``: ``identity&camera | identity&clothes``. A
gallery image is left out for a query where all columns of a term are equal and known (-1 is unknown, but an identity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vareid_ext import _arrays
from vareid_ext._labels import UNKNOWN, Labels, check_column
from vareid_ext.ops._checks import check_values
from vareid_ext.reference.ranking import share_a_code

USUAL = "identity&camera"
"""The rule where nobody names one and cameras are known."""

Terms = tuple[tuple[str, ...], ...]
Columns = Mapping[str, tuple[Any, Any]]


def parse_exclusion(rule: str, name: str = "exclude") -> Terms:
    """The terms of a rule, each its columns; without repetitions and terms that others contain, in one order.

    Raises:
        TypeError: not text.
        ValueError: not a rule; the message calls it by ``name``.
    """
    if not isinstance(rule, str):
        raise TypeError(f"{name}: {type(rule).__name__} was given; text is needed, such as {USUAL!r} or 'none'")
    if rule.strip() == "none":
        return ()
    terms = {frozenset(column.strip() for column in term.split("&")) for term in rule.split("|")}
    for column in sorted(column for term in terms for column in term):
        if not column.isidentifier() or column == "none":
            raise ValueError(
                f"{name}: {rule!r} was given; allowed are 'none' and names of columns joined by & and, in terms, by |: "
                f"{USUAL!r}, 'identity&camera | identity&clothes'"
            )
    needed = [term for term in terms if not any(other < term for other in terms)]
    return tuple(sorted((tuple(sorted(term, key=_place)) for term in needed), key=lambda term: [*map(_place, term)]))


def _place(column: str) -> tuple[bool, bool, str]:
    return column != "identity", column != "camera", column


def exclusion_text(rule: str | None) -> str:
    """A rule as it is shown, one text for all that mean the same; "" for None and the usual one."""
    if rule is None:
        return ""
    text = " | ".join("&".join(term) for term in parse_exclusion(rule)) or "none"
    return "" if text == USUAL else text


def exclusion_note(rule: str | None) -> str:
    """What is said beside results under a rule; "" for None and the usual one."""
    text = exclusion_text(rule)
    return text and f"images are left out by the rule {text}"


def label_vector(value: Any, name: str) -> Tensor:
    """Identities, cameras or viewpoints as an int64 vector; TypeError or ValueError if they are not one."""
    if isinstance(value, list | tuple | range):
        try:
            value = np.asarray(value, dtype=np.int64 if len(value) == 0 else None)
        except ValueError:
            raise ValueError(f"{name}: lists of different lengths were given, expected one dimension") from None
    tensor = _arrays.to_tensor(value, name)
    check_values(name, tensor)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: dtype {tensor.dtype} was given; allowed are whole-number types")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} was given, expected one dimension")
    whole = tensor.to(torch.int64).contiguous()
    if tensor.dtype == torch.uint64 and bool((whole < 0).any()):
        raise ValueError(f"{name}: holds numbers of 2^63 or more; allowed are those that int64 holds")
    return whole


class RankingLabels(NamedTuple):
    """The labels of one evaluation, int64; made by :func:`check_labels`.

    Codes stand for the terms of the rule that have the identity, marks for the others: where a query and an image have
    one in common that is not -1, the image is left out, by codes only if it is of the query's identity.
    """

    query_identity: Tensor
    gallery_identity: Tensor
    query_codes: Tensor | None
    """[Q, C], as the next [G, C]; None where there are none, as for the marks"""
    gallery_codes: Tensor | None
    query_marks: Tensor | None
    gallery_marks: Tensor | None

    def on(self, device: torch.device) -> RankingLabels:
        """The same on a device."""
        return RankingLabels._make(None if label is None else label.to(device) for label in self)

    def _take(self, side: str, chosen: Any) -> RankingLabels:
        values = (
            label[chosen] if label is not None and name.startswith(side) else label
            for name, label in self._asdict().items()
        )  # fmt: skip
        return RankingLabels(*values)

    def of_queries(self, rows: slice | Tensor) -> RankingLabels:
        """The same for some of the queries."""
        return self._take("query", rows)

    def of_gallery(self, kept: Tensor) -> RankingLabels:
        """The same for some of the gallery's images."""
        return self._take("gallery", kept)

    def left_out(self, queries: slice | Tensor, images: slice | Tensor) -> Tensor:
        """Whether the rule leaves images out for queries, bool; of both the indices, which are broadcast."""
        same = self.query_identity[queries] == self.gallery_identity[images]
        out = torch.zeros_like(same)
        if self.query_codes is not None and self.gallery_codes is not None:
            out |= same & share_a_code(self.query_codes[queries], self.gallery_codes[images])
        if self.query_marks is not None and self.gallery_marks is not None:
            out |= share_a_code(self.query_marks[queries], self.gallery_marks[images])
        return out

    def parts(self, junk_identity: int | None) -> Iterator[tuple[slice | Tensor, tuple[Any, ...]]]:
        """The queries by their marks, as what marks leave out is the same for all with the same.

        Yields:
            which queries, and what the operators take of them behind distances or features: identities, codes and
            ``junk_identity``, which the images that marks leave out have then.
        """
        if self.query_marks is None or self.gallery_marks is None:
            yield slice(None), (*self[:4], junk_identity)
            return
        junk = _unused(self.query_identity, self.gallery_identity) if junk_identity is None else junk_identity
        marks, place = torch.unique(self.query_marks, dim=0, return_inverse=True)
        for number, mark in enumerate(marks):
            rows = (place == number).nonzero()[:, 0]
            out = share_a_code(mark, self.gallery_marks)
            some = self.of_queries(rows)._replace(gallery_identity=self.gallery_identity.masked_fill(out, junk))
            yield rows, (*some[:4], junk)

    def results(self, junk_identity: int | None, compute: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``compute(rows, operands)`` gives of the queries of each of :meth:`parts`, of all in order."""
        rows, found = zip(
            *((rows, compute(rows, operands)) for rows, operands in self.parts(junk_identity)), strict=True
        )
        if isinstance(rows[0], slice):
            return found[0]
        order = torch.argsort(torch.cat(rows))
        return tuple(torch.cat(parts)[order] for parts in zip(*found, strict=True))


def _unused(*identities: Tensor) -> int:
    """An identity that nobody has."""
    known = torch.cat([identity.cpu() for identity in identities]).unique()
    candidates = torch.arange(len(known) + 1)
    return int(candidates[~torch.isin(candidates, known)][0])


def check_labels(
    query_identity: Any,
    gallery_identity: Any,
    query_camera: Any,
    gallery_camera: Any,
    exclude: str | None = None,
    columns: Columns | None = None,
) -> RankingLabels:
    """The labels as the evaluation takes them, or an error that names the argument."""
    given = {
        "query_identity": query_identity, "gallery_identity": gallery_identity, "query_camera": query_camera,
        "gallery_camera": gallery_camera,
    }  # fmt: skip
    for name in ("query_identity", "gallery_identity"):
        if given[name] is None:
            raise TypeError(f"{name}: None was given; whole numbers are needed")
    vectors = {name: label_vector(value, name) for name, value in given.items() if value is not None}
    identities = vectors["query_identity"], vectors["gallery_identity"]
    if len(identities[0]) == 0:
        raise ValueError("query_identity: the query set is empty")
    if len(identities[1]) == 0:
        raise ValueError("gallery_identity: the gallery is empty")
    if (query_camera is None) != (gallery_camera is None):
        names = "query_camera", "gallery_camera"
        missing, present = names if query_camera is None else names[::-1]
        raise ValueError(f"{missing}: is missing, but {present} is given; give both or neither")
    pairs = {} if query_camera is None else {"camera": (vectors["query_camera"], vectors["gallery_camera"])}
    for name, pair in _checked_columns(columns).items():
        query, gallery = (
            label_vector(values, f"columns: {name} of {side}") for side, values in zip(_SIDES, pair, strict=True)
        )
        pairs[name] = query, gallery
    for name, pair in pairs.items():
        for side, vector, identity in zip(_SIDES, pair, identities, strict=True):
            if len(vector) != len(identity):
                what = f"{side}_camera" if name == "camera" else f"columns: {name} of {side}"
                raise ValueError(
                    f"{what}: length {len(vector)} was given, expected {len(identity)} (as {side}_identity)"
                )
    terms = parse_exclusion(exclude if exclude is not None else USUAL if "camera" in pairs else "none")
    missing_columns = [column for term in terms for column in term if column not in ("identity", *pairs)]
    if missing_columns:
        raise ValueError(
            f"exclude: {exclude!r} was given, but {missing_columns[0]} is not; allowed are 'none' and terms of "
            f"{', '.join(['identity', *pairs])}"
        )
    codes = [_numbered([pairs[c] for c in term[1:]], identities) for term in terms if term[0] == "identity"]
    marks = [_numbered([pairs[c] for c in term], identities) for term in terms if term[0] != "identity"]
    return RankingLabels(*identities, *_stacked(codes), *_stacked(marks))


_SIDES = ("query", "gallery")


def _checked_columns(columns: Columns | None) -> Columns:
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns: {type(columns).__name__} was given; a mapping of names to pairs is needed")
    for name, pair in columns.items():
        if name != "viewpoint":
            check_column(name)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"columns: {name}: {type(pair).__name__} was given; a pair is needed, of the queries and of the gallery"
            )
    return columns


def _numbered(pairs: list[tuple[Tensor, Tensor]], identities: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One number for all columns of a term, of queries and of gallery images; -1 where a column is."""
    if len(pairs) == 1:
        return pairs[0]
    if not pairs:
        return torch.zeros_like(identities[0]), torch.zeros_like(identities[1])
    device = identities[1].device
    both = torch.stack([torch.cat([side.to(device) for side in pair]) for pair in pairs], 1)
    number = torch.unique(both, dim=0, return_inverse=True)[1].masked_fill((both == UNKNOWN).any(1), UNKNOWN)
    query, gallery = number.split([len(identity) for identity in identities])
    return query, gallery


def _stacked(numbers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """Those of all terms side by side, [Q, C] and [G, C]."""
    if not numbers:
        return None, None
    query, gallery = ([number.to(side[0].device) for number in side] for side in zip(*numbers, strict=True))
    return torch.stack(query, 1), torch.stack(gallery, 1)


def label_arguments(query: Labels, gallery: Labels, exclude: str | None = None) -> dict[str, Any]:
    """Two lists of images as the functions of :mod:`vareid_ext.metrics` take them: labels, rule, and what it names."""
    named = {column for term in parse_exclusion(exclude) for column in term} if exclude is not None else set()
    there = {"viewpoint", *query.columns, *gallery.columns}
    columns = {name: (_label(query, name), _label(gallery, name)) for name in sorted(named & there)}
    return {
        "query_identity": query.identity, "gallery_identity": gallery.identity, "query_camera": query.camera,
        "gallery_camera": gallery.camera, "exclude": exclude, "columns": columns,
    }  # fmt: skip


def check_exclusion(exclude: str | None, query: Labels, gallery: Labels, name: str = "exclude") -> None:
    """ValueError, which calls it by ``name``, for a rule that names a column that no image of a side is known by."""
    if exclude is None:
        return
    sides = {"query": query, "gallery": gallery}
    for column in (column for term in parse_exclusion(exclude, name) for column in term):
        for side, images in sides.items():
            if column != "identity" and not (_label(images, column) != UNKNOWN).any():
                known = [
                    other
                    for other in ("camera", "viewpoint", *query.columns)
                    if all((_label(images, other) != UNKNOWN).any() for images in sides.values())
                ]
                raise ValueError(
                    f"{name}: {exclude!r} was given, but no {side} image has a known {column}; allowed are 'none' and "
                    f"terms of {', '.join(['identity', *known])}"
                )


def _label(images: Labels, name: str) -> np.ndarray:
    if name in ("camera", "viewpoint"):
        return np.asarray(getattr(images, name))
    return images.columns.get(name, np.full(len(images), UNKNOWN))
