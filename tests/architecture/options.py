"""Derives the package's options: parameters of documented functions, classes and methods that have a default.

A parameter without a default cannot be left out, so ignoring it is no option. `*args` and `**kwargs` count as options. An
option's name is that of its owner, without the module, and its own: `Accelerator.prepare` and `device_placement`.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from accelerate.settings.planned import Placeholder

OPTIONAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Owner(NamedTuple):
    """A documented callable with options.

    Attributes:
        name: Its qualified name, as in ``Accelerator.prepare``; a class stands for its constructor.
        module: The module that defines it.
        path: Its qualified name in that module.
        options: The names of its options.
    """

    name: str
    module: str
    path: str
    options: tuple[str, ...]


def owners(documented: Iterable[Any]) -> dict[str, Owner]:
    """The options of documented objects by owner: those of functions, of constructors and of public methods."""
    found: dict[str, Owner] = {}
    documented = list(documented)
    seen: set[Any] = set()
    for value in documented:
        module = getattr(value, "__module__", None) or ""
        if module.partition(".")[0] != "accelerate" or not hasattr(value, "__qualname__"):
            continue
        if inspect.isclass(value):
            if issubclass(value, Placeholder) or hasattr(value, "__members__"):
                continue
            add(found, value, value.__module__, value.__qualname__)
            for name, method in methods(value, documented):
                if inspect.unwrap(method) in seen:  # a base of two documented classes has it
                    continue
                seen.add(inspect.unwrap(method))
                add(found, method, value.__module__, f"{value.__qualname__}.{name}")
        elif inspect.isroutine(value):
            add(found, value, module, value.__qualname__)
    return found


def add(found: dict[str, Owner], value: Any, module: str, path: str) -> None:
    options = tuple(options_of(value))
    if not options:
        return
    known = found.setdefault(path, Owner(path, module, path, options))
    if known.module != module:
        raise ValueError(f"{path} is the name of two documented objects: in {known.module} and in {module}")


def options_of(value: Any) -> Iterator[str]:
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # built in
        return
    for parameter in parameters:
        optional = parameter.kind in OPTIONAL or parameter.default is not parameter.empty
        if optional and not parameter.name.startswith("_"):
            yield parameter.name


def methods(cls: type, documented: list[Any]) -> Iterator[tuple[str, Any]]:
    """Public methods that a class defines, or a base of it in the package that is not documented itself."""
    for name in dir(cls):
        if name.startswith("_"):
            continue
        home = next((base for base in cls.__mro__ if name in vars(base)), object)
        if home.__module__.partition(".")[0] != "accelerate" or (home is not cls and home in documented):
            continue
        method = vars(home)[name]
        if inspect.isfunction(method) or isinstance(method, (staticmethod, classmethod)):
            yield name, getattr(cls, name)


def flags(parser: argparse.ArgumentParser, command: str) -> Iterator[tuple[str, str]]:
    """A parser's options by command: their destinations."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield from flags(subparser, f"{command} {name}")
        elif action.option_strings and action.dest != "help":
            yield command, action.dest
