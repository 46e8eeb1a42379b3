"""Parsing of flags and YAML files into a dataclass of settings.

This module does not import torch, which would delay `--help` and the error for an unknown flag by seconds.
"""

import difflib
import json
import os
import re
import shutil
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import (
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from data.schema import conform
from data.text import one_line
from pipelines.engine.console import fail

T = TypeVar("T")

_REWORDED = {
    r'Parser key "(.+?)":': r"\1:",
    r"Expected a <class 'int'>\. Got value: (.*)": r"must be a whole number, got \1",
    r"Expected a <class 'float'>\. Got value: (.*)": r"must be a number, got \1",
    r"Expected a <class 'bool'>\. Got value: (.*)": r"must be true or false, got \1",
    r"Expected a <class 'tuple'>\. Got value: (.*)": r"must be a list of numbers, got \1",
    r"Expected a tuple with (\d+) elements\. Got value: (.*)": r"must be a list of \1 numbers, got \2",
    r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)": r"must be one of \1, got \2",
    r"Expected a dot import path string:": "unknown class:",
    r"(?s)(?:Type [^\n]*?: )?Importing '(.+?)' is not allowed.*": r"'\1' is not a class of this project",
    r"(?s)Does not validate against any of the Union subtypes.*Given value: (.*)": r"invalid value \1",
}
"""Patterns of messages of jsonargparse, and plainer replacements."""

_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "true|false", dict: "MAPPING", ...: "..."}
"""Placeholders for values in `--help`, by type."""

_IMPORTABLE = ["ar_model", "tokenizer"]
"""Modules that a `class_path` may name. A file of somebody else must not import others, because an import runs code."""


_LONGEST_MESSAGE = 1000
_MOST_VALUES = 100_000
_LOAD = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        yaml.YAMLError: if the text is not YAML, an integer is too large, or the values are too many, where an alias counts as
            often as it is used.
    """
    try:
        value = _LOAD(text)
    # PyYAML raises exceptions of these types for numbers, dates and tags that it cannot convert.
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {one_line(error, 200)}") from None
    remaining, parts = _MOST_VALUES, [value]
    while parts and remaining:
        part, remaining = parts.pop(), remaining - 1
        if isinstance(part, int) and abs(part) >= 2**63:
            raise yaml.YAMLError("an integer of more than 64 bits")
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if parts:
        raise yaml.YAMLError(f"more than {_MOST_VALUES} values")
    return value


set_loader("yaml", load_yaml, (yaml.YAMLError,))


class _HelpFormatter(DefaultHelpFormatter):
    """Help of up to 120 columns with the default of each flag, without Python types."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns) - 2)

    def _metavar_formatter(self, action: Any, default_metavar: str) -> Any:
        name = _metavar(getattr(action, "_typehint", action.type))
        if name is None:
            return super()._metavar_formatter(action, default_metavar)
        return lambda size: (name,) * size

    def _get_help_string(self, action: Any) -> str:
        text, default = action.help or "", action.default
        if isinstance(default, dict | type) or default in (None, [], SUPPRESS):
            return text
        return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"


def _metavar(kind: Any) -> str | None:
    """Return the placeholder for values of a type, for example `N` for `int | None`; None if the type has none."""
    origin, parts = get_origin(kind), [part for part in get_args(kind) if part is not NoneType]
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, UnionType, tuple):
        names = [str(_metavar(part)) for part in parts]
        return f"[{','.join(names)}]" if origin is tuple else "|".join(names)
    return _METAVARS.get(origin or kind)


class _Parser(ArgumentParser):
    command: str
    """Name at the start of an error line. It is a class attribute, because jsonargparse creates the parser for the settings
    of a chosen class from the parser's type alone."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        usage = "%(prog)s [--config FILE] [--flag value ...]"
        super().__init__(*args, **{"usage": usage, "formatter_class": _HelpFormatter, **settings})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line for a user's mistake and exit with code 2."""
        # For an unknown setting of a chosen class, this is the parser of the class, which knows its settings.
        if unknown := re.search(r"Option '(.+?)' is not accepted", message):
            suggestion = _suggestion(unknown[1], [action.dest for action in self._actions])
            message = f"unknown setting '{unknown[1]}'{suggestion}; for a chosen class, its .help flag lists all"
        for pattern, plain in _REWORDED.items():
            message = re.sub(pattern, plain, message)
        message = one_line(message, _LONGEST_MESSAGE)
        raise SystemExit(fail(self.command.removesuffix(".py"), f"{message} (--help lists the flags)"))


