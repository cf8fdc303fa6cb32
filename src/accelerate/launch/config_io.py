"""A configuration file as text: yaml or json to a mapping, and back.

Whatever the bytes are, reading gives a mapping with words as keys or one `SettingsError` that names the file and the
place. Writing lands whole or not at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..settings.option import SettingsError, short_repr

if TYPE_CHECKING:
    import yaml

# A configuration has a few kilobytes. What is far beyond is something else, and costs memory or the C stack.
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_TOO_DEEP = f"nested more than {_MAX_DEPTH} deep."
_MAX_DIGITS = 100
_MAX_VALUES = 100_000
# What yaml's constructors raise for scalars that are not what they claim to be: !!int x, 2020-99-99.
_CONSTRUCTOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def load(path: str) -> dict[str, Any]:
    """The file's content, yaml or json, as a mapping.

    Raises:
        SettingsError: when it cannot be read, is neither, or is no mapping.
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
    """The file's bytes.

    Raises:
        SettingsError: when it cannot be read, or is too large to be a configuration.
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
    """What yaml or json text says; nothing for an empty file.

    Raises:
        ValueError: when it is not valid or nested too deeply, or a key stands twice in one mapping.
    """
    return _json(data) if as_json else _yaml(data)


def _json(data: bytes) -> Any:
    import json

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _reject_duplicates((key, printable(key)) for key, _ in pairs)
        return dict(pairs)

    def integer(text: str) -> int | str:
        return int(text) if len(text) <= _MAX_DIGITS else text  # Python refuses the largest; as text its key is told

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
    """What is wrong with a text, and where: yaml's own words tell where the block around it begins as well."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).replace('in "<byte string>", ', "at ")
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"


def _check_depth(data: bytes, loader_type: Any) -> None:
    # The composer of libyaml's binding recurses without a limit: deep nesting would end the process.
    import yaml

    depth = 0
    for event in yaml.parse(data, Loader=loader_type):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {_line(event)}: {_TOO_DEEP}")


def _count_values(node: yaml.Node, counts: dict[int, int], path: str) -> int:
    """How many values `node` stands for once aliases are followed; refuses keys that stand twice on the way.

    Raises:
        ValueError: when it refers to itself, a few aliases stand for a flood of values, or a number is no number
            for a configuration.
    """
    import yaml

    line = f"line {_line(node)}"
    if counts.setdefault(id(node), 0):
        return counts[id(node)]
    counts[id(node)] = -1  # being weighed
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
    """A key for a message: as it is where it can be printed on one line."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 80 else short_repr(key)


def _reject_duplicates(keys: Iterable[tuple[object, str]]) -> None:
    """Raises for the second of two equal keys, each given with the words that name it."""
    seen: set[object] = set()
    for key, name in keys:
        if key in seen:
            raise ValueError(f"key {name}: stands in it twice, keep one.")
        seen.add(key)


def _find_invalid_scalar(loader: Any, node: yaml.Node) -> str | None:
    """The first scalar below `node` that cannot be constructed, in words."""
    import yaml

    loader.recursive_objects = {}  # the failed attempt left what it was at
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
    """`content` as yaml or json.

    Args:
        content: Plain values.
        as_json: Which of the two.
        sort: Keys in alphabetical order, else as they come.
    """
    if as_json:
        import json

        return json.dumps(content, indent=2, sort_keys=sort) + "\n"
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=sort, allow_unicode=True))


def write(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Writes beside the target and renames: an interruption leaves no half of a file. A link's target is written.

    Raises:
        OSError: when the folder or the file cannot be written.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    beside = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(beside, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(beside, target)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)
