"""``accelerate config update``: migrates a file of an earlier release to current keys, and adds missing defaults."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...launch import config_file
from ...launch.config_io import load, read, write
from ...settings.enums import FSDP_SHARDING_STRATEGY
from ...settings.option import OptionSpec, SettingsError, format_value
from ..parsers import add

description = "Migrates a configuration file of an earlier release to current keys and values, and lists the changes."

# Sections whose current keys omit the prefix.
_UNPREFIXED = ("fp8_config",)
_WITHOUT_EFFECT = {"ipex_config": "Intel's extension is discontinued, and PyTorch includes its optimizations"}
# Values of earlier releases, by the option.
_OLD_VALUES: dict[str, dict[str, str]] = {
    "fsdp_sharding_strategy": {str(number): name for number, name in enumerate(FSDP_SHARDING_STRATEGY, 1)},
    "dynamo_backend": {"torhchxla_trace_once": "torchxla_trace_once"},
}


class Update(NamedTuple):
    """Migrated content.

    Attributes:
        content: The new content.
        changes: A line for each change.
    """

    content: dict[str, Any]
    changes: tuple[str, ...]


def migrate(content: Mapping[str, Any], path: str) -> Update:
    """Migrates a file's content to current keys and values, and adds missing defaults.

    Args:
        content: The content, as returned by `launch.config_io.load`.
        path: The file's path, for messages.

    Raises:
        SettingsError: if the content is invalid: unknown keys, values of the wrong type.
    """
    understood = config_file.parse_content(content, path)
    top, inside = config_file.key_tables()
    made: dict[str, Any] = {}
    changes: list[str] = []
    for key, value in content.items():
        if key in _WITHOUT_EFFECT:
            changes.append(f"{key}: removed, it has no effect any more: {_WITHOUT_EFFECT[key]}")
        elif key == "distributed_type" and value in config_file.LEGACY_DISTRIBUTED_TYPES:
            made[key] = config_file.LEGACY_DISTRIBUTED_TYPES[value]
            changes.append(f"{key}: {value} is {made[key]} today")
        elif key in inside and isinstance(value, Mapping):
            made[key] = made.get(key) or {}
            for name, inner in value.items():
                _place(made[key], inside[key][name], f"{key}.{name}", name, inner, changes)
        elif key == "num_processes" and value == -1:
            changes.append("num_processes: -1 removed, without the key it is as many as there are devices")
        elif key in top:
            section = _section(top[key])
            if section is not None:
                made[section] = made.get(section) or {}
            _place(made if section is None else made[section], top[key], key, key, value, changes)
        else:
            made.setdefault(key, value)
    for key, value in _defaults(understood.compute_environment).items():
        if key not in made:
            made[key] = value
            changes.append(f"{key}: added, {format_value(value)} is the default")
    if list(content) == sorted(content):
        made = {key: made[key] for key in sorted(made)}
    return Update(made, tuple(changes))


def _place(target: dict[str, Any], entry: OptionSpec, where: str, name: str, value: Any, changes: list[str]) -> None:
    """Stores an option of the file under its current key, with the current spelling of its value."""
    section = _section(entry)
    key = name if section in _UNPREFIXED else entry.key
    now = f"{section}.{key}" if section is not None else key
    if where != now:
        changes.append(f"{where}: renamed, it is {now} today")
    if value is None and key in target:  # another spelling of the key has a value
        return
    replaced = _OLD_VALUES[entry.dest].get(str(value).lower(), value) if entry.dest in _OLD_VALUES else value
    if replaced != value:
        changes.append(f"{now}: {value} is {replaced} today")
    target[key] = replaced


def _section(entry: OptionSpec) -> str | None:
    return entry.section.key if entry.section is not None else None


def _defaults(compute_environment: str) -> dict[str, Any]:
    """Returns the defaults that `accelerate config` writes."""
    from dataclasses import MISSING, fields

    from .config_args import BaseConfig, ClusterConfig, SageMakerConfig

    kind = SageMakerConfig if compute_environment == "AMAZON_SAGEMAKER" else ClusterConfig
    found = {field.name: field.default for field in fields(kind) if field.default not in (MISSING, None, "", -1)}
    return BaseConfig.process_config(found)


def update_config(args: argparse.Namespace) -> Path:
    """Migrates the file, prints the changes, and returns the file's path.

    Raises:
        SettingsError: if the file does not exist or is invalid; it is left unchanged.
    """
    path = args.config_file if args.config_file is not None else config_file.default_path()
    if not os.path.isfile(path):
        raise SettingsError(f"configuration file {path} does not exist. `accelerate config` writes one.")
    content, changes = migrate(load(path), path)
    if not changes:
        print(f"{path} is up to date and was left as it is")
        return Path(path)
    from .rewrite import rewritten

    text, kept_comments = rewritten(read(path), content, as_json=path.endswith(".json"))
    write(path, text)
    print(f"updated {path}:")
    for change in changes:
        print(f"  {change}")
    if not kept_comments:
        print("comments in the file could not be kept")
    return Path(path)


def update_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``update`` to the subcommands of ``accelerate config``."""
    made: argparse.ArgumentParser = parser.add_parser(
        "update", parents=parents, description=description, help="bring a file of an earlier release up to date"
    )
    add(made, "--config_file", help="the file to bring up to date instead of the default one")
    made.set_defaults(func=update_config_command)
    return made


def update_config_command(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        SystemExit: with code 2 if the file cannot be read, is invalid, or cannot be written.
    """
    try:
        update_config(args)
    except (SettingsError, OSError) as error:
        print(f"accelerate config update: {error}", file=sys.stderr)
        raise SystemExit(2) from None
