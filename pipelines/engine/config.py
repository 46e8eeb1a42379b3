"""Command lines: a typed dataclass, YAML files, dotted overrides.

Nothing here imports torch, so that `--help` and a mistyped flag are answered at once.
"""

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from pipelines.engine.console import fail

T = TypeVar("T")

_REWORDED = {
    r'Parser key "(.+?)":': r"\1:",
    r"Expected a <class 'int'>\. Got value: (.*)": r"must be a whole number, not \1",
    r"Expected a <class 'float'>\. Got value: (.*)": r"must be a number, not \1",
    r"Expected a <class 'bool'>\. Got value: (.*)": r"must be true or false, not \1",
    r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)": r"must be one of \1, not \2",
    r"Expected a dot import path string:": "there is no such class:",
    r"Option '(.+?)' is not accepted": r"the chosen class has no setting '\1'; the .help of its flag, with its name, lists them",
}
"""Messages of jsonargparse, as patterns, and the plainer ones that replace them."""


class _HelpFormatter(DefaultHelpFormatter):
    """Help with the default of each flag, without Python types."""

    def _get_help_string(self, action: Any) -> str:
        text = (action.help or "").replace("%", "%%")
        if action.dest in ("help", "config") or action.help is None:
            return text
        default = action.default
        if isinstance(default, dict | type) or default in (None, [], "==SUPPRESS=="):
            return text
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


class _Parser(ArgumentParser):
    speaker: str
    """Name that starts an error line. A class attribute: jsonargparse makes the parsers of chosen classes from the class."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line for a user's mistake and exit with code 2."""
        for pattern, plain in _REWORDED.items():
            message = re.sub(pattern, plain, message)
        raise SystemExit(fail(self.speaker.removesuffix(".py"), f"{message} (--help lists the flags)"))


def parse(schema: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[T, str]:
    """Parse files (`--config`, later ones win) and flags (which win over files) into a settings object, and dump it as YAML.

    Args:
        schema: dataclass of settings; a base class and a nested dataclass each give a group of `--help`. A field made
            by `class_setting` takes a class and that class's own settings.
        prog: name that starts an error line; the command's by default.

    Raises:
        SystemExit: with code 2 and one line on stderr for an unknown key, a wrong type, or a value that the schema refuses.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        _make_parser(schema, prog, with_classes=False).parse_args(["--help"])
    parser = _make_parser(schema, prog, with_classes=True, argv=argv)
    settings = parser.parse_args(argv)
    if _default_to_chosen_classes(parser, settings):
        settings = parser.parse_args(argv)
    try:
        values = vars(parser.instantiate(settings))
        values.pop("config", None)
        return schema(**values), parser.dump(settings, skip_unset=False)
    except ValueError as error:
        parser.error(str(error))


def _make_parser(schema: type, prog: str | None, *, with_classes: bool, argv: Sequence[str] = ()) -> _Parser:
    """Build the parser of a schema. Class settings need torch: without `with_classes` they are plain flags.

    Names in `argv` that the schema does not have are refused before a class setting imports anything.
    """
    make = type("_Parser", (_Parser,), {"speaker": prog or Path(sys.argv[0]).name})
    parser: _Parser = make(
        prog=prog,
        usage="%(prog)s [--config FILE] [--flag value ...]",
        description=schema.__doc__,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of settings; may be given several times, later ones win",
    )
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
    return parser


def _groups(schema: type) -> Iterator[tuple[str, list[tuple[Field[Any], str]]]]:
    """Group the fields of a schema by the class that defines them first, derived classes first; with each field's help."""
    classes = [cls for cls in schema.__mro__ if is_dataclass(cls)]
    texts: dict[str, str] = {}
    for cls in reversed(classes):
        texts |= {
            p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(cls).params
        }
    home = {field.name: cls for cls in classes for field in fields(cls)}  # type: ignore[arg-type]
    for cls in classes:
        own = [field for field in fields(schema) if home[field.name] is cls]  # type: ignore[arg-type]
        title = "settings" if cls is schema else " ".join(re.findall("[A-Z][a-z]+", cls.__name__)).lower()
        yield title, [(field, field.metadata.get("help", texts.get(field.name, ""))) for field in own]


def _add_flag(group: Any, field: Field[Any], kind: Any, text: str) -> None:
    required = field.default is MISSING and field.default_factory is MISSING
    if kind == list[str]:
        default = None if required else _default(field)
        group.add_argument(f"--{field.name}", nargs="+", type=str, required=required, default=default, help=text)
    elif required:
        group.add_argument(field.name, type=kind, help=text)
    else:
        action = group.add_argument(f"--{field.name}", type=kind, default=_default(field), help=text)
        if kind is bool:  # --trust alone means --trust true
            action.nargs, action.const = "?", True


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_names(parser: _Parser, schema: type, argv: Sequence[str]) -> None:
    """Refuse flags that the schema does not have, abbreviations included."""
    types, known, open_ended = get_type_hints(schema), ["config", "print_config", "help"], []
    for field in fields(schema):  # type: ignore[arg-type]
        known.append(field.name)
        if is_dataclass(types[field.name]):
            known += [f"{field.name}.{part.name}" for part in fields(types[field.name])]
        if "load" in field.metadata:
            open_ended.append(field.name)
    for word in argv:
        name = word[2:].partition("=")[0]
        if not word.startswith("--") or name.rstrip("+") in known or name.split(".")[0] in open_ended:
            continue
        near = difflib.get_close_matches(name, known, 1)
        parser.error(f"there is no flag --{name}" + (f"; did you mean --{near[0]}?" if near else ""))


def _default_to_chosen_classes(parser: ArgumentParser, settings: Namespace) -> bool:
    """Make each chosen class the default of its flag, and return whether one was not.

    Otherwise a chosen class inherits the settings of the default class.
    """
    changed = False
    for action in parser._actions:
        default, chosen = action.default, settings.get(action.dest)
        if isinstance(default, dict) and "class_path" in default and chosen["class_path"] != default["class_path"]:
            action.default, changed = {"class_path": chosen["class_path"]}, True
    return changed


def load_settings(text: str) -> dict[str, Any]:
    """Settings in YAML text as plain values."""
    return yaml.safe_load(text)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of an earlier run.

    Raises:
        ValueError: if the file is missing or holds no settings.
    """
    try:
        settings = load_settings(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: cannot be read: no settings")
    return settings
