"""Asks the questions of a table, as earlier answers require, and collects the content of the configuration file.

`ask_all` is driven by the table (`questions.py`) and asks through a prompter (`prompts.py`); it neither prints nor reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ...settings import env
from ...settings.option import OptionSpec, SettingsError, short_repr
from .prompts import Choice, Prompt, Prompter
from .routing_questions import ENTRIES, MACHINES, STEPS

Answers = dict[str, Any]
When = Mapping[str, Any]
"""Conditions on earlier answers: a value, a tuple of values, or a predicate. An answer of None means not asked."""


class Question(NamedTuple):
    """A row of the table: an option (its ``ask`` is the text), and the condition under which it is asked.

    Attributes:
        name: The option's name, as in `routing_questions.ENTRIES`.
        when: Conditions on earlier answers.
        default: The answer to an empty line, or a function of the answers; the option's own default if omitted.
        choices: The values offered, if not all of the option's; a mapping gives their labels.
        check: Validates the answer against earlier ones; returns the problem, or None.
        write: Converts the answer to the file's value; None omits the key.
        fixed: An answer that is recorded without asking.
    """

    name: str
    when: When = {}
    default: Any = None
    choices: Iterable[Any] = ()
    check: Callable[[Any, Answers], str | None] | None = None
    write: Callable[[Any], Any] | None = None
    fixed: Any = None


class QuestionGroup(NamedTuple):
    """Questions on one topic.

    Attributes:
        questions: In the order in which they are asked.
        when: Conditions on earlier answers.
        gate: A yes/no question that is asked first; no skips the group.
    """

    questions: tuple[Question, ...]
    when: When = {}
    gate: str | None = None


def matches(when: When, answers: Answers) -> bool:
    """Returns whether the answers so far meet the conditions."""
    for name, wanted in when.items():
        found = answers.get(name)
        if callable(wanted):
            if not wanted(found):
                return False
        elif found is None or found not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return False
    return True


def ask_all(areas: Iterable[QuestionGroup], ask: Prompter, answers: Answers, file: dict[str, Any]) -> None:
    """Asks the questions of a table.

    Args:
        areas: The table.
        ask: Displays a prompt and returns the answer.
        answers: Earlier answers by name; updated in place.
        file: Content of the file, updated in place; routing questions, gates and secrets are not stored.
    """
    for area in areas:
        if not matches(area.when, answers):
            continue
        if area.gate is not None:
            answers[area.gate] = ask(prompt(Question(area.gate), answers))
            if not answers[area.gate]:
                continue
        for question in area.questions:
            if matches(question.when, answers):
                answers[question.name] = _ask(question, answers, ask)
                _store(question, answers[question.name], file)


def _ask(question: Question, answers: Answers, ask: Prompter) -> Any:
    if ENTRIES[question.name].type != "tuple[str, ...]":
        return ask(prompt(question, answers)) if question.fixed is None else question.fixed
    gathered: tuple[str, ...] = answers.get(question.name, ()) + (question.fixed or ())
    if question.fixed is None:
        while more := ask(prompt(question, answers)):
            gathered += more
    return gathered


def _store(question: Question, value: Any, file: dict[str, Any]) -> None:
    entry = ENTRIES[question.name]
    written = question.write(value) if question.write is not None else value
    if written is None or entry.option.secret or (entry.dest in STEPS and entry.option.key is None):
        return
    section = entry.section.key if entry.section is not None else None
    place = file if section is None else file.setdefault(section, {})
    place[entry.key] = list(written) if isinstance(written, tuple) else written


def prompt(question: Question, answers: Answers) -> Prompt:
    """Builds the prompt of a question, with the default that follows from earlier answers."""
    entry = ENTRIES[question.name]
    default = question.default(answers) if callable(question.default) else question.default
    if default is None:
        default = entry.option.default
    if default is not None and question.check is not None and question.check(default, answers) is not None:
        default = None  # invalid with earlier answers
    text = str(entry.option.ask).format(devices=MACHINES[answers.get("machine", "NO")][1])
    choices = _choices(entry, question)

    def read(typed: str) -> Any:
        value = entry.convert(_boolean(typed, entry.dest) if entry.type == "bool" else typed, entry.dest)
        wrong = question.check(value, answers) if question.check is not None else None
        if wrong is not None:
            raise SettingsError(f"{entry.dest}: {wrong}")
        return value

    return Prompt(entry.dest, text, read, _hint(entry, choices, default), default, choices, entry.option.secret)


def _choices(entry: OptionSpec, question: Question) -> tuple[Choice, ...]:
    values = tuple(question.choices) or entry.option.choices
    labels = question.choices if isinstance(question.choices, Mapping) else {}
    numbered = all(isinstance(value, int) for value in values)  # stages and versions are numbers themselves
    return tuple(
        Choice(value, str(labels.get(value, value)), value if numbered else number)
        for number, value in enumerate(values)
    )


def _hint(entry: OptionSpec, choices: tuple[Choice, ...], default: Any) -> str:
    if choices:
        return next((str(choice.number) for choice in choices if choice.value == default), "")
    if entry.type == "bool":
        return {True: "YES/no", False: "yes/NO"}.get(default, "yes/no")
    if entry.type == "tuple[str, ...]":
        return "an empty line ends the list"
    if entry.type == "tuple[bool, bool, bool]":
        return ",".join("yes" if word else "no" for word in dict.fromkeys(default))
    return "" if default is None else str(default)


def _boolean(typed: str, name: str) -> bool:
    try:
        return bool(env.str_to_bool(typed))
    except ValueError:
        raise SettingsError(f"{name}: expected yes or no, found {short_repr(typed)}.") from None
