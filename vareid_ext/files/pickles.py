"""A reader for pickles of plain data that cannot run anything.

Pickle is a small program; Python's own reader looks up and calls whatever that program names. This one knows only the
instructions that numbers, strings, lists, tuples and dictionaries are made of, and the names that its caller gives.
``pickle.Unpickler`` with a ``find_class`` that refuses everything is not enough: ten bytes, a large memo index, make it
take 4 GiB, and nested tuples as keys are hashed for ever.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

MAX_STEPS = 2**21

_MARK = object()
_PUSH = frozenset(
    ["BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINUNICODE",
     "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"]
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUT = frozenset(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])
_GET = frozenset(["GET", "BINGET", "LONG_BINGET"])
_TUPLE = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Unread:
    """What stands for an object whose name the reader was not given: nothing is imported or called for it.

    Attributes:
        name: ``module.name`` of its class or function.
        state: what the pickle sets as its state, such as the attributes of an object.
    """

    def __init__(self, name: str) -> None:
        self.name, self.state = name, None

    def __call__(self, *_: Any) -> Unread:
        """The object that the class or function would make."""
        return Unread(self.name)

    def build(self, state: Any) -> None:
        """Take the state that the pickle sets."""
        self.state = state


class _Machine:
    """The stack of a pickle, and the instructions that change it."""

    def __init__(self, names: Mapping[str, Any], persistent: Callable[[Any], Any] | None, unread: bool) -> None:
        self.names, self.persistent, self.unread = names, persistent, unread
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self, count: int) -> list[Any]:
        taken = self.stack[len(self.stack) - count :] if count else []
        if len(taken) < count or any(item is _MARK for item in taken):
            raise ValueError("too few values for this instruction")
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                taken = self.stack[start + 1 :]
                del self.stack[start:]
                return taken
        raise ValueError("too few values for this instruction")

    def extend(self, kind: type, items: list[Any]) -> None:
        """Put items into the list or the dictionary on top of the stack."""
        target = self.stack[-1] if self.stack else None
        if isinstance(target, Unread):
            return
        if type(target) is not kind:
            raise ValueError(f"items that belong to no {kind.__name__}")
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, dict):
            self._fill(target, items)

    @staticmethod
    def _fill(target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples, or a long number again and again, could be made to take for ever.
            if type(key) is not str and not (type(key) is int and key.bit_length() <= 64):
                raise ValueError(f"a {type(key).__name__} as key; allowed are str and int")
            if key in target:
                raise ValueError(f"the key {str(key)[:100]!r} is given twice")
            target[key] = value

    def named(self, name: str) -> Any:
        if name not in self.names and self.unread:
            return Unread(name[:200])
        if name not in self.names:
            raise ValueError(f"it names {name[:200]!r}, which is not plain data")
        return self.names[name]

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUT:
            (value,) = self.pop(1)
            stack.append(value)
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = value
        elif name in _GET:
            if argument not in self.memo:
                raise ValueError("refers to a value that was never stored")
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLE:
            stack.append(tuple(self.pop(_TUPLE[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("LIST", "DICT"):
            items = self.pop_to_mark()
            stack.append([] if name == "LIST" else {})
            self.extend(type(stack[-1]), items)
        elif name in ("APPEND", "APPENDS"):
            self.extend(list, self.pop(1) if name == "APPEND" else self.pop_to_mark())
        elif name in ("SETITEM", "SETITEMS"):
            self.extend(dict, self.pop(2) if name == "SETITEM" else self.pop_to_mark())
        elif name == "GLOBAL":
            stack.append(self.named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, attribute = self.pop(2)
            if type(module) is not str or type(attribute) is not str:
                raise ValueError("a name that is no string")
            stack.append(self.named(f"{module}.{attribute}"))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            if not callable(function) or type(arguments) is not tuple:
                raise ValueError("a call of what cannot be called")
            stack.append(function(*arguments))
        elif name == "NEWOBJ" and self.unread:
            kind, arguments = self.pop(2)
            if not isinstance(kind, Unread):
                raise ValueError("an object of what is no class")
            stack.append(kind())
        elif name == "BUILD":
            target, state = self.pop(2)
            if not isinstance(target, dict):  # an OrderedDict's attributes are of no use here
                target.build(state)
            stack.append(target)
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(*self.pop(1)))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the pickle instruction {name} is not one of plain data")


def read_pickle(
    file: BinaryIO,
    names: Mapping[str, Any] = MappingProxyType({}),
    persistent: Callable[[Any], Any] | None = None,
    max_steps: int = MAX_STEPS,
    unread: bool = False,
) -> Any:
    """The value of the pickle that begins at the file's position; the position is behind it afterwards.

    Nothing is imported, and nothing called but what `names` holds; the work is linear in the pickle's length.

    Args:
        file: protocols 0 to 5.
        names: ``module.name`` -> what stands for it: a function that is called in its place, or a value. What such a
            function returns may have a method ``build`` that takes the state the pickle sets.
        persistent: makes a value of a persistent id; None refuses them.
        max_steps: the most instructions taken; each costs at most 128 bytes beside the data it carries.
        unread: an :class:`Unread` stands for an object of another name, which otherwise is an error.

    Raises:
        ValueError: the pickle is cut short, damaged, longer, or holds anything else; the message names the byte.
    """
    machine = _Machine(names, persistent, unread)
    for number, (opcode, argument, at) in enumerate(pickletools.genops(file)):
        if number >= max_steps:
            raise ValueError(f"byte {at}: more than {max_steps:,} pickle instructions")
        try:
            machine.step(opcode.name, argument)
        except Exception as error:  # the caller's functions meet arguments of any kind
            raise ValueError(f"byte {at}: {str(error) or type(error).__name__}") from None
    (result,) = machine.pop(1)
    if machine.stack:
        raise ValueError("it holds more than one value")
    return result
