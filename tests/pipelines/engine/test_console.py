"""Messages reach the terminal without control characters, and with the letters of all scripts."""

from types import SimpleNamespace
from typing import Any

import pytest

from data.cache import tool
from pipelines.engine.config import parse
from pipelines.engine.console import fail, progress, say
from pipelines.settings.report import Report
from tokenizer import convert

CONTROL = "\x1b]0;title\x07\x1b[2J\x9b2J\r\b\x7f\u2028\u202e"
LETTERS = "Grüße видео クリップ می\u200cخواهم 👩\u200d🔬"
TEXT = f"skipped {LETTERS}{CONTROL}.mp4"
MAIN: Any = SimpleNamespace(is_main_process=True)


def say_to_the_user(text: str) -> None:
    say(MAIN, text)


def draw_a_bar(text: str) -> None:
    progress(MAIN, 1, text).close()


def fail_in_a_command(text: str) -> None:
    fail(text, text)


def fail_in_the_tool(text: str) -> None:
    tool._fail(text, text)


def mistype_a_flag(text: str) -> None:
    with pytest.raises(SystemExit):
        parse(Report, [f"--{text}", "x"], prog="x")


def name_a_checkpoint(text: str) -> None:
    with pytest.raises(SystemExit):
        convert.main([text])


def list_a_folder(text: str) -> None:
    with pytest.raises(SystemExit):
        tool.main(["list", "--caches", text])


@pytest.mark.parametrize(
    "write",
    [
        *(say_to_the_user, draw_a_bar, fail_in_a_command, fail_in_the_tool),
        *(mistype_a_flag, name_a_checkpoint, list_a_folder),
    ],
)
def test_no_control_character_reaches_the_terminal(capsys: pytest.CaptureFixture[str], write: Any) -> None:
    write(TEXT)
    captured = capsys.readouterr()
    text = (captured.out + captured.err).replace("\n", "")
    assert LETTERS in text
    assert not set(text) & set("\x1b\x07\x9b\r\b\x7f\u2028\u202e")


def test_lines_of_a_message_stay(capsys: pytest.CaptureFixture[str]) -> None:
    say(MAIN, "+---+\n| a |")
    assert capsys.readouterr().err == "+---+\n| a |\n"
