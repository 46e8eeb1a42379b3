"""Self-contained HTML pages from the templates in `templates/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def mean_with_error(value: Mapping[str, float | None]) -> str:
    """Format {mean, stderr}; `stderr` is None if it is unknown, for example for a single seed."""
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.3f}"
    return f"{value['mean']:.3f}{error}"


def pretraining_in_words(seen: int | None) -> str:
    """State how many tested clips a network was pre-trained on; None is an unknown number."""
    if seen is None:
        return "it is unknown how many of them were in pre-training, without labels"
    return f"{seen} of them were in pre-training, without labels" if seen else "none of them was in pre-training"


_TEMPLATES.filters["mean_with_error"] = mean_with_error


def write_page(file: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template, write the page and return its path. Values are escaped, except `Markup`, such as charts."""
    text = _TEMPLATES.get_template(template).render(values)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Names of files that are not valid Unicode contain surrogates, which UTF-8 cannot encode.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return file
