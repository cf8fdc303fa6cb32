"""What is in the tree stands on its own: it names no path of the machine on which it was written."""

from __future__ import annotations

import re
from pathlib import Path

from tests.architecture import rules

# Put together here, so that this file does not hold them.
PRIVATE = re.compile(
    "|".join(["/wo" + "rk/", r"(?<!\w)\.lib" + "rary", r"/ro" + "ot/", r"\bfa" + r"rm\b", "share" + "d/contract"])
)
FOLDERS = ("src", "tests", "examples", "benchmarks", "docs", "tools", ".ci")


def texts() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (rules.ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in rules.ROOT.iterdir() if path.is_file()]
    skipped = {"__pycache__", "accelerate.egg-info", ".git"}  # in a worktree, .git is a file that names a folder
    return [path for path in [*files, *inside] if not skipped & set(path.parts) and path.suffix != ".pyc"]


def mentions(text: str) -> list[str]:
    return PRIVATE.findall(text)


def test_no_private_path_is_mentioned() -> None:
    found = {
        str(path.relative_to(rules.ROOT)): mentions(path.read_text(encoding="utf-8", errors="replace"))
        for path in texts()
    }
    assert not {path: words for path, words in found.items() if words}


def test_a_mention_is_noticed() -> None:
    assert mentions("see /wo" + "rk/main") and not mentions("a workshop")
