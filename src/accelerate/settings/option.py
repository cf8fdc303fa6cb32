"""Declares options: one declaration gives the flag, the configuration key, the variable, the question and the default.

A `Settings` class is a frozen value whose fields are declared by `option`. A field declared by `section` is itself such a
class: a group of options with a common prefix. `option_specs` lists all of them with their spellings.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from . import env

if TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform
else:

    def dataclass_transform(**_: object) -> object:
        """Replaces the decorator at run time: only type checkers use it."""
        return lambda cls: cls


_T = TypeVar("_T")
_S = TypeVar("_S", bound="Settings")


class SettingsError(ValueError):
    """Raised for an invalid value on the command line or in a file; the message gives the reason and the remedy."""


class Section(NamedTuple):
    """Properties that the options of one group share.

    Attributes:
        title: Heading in the help.
        key: The mapping in the configuration file that holds them, or None for the file's top level.
        prefix: Prefix of flags and keys (``fsdp_``); field names omit it.
        variables: Prefix of the variables; None if only options with an explicit name have one.
        enabled_by: The flag that turns the group on; without it, help only mentions the group.
        truth: Spellings of true and false in the variables.
    """

    title: str
    key: str | None = None
    prefix: str = ""
    variables: str | None = None
    enabled_by: str | None = None
    truth: tuple[str, str] = ("true", "false")


class Option(NamedTuple):
    """One option as declared; see `option` for the attributes."""

    help: str
    default: Any
    group: str | None
    flags: tuple[str, ...]
    switch: bool
    off: str | None
    choices: tuple[Any, ...]
    numbered: tuple[Any, ...]
    minimum: float | None
    key: str | None
    keys: tuple[str, ...]
    env: str | None
    ask: str | None
    secret: bool


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    flags: tuple[str, ...] = (),
    switch: bool = False,
    off: str | None = None,
    choices: tuple[Any, ...] = (),
    numbered: tuple[Any, ...] = (),
    minimum: float | None = None,
    key: str | None = None,
    keys: tuple[str, ...] = (),
    env: str | None = None,
    ask: str | None = None,
    secret: bool = False,
) -> Any:
    """Declares a field of a settings class; its annotation gives the type: int, float, str, bool or a tuple.

    Args:
        default: The value if neither flag nor file gives one.
        help: One line for ``-h``.
        group: Heading in the help, for a class without a `Section`.
        flags: Additional spellings; one that replaces the derived flag comes first and starts with ``--``.
        switch: The flag takes no value and means True.
        off: A flag that means False.
        choices: Allowed values; words are matched case-insensitively and stored as spelled here.
        numbered: Choices that the documentation numbers from 1; the number is accepted as well.
        minimum: The smallest number allowed.
        key: The key in the file, if it differs from the flag's name.
        keys: Older or shorter spellings of the key.
        env: The child's variable, if it is not derived from the section's prefix and the name; ``""`` for none.
        ask: The question of ``accelerate config``.
        secret: The value is neither stored in a file nor displayed.
    """
    return Option(help, default, group, flags, switch, off, choices, numbered, minimum, key, keys, env, ask, secret)


class _Group(NamedTuple):
    kind: Any


def section(kind: type[_T]) -> _T:
    """Declares a field that holds a group of options: a `Settings` class with a `Section` named ``section``."""
    made: Any = _Group(kind)
    return made  # type: ignore[no-any-return]  # the field's type; `Settings` puts a value in its place


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Settings:
    """A frozen value with named, typed, defaulted fields.

    Equivalent to a frozen dataclass; importing `dataclasses` would take longer than the rest of the launcher's work.

    Raises:
        TypeError: if a field is unknown.
        AttributeError: if a field is assigned.
    """

    _declared: ClassVar[dict[str, Any]] = {}
    _types: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        names = [name for name, kind in cls.__annotations__.items() if not str(kind).startswith("ClassVar")]
        cls._types = {name: str(cls.__annotations__[name]) for name in names}
        cls._declared = {name: vars(cls)[name] for name in names}
        for name, declared in cls._declared.items():
            setattr(cls, name, declared.default if isinstance(declared, Option) else declared)

    def __init__(self, **values: Any) -> None:
        for name, declared in self._declared.items():
            if isinstance(declared, _Group) and name not in values:
                values[name] = declared.kind()
        if unknown := values.keys() - self._declared.keys():
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}.")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: make another with replace({name}=...).")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(getattr(self, name) == getattr(other, name) for name in self._declared)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self._declared))

    def __repr__(self) -> str:
        changed = (f"{name}={self._shown(name)}" for name in self._declared if name in self.__dict__)
        return f"{type(self).__name__}({', '.join(changed)})"

    def _shown(self, name: str) -> str:
        declared, value = self._declared[name], getattr(self, name)
        return "..." if isinstance(declared, Option) and declared.secret and value is not None else repr(value)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed."""
        return type(self)(**{**self.__dict__, **changes})


