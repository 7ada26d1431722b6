"""The training program's command line: recipes, configuration files and single fields, the later winning.

A recipe or a configuration file holds what differs from its `base`, a recipe.

Every field of :class:`vareid_ext.training.config.Config` is an option, ``--section.field VALUE``. Its last name alone
will do where only one section has it (``--lr 1e-3``), a truth value may be left out (``--local``), and dashes and
underscores are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml

from vareid_ext.data import READERS
from vareid_ext.files import plain_yaml
from vareid_ext.methods import METHODS
from vareid_ext.training.config import Config, StageConfig

DEFAULT_RECIPE = "synthetic"
"""The recipe of a run that names none."""

_EXTRA_NAMES = {
    "method": "method.name",
    "synthetic_identities": "data.synthetic.identities_train",
    "synthetic_test_identities": "data.synthetic.identities_test",
    "synthetic_images": "data.synthetic.images_per_identity",
    "synthetic_seed": "data.synthetic.seed",
    "epochs": "optimizer.epochs",
    "seed": "run.seed",
    "height": "data.height",
    "width": "data.width",
}
"""Short names of options that their last name would not find, or not as the most likely meaning."""

_MISLEADING = {
    "batch_size": "a training batch is --sampler.identities x --sampler.instances images, or --sampler.batch_size with "
    "--sampler.kind shuffled; --evaluation.batch_size is for the evaluation",
}
"""Last names that a user may well take for another field."""

_SYNONYMS = {"learning_rate": "optimizer.lr", "dataset": "data.kind", "data_dir": "data.root"}
"""What other programs call a field, where its own name is spelled differently."""

_LONGEST_LIST = 1000  # characters of an error's list of names
_NEAR = 0.65  # of difflib; another letter in a name of three gives 0.67

_EPILOG = """\
a field's last name alone will do where only one section has it: --lr 1e-3, --alpha 0.1, --local, --skip-bad-images;
--synthetic-identities N is --data.synthetic.identities_train N

--plan trains nothing and says what a step takes of each process: memory, bytes sent, operations. Behind it may stand
processes=N identities=K viewpoints=V, which are else 1 and the data set's

--json, --quiet and --debug are as for every command

examples:
  vareid train
  vareid train --recipe market1501-va-reid --root /data/Market-1501 --viewpoint-file market.pkl
  vareid train --recipe coil20 --root coil20/manifest.csv --output runs/coil20
  vareid train --resume runs/coil20
  vareid train --shard-identities --plan processes=8 identities=1000000 viewpoints=3
"""


class CommandLineError(ValueError):
    """A command line or configuration file that asks for something that does not exist or is not allowed."""


class Request(NamedTuple):
    """What the command line asks for."""

    config: Config
    name: str
    """the recipe's name, or that of the configuration file"""
    output: Path | None
    """the run folder; None: a new one"""
    resume: bool
    """whether `output` holds a run to continue"""
    command: str
    """the command line, in one line"""


def recipe_names() -> list[str]:
    """The names that ``--recipe`` takes, the default first."""
    files = resources.files("vareid_ext.recipes").iterdir()
    names = sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))
    return sorted(names, key=lambda name: name != DEFAULT_RECIPE)


def _recipe(name: str, source: str) -> dict[str, Any]:
    """What a recipe and its base set, by dotted field name; CommandLineError, naming `source`, if there is none."""
    if name not in recipe_names():
        raise CommandLineError(f"{source}: there is no recipe {name!r:.60}{nearest(name, recipe_names())}")
    text = resources.files("vareid_ext.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    values = _check_file(text, f"recipe {name}")
    base = values.pop("base", None)
    return values if base is None else _over(_recipe(base, f"recipe {name}: base"), values)


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the changes winning; where these name another method, without the settings of the base's."""
    kept = base if _method_name({**base, **changes}) == _method_name(base) else _without_method(base)
    return {**kept, **changes}


def _without_method(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith("method.")}


def _method_name(values: Mapping[str, Any]) -> str:
    """The method that values by dotted field name ask for."""
    name = values.get("method.name", Config().method.name)
    if name not in METHODS:
        raise CommandLineError(f"method.name: {name!r:.60} was given{nearest(str(name), list(METHODS))}")
    return name


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" with the known name whose last part is most like that of `name`, or all known names.

    What stands before, a section or a data set, is the same for many names and says only which of equals is meant.
    """

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    synonym = _SYNONYMS.get(_last_part(name))
    if synonym in known:
        return f"; did you mean {synonym!r}?"
    near = {k: likeness(_last_part(name), _last_part(k)) for k in known}
    best = max(known, key=lambda k: (near[k], likeness(name, k)))
    listed = textwrap.shorten(", ".join(known), _LONGEST_LIST, placeholder=" ...")
    return f"; did you mean {best!r}?" if near[best] >= _NEAR else f"; known are {listed}"


def _last_part(name: str) -> str:
    """Of section.field or <data set>-<method>."""
    field = name.rpartition(".")[2]
    return field.partition("-")[2] or field


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a configuration as (dotted name, value), sections taken apart."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def _defaults(method: str) -> Config:
    return Config(method=METHODS[method].Config())


def _all_fields() -> dict[str, Any]:
    """The default of every field of a configuration, with the settings of every method."""
    return {name: default for method in METHODS for name, default in fields(_defaults(method))}


def field_names() -> tuple[str, ...]:
    """The fields of a configuration, with the settings of every method."""
    return tuple(_all_fields())


def _names_of(kind: type) -> set[str]:
    return {name for name, default in _all_fields().items() if isinstance(default, kind)}


def pairs(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree of sections as (dotted name, value)."""
    dictionaries = _names_of(dict)

    def leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping) and f"{prefix}{key}" not in dictionaries:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return leaves(tree, "")


