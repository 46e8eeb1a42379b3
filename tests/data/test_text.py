"""Text for people: errors on one line, sizes, tables of any names."""

from data.text import one_line, size, table


def test_one_line_joins_lines_and_limits_the_length() -> None:
    assert one_line(ValueError("a \n\tb\r\nc ")) == "a b c"
    assert one_line("long text", 4) == "long"


def test_size_has_a_binary_unit() -> None:
    assert [size(n) for n in (5, 1024, 1.5 * 2**20, 2**41)] == ["5 B", "1.0 KiB", "1.5 MiB", "2.0 TiB"]


def test_table_aligns_numbers_to_the_right_and_replaces_control_characters() -> None:
    assert table(["name", "clips"], [["a\nb", "5"], ["c", "1234"]]) == "name  clips\na\ufffdb       5\nc      1234"
