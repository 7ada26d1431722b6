"""The ranked lists of a report: queries, what each of the compared found for them, and activation maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vareid_ext._labels import UNKNOWN, Labels
from vareid_ext._text import viewpoint_name
from vareid_ext.report.activation import activation_maps, why_no_activation
from vareid_ext.report.measure import Found, Measured, chosen_queries, found_lists
from vareid_ext.report.page import Part, Ranked, Tile
from vareid_ext.report.pictures import Pictures, data_uri, overlay

if TYPE_CHECKING:
    from vareid_ext.trained import TrainedModel

_MARKS = {"right": "\u2713", "wrong": "\u2717", "missed": "\u25cb", "junk": "\u2013"}


@dataclass(frozen=True)
class Compared:
    """One of the compared.

    Attributes:
        name: what the page calls it.
        model: what made the features; None where they come out of files.
        measured: its query, its gallery and what was measured of them.
        query_pictures, gallery_pictures: their images.
        part: what belongs to it on the page.
    """

    name: str
    model: TrainedModel | None
    measured: Measured
    query_pictures: Pictures
    gallery_pictures: Pictures
    part: Part


def ranked_lists(items: Sequence[Compared], *, queries: int, top: int, activations: int) -> tuple[list[Ranked], str]:
    """The ranked lists of all, and what is said above them; what cannot be shown becomes a gap of their parts.

    Args:
        items: what is compared; the first chooses the queries.
        queries: how many to show.
        top: images of a list.
        activations: of the queries, the first so many have activation maps.
    """
    first = items[0].measured
    precision, matches = (
        np.asarray(values.cpu()) for values in (first.ranking.average_precision, first.ranking.num_matches)
    )
    chosen = chosen_queries(precision, matches > 0, queries)
    lists = [found_lists(item.measured, chosen.tolist(), top) for item in items]
    with_activation = _activation_items(items) if activations else []
    rows = []
    for i, q in enumerate(chosen.tolist()):
        query = first.query
        view = viewpoint_name(int(query.viewpoint[q]), query.viewpoints)
        identity, camera = _called(query, "identity", q), _called(query, "camera", q)
        details = f"camera {camera}, {view}"
        outcome = ""
        shown: list[tuple[str, str, list[Tile]]] = []
        query_tiles: list[Tile] = []
        for item, found in zip(items, lists, strict=True):
            counted = [image for image in found[i].images if image.kind in ("right", "wrong")]
            outcome = outcome or counted[0].kind
            maps: Sequence[str] = [""] * (1 + len(found[i].images))
            if item in with_activation and i < activations:
                maps = _activations(item, q, found[i].images)
            tiles = [
                _tile(item, image, activation) for image, activation in zip(found[i].images, maps[1:], strict=True)
            ]
            query_tiles.append(
                Tile("query", "query", details, f"Query {q}: identity {identity}, {details}",
                     item.query_pictures.uri(q), maps[0])
            )  # fmt: skip
            ap = float(item.measured.ranking.average_precision[q])
            total = int(item.measured.ranking.num_matches[q])
            line = f"AP {100 * ap:.1f} %; {found[i].missed} of {total} matches behind the first {top}"
            if found[i].more_missed:
                line += f"; {found[i].more_missed} more missed matches not shown"
            if found[i].more_junk:
                line += f"; {found[i].more_junk} more junk images not shown"
            shown.append((item.name, line, tiles))
        title = f"Query {q}: identity {identity}, {details}"
        rows.append(Ranked(q, title, view, camera, outcome, query_tiles, shown))
    for item in items:
        for side, pictures in (("query", item.query_pictures), ("gallery", item.gallery_pictures)):
            if pictures.missing:
                example = next(iter(pictures.missing.values()))
                item.part.gaps.append(
                    f"pictures: {len(pictures.missing)} {side} images cannot be read and are placeholders: {example}"
                )
    with_match = int((matches > 0).sum())
    note = f"{len(chosen)} of {with_match:,} queries with a match, the hardest first (lowest average precision)"
    if len(chosen) < with_match:
        note += "; half of them are the hardest of all, the others are spread evenly over the rest"
    note += ". Under each image is its distance to the query."
    if with_activation:
        note += (
            f" The first {min(activations, len(chosen))} have activation maps: what in an image makes it like "
            "the query, and in the query what makes it like the nearest image."
        )
    return rows, note


def _called(images: Labels, label: str, index: int) -> str:
    return "unknown" if getattr(images, label)[index] == UNKNOWN else str(images.called(label)[index])


def _tile(item: Compared, found: Found, activation: str) -> Tile:
    gallery, index = item.measured.gallery, found.index
    known = gallery.viewpoint[index] >= 0
    view = viewpoint_name(int(gallery.viewpoint[index]), gallery.viewpoints) if known else "view unknown"
    rank = f"rank {found.rank}" if found.rank else "not ranked"
    labels = f"identity {_called(gallery, 'identity', index)}, camera {_called(gallery, 'camera', index)}, {view}"
    alt = f"{found.kind}, {rank}, distance {found.distance:.3f}, {labels}"
    label = f"{_MARKS[found.kind]} {found.kind}" + (f" {found.rank}" if found.rank else "")
    return Tile(found.kind, label, f"{found.distance:.3f}", alt, item.gallery_pictures.uri(index), activation)


def _activation_items(items: Sequence[Compared]) -> list[Compared]:
    """Those whose models have activation maps; why the others have none is said."""
    found = []
    for item in items:
        why = "features in files have no network"
        if item.model is not None:
            why = why_no_activation(item.model)
        if not why:
            found.append(item)
        else:
            item.part.gaps.append(f"activation maps: {why}")
    return found


def _activations(item: Compared, q: int, found: Sequence[Found]) -> list[str]:
    """Pictures of the query and of what was found for it with activation maps over them, "" where there is none."""
    model, query, gallery = item.model, item.measured.query, item.measured.gallery
    assert model is not None
    nearest = next(image.index for image in found if image.kind in ("right", "wrong"))
    pictures = [item.query_pictures.image(q), *(item.gallery_pictures.image(image.index) for image in found)]
    reference = torch.stack([gallery.feature[nearest], *(query.feature[q] for _ in found)])
    there = [i for i, picture in enumerate(pictures) if picture is not None]
    result = [""] * len(pictures)
    if there:
        maps = activation_maps(model, [pictures[i] for i in there], reference[there])  # type: ignore[misc]
        for i, activation in zip(there, maps, strict=True):
            result[i] = data_uri(overlay(pictures[i], activation))  # type: ignore[arg-type]
    return result
