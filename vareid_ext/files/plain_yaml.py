"""YAML as far as a configuration needs it: sections, lists and plain values, each key once, of bounded size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

MOST_CHARACTERS = 100_000
"""The longest text that is read."""

_MOST_VALUES = 10_000
_MOST_LEVELS = 20
_MOST_DIGITS = 40
_LONGEST_NAME = 100
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


class PlainYamlError(ValueError):
    """A text that is YAML, but holds what is not read here."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for which a date is a string like any other: a folder may be called by one."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if not tag.endswith(":timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load(text: str) -> Any:
    """What a YAML text holds: None, truth values, numbers, strings, and lists and dictionaries of them.

    Aliases are taken as long as all that they stand for stays within the limits.

    Raises:
        yaml.YAMLError: the text is not YAML.
        PlainYamlError: a key that is there twice or is no name, a value of another kind (tagged `!!binary`, say), a
            text or a number that is too long, too many values or levels.
    """
    if len(text) > MOST_CHARACTERS:
        raise PlainYamlError(f"a longer text was given; allowed are {MOST_CHARACTERS:,} characters")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root)
        return loader.construct_document(root)
    except RecursionError:
        raise PlainYamlError(f"too many levels were given; allowed are {_MOST_LEVELS}") from None
    except PlainYamlError:
        raise
    except (ValueError, LookupError, OverflowError) as error:  # numbers and escapes that PyYAML's own parser trips over
        raise yaml.YAMLError(error) from error
    finally:
        loader.dispose()


def _check(root: yaml.Node) -> None:
    """PlainYamlError if there is anything in the tree that is not read, aliases followed wherever they stand."""
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, level = waiting.pop()
        count += 1
        line = f"line {node.start_mark.line + 1}"
        if count > _MOST_VALUES:
            raise PlainYamlError(f"more than {_MOST_VALUES:,} values were given, aliases followed; allowed are as many")
        if level > _MOST_LEVELS:
            raise PlainYamlError(f"{line}: too many levels were given, aliases followed; allowed are {_MOST_LEVELS}")
        if node.tag not in _PLAIN:
            kind = node.tag.rpartition(":")[2]
            raise PlainYamlError(
                f"{line}: a value of kind {kind[:40]!r} was given; allowed are numbers, strings, truth values, null, "
                "lists and sections"
            )
        if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
            raise PlainYamlError(
                f"{line}: a number of {len(node.value):,} digits was given; allowed are {_MOST_DIGITS}"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting += [(value, level + 1) for value in node.value]
        elif isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if not _is_name(key):
                    given = repr(key.value[:_LONGEST_NAME]) if isinstance(key, yaml.ScalarNode) else "a list or section"
                    raise PlainYamlError(
                        f"line {key.start_mark.line + 1}: {given} was given as a key; allowed are strings of "
                        f"{_LONGEST_NAME} letters"
                    )
            for key, times in Counter(key.value for key, _ in node.value).items():
                if times > 1:
                    raise PlainYamlError(f"{line}: {key!r} was given {times} times; allowed is once")
            waiting += [(value, level + 1) for _, value in node.value]


def _is_name(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str") and len(node.value) <= _LONGEST_NAME