def _suggestion(name: str, known: Sequence[str], dashes: str = "") -> str:
    """Return a question for the known name that is closest to a mistyped one; empty if none is close."""
    close = difflib.get_close_matches(name, known, 1) or [word for word in known if word.startswith(name)]
    return f", did you mean {dashes}{close[0]}?" if close else ""


def parse(schema: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[T, str]:
    """Parse YAML files (`--config`) and flags, which override files; return the settings and a YAML dump of them.

    Args:
        schema: dataclass of settings. Each base class and each nested dataclass is a group of `--help`. A field made by
            `class_setting` takes a class and the settings of that class.
        argv: flags; by default the flags of this process.
        prog: name at the start of an error line; by default the name of the command.

    Raises:
        SystemExit: with code 2 and one line on stderr for an unknown key, a wrong type, or a value that the schema rejects.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, import_path_denylist=["*"], import_path_allowlist=_IMPORTABLE
    )
    argv = _files_first(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        _make_parser(schema, prog, with_classes=False).parse_args(["--help"])
    parser = _make_parser(schema, prog, with_classes=True, argv=argv)
    try:
        settings = parser.parse_args(argv)
        _check_kinds(parser, schema, settings)
        if _default_to_chosen_classes(parser, settings):
            settings = parser.parse_args(argv)
        if recorded := _recorded_flags(schema, settings):
            # Files and flags come later, so they override these flags.
            settings = parser.parse_args([*recorded, *argv])
            _check_kinds(parser, schema, settings)
        values = vars(parser.instantiate(settings))
        values.pop("config", None)
        return schema(**values), parser.dump(settings, skip_unset=False)
    # A number that is too large for a float is an OverflowError.
    except (ValueError, OverflowError) as error:
        parser.error(str(error))


def _files_first(argv: Sequence[str]) -> list[str]:
    """Return the arguments with all `--config FILE` before the flags. jsonargparse lets the later one of both win."""
    files: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *islice(words, 1)]
        else:
            (files if word.startswith("--config=") else flags).append(word)
    return [*files, *flags]


def _make_parser(schema: type, prog: str | None, *, with_classes: bool, argv: Sequence[str] = ()) -> _Parser:
    """Build the parser of a schema. Fields made by `class_setting` need torch; without `with_classes` they are plain flags.

    Unknown names in `argv` are rejected before torch is imported.
    """

    class CommandParser(_Parser):
        command = prog or Path(sys.argv[0]).name

    parser = CommandParser(prog=prog, description=schema.__doc__)
    config_help = "YAML file of settings; may be given several times, later files override earlier ones"
    parser.add_argument("--config", action="config", metavar="FILE", help=config_help)
    _check_names(parser, schema, argv)
    types = get_type_hints(schema)
    for title, group_fields in _groups(schema):
        group = parser.add_argument_group(title)
        for field, text in group_fields:
            if "load" in field.metadata:
                kind, default = field.metadata["load"]() if with_classes else (Any, None)
                group.add_argument(f"--{field.name}", type=kind, default=default, help=text, metavar="CLASS")
            elif is_dataclass(types[field.name]):
                parser.add_argument(f"--{field.name}", type=types[field.name], default=_default(field), help=text)
            else:
                _add_flag(group, field, types[field.name], text)
    # Flags that jsonargparse adds by itself.
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.metavar = "[=skip_default]"
            action.help = "Print the settings as YAML, or only changed ones, and exit"
        elif action.metavar == "CONFIG":
            action.metavar, action.help = "FILE", "YAML file with the settings of this group"
    return parser


def _groups(schema: type) -> Iterator[tuple[str, list[tuple[Field[Any], str]]]]:
    """Yield a title and the fields with their help for each class of a schema, derived classes first.

    A field that a derived class redefines stays in the group of its base class.
    """
    classes = [cls for cls in schema.__mro__ if is_dataclass(cls)]
    texts: dict[str, str] = {}
    owners: dict[str, type] = {}
    for cls in reversed(classes):
        for parameter in docstring_parser.parse_from_object(cls).params:
            texts[parameter.arg_name] = one_line(parameter.description or "")
        for field in fields(cls):  # type: ignore[arg-type]
            owners.setdefault(field.name, cls)
    for cls in classes:
        own = [field for field in fields(schema) if owners[field.name] is cls]  # type: ignore[arg-type]
        title = "settings" if cls is schema else " ".join(re.findall("[A-Z][a-z]+", cls.__name__)).lower()
        yield title, [(field, texts.get(field.name, "")) for field in own]


def _add_flag(group: Any, field: Field[Any], kind: Any, text: str) -> None:
    required = field.default is MISSING and field.default_factory is MISSING
    if kind == list[str]:
        default = None if required else _default(field)
        group.add_argument(f"--{field.name}", nargs="+", type=str, required=required, default=default, help=text)
    elif required:
        group.add_argument(field.name, type=kind, help=text)
    else:
        action = group.add_argument(f"--{field.name}", type=kind, default=_default(field), help=text)
        # --trust alone means --trust true.
        if kind is bool:
            action.nargs, action.const = "?", True


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_names(parser: _Parser, schema: type, argv: Sequence[str]) -> None:
    """Reject flags that the schema does not have, including abbreviated flags."""
    types = get_type_hints(schema)
    class_settings = [field.name for field in fields(schema) if "load" in field.metadata]  # type: ignore[arg-type]
    known = ["config", "print_config", "help", *types]
    for field_name, kind in types.items():
        if is_dataclass(kind):
            known += [f"{field_name}.{part.name}" for part in fields(kind)]
    for word in argv:
        name = word[2:].partition("=")[0]
        if word.startswith("--") and name.rstrip("+") not in known and name.split(".")[0] not in class_settings:
            parser.error(f"unknown flag --{name}{_suggestion(name, known, '--')}")


def _check_kinds(parser: _Parser, schema: type, settings: Namespace, group: str = "") -> None:
    """Reject values that jsonargparse accepts: null for a setting that cannot be null, and a group that is no mapping."""
    types = get_type_hints(schema)
    for field in fields(schema):  # type: ignore[arg-type]
        name, value, kind = f"{group}{field.name}", settings.get(field.name), types[field.name]
        if value is None and NoneType not in get_args(kind):
            parser.error(f"{name}: must not be null")
        if is_dataclass(kind):
            if not isinstance(value, Namespace):
                parser.error(f"{name}: must be a group of settings, got {value}")
            _check_kinds(parser, kind, value, f"{name}.")  # type: ignore[arg-type]


def _default_to_chosen_classes(parser: ArgumentParser, settings: Namespace) -> bool:
    """Make each chosen class the default of its flag; return whether any default changed.

    Without this, a chosen class would inherit the settings of the default class.
    """
    changed = False
    for action in parser._actions:
        default, chosen = action.default, settings.get(action.dest)
        if isinstance(default, dict) and "class_path" in default and chosen["class_path"] != default["class_path"]:
            action.default, changed = {"class_path": chosen["class_path"]}, True
    return changed


def _recorded_flags(schema: type, settings: Namespace) -> list[str]:
    """Return flags with the defaults of groups made by `recorded_in`: the values on which all recorded runs agree."""
    flags: list[str] = []
    for field in fields(schema):
        if "recorded_in" in field.metadata:
            named = settings[field.metadata["recorded_in"]] or []
            runs = [named] if isinstance(named, str) else named
            kind = get_type_hints(schema)[field.name]
            groups = [group for group in (recorded_group(run, field.name, kind) for run in runs) if group is not None]
            agreed = {}
            for part in fields(kind):
                values = [getattr(group, part.name) for group in groups]
                if values and values[0] != part.default and all(value == values[0] for value in values):
                    agreed[part.name] = values[0]
            flags += flags_of(field.name, agreed)
    return flags


def flags_of(group: str, values: Mapping[str, Any]) -> list[str]:
    """Return the flags that set values of a group. Flags have texts without quotes, and other values as JSON."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in values.items()
    }
    return [f"--{group}.{name}={text}" for name, text in texts.items()]


def recorded_group(run: str, group: str, kind: type[T]) -> T | None:
    """Return a group of the settings of a run, given as its folder or its model folder; None if there is no such group.

    `kind` is the dataclass of the group. A setting that the run does not have, because it came later, has its default.

    Raises:
        ValueError: if the settings cannot be read, or have values that `kind` rejects.
    """
    folder = Path(os.path.expanduser(run))
    for candidate in (folder, folder.parent) if folder.name == "model" else (folder,):
        file = candidate / "config.yaml"
        if file.is_file():
            settings = read_settings(file).get(group)
            if not isinstance(settings, dict):
                return None
            known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
            try:
                return kind(**{name: value for name, value in settings.items() if name in known})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: {error}") from None
    return None


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of an earlier run.

    Raises:
        ValueError: if the file is missing or contains no settings.
    """
    try:
        settings = load_yaml(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error, _LONGEST_MESSAGE)}") from None
    return conform(settings, dict[str, Any], f"{path}: cannot be read")
