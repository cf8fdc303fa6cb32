"""How a table of questions is gone through: which are asked, and what the file holds of the answers.

`walk` is driven by the table alone (`questions.py`) and asks through a prompter (`prompts.py`): nothing here prints or
reads.
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
"""What earlier answers must be: a value, several in a tuple, or a function of the answer. None means not asked."""


class Question(NamedTuple):
    """One row of the table: an option by name (its text is the option's ``ask``), and when it is asked.

    Attributes:
        name: The option, as in `steps.ENTRIES`.
        when: What earlier answers must be.
        default: The answer of an empty line, or a function of the answers; the option's own default if left out.
        choices: The values offered, if not all of the option's; a mapping says what is shown for each.
        check: Compares the answer with earlier ones; gives what is wrong with it, or None.
        write: The value as it stands in the file; None leaves the key out.
        fixed: The answer that goes without asking.
    """

    name: str
    when: When = {}
    default: Any = None
    choices: Iterable[Any] = ()
    check: Callable[[Any, Answers], str | None] | None = None
    write: Callable[[Any], Any] | None = None
    fixed: Any = None


class QuestionGroup(NamedTuple):
    """Questions about one thing.

    Attributes:
        questions: In the order in which they are asked.
        when: What earlier answers must be.
        gate: A question with yes or no that comes first; no skips the rest.
    """

    questions: tuple[Question, ...]
    when: When = {}
    gate: str | None = None


def matches(when: When, answers: Answers) -> bool:
    """Whether the answers so far are what `when` says."""
    for name, wanted in when.items():
        found = answers.get(name)
        if callable(wanted):
            if not wanted(found):
                return False
        elif found is None or found not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return False
    return True


def ask_all(areas: Iterable[QuestionGroup], ask: Prompter, answers: Answers, file: dict[str, Any]) -> None:
    """Asks what the table says.

    Args:
        areas: The table.
        ask: Puts a prompt to the person and gives the answer.
        answers: Earlier answers by name; those given now are added.
        file: What the file will hold; steps, gates and secrets leave nothing in it.
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
    """What is asked, with the default that the answers so far lead to."""
    entry = ENTRIES[question.name]
    default = question.default(answers) if callable(question.default) else question.default
    if default is None:
        default = entry.option.default
    if default is not None and question.check is not None and question.check(default, answers) is not None:
        default = None  # earlier answers rule it out
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
