"""ARCHITECTURE.md is true: what its tree names is there, and nothing at the top of the package is left out."""

from __future__ import annotations

import re
from pathlib import Path

from tests.architecture import rules

PAGE = (rules.ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def tree(page: str) -> list[Path]:
    """The paths that the page's tree names, by their indentation."""
    block = page.split("## The tree\n", 1)[1].split("\n## ", 1)[0]
    found: list[Path] = []
    parents: list[tuple[int, Path]] = []
    for line in block.splitlines():
        match = re.match(r"( {4,})([\w./]+)(?:\s{2,}|$)", line)
        if match is None or not line.startswith("    "):
            continue
        depth, name = len(match[1]), match[2]
        parents = [(other, path) for other, path in parents if other < depth]
        path = (parents[-1][1] if parents else Path()) / name
        found.append(path)
        if name.endswith("/"):
            parents.append((depth, path))
    return found


def test_what_the_tree_names_is_there() -> None:
    named = tree(PAGE)
    assert len(named) > 40
    missing = [str(path) for path in named if not (rules.ROOT / path).exists()]
    assert not missing, f"in ARCHITECTURE.md, but not in the tree: {missing}"


def test_nothing_at_the_top_is_left_out() -> None:
    named = {path.parts[2] for path in tree(PAGE) if path.parts[:2] == ("src", "accelerate") and len(path.parts) > 2}
    there = {Path(path).parts[0] for path in rules.sources()} - {"__init__.py"}
    assert not there - named, f"not in ARCHITECTURE.md: {sorted(there - named)}"


def test_a_false_tree_is_noticed() -> None:
    page = "## The tree\n\n    src/\n      nothing.py   not there\n\n## Next"
    assert tree(page) == [Path("src"), Path("src/nothing.py")]
