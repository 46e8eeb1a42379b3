"""Text for people: errors on one line, sizes, tables of any names."""

import pytest

from data.text import appearance, escaped, one_line, printable, printable_lines, size, table, told_apart


def test_one_line_joins_lines_and_limits_the_length() -> None:
    assert one_line(ValueError("a \n\tb\r\nc ")) == "a b c"
    assert one_line("long text", 4) == "long"


def test_size_has_a_binary_unit() -> None:
    assert [size(n) for n in (5, 1024, 1.5 * 2**20, 2**41)] == ["5 B", "1.0 KiB", "1.5 MiB", "2.0 TiB"]


def test_table_aligns_numbers_to_the_right_and_replaces_control_characters() -> None:
    assert table(["name", "clips"], [["a\nb", "5"], ["c", "1234"]]) == "name  clips\na\ufffdb       5\nc      1234"


NAMES = ["Grüße", "видео.mp4", "クリップ\u3000一", "می\u200cخواهم", "👩\u200d🔬🏽", "e\u0301\u00a0x", "क्\u200dष", "a b"]
CONTROLS = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b2J",
    "\r",
    "\n",
    "\b",
    "\x7f",
    "\0",
    "\u2028",
    "\u202e",
    "\u2066",
    "\udcff",
]


@pytest.mark.parametrize("name", NAMES)
def test_letters_of_all_scripts_stay_as_they_are(name: str) -> None:
    assert printable(name) == name
    assert name in table(["name"], [[name]])


@pytest.mark.parametrize("control", CONTROLS)
def test_characters_that_control_the_terminal_are_replaced(control: str) -> None:
    for text in (printable(f"a{control}b"), table(["name"], [[f"a{control}b"]]), one_line(f"a{control}b")):
        assert not set(text) & set("\x1b\x07\x9b\r\b\x7f\0\u2028\u202e\u2066\udcff")


def test_lines_of_a_message_are_kept() -> None:
    assert printable_lines("a\x1b\nb\r\n") == "a\ufffd\nb\ufffd\n"


ESCAPED = {
    "a\u200bb": r"a\u200bb",
    "\ufeffa": r"\ufeffa",
    "a\u00a0\u3000": r"a\xa0\u3000",
    "a\t\n": r"a\t\n",
    "\udcffa\u2028": r"\xffa\u2028",
    " a  b ": r"\x20a \x20b\x20",
    "\u2764\ufe0f": "\u2764\\ufe0f",
    "видео \u0915\u094d e\u0301 C:\\a": "видео \u0915\u094d e\u0301 C:\\a",
}


@pytest.mark.parametrize("name", ESCAPED)
def test_characters_that_cannot_be_seen_are_escaped(name: str) -> None:
    assert escaped(name) == ESCAPED[name]
    assert one_line(escaped(name)) == escaped(name)


def test_names_that_look_the_same_have_one_appearance_and_are_told_apart() -> None:
    alike = ["\u00e9 x", "e\u0301 x", "\ufeff\u00e9 x", "\u00e9\u00a0x", "\u00e9  x\u200b", " \u00e9 x\u2028"]
    assert len({appearance(name) for name in alike}) == 1
    assert len(set(told_apart(*alike))) == len(alike)
    assert all(name.isascii() for name in told_apart(*alike))
    assert told_apart("видео", "видео\u200b") == ["видео", "видео\\u200b"]
    assert appearance("Run") != appearance("run")
