"""The code in README and docs is true: python blocks run, `py` fragments compile, commands parse, links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.test_contract import PARSERS, resolve

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    code: str


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.relative_to(ROOT).as_posix(), text[: match.start()].count("\n") + 2, language, dedented(match))
        for match in FENCE.finditer(text)
        if match["language"] == language
    ]


def dedented(match: re.Match[str]) -> str:
    return "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_page(found: list[Block], folder: str) -> None:
    """Runs a page's blocks one after the other in one namespace, as a reader would."""
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        # The empty lines in front make a traceback's line numbers those of the page.
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page: Path, run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(1, run_page, blocks(page, "python"), str(tmp_path), timeout=120, env={"ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fragments_compile(page: Path) -> None:
    for block in blocks(page, "py"):
        compile("\n" * (block.line - 1) + block.code, block.page, "exec")


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, without what they print, comments and variables in front."""
    found = []
    for block in [*blocks(page, "bash"), *blocks(page, "console")]:
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """Raises where a documented command would be refused."""
    program, *arguments = words
    if program == "make":
        targets = {
            line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"[a-z]+:", line)
        }
        assert not {word for word in arguments if "=" not in word} - targets, words
    elif program == "accelerate" and arguments[0] == "launch":
        importlib.import_module("accelerate.launch.plan").plan(arguments[1:])
    elif program == "accelerate":
        parser = resolve(f"accelerate.commands.{PARSERS[arguments[0]]}")()
        _, rest = parser.parse_known_args(arguments[1:])
        assert arguments[0] == "test" or not rest, f"unknown: {rest}"
        if rest:  # `accelerate test` hands what it does not know to launch
            importlib.import_module("accelerate.launch.plan").plan([*rest, "script.py"])
    for word in arguments:
        if word.startswith(("examples/", "benchmarks/", "docs/")):
            assert (ROOT / word).exists(), f"{word} is not there"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        try:
            check_command(words)
        except SystemExit as error:
            raise AssertionError(f"{name(page)}: {shlex.join(words)} is refused") from error


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises((SystemExit, ValueError)):
        check_command(["accelerate", "launch", "--no_such_flag", "script.py"])
    with pytest.raises(AssertionError):
        check_command(["make", "nothing"])
