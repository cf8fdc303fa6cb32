"""Displays one question at a time: arrow keys in a terminal, plain numbered lines everywhere else.

A prompter is a function from a `Prompt` to its answer. It repeats the question after an invalid answer; the end of input
raises `SettingsError` and Ctrl-C KeyboardInterrupt.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from ...settings import env
from ...settings.option import SettingsError, short_repr

_WIDTH = 76  # 80 columns less questionary's decoration
_NO_QUESTIONARY = 'Arrow keys come with questionary: pip install "accelerate[config]". Numbers do as well.'

Prompter = Callable[["Prompt"], Any]


class Choice(NamedTuple):
    """One of several answers: its value, its label, and its number."""

    value: Any
    label: str
    number: int


class Prompt(NamedTuple):
    """A question, ready to be asked.

    Attributes:
        name: The option's name, for messages.
        text: The question.
        read: Converts the typed text to the answer; raises `SettingsError`.
        hint: Text in brackets: the answer to an empty line.
        default: The answer to an empty line; None if an answer is required.
        choices: The allowed answers, if the question has choices.
        secret: Whether the answer is not echoed.
    """

    name: str
    text: str
    read: Callable[[str], Any]
    hint: str = ""
    default: Any = None
    choices: tuple[Choice, ...] = ()
    secret: bool = False


def answer(prompt: Prompt, line: str) -> Any:
    """Parses a typed line: a choice by label, value or number; an empty line selects the default.

    Raises:
        SettingsError: if it is not a valid answer; the message lists valid ones.
    """
    text = line.strip()
    if not text:
        if prompt.default is None:
            raise SettingsError(f"{prompt.name}: an answer is needed.")
        return prompt.default
    if not text.isprintable():
        raise SettingsError(f"{prompt.name}: expected text without control characters, found {short_repr(text)}.")
    if not prompt.choices:
        return prompt.read(text)
    for text_of in (lambda choice: choice.label, lambda choice: str(choice.value), lambda choice: str(choice.number)):
        for choice in prompt.choices:
            if text_of(choice).lower() == text.lower():
                return choice.value
    numbers = f"{prompt.choices[0].number} to {prompt.choices[-1].number}"
    raise SettingsError(f"{prompt.name}: expected {numbers}, or one of the words, found {short_repr(text)}.")


class Numbered:
    """Asks in plain lines with numbered choices. Piped answers are echoed as if they were typed."""

    def __init__(self, typed: bool) -> None:
        self.typed = typed

    def __call__(self, prompt: Prompt) -> Any:
        question = _in_columns(prompt)
        if prompt.choices:
            print(
                "\n".join([_fill(prompt.text), *(f"  [{choice.number}] {choice.label}" for choice in prompt.choices)])
            )
            question = f"Your answer{_bracketed(prompt)}:"
        while True:
            line = self._line(f"{question} ", prompt)
            try:
                return answer(prompt, line)
            except SettingsError as error:
                print(textwrap.fill(str(error), _WIDTH, initial_indent="  ", subsequent_indent="  "))

    def _line(self, question: str, prompt: Prompt) -> str:
        try:
            if self.typed and prompt.secret:
                import getpass

                return getpass.getpass(question)
            line = input(question)
        except EOFError:
            print()
            raise SettingsError(f'the answers end before "{prompt.text}" ({prompt.name}) has one.') from None
        except UnicodeDecodeError as error:
            print()
            raise SettingsError(f"the answers cannot be read as text: {error}") from None
        if not self.typed:
            print("..." if prompt.secret and line else line)
        return line


class ArrowKeys:
    """Asks with questionary: choices are selected with the arrow keys."""

    def __init__(self, questionary: Any) -> None:
        self.questionary = questionary

    def __call__(self, prompt: Prompt) -> Any:
        if prompt.choices:
            choices = [self.questionary.Choice(_titled(choice), value=choice.value) for choice in prompt.choices]
            marked = next((choice for choice in choices if choice.value == prompt.default), choices[0])
            question = self.questionary.select(_fill(prompt.text), choices, default=marked, use_jk_keys=False)
        else:
            kind = self.questionary.password if prompt.secret else self.questionary.text
            question = kind(_in_columns(prompt), validate=lambda text: self._complaint(prompt, text) or True)
        try:
            answered = question.unsafe_ask()
        except EOFError:
            raise SettingsError(f'the answers end before "{prompt.text}" ({prompt.name}) has one.') from None
        return answered if prompt.choices else answer(prompt, answered)

    @staticmethod
    def _complaint(prompt: Prompt, text: str) -> str | None:
        try:
            answer(prompt, text)
        except SettingsError as error:
            return str(error)
        return None


def prompter() -> Prompter:
    """Returns the prompter for this process: arrow keys if there is a terminal and questionary is installed."""
    typed = sys.stdin.isatty()
    if not (typed and sys.stdout.isatty()) or env.get("TERM") == "dumb":  # the terminal cannot move the cursor
        return Numbered(typed)
    try:
        import questionary
    except ImportError:
        print(_NO_QUESTIONARY)
        return Numbered(typed=True)
    return ArrowKeys(questionary)


def _titled(choice: Choice) -> str:
    """Returns the line of a choice; values that are numbers (stages, versions) are displayed as well."""
    return f"{choice.number}: {choice.label}" if isinstance(choice.value, int) else choice.label


def _bracketed(prompt: Prompt) -> str:
    return f" [{prompt.hint}]" if prompt.hint else ""


def _in_columns(prompt: Prompt) -> str:
    question = f"{prompt.text}{_bracketed(prompt)}"
    return _fill(question if question.endswith("?") else f"{question}:")


def _fill(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
