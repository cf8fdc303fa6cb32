"""One question at a time, without a terminal."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from accelerate.commands.config import prompts
from accelerate.commands.config.prompts import Choice, Numbered, Prompt, answer, prompter
from accelerate.settings.option import SettingsError

KIND = Prompt(
    "machine",
    "Which type of machine are you using?",
    read=str,
    hint="0",
    default="NO",
    choices=(Choice("NO", "No distributed training", 0), Choice("MULTI_GPU", "multi-GPU", 1), Choice("XLA", "TPU", 2)),
)
STAGE = Prompt("zero_stage", "Which stage?", read=str, choices=(Choice(1, "optimizer", 1), Choice(2, "gradients", 2)))
PATH = Prompt("path", "Which path?", read=str)


@pytest.mark.parametrize(
    ("prompt", "line", "value"),
    [
        (KIND, "", "NO"),
        (KIND, "  \t", "NO"),
        (KIND, "1", "MULTI_GPU"),
        (KIND, "Multi-gpu", "MULTI_GPU"),
        (KIND, "multi_gpu", "MULTI_GPU"),
        (KIND, " tpu ", "XLA"),
        (STAGE, "2", 2),  # what is numbered by itself
        (STAGE, "gradients", 2),
        (PATH, " a b ", "a b"),
    ],
)
def test_a_choice_is_a_number_or_a_word(prompt: Prompt, line: str, value: Any) -> None:
    assert answer(prompt, line) == value


@pytest.mark.parametrize(
    ("prompt", "line", "said"),
    [
        (KIND, "3", "machine: expected 0 to 2, or one of the words, found '3'"),
        (KIND, "gpu", "found 'gpu'"),
        (STAGE, "0", "expected 1 to 2"),
        (PATH, "", "path: an answer is needed"),
        (PATH, "\x1b[B", "without control characters"),  # an arrow key, where there are none
    ],
)
def test_what_is_no_answer(prompt: Prompt, line: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace("[", r"\[")):
        answer(prompt, line)


def piped(text: str | bytes, monkeypatch: pytest.MonkeyPatch) -> Numbered:
    stream = io.StringIO(text) if isinstance(text, str) else io.TextIOWrapper(io.BytesIO(text), "utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    return Numbered(typed=False)


def test_a_wrong_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert piped("seven\n9\n2\n", monkeypatch)(KIND) == "XLA"
    assert capsys.readouterr().out == (
        "Which type of machine are you using?\n"
        "  [0] No distributed training\n"
        "  [1] multi-GPU\n"
        "  [2] TPU\n"
        "Your answer [0]: seven\n"
        "  machine: expected 0 to 2, or one of the words, found 'seven'.\n"
        "Your answer [0]: 9\n"
        "  machine: expected 0 to 2, or one of the words, found '9'.\n"
        "Your answer [0]: 2\n"
    )


def test_the_end_of_the_answers_names_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r'the answers end before "Which path\?" \(path\) has one'):
        piped("", monkeypatch)(PATH)
    with pytest.raises(SettingsError, match="the answers cannot be read as text"):
        piped(b"\xff\xfe\n", monkeypatch)(PATH)


def test_a_last_line_without_its_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert piped("a/b", monkeypatch)(PATH) == "a/b"


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert piped("hush\n", monkeypatch)(PATH._replace(secret=True)) == "hush"
    assert capsys.readouterr().out == "Which path? ...\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stages_and_versions_show_their_number_among_the_arrows() -> None:
    shown: list[Any] = []

    class Questionary:
        @staticmethod
        def Choice(title: str, value: Any) -> Choice:  # questionary's own name
            return Choice(value, title, 0)

        @staticmethod
        def select(text: str, choices: list[Choice], **_: Any) -> Any:
            shown.append([choice.label for choice in choices])
            return type("Question", (), {"unsafe_ask": lambda self: choices[0].value})()

    asked = prompts.ArrowKeys(Questionary)
    assert asked(STAGE) == 1 and asked(KIND) == "NO"
    assert shown == [["1: optimizer", "2: gradients"], ["No distributed training", "multi-GPU", "TPU"]]


def test_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(prompter(), Numbered)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(prompter(), prompts.ArrowKeys)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(prompter(), Numbered)
