"""Prose in the terms of the field: docstrings that open with a verb or a noun, verbs that code does, American spelling."""

from __future__ import annotations

import ast
import textwrap

import pytest

from tests.architecture import prose

REPORTS = prose.reports(prose.files())


@pytest.mark.parametrize("part", REPORTS)
def test_prose(part: str) -> None:
    violations = REPORTS[part].violations()
    assert not violations, "\n".join(map(str, violations))


def test_what_is_rare_in_the_whole_package() -> None:
    whats = [finding for report in REPORTS.values() for finding in report.whats]
    limit = prose.WHAT_LIMIT * sum(report.words for report in REPORTS.values()) / 1000
    assert len(whats) <= limit, f"more than {limit:.0f}:\n" + "\n".join(map(str, whats))


def test_retired_names_stay_away() -> None:
    found = prose.retired(prose.files(), prose.OLD_WORDS)
    assert not found, "\n".join(map(str, found))


def test_exceptions_have_reasons() -> None:
    for table in (prose.IDIOMS, prose.SPELLED_BY_OTHERS):
        assert all(len(reason) > 10 for reason in table.values())


def source(text: str, path: str = "src/accelerate/launch/new.py") -> list[str]:
    """Returns the rules that a source breaks, with the lines."""
    report = prose.reports({path: textwrap.dedent(text)})[prose.part_of(path)]
    return [f"{finding.rule} {finding.line}" for finding in report.violations()]


@pytest.mark.parametrize(
    "words", ["What is left.", "Those of a rank.", "One that waits.", "Of a model.", "\n    What is left."]
)
def test_an_opening_is_noticed(words: str) -> None:
    assert source(f'"""Plans."""\n\ndef f():\n    """{words}"""') == ["opening 4"]
    assert source(f'x = 1\n"""{words}"""') == ["opening 2"]
    assert source(f'class A:\n    """Returns a rank. {words.strip()}"""') == []


def test_whether_something_has_had_is_noticed() -> None:
    assert source('"""Whether the rank has had its turn."""') == ["opening 1"]
    assert source('"""Whether to shard."""') == source('"""Returns whether a rank is alive."""') == []


VERBS = [
    '"""The plan says\nwhich."""',
    "x = 1  # tells the launcher",
    "# it then lets\n# go of the tensor",
    'raise ValueError("nobody reads this file")',
    'raise ValueError(f"{name} is not known here")',
    'raise ValueError("the first half of it "\n    "waits in vain")',
]


@pytest.mark.parametrize("text", VERBS)
def test_a_verb_that_code_does_not_do_is_noticed(text: str) -> None:
    assert [each.split()[0] for each in source(text)] == ["verb"]


PASSING = [
    '"""Uses a well-known port, of unknown use; best\nknown by its number."""',
    '"""Calls `say`, ``tell()``.\n\n>>> tell(1)\n\n```\nsay(nobody)\n```\n"""',
    "say(tell)",
    'x = "nobody"',
]


@pytest.mark.parametrize("text", PASSING)
def test_idioms_and_code_pass(text: str) -> None:
    assert source(text) == []


def test_lines_are_those_of_the_phrase() -> None:
    assert source('"""Plans.\n\nIt says so.\n"""\n\n# first\n# knows') == ["verb 3", "verb 7"]


def test_what_is_counted_against_the_words_around_it() -> None:
    filler = "word " * 1500
    assert source(f'"""Plans {filler} what it does, and what it reads."""') == []
    assert source(f'"""Plans {filler} what it does."""\n# what it reads\n# and what it writes') == [
        "what 1",
        "what 2",
        "what 3",
    ]
    assert source('"""Plans what it does."""') == []
    assert source('"""Plans what it does.\n\nAnd what it reads."""') == ["what 1", "what 3"]


@pytest.mark.parametrize(
    "word",
    [
        "synchronise",
        "Initialised",
        "quantisation",
        "_serialised",
        "behaviours",
        "isNeighbour",
        "centred",
        "licence",
        "spelt",
    ],
)
def test_a_british_spelling_is_noticed(word: str) -> None:
    assert source(f"{word} = 1") == ["British spelling 1"]
    for path in ("docs/new.md", "tests/unit/test_new.py", "README.md"):
        assert source(f"A line,\nand {word}.", path) == ["British spelling 2"]


def test_american_spellings_pass() -> None:
    text = (
        "optimistic raise promise exercise premise organism analyses emphasis specialist license center programmer rise"
    )
    assert source(f'"""Plans {text}."""') == []


def test_a_file_with_a_british_name_is_noticed() -> None:
    assert source("", "tests/unit/test_behaviours.py") == ["British spelling in the file's name 1"]


def test_markdown_follows_the_rules_for_verbs() -> None:
    assert source("The plan\nsays so.\n\n```bash\nsay\n```\n", "docs/new.md") == ["verb 2"]
    assert source("A test says so.", "tests/unit/test_new.py") == []


RETIRED = [
    "import a.oldname",
    "from .oldname import b",
    "from . import oldname",
    "oldname = 1",
    "a.oldname()",
    "def oldname(): ...",
    "class oldname: ...",
    "def f(oldname): ...",
    "f(oldname=1)",
]


@pytest.mark.parametrize("text", RETIRED)
def test_a_retired_name_is_noticed(text: str) -> None:
    assert list(prose.old_words(ast.parse(text), {"oldname": "new_name"})) == [(1, "oldname, now new_name")]
    assert not list(prose.old_words(ast.parse(text), {"old": "new", "name": "new"}))
    assert prose.retired({"src/accelerate/runtime/oldname.py": ""}, {"oldname": "new_name"})


def test_parts() -> None:
    assert (
        prose.part_of("src/accelerate/launch/local/run.py") == prose.part_of("src/accelerate/launch/run.py") == "launch"
    )
    assert prose.part_of("src/accelerate/state.py") == "state"
    assert (
        prose.part_of("src/accelerate/offload/hooks/align.py")
        == prose.part_of("src/accelerate/offload/align.py")
        == "offload"
    )
    assert prose.part_of("tests/unit/launch/test_plan.py") == "tests/unit"
    assert prose.part_of("docs/mesh.md") == "docs"
