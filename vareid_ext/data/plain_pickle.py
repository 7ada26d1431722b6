"""Pickles of plain label tables."""

from __future__ import annotations

import io

from vareid_ext.files.pickles import read_pickle


def load_label_table(data: bytes) -> dict[str, tuple[int, str]]:
    """The dictionary of file name -> (label, name) pickled in `data` (protocols 0 to 5).

    Nothing is imported or called, whatever `data` holds; the work is linear in its length, and the memory is at most 40
    times it.

    Raises:
        ValueError: `data` is cut short, damaged, or holds anything else.
    """
    # Entries of real tables take six bytes an instruction; two are the fewest where the names have four letters.
    table = read_pickle(io.BytesIO(data), max_steps=len(data) // 2 + 16)
    if not isinstance(table, dict):
        raise ValueError(f"expected one dictionary of file name -> (label, name), got {type(table).__name__}")
    for key, value in table.items():
        if type(key) is not str or type(value) is not tuple:
            raise ValueError(f"expected file name -> (label, name), got {type(key).__name__} -> {type(value).__name__}")
        kinds = [type(part) for part in value]
        if kinds != [int, str]:
            found = ", ".join(kind.__name__ for kind in kinds[:9])
            raise ValueError(f"{key[:200]!r}: expected a (label, name) pair, got ({found})")
    return table