class OptionSpec(NamedTuple):
    """An option within its settings class, with all its spellings.

    Attributes:
        path: Field names that lead to it from the outermost class.
        dest: Its name in a flat namespace (argparse's ``dest``): ``fsdp_version``.
        flags: Spellings on the command line, with underscores; dashes are accepted as well.
        group: Heading in the help.
        section: Its group, or None.
        key: The key inside the section's mapping in the file.
        keys: All spellings of the key that are read.
        variable: The child's variable, or None.
    """

    option: Option
    path: tuple[str, ...]
    dest: str
    flags: tuple[str, ...]
    group: str
    section: Section | None
    key: str
    keys: tuple[str, ...]
    variable: str | None
    type: str

    def get(self, settings: Any) -> Any:
        """Returns the option's value in `settings`."""
        return functools.reduce(getattr, self.path, settings)

    def render(self, value: Any) -> str:
        """Formats a value for the child's variable."""
        if isinstance(value, bool):
            true, false = self.section.truth if self.section is not None else ("true", "false")
            return true if value else false
        return format_value(value)

    def convert(self, value: Any, where: str) -> Any:
        """Converts text from the command line, or a value from a file, to the option's type.

        Args:
            value: The text or value.
            where: Flag, or file and key, for the message.

        Raises:
            SettingsError: if the value does not convert, or is out of range.
        """
        if self.option.choices:
            return self._choice(value, where)
        converted = _CONVERTERS[self.type](value)
        if converted is None:
            raise SettingsError(f"{where}: expected {_EXPECTED[self.type]}, found {short_repr(value)}.")
        if self.option.minimum is not None and not converted >= self.option.minimum:  # nan is not
            raise SettingsError(f"{where}: expected at least {self.option.minimum:g}, found {short_repr(value)}.")
        return converted

    def _choice(self, value: Any, where: str) -> Any:
        # YAML 1.1 reads a bare `no` or NO as false, and that word is a choice of several options.
        text = "no" if value is False and "no" in self.option.choices else value
        text = text if isinstance(text, str) else short_repr(text)
        for choice in self.option.choices:
            if str(choice).lower() == text.lower():
                return choice
        numbers = self.option.numbered
        if text.isdecimal() and 0 < int(text) <= len(numbers):
            return numbers[int(text) - 1]
        raise SettingsError(
            f"{where}: expected one of {', '.join(map(str, self.option.choices))}, found {short_repr(value)}."
        )


