"""Command lines: a typed dataclass, YAML files, dotted overrides."""

import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

T = TypeVar("T")


_WORDS = {
    r'Parser key "(.+?)":': r"\1:",
    r"Expected a <class 'int'>\. Got value: (.*)": r"must be a whole number, not \1",
    r"Expected a <class 'float'>\. Got value: (.*)": r"must be a number, not \1",
    r"Expected a <class 'bool'>\. Got value: (.*)": r"must be true or false, not \1",
    r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)": r"must be one of \1, not \2",
    r"Expected a dot import path string:": "there is no such class:",
    r"Option '(.+?)' is not accepted": r"the chosen class has no setting '\1'; the .help of its flag, with its name, lists them",
}
"""What the parser says, and how we do."""


class _Parser(ArgumentParser):
    speaker: str
    """Who speaks of a mistake; of the class, since jsonargparse keeps the parsers of chosen classes by it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line for a user's mistake, exit code 2."""
        for said, better in _WORDS.items():
            message = re.sub(said, better, message)
        raise SystemExit(fail(self.speaker.removesuffix(".py"), f"{message} (--help lists the flags)"))


def fail(name: str, message: str) -> int:
    """Print one line to stderr; returns the exit code of a user's mistake."""
    print(f"{name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def parse(schema: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[T, str]:
    """The configuration from files (`--config`, later ones win) and flags (which win over files), and the same as YAML.

    `prog` is who speaks of a mistake, by default the command. Exits with code 2 and one line on stderr for an unknown
    key, a wrong type, or a value that the schema refuses.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    speaker = prog or Path(sys.argv[0]).name
    parser: _Parser = type("_Parser", (_Parser,), {"speaker": speaker})(prog=prog, description=schema.__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; may be given several times, later files win"
    )
    several = {f.name: f for f in fields(schema) if f.type == list[str]}  # type: ignore[arg-type]  # schemas are dataclasses
    for name, field in several.items():
        needed = field.default_factory is MISSING
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=str,
            required=needed,
            default=None if needed else [],
            help=field.metadata["help"],
        )
    parser.add_class_arguments(schema, as_group=False, as_positional=True, skip=set(several))
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --trust alone means --trust true
            action.nargs, action.const = "?", True
    settings = parser.parse_args(argv)
    if _default_to_chosen_classes(parser, settings):
        settings = parser.parse_args(argv)
    try:
        values = vars(parser.instantiate(settings))
        values.pop("config", None)
        return schema(**values), parser.dump(settings, skip_unset=False)
    except ValueError as error:
        parser.error(str(error))


def _default_to_chosen_classes(parser: ArgumentParser, settings: Namespace) -> bool:
    """Make the chosen classes the defaults; whether one was not. Else a class inherits the defaults of the one before it."""
    changed = False
    for action in parser._actions:
        default, chosen = action.default, settings.get(action.dest)
        if isinstance(default, dict) and "class_path" in default and chosen["class_path"] != default["class_path"]:
            action.default, changed = {"class_path": chosen["class_path"]}, True
    return changed


def load_settings(text: str) -> dict[str, Any]:
    """Settings from YAML text as plain values."""
    return yaml.safe_load(text)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of an earlier run.

    Raises:
        ValueError: if the file is not there or holds no settings.
    """
    try:
        settings = load_settings(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: cannot be read: no settings")
    return settings