def _check_file(text: str, source: str) -> dict[str, Any]:
    """What the YAML text of a configuration sets, by dotted field name, and its `base` if it names one."""
    try:
        tree = plain_yaml.load(text)
    except yaml.YAMLError as error:
        raise CommandLineError(f"{source}: not a YAML file: {' '.join(str(error).split())}") from error
    except plain_yaml.PlainYamlError as error:
        raise CommandLineError(f"{source}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise CommandLineError(
            f"{source}: must hold sections such as `data:` and `optimizer:`, not {type(tree).__name__}"
        )
    known = field_names()
    sections = {name.rsplit(".", n)[0] for name in known for n in range(1, name.count(".") + 1)}
    values: dict[str, Any] = {}
    for name, value in pairs(tree):
        if name in sections:
            raise CommandLineError(f"{source}: {name} is a section and must hold fields")
        if name not in known and name != "base":
            raise CommandLineError(f"{source}: there is no field {name!r}{nearest(name, known)}")
        if name in values:
            raise CommandLineError(f"{source}: {name} is given twice")
        values[name] = value
    return values


def _full_name(option: str) -> str:
    """The field that an option without its dashes names."""
    name = option.replace("-", "_")
    names = field_names()
    if name in names:
        return name
    if name in _EXTRA_NAMES:
        return _EXTRA_NAMES[name]
    if name in _MISLEADING:
        raise CommandLineError(f"--{option}: {_MISLEADING[name]}")
    matches = [known for known in names if known.rsplit(".", 1)[-1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise CommandLineError(f"--{option}: several fields have this name: {', '.join('--' + m for m in matches)}")
    known = (*names, "recipe", "config", "output", "resume")
    raise CommandLineError(f"--{option}: there is no such option{nearest(name, known)}")


def _normalise(arguments: Sequence[str]) -> list[str]:
    """Options spelled out as --section.field=value."""
    result: list[str] = []
    booleans, lists = _names_of(bool), _names_of(tuple)
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not argument.startswith("--"):
            raise CommandLineError(f"{argument!r}: an option was expected here, such as --output DIR")
        option, equals, value = argument[2:].partition("=")
        if option == "help":
            result.append("--help")
            continue
        own = option in ("recipe", "config", "output", "resume")
        name = option if own else _full_name(option)
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif name in booleans:
                value = "true"
            else:
                raise CommandLineError(f"--{option}: a value was expected after it")
        if own and not value:
            raise CommandLineError(f"--{option}: a value was expected after it, not an empty one")
        if name in booleans:
            value = value.lower()
        if name in lists and not value.startswith("["):
            value = f"[{value}]"
        if not own:
            _check_value(name, value)
        result.append(f"--{name}={value}")
    return result


def split_method_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The options of a command line but the settings of a method; and these, a setting's name -> its option.

    Raises:
        CommandLineError: as :func:`parse`, for an option that does not exist.
    """
    general, settings = [], {}
    for option in _normalise(arguments):
        section, _, field = option.partition("=")[0].rpartition(".")
        if section == "--method" and field != "name":
            settings[field] = option
        else:
            general.append(option)
    return general, settings


def _check_value(name: str, text: str) -> None:
    """CommandLineError where an option's value, which jsonargparse reads as YAML, is more than plain values."""
    try:
        plain_yaml.load(text)
    except yaml.YAMLError:
        pass  # a string then, for whose field that is no error
    except plain_yaml.PlainYamlError as error:
        raise CommandLineError(f"{name}: {error}") from error


def _parser(method: str) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="vareid train",
        usage="%(prog)s [--recipe NAME | --resume DIR] [--config FILE] [--output DIR] [--section.field VALUE ...]",
        description="Train a viewpoint-aware re-identification model and evaluate it with and without re-ranking.",
        epilog=_EPILOG,
        exit_on_error=False,
        default_env=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        help=f"named configuration to start from, {DEFAULT_RECIPE} if none is given: {', '.join(recipe_names())}",
    )
    parser.add_argument("--config", help="YAML file of what differs from the recipe, which its `base` may name")
    parser.add_argument("--output", help="run folder; default: runs/<recipe>-<date and time>")
    parser.add_argument(
        "--resume", help="run folder of an interrupted run to continue, with the configuration it holds"
    )
    for section in dataclasses.fields(Config):
        default = getattr(_defaults(method), section.name)
        if dataclasses.is_dataclass(default):
            parser.add_class_arguments(type(default), section.name)
    stages = "stages of training, a list of what differs in each: {epochs, train, optimizer, sampler}; none: one stage"
    parser.add_argument("--stages", type=tuple[StageConfig, ...], default=(), help=stages)
    # A file holds a whole configuration here, never one section.
    sections = {f"--{name.rsplit('.', n)[0]}" for name in field_names() for n in range(1, name.count(".") + 1)}
    for action in parser._actions:
        if sections & set(action.option_strings):
            action.help = argparse.SUPPRESS
        elif "--data.kind" in action.option_strings:
            action.help = f"{action.help}: {', '.join(READERS)}"
    return parser


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """jsonargparse's help, with the epilog's line breaks kept."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _value(arguments: Sequence[str], name: str) -> str | None:
    found = [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]
    return found[-1] if found else None


def parse(arguments: Sequence[str]) -> Request:
    """Read a command line (without the program's name).

    Returns:
        The configuration and where the run goes.

    Raises:
        CommandLineError: an unknown option, recipe or key of a configuration file (the nearest is named), a value of
            the wrong type or out of range, a file that does not exist, epochs beside stages.
        SystemExit: after ``--help``.
    """
    options = _normalise(arguments)
    recipe, file, resume, output = (_value(options, name) for name in ("recipe", "config", "resume", "output"))
    if resume is not None:
        for name, given in (("recipe", recipe), ("config", file), ("output", output)):
            if given is not None:
                raise CommandLineError(f"--{name}: not together with --resume, which takes the run folder as it is")
        saved = Path(resume) / "config.yaml"
        if not saved.is_file():
            raise CommandLineError(f"--resume: {resume!r} is not a run folder (there is no {saved})")
        defaults, values = {}, _saved(_check_file(_read_text(saved), str(saved)))
        name = Path(resume).name
    else:
        if file is not None and not Path(file).is_file():
            raise CommandLineError(f"--config: there is no file {file!r}")
        values = {} if file is None else _check_file(_read_text(Path(file)), file)
        base = str(values.pop("base", DEFAULT_RECIPE))
        defaults = _recipe(base, f"{file}: base") if recipe is None else _recipe(recipe, "--recipe")
        name = recipe or (DEFAULT_RECIPE if file is None else Path(file).stem)
    pairs_given = [option[2:].partition("=") for option in options]
    known = field_names()
    texts = {name: text for name, _, text in pairs_given if name in known}
    config = _config(defaults, _as_texts(values) | texts, show_help="--help" in options)
    if "optimizer.epochs" in texts and config.stages:
        stages = [
            {key: value for key, value in stage.items() if value not in (None, {})}
            for stage in config.plain()["stages"]
        ]
        raise CommandLineError(
            f"optimizer.epochs: {texts['optimizer.epochs']} was given; {name} trains in stages, each of which has its "
            f"own epochs: --stages {shlex.quote(_as_text(stages))} has them now (vareid ablate: with --methods of that "
            "one alone), and --stages=[] beside --epochs trains in one stage"
        )
    folder = resume if resume is not None else output
    command = f"python -m vareid_ext.train {shlex.join(arguments)}".strip()
    command = command if command.isprintable() else ascii(command)
    return Request(config, name, None if folder is None else Path(folder), resume is not None, command)


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(plain_yaml.MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise CommandLineError(f"{path}: not UTF-8 text: {error}") from error


def _saved(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved configuration; earlier versions wrote an empty list of parts where a stage trains all."""
    stages = values.get("stages")
    if isinstance(stages, list):
        all_parts = {"train": None}
        stages = [{**s, **all_parts} if isinstance(s, dict) and s.get("train") == [] else s for s in stages]
        values = {**values, "stages": stages}
    return values


def to_config(plain: Mapping[str, Any]) -> Config:
    """The configuration of its plain values, such as a checkpoint holds: what :meth:`Config.plain` gives.

    Raises:
        CommandLineError: a field that does not exist, a value that is not allowed.
    """
    values, known = _saved(dict(pairs(plain))), field_names()
    unknown = [name for name in values if name not in known]
    if unknown:
        raise CommandLineError(f"there is no field {unknown[0]!r:.100}{nearest(unknown[0], known)}")
    return _config({}, _as_texts(values))


def _config(defaults: dict[str, Any], texts: dict[str, str], show_help: bool = False) -> Config:
    """The configuration of a recipe's values and, winning over them, texts by dotted field name."""
    method = _method_name(defaults | texts)
    if method != _method_name(defaults):
        defaults = _without_method(defaults)
    allowed = [name for name, _ in fields(_defaults(method))]
    for name in texts:
        if name not in allowed:
            own = [field for field in allowed if field.startswith("method.")]
            raise CommandLineError(f"{name}: method {method!r} has no such setting{nearest(name, own)}")
    parser = _parser(method)
    parser.set_defaults(defaults)
    if "stages" in texts:
        _check_stages(texts["stages"])
    try:
        options = [f"--{name}={text}" for name, text in texts.items()]
        sections = parser.instantiate(parser.parse_args(options + ["--help"] * show_help))
        for number, stage in enumerate(sections.stages):
            _check_stage(parser, number, stage)
        return Config(**{f.name: getattr(sections, f.name) for f in dataclasses.fields(Config)})
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = textwrap.shorten(str(error), 600)
        raise CommandLineError(message if message.isprintable() else ascii(message)) from error


def _check_stages(text: str) -> None:
    """CommandLineError where a text of stages is no list of what differs in each."""
    try:
        stages = plain_yaml.load(text)
    except yaml.YAMLError as error:
        raise CommandLineError(f"stages: {text!r:.100} was given; a YAML list is needed") from error
    names = [f.name for f in dataclasses.fields(StageConfig)]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise CommandLineError(
            f"stages: {stages!r:.100} was given; a list is needed, of each stage its {', '.join(names)}"
        )
    for number, stage in enumerate(stages):
        for name in stage:
            if name not in names:
                raise CommandLineError(f"stages[{number}]: there is no field {name!r:.60}{nearest(str(name), names)}")
        if type(stage.get("epochs")) is not int:
            given = f"{stage['epochs']!r:.60}" if "epochs" in stage else "nothing"
            raise CommandLineError(f"stages[{number}].epochs: {given} was given; a whole number is needed")
        parts = stage.get("train")
        if parts is not None and not (isinstance(parts, list) and all(isinstance(part, str) for part in parts)):
            raise CommandLineError(
                f"stages[{number}].train: {parts!r:.60} was given; a list of parts of the method is needed, such as "
                "[backbone], or null for all of it"
            )


def _check_stage(parser: jsonargparse.ArgumentParser, number: int, stage: StageConfig) -> None:
    """CommandLineError where a field of a stage has a value of another type than that of its section."""
    for section in ("optimizer", "sampler"):
        changes = getattr(stage, section)
        if not isinstance(changes, dict):
            raise CommandLineError(f"stages[{number}].{section}: {changes!r} was given; allowed are fields and values")
        known = [f.name for f in dataclasses.fields(getattr(Config(), section))]
        for name, value in changes.items():
            if name not in known:
                raise CommandLineError(f"stages[{number}].{section}: there is no field {name!r}{nearest(name, known)}")
            try:
                parser.parse_args([f"--{section}.{name}={_as_text(value)}"])
            except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
                raise CommandLineError(f"stages[{number}]: {textwrap.shorten(str(error), 600)}") from error


def _as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a file as the texts of options, whose types are checked; those of a recipe need not be."""
    texts = {name: _as_text(value) for name, value in values.items()}
    for name, text in texts.items():
        _check_value(name, text)
    return texts


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip().removesuffix("...").strip()
    )


class _Dumper(yaml.SafeDumper):
    """Sections line by line, lists within a line."""

    def represent_list(self, data: Any) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def to_yaml(config: Config) -> str:
    """A configuration as the YAML text that ``--config`` and ``--resume`` read."""
    return yaml.dump(config.plain(), Dumper=_Dumper, sort_keys=False, width=120)
