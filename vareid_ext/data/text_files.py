"""Reading the tables that people write: CSV files from any program, checked line by line."""

from __future__ import annotations

import codecs
import csv
import io
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


_MINUS_ONE = re.compile(r"-0*1(\.0*)?")
_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?[\r\n]*$')  # Excel's first line
_UNKNOWN_WORDS = ("", "nan", "none", "null", "na", "n/a", "unknown", "?")


def is_minus_one(text: str) -> bool:
    """Whether a cell says -1, as programs write it."""
    return _MINUS_ONE.fullmatch(text) is not None


def known(text: str) -> str:
    """`text`, or "" where it says that there is none: -1, or what programs write for a missing value."""
    return "" if text.lower() in _UNKNOWN_WORDS or is_minus_one(text) else text


def shown(value: object) -> str:
    """`value` as an error shows it: quoted, on one line, and short however long it is."""
    return _SHORT.repr(value)


def no_file(path: Path) -> str:
    """Why `path` cannot be read as a file, "" when it can. Pipes and devices, which could block for ever, cannot."""
    if path.is_file():
        return ""
    if path.is_dir():
        return f"{path} is a folder"
    return f"{path} is neither a file nor a folder" if path.exists() else f"{path} does not exist"


def _decoded(content: bytes, encoding: str, where: str, allowed: str = "UTF-8") -> str:
    """The text of a file; ValueError, which begins with `where`, names the line that is not in `encoding`."""
    try:
        text = content.decode(encoding)
        line = text[: text.index("\0")].count("\n") + 1 if "\0" in text[:2] else 0
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
    if line:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"{where}, line {line}: it is not text in {name}; allowed is {allowed}")
    return text


def text_lines(path: Path, title: str) -> Iterator[tuple[str, str]]:
    """(where it stands, line) for each line of a text file in UTF-8 that is not blank, without the blanks around it.

    `title` is what errors call the data set. Raises ValueError for a file that is no text in UTF-8.
    """
    text = _decoded(path.read_bytes(), "utf-8-sig", f"{title}: {path}")
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield f"{title}: {path}, line {number}", line.strip()


def read_table(
    path: Path, title: str, required: Sequence[str], optional: Sequence[str] = (), further: str = ""
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> cell) for each row of a CSV file, UTF-8 or, with a byte order mark, UTF-16.

    Cells are separated by commas, semicolons or tabs, of which the first line has most, or as a line `sep=;` before it
    says.

    The first line that is not blank names the columns, in any order and in small or capital letters; beside those
    named, all that begin with `further` are allowed.
    Cells lose the blanks around them; blank lines are passed over. `title` is what errors call the file. Raises
    ValueError, with the line, for unknown, repeated or missing columns, a wrong number of cells, an empty cell in a
    `required` column, and a file that is no CSV.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    text = _decoded(content, encoding, f"{title} {path}", "UTF-8, and UTF-16 with a byte order mark")
    lines = io.StringIO(text, newline="").readlines()
    before = next((place for place, line in enumerate(lines) if line.strip()), 0)
    separator = _SEPARATOR.match(lines[before]) if lines else None
    before += separator is not None
    first = lines[before] if before < len(lines) else ""
    delimiter = separator[1] if separator else max(",;\t", key=first.count)
    reader = csv.reader(lines[before:], strict=True, delimiter=delimiter)
    begun = before + 1
    named = (*required, *optional)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        header = [cell.lower() if cell.lower() in named else cell for cell in header]
        where = f"{title} {path}, line {begun}"
        allowed = f"columns are {', '.join(required)}" + (f" and optionally {', '.join(optional)}" if optional else "")
        allowed += f", and {further}NAME for further ones" if further else ""
        for column in header:
            if column not in named and not (further and column.startswith(further)):
                raise ValueError(f"{where}: unknown column {shown(column)}; {allowed}")
            if header.count(column) > 1:
                raise ValueError(f"{where}: column {column!r} is given twice; {allowed}")
        missing = [column for column in required if column not in header]
        if missing:
            raise ValueError(f"{where}: missing column {', '.join(missing)}; {allowed}")
        begun = before + reader.line_num + 1
        for cells in reader:
            line, begun = before + reader.line_num, before + reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{title} {path}, line {line}"
            if len(cells) != len(header):
                raise ValueError(
                    f"{where}: {len(cells)} cells were given; {len(header)} are needed ({','.join(header)})"
                )
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            empty = [column for column in required if not row[column]]
            if empty:
                raise ValueError(f"{where}: {empty[0]} is empty")
            yield line, row
    except csv.Error as error:
        raise ValueError(
            f"{title} {path}, line {begun}: not a readable CSV file: {error}; is a quote open from here?"
        ) from None
