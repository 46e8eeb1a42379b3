"""HTML pages that need no other file."""

from collections.abc import Mapping
from pathlib import Path

_TEMPLATES = Path(__file__).parent / "templates"


def write_page(file: Path, template: str, sections: Mapping[str, str], width: str = "56rem") -> None:
    """Fill a template of this folder with HTML, and put it into the frame that all pages have.

    Args:
        sections: by the names that the template has in double braces; `title` is the page's too.
    """
    text = (_TEMPLATES / "page.html").read_text(encoding="utf-8")
    body = (_TEMPLATES / template).read_text(encoding="utf-8")
    for name, content in {"body": body, "width": width, **sections}.items():
        text = text.replace("{{ " + name + " }}", content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
