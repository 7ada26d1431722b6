"""A reader for the pickles of plain label tables that cannot run anything.

Pickle is a small program; Python's own reader looks up and calls whatever that program names. This one knows only the
instructions that a dictionary of strings and (integer, string) pairs is made of, and refuses the file at any other.
"""

from __future__ import annotations

import pickletools

_MARK = object()
_DEEPEST = 4096  # values on the stack; pickle puts 1,000 keys and values there at a time
_PUSH = frozenset(["BININT", "BININT1", "BININT2", "INT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"])
_PUT = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GET = frozenset(["GET", "BINGET", "LONG_BINGET"])
_TUPLE = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _pop(stack: list[object], count: int, position: int) -> list[object]:
    if len(stack) < count or any(item is _MARK for item in stack[len(stack) - count :]):
        raise ValueError(f"byte {position}: too few values for this instruction")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _pop_to_mark(stack: list[object], position: int) -> list[object]:
    for start in range(len(stack) - 1, -1, -1):
        if stack[start] is _MARK:
            taken = stack[start + 1 :]
            del stack[start:]
            return taken
    raise ValueError(f"byte {position}: too few values for this instruction")


def _pair(values: list[object], position: int) -> tuple[int, str]:
    # Only finished pairs may exist: nested tuples could be made to take for ever to hash or print.
    if len(values) != 2 or type(values[0]) is not int or type(values[1]) is not str:
        kinds = ", ".join(type(value).__name__ for value in values)
        raise ValueError(f"byte {position}: expected a (label, name) pair, got ({kinds})")
    return values[0], values[1]


def load_label_table(data: bytes) -> dict[str, tuple[int, str]]:
    """The dictionary of file name -> (label, name) pickled in `data` (protocols 0 to 5).

    Nothing is imported or called, whatever `data` holds; the work is linear in its length, and the memory is at most 40
    times it.

    Raises:
        ValueError: `data` is cut short, damaged, or holds anything else; the message names the byte.
    """
    stack: list[object] = []
    memo: dict[object, object] = {}
    values = tables = 0

    def fill(table: object, items: list[object], position: int) -> None:
        if not isinstance(table, dict) or len(items) % 2:
            raise ValueError(f"byte {position}: keys and values that belong to no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or type(value) is not tuple:
                raise ValueError(
                    f"byte {position}: expected file name -> (label, name), got "
                    f"{type(key).__name__} -> {type(value).__name__}"
                )
            if key in table:
                raise ValueError(f"byte {position}: a file name is given twice")
            table[key] = value

    for opcode, argument, at in pickletools.genops(data):
        name, position = opcode.name, at or 0
        if name in _PUSH:
            if type(argument) is bool:  # protocol 0 writes True and False as the integers 01 and 00
                raise ValueError(f"byte {position}: expected an integer label, got {argument}")
            stack.append(argument)
            values += 1
        elif name in _PUT or name == "MEMOIZE":
            (value,) = _pop(stack, 1, position)
            stack.append(value)
            memo[len(memo) if name == "MEMOIZE" else argument] = value
        elif name in _GET:
            if argument not in memo:
                raise ValueError(f"byte {position}: refers to a value that was never stored")
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
            tables += 1
        elif name == "DICT":
            table: dict[str, tuple[int, str]] = {}
            fill(table, _pop_to_mark(stack, position), position)
            stack.append(table)
            tables += 1
        elif name in _TUPLE:
            stack.append(_pair(_pop(stack, _TUPLE[name], position), position))
        elif name == "TUPLE":
            stack.append(_pair(_pop_to_mark(stack, position), position))
        elif name == "SETITEM":
            items = _pop(stack, 2, position)
            fill(stack[-1] if stack else None, items, position)
        elif name == "SETITEMS":
            items = _pop_to_mark(stack, position)
            fill(stack[-1] if stack else None, items, position)
        elif name == "STOP":
            (result,) = _pop(stack, 1, position)
            if stack or not isinstance(result, dict):
                raise ValueError(f"byte {position}: expected one dictionary of file name -> (label, name)")
            return result
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"byte {position}: the pickle instruction {name} is not one of plain label data")
        # What no label file needs, and a hostile one could fill the memory with.
        if len(stack) > _DEEPEST or tables > 1 or len(memo) > values + 1:
            raise ValueError(f"byte {position}: more unused values, dictionaries or stored values than label data has")
    raise ValueError("the file is cut short")
