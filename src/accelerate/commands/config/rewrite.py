"""Edits a configuration file's text to new content, preserving comments, order and spelling of everything else.

The result is parsed and compared with the content. If they differ, the file is written from scratch without its comments,
which the return value reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ...launch import config_file
from ...launch.config_io import dump, parse

if TYPE_CHECKING:
    import yaml


class Rewritten(NamedTuple):
    """A file's new text, and whether its comments are preserved."""

    text: str
    kept_comments: bool


def rewritten(
    data: bytes, content: Mapping[str, Any], as_json: bool, renamed: Mapping[str, str] | None = None
) -> Rewritten:
    """Edits the text of a file to new content.

    Args:
        data: The file's bytes.
        content: The new content.
        as_json: Whether the file is JSON.
        renamed: Old key -> new key that takes its place and comments; other spellings of the same option need no entry.
    """
    if as_json:
        return Rewritten(dump(content, as_json=True, sort=False), True)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16")
    else:
        text = data.decode("utf-8-sig")
    edited = _edited(text, content, _options() | {new: old for old, new in (renamed or {}).items()})
    if edited is not None:
        return Rewritten(edited, True)
    return Rewritten(dump(content, sort=False), "#" not in text)


def _options() -> dict[str, str]:
    """Returns the option of each key."""
    top, inside = config_file.key_tables()
    return {key: entry.dest for table in (*inside.values(), top) for key, entry in table.items()}


def _edited(text: str, content: Mapping[str, Any], options: Mapping[str, str]) -> str | None:
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = text.splitlines(keepends=True)
    if not isinstance(node, yaml.MappingNode) or not _is_block_mapping(node) or not lines[-1].endswith("\n"):
        return None
    made = "".join(_lines(node, lines, 0, len(lines), parse(text.encode()), content, options))
    try:
        return made if parse(made.encode()) == content else None
    except (ValueError, UnicodeEncodeError):
        return None


def _is_block_mapping(node: yaml.Node) -> bool:
    """Returns whether `node` is a block mapping with one key per line."""
    import yaml

    if not isinstance(node, yaml.MappingNode) or node.flow_style or not node.value:
        return False
    starts = [key.start_mark.line for key, _ in node.value]
    return len(set(starts)) == len(starts)


def _lines(
    node: yaml.MappingNode,
    lines: list[str],
    begin: int,
    end: int,
    old: Mapping[str, Any],
    content: Mapping[str, Any],
    options: Mapping[str, str],
) -> Iterator[str]:
    """Yields the lines `begin` to `end` of `node`, whose value is `old`, edited so that their value is `content`."""
    names = [key.value for key, _ in node.value]
    keys = [key.start_mark.line for key, _ in node.value]
    # Comments and empty lines above a key belong to it; those above the first and below the last key to the mapping.
    tops = [keys[0], *(_above(lines, before, line) for before, line in zip(keys, [*keys[1:], end], strict=True))]
    yield from lines[begin : keys[0]]
    indent = " " * node.start_mark.column
    following = 0  # index among the old keys after the last one written
    for name, value in content.items():
        there = name in old and name in names
        before = name if there else _before(name, names, content, options)
        where = names.index(before) if before is not None else following
        replaces = before is not None  # otherwise the comments of a removed key are removed with it
        above = lines[tops[where] : keys[where]] if replaces else []
        following = where + 1 if replaces else following
        inner = node.value[where][1] if there else None
        if there and old[name] == value:
            yield from lines[tops[where] : tops[where + 1]]
        elif isinstance(value, Mapping) and value and inner is not None and _is_block_mapping(inner):
            yield from above
            first = inner.start_mark.line
            yield from lines[keys[where] : first]
            yield from _lines(inner, lines, first, tops[where + 1], old[name], value, options)
        else:
            yield from above
            made = [indent + line for line in dump({name: value}, sort=False).splitlines()]
            behind = _behind(node.value[where], lines) if replaces else ""
            yield from (line + "\n" for line in [made[0] + behind, *made[1:]])
    yield from lines[tops[-1] : end]


def _before(name: str, names: list[str], content: Mapping[str, Any], options: Mapping[str, str]) -> str | None:
    """Returns the removed key that `name` replaces, another spelling of the same option, or None."""
    option = options.get(name, name)
    return next((old for old in names if old not in content and option in (old, options.get(old))), None)


def _above(lines: list[str], before: int, line: int) -> int:
    while line - 1 > before and lines[line - 1].strip()[:1] in ("", "#"):
        line -= 1
    return line


def _behind(pair: tuple[yaml.Node, yaml.Node], lines: list[str]) -> str:
    """Returns the comment after a value on its key's line."""
    key, value = pair
    rest = lines[value.end_mark.line][value.end_mark.column :].strip() if value.end_mark.line < len(lines) else ""
    return f"  {rest}" if value.end_mark.line == key.start_mark.line and rest.startswith("#") else ""