def format_value(value: Any) -> str:
    """Formats a value as it is written on the command line or in a file."""
    if isinstance(value, tuple):
        return ",".join(map(format_value, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def short_repr(value: Any) -> str:
    """Returns the repr of a value for a message, in at most 60 characters."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write out the largest
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        number = int(value)
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _text(value: Any) -> str | None:
    if isinstance(value, list):  # class names and device numbers may be written as a list in a file
        words = [_text(word) for word in value if not isinstance(word, list)]
        return None if None in words or len(words) < len(value) else ",".join(map(str, words))
    if isinstance(value, bool):
        return "true" if value else "false"
    return _word(value) if isinstance(value, (int, float, str)) else None


def _word(value: float | str) -> str | None:
    """Returns a value as text that fits on a command line and in a variable."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return None
    try:
        return None if b"\0" in os.fsencode(str(value)) else str(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, str)):
        try:
            return bool(env.str_to_bool(short_repr(value) if isinstance(value, int) else value))
        except ValueError:
            return None
    return None


def _texts(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, (list, tuple, str)):
        return None
    words = [_text(word) for word in ([value] if isinstance(value, str) else value)]
    return None if None in words else tuple(map(str, words))


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None


def _booleans(value: Any) -> tuple[bool, bool, bool] | None:
    """Parses three truth values: ``(True, False, True)``, ``true,false,true``, a list; a single word applies to all."""
    if isinstance(value, str):
        value = [word.strip() for word in value.strip("()[] ").split(",")]
    words = [_boolean(word) for word in (value if isinstance(value, (list, tuple)) else [value])]
    if len(words) == 1:
        words = words * 3
    if len(words) != 3 or None in words:
        return None
    first, second, third = map(bool, words)
    return first, second, third


_CONVERTERS: dict[str, Any] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "bool": _boolean,
    "tuple[str, ...]": _texts,
    "tuple[bool, bool, bool]": _booleans,
    "dict[str, Any]": _mapping,
}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "bool": "true or false",
    "tuple[str, ...]": "a list of words",
    "tuple[bool, bool, bool]": "three times true or false, as in true,false,true",
    "dict[str, Any]": "keys and values of its own",
}


_entries: dict[type[Settings], tuple[OptionSpec, ...]] = {}


def option_specs(settings: type[Settings]) -> tuple[OptionSpec, ...]:
    """Returns all options of a settings class and its sections, in order of declaration."""
    if settings not in _entries:
        _entries[settings] = tuple(_find(settings))
    return _entries[settings]


def _find(settings: type[Settings]) -> list[OptionSpec]:
    found: list[OptionSpec] = []
    for name, declared in settings._declared.items():
        if isinstance(declared, Option):
            found.append(_spec(settings, declared, (name,), None))
        elif isinstance(declared, _Group):
            found += [
                _spec(declared.kind, inner, (name, inner_name), declared.kind.section)
                for inner_name, inner in declared.kind._declared.items()
            ]
    return found


def _spec(settings: type[Settings], declared: Option, path: tuple[str, ...], section: Section | None) -> OptionSpec:
    name = path[-1]
    dest = (section.prefix if section is not None else "") + name
    flags = declared.flags if any(flag.startswith("--") for flag in declared.flags[:1]) else ()
    key = declared.key or dest
    variable = declared.env
    if variable is None and section is not None and section.variables is not None:
        variable = section.variables + name.upper()
    return OptionSpec(
        option=declared,
        path=path,
        dest=dest,
        flags=flags or (f"--{dest}", *declared.flags),
        group=declared.group or (section.title if section is not None else "General"),
        section=section,
        key=key,
        keys=tuple(dict.fromkeys((key, dest, name, *declared.keys))),
        variable=variable or None,
        type=settings._types[name].removesuffix(" | None"),
    )


def build(settings: type[_S], values: Mapping[str, Any], **rest: Any) -> _S:
    """Builds a settings object from values by `OptionSpec.dest`; options without a value keep their defaults.

    Args:
        settings: The class.
        values: Converted values by ``dest``.
        **rest: Fields of the class that are no options.
    """
    sections: dict[str, dict[str, Any]] = {}
    for entry in option_specs(settings):
        if entry.dest in values:
            target = rest if len(entry.path) == 1 else sections.setdefault(entry.path[0], {})
            target[entry.path[-1]] = values[entry.dest]
    for name, inner in sections.items():
        rest[name] = settings._declared[name].kind(**inner)
    return settings(**rest)
