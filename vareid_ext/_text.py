"""What tables and files call things: rows and columns of text, and the viewpoints by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

VIEWPOINTS = ("front", "side", "back")
"""The viewpoint classes in label order: front 0, side 1, back 2."""


def viewpoint_name(label: int) -> str:
    """The name of a viewpoint's number: that of :data:`VIEWPOINTS`, or the number itself beyond them."""
    return VIEWPOINTS[label] if 0 <= label < len(VIEWPOINTS) else str(label)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right, a rule under the header."""
    body = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *body]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([line(header), "  ".join("\u2500" * width for width in widths), *map(line, body)])
