"""Reads and writes configuration files in YAML or JSON.

Reading returns a mapping with string keys, or raises one `SettingsError` with file and line, for any bytes. Writing is
atomic.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..settings.option import SettingsError, short_repr

if TYPE_CHECKING:
    import yaml

# A configuration has a few kilobytes. Much larger input is rejected before it exhausts memory or the C stack.
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_TOO_DEEP = f"nested more than {_MAX_DEPTH} deep."
_MAX_DIGITS = 100
_MAX_VALUES = 100_000
# Raised by yaml's constructors for invalid scalars: !!int x, 2020-99-99.
_CONSTRUCTOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def load(path: str) -> dict[str, Any]:
    """Loads a YAML or JSON file that contains a mapping.

    Raises:
        SettingsError: if it cannot be read, is not valid, or does not contain a mapping.
    """
    data = read(path)
    try:
        content = parse(data, as_json=path.endswith(".json"))
    except ValueError as error:
        raise SettingsError(f"configuration file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"configuration file {path}: expected keys and values such as `num_processes: 2`, found {short_repr(content)}."
        )
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"configuration file {path}: expected a word as key, found {short_repr(key)}.")
    return content


def read(path: str) -> bytes:
    """Reads a file.

    Raises:
        SettingsError: if it cannot be read, or is too large to be a configuration.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise SettingsError(f"configuration file {path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    if len(data) > _MAX_BYTES:
        raise SettingsError(
            f"configuration file {path} is larger than {_MAX_BYTES >> 20} MiB: is it a configuration of accelerate?"
        )
    return data


def parse(data: bytes, as_json: bool = False) -> Any:
    """Parses YAML or JSON; returns an empty mapping for an empty file.

    Raises:
        ValueError: if it is not valid or nested too deeply, or a mapping has duplicate keys.
    """
    return _json(data) if as_json else _yaml(data)


def _json(data: bytes) -> Any:
    import json

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _reject_duplicates((key, printable(key)) for key, _ in pairs)
        return dict(pairs)

    def integer(text: str) -> int | str:
        return (
            int(text) if len(text) <= _MAX_DIGITS else text
        )  # Python rejects larger ones; as text, the error names its key

    try:
        content = json.loads(data, object_pairs_hook=mapping, parse_int=integer)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid json: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8: {error}") from None
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [part for value in level for part in _children(value)]
    if level:
        raise ValueError(_TOO_DEEP)
    return content


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _yaml(data: bytes) -> Any:
    import yaml

    loader_type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_depth(data, loader_type)
        loader = loader_type(data)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            _count_values(node, {}, "")
            try:
                return loader.construct_document(node)
            except _CONSTRUCTOR_ERRORS as error:
                raise ValueError(_find_invalid_scalar(loader, node) or str(error)) from None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid yaml: {_format_yaml_error(error)}") from None


def _format_yaml_error(error: yaml.YAMLError) -> str:
    """Formats the problem and its position, without the context that yaml adds."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).replace('in "<byte string>", ', "at ")
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"


def _check_depth(data: bytes, loader_type: Any) -> None:
    # The composer of libyaml's binding recurses without a limit: deep nesting would crash the process.
    import yaml

    depth = 0
    for event in yaml.parse(data, Loader=loader_type):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {_line(event)}: {_TOO_DEEP}")


def _count_values(node: yaml.Node, counts: dict[int, int], path: str) -> int:
    """Counts the values of `node` with aliases expanded, and checks for duplicate keys.

    Raises:
        ValueError: if it refers to itself, aliases expand to too many values, or an integer is too long.
    """
    import yaml

    line = f"line {_line(node)}"
    if counts.setdefault(id(node), 0):
        return counts[id(node)]
    counts[id(node)] = -1  # in progress
    inner: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        words = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        _reject_duplicates(((key.tag, key.value), f"{_key_path(path, key)} (line {_line(key)})") for key in words)
        inner = [(_key_path(path, key), part) for key, value in node.value for part in (key, value)]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(path, value) for value in node.value]
    elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MAX_DIGITS:
        raise ValueError(f"{line}: {path}: found a number of {len(node.value)} digits.")
    total = 1
    for name, part in inner:
        count = _count_values(part, counts, name)
        if count < 0:
            raise ValueError(f"{line}: {name or 'the file'} refers to itself.")
        total += count
        if total > _MAX_VALUES:
            raise ValueError(f"{line}: {name or 'the file'} stands for more than {_MAX_VALUES} values.")
    counts[id(node)] = total
    return total


def _line(part: yaml.Node | yaml.Event) -> int:
    return part.start_mark.line + 1 if part.start_mark is not None else 0


def _key_path(path: str, key: yaml.Node) -> str:
    import yaml

    name = printable(key.value) if isinstance(key, yaml.ScalarNode) else "?"
    return f"{path}.{name}" if path else name


def printable(key: Any) -> str:
    """Formats a key for a message: unchanged if it is short and printable."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 80 else short_repr(key)


def _reject_duplicates(keys: Iterable[tuple[object, str]]) -> None:
    """Raises for duplicate keys; each is given with its name for the message."""
    seen: set[object] = set()
    for key, name in keys:
        if key in seen:
            raise ValueError(f"key {name}: duplicate, keep one.")
        seen.add(key)


def _find_invalid_scalar(loader: Any, node: yaml.Node) -> str | None:
    """Returns a message about the first scalar below `node` that cannot be constructed."""
    import yaml

    loader.recursive_objects = {}  # left over from the failed attempt
    todo: list[tuple[str, yaml.Node]] = [("", node)]
    while todo:
        path, node = todo.pop(0)
        if isinstance(node, yaml.MappingNode):
            todo += [(_key_path(path, key), part) for key, value in node.value for part in (key, value)]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(path, value) for value in node.value]
        else:
            try:
                loader.construct_object(node)
            except _CONSTRUCTOR_ERRORS:
                kind = node.tag.rpartition(":")[2]
                return f"line {_line(node)}: {path}: {short_repr(node.value)} cannot be read as {kind}."
    return None


# Writing -------------------------------------------------------------------------------------------------------------


def dump(content: Mapping[str, Any], as_json: bool = False, sort: bool = True) -> str:
    """Formats `content` as YAML or JSON.

    Args:
        content: Plain values.
        as_json: Whether to format as JSON.
        sort: Whether to sort keys.
    """
    if as_json:
        import json

        return json.dumps(content, indent=2, sort_keys=sort) + "\n"
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=sort, allow_unicode=True))


def write(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Writes a file atomically, by renaming a temporary file; follows symbolic links.

    Raises:
        OSError: if the folder or the file cannot be written.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
