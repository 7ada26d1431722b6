"""YAML configurations, as `--config` reads them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from tests.fuzz import runner
from vareid_ext.training import command_line

ALIASES = b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9) if i else b"x") for i in range(10))


def seeds() -> dict[str, bytes]:
    """The recipes, a complete configuration, and a file of few fields."""
    folder = resources.files("vareid_ext.recipes")
    recipes = {f"{name}.yaml": (folder / f"{name}.yaml").read_bytes() for name in command_line.recipe_names()}
    complete = command_line.to_yaml(command_line.parse([]).config).encode()
    short = b"data: {flip: 0.5, mean: [0.4, 0.5, 0.6]}\nmodel:\n  backbone_options: {channels: [8, 16]}\n"
    return {**recipes, "complete.yaml": complete, "short.yaml": short}


def read(path: Path) -> None:
    """Reads a configuration file for the default recipe."""
    command_line.parse(["--config", str(path), "--data.root", "images"])


TOKENS = (
    b"data:", b"optimizer:", b"lr:", b"backbone_options:", b"{", b"}", b"[", b"]", b"- ", b"? ", b": ", b",", b"&a ",
    b"*a", b"&a [*a]", b"<<: *a", b"\n", b"\n  ", b"\t", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"#", b"|", b">", b"'",
    b'"', b"%YAML 1.1\n---\n", b"---\n", b"...\n", b"!!binary ", b"!!set ", b"!!omap ", b"!!timestamp ", b"!!float ",
    b"!!python/object/apply:os.system ", b"!x ", b"2001-12-14t21:59:43.10-05:00", b"2001-99-99", b"1:60:60", b"0b1",
    b".inf", b".nan", b"~", b"=", b"on", b"\\x", b'"\\ud800"', b"{a: ", b"9" * 5000, b"1e400", b"base: ", ALIASES,
)  # fmt: skip
SUBJECT = runner.Subject(seeds, read, command_line.CommandLineError, TOKENS)


def test_mutated_configurations_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Building the parser takes most of a call, and it is the same each time.
    parser = command_line._parser(command_line._recipe(command_line.DEFAULT_RECIPE, "recipe"))
    monkeypatch.setattr(command_line, "_parser", lambda defaults: parser)
    runner.check(SUBJECT)
