"""Reading the tables that people write: CSV files from any program, checked line by line."""

from __future__ import annotations

import codecs
import csv
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


_MINUS_ONE = re.compile(r"-0*1(\.0*)?")
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


def text_lines(path: Path, title: str) -> Iterator[tuple[str, str]]:
    """(where it stands, line) for each line of a text file in UTF-8 that is not blank, without the blanks around it.

    `title` is what errors call the data set. Raises ValueError for a file that is no text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{title}: {path} is not text in UTF-8: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{title}: {path}, line {number}", line.strip()


def read_table(
    path: Path, title: str, required: Sequence[str], optional: Sequence[str] = (), further: str = ""
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> cell) for each row of a CSV file, UTF-8 or, with a byte order mark, UTF-16.

    Cells are separated by commas, semicolons or tabs, of which the first line has most.

    The first line names the columns, in any order; beside those named, all that begin with `further` are allowed.
    Cells lose the blanks around them; blank lines are passed over. `title` is what errors call the file. Raises
    ValueError, with the line, for unknown, repeated or missing columns, a wrong number of cells, an empty cell in a
    `required` column, and a file that is no CSV.
    """
    try:
        with path.open("rb") as file:
            encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        with path.open(newline="", encoding=encoding) as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, strict=True, delimiter=max(",;\t", key=first.count))
            header = [cell.strip() for cell in next(reader, [])]
            where = f"{title} {path}, line 1"
            allowed = f"columns are {', '.join(required)}" + (
                f" and optionally {', '.join(optional)}" if optional else ""
            )
            allowed += f", and {further}NAME for further ones" if further else ""
            for column in header:
                if column not in (*required, *optional) and not (further and column.startswith(further)):
                    raise ValueError(f"{where}: unknown column {shown(column)}; {allowed}")
                if header.count(column) > 1:
                    raise ValueError(f"{where}: column {column!r} is given twice; {allowed}")
            missing = [column for column in required if column not in header]
            if missing:
                raise ValueError(f"{where}: missing column {', '.join(missing)}; {allowed}")
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{title} {path}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where}: {len(cells)} cells were given; {len(header)} are needed ({','.join(header)})"
                    )
                row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
                empty = [column for column in required if not row[column]]
                if empty:
                    raise ValueError(f"{where}: {empty[0]} is empty")
                yield reader.line_num, row
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{title} {path}: not a readable CSV file: {error}") from None
