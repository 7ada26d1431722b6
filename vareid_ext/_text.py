"""What tables and files call things: rows and columns of text, and the viewpoints by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

VIEWPOINTS = ("front", "side", "back")
"""The viewpoints of the paper in the order of their numbers: front 0, side 1, back 2."""


def viewpoint_name(label: int, names: Sequence[str] = VIEWPOINTS) -> str:
    """The name of a viewpoint's number, the number itself beyond the names, "unknown" below 0."""
    return "unknown" if label < 0 else names[label] if label < len(names) else str(label)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right, a rule under the header."""
    body = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *body]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([line(header), "  ".join("\u2500" * width for width in widths), *map(line, body)])
