"""Counts lines of code, words of prose, modules per folder, import circles and names of two classes.

    python tools/count_code.py [SRC]

SRC is the folder that holds the package (src). Lines of code are physical lines without docstrings, comments, blank lines
and import statements. Circles are the strongly connected components of the import graph, with imports inside functions
and those for type checkers counted. Prose is docstrings and comments, code blocks in them included.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]
PACKAGE = "accelerate"
PHRASES = {
    "what": r"\bwhat ",
    "say, tell, know, nobody": r"\b(?:say|says|said|tell|tells|told|know|knows|known|nobody)\b",
}
"""Patterns whose occurrences are counted per 1,000 words of prose."""


def modules(src: Path) -> dict[str, Path]:
    """Returns the package's modules, dotted name -> file."""
    found = {}
    for path in sorted((src / PACKAGE).rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def code_lines(source: str) -> int:
    """Counts the lines that hold code other than docstrings and imports."""
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        docstring = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if docstring or isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - left_out)


def prose(source: str) -> str:
    """Returns a module's docstrings, those of attributes included, and its comments."""
    found = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*found, *(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)])


def imports(module: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """Yields the modules of the package that a module imports, wherever in it the import stands."""
    names = set(known)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if (target if target in names else base) in names:
                    yield target if target in names else base


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in list(graph):
        if node not in index:
            visit(node)
    return found


def sibling_circles(graph: Graph) -> list[list[str]]:
    """Returns circles among the direct children of each package; a package imports what its modules import."""
    levels: dict[str, Graph] = defaultdict(lambda: defaultdict(set))
    for module, targets in graph.items():
        for target in targets:
            ours, theirs = module.split("."), target.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if depth is not None:
                levels[".".join(ours[:depth])][".".join(ours[: depth + 1])].add(".".join(theirs[: depth + 1]))
    return [circle for level in levels.values() for circle in circles(level)]


def main(arguments: list[str]) -> int:
    """Prints the counts."""
    sys.setrecursionlimit(10_000)
    src = Path(arguments[0] if arguments else "src")
    found = modules(src)
    total = sum(code_lines(path.read_text(encoding="utf-8")) for path in found.values())
    print(f"{total:,} lines of code in {len(found)} modules")
    text = "\n".join(prose(path.read_text(encoding="utf-8")) for path in found.values())
    words = len(text.split())
    rates = {name: len(re.findall(pattern, text, re.IGNORECASE)) / words * 1000 for name, pattern in PHRASES.items()}
    print(f"{words:,} words of prose; per 1,000: " + "; ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    by_folder = Counter(path.parent for path in found.values() if path.name != "__init__.py")
    print("largest folders: " + ", ".join(f"{path.relative_to(src)} {n}" for path, n in by_folder.most_common(8)))
    graph = {name: set(imports(name, path, found)) - {name} for name, path in found.items()}
    for title, listed in (("modules", circles(graph)), ("siblings", sibling_circles(graph))):
        print(f"circles of {title}: {len(listed)}", *("  " + ", ".join(circle) for circle in listed), sep="\n")
    classes: dict[str, list[str]] = defaultdict(list)
    for name, path in found.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(name)
    doubled = {name: homes for name, homes in classes.items() if len(homes) > 1}
    print(f"names of two classes: {len(doubled)}")
    for name, homes in sorted(doubled.items()):
        print(f"  {name}: {', '.join(homes)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
