"""One question at a time, to a person: arrow keys in a terminal, plain numbered lines everywhere else.

A `Prompt` says what is asked; a prompter is a function from a prompt to its answer. A wrong answer is asked for again;
the end of input and Ctrl-C leave as `SettingsError` and KeyboardInterrupt.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from ...settings import env
from ...settings.option import SettingsError, short_repr

_WIDTH = 76  # of 80 columns, less what questionary puts around a question
_NO_QUESTIONARY = 'Arrow keys come with questionary: pip install "accelerate[config]". Numbers do as well.'

Prompter = Callable[["Prompt"], Any]


class Choice(NamedTuple):
    """One of several answers: its value, what is shown for it, and the number that stands for it."""

    value: Any
    label: str
    number: int


class Prompt(NamedTuple):
    """A question, ready to be asked.

    Attributes:
        name: What it is about, for messages.
        text: The question.
        read: Turns what was typed into the answer; raises `SettingsError`.
        hint: What stands in brackets: the answer of an empty line.
        default: That answer; None where there must be one.
        choices: The answers allowed, if they are few.
        secret: Whether the answer is kept off the screen.
    """

    name: str
    text: str
    read: Callable[[str], Any]
    hint: str = ""
    default: Any = None
    choices: tuple[Choice, ...] = ()
    secret: bool = False


def answer(prompt: Prompt, line: str) -> Any:
    """What a typed line says: a choice by its label, value or number; nothing for the default.

    Raises:
        SettingsError: when it is no answer; the text says what is allowed.
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
    """Asks in plain lines: choices have numbers. Piped answers are shown as if they had been typed."""

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
    """Asks with questionary: choices are moved through with the arrow keys."""

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
            said = question.unsafe_ask()
        except EOFError:
            raise SettingsError(f'the answers end before "{prompt.text}" ({prompt.name}) has one.') from None
        return said if prompt.choices else answer(prompt, said)

    @staticmethod
    def _complaint(prompt: Prompt, text: str) -> str | None:
        try:
            answer(prompt, text)
        except SettingsError as error:
            return str(error)
        return None


def prompter() -> Prompter:
    """The way to ask here: arrow keys where there is a terminal, and questionary."""
    typed = sys.stdin.isatty()
    if not (typed and sys.stdout.isatty()) or env.get("TERM") == "dumb":  # no cursor to move
        return Numbered(typed)
    try:
        import questionary
    except ImportError:
        print(_NO_QUESTIONARY)
        return Numbered(typed=True)
    return ArrowKeys(questionary)


def _titled(choice: Choice) -> str:
    """What stands on a choice's line; a stage or a version is a number, and shown as well."""
    return f"{choice.number}: {choice.label}" if isinstance(choice.value, int) else choice.label


def _bracketed(prompt: Prompt) -> str:
    return f" [{prompt.hint}]" if prompt.hint else ""


def _in_columns(prompt: Prompt) -> str:
    question = f"{prompt.text}{_bracketed(prompt)}"
    return _fill(question if question.endswith("?") else f"{question}:")


def _fill(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
