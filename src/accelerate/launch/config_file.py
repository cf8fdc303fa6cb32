"""Finds and parses the configuration file, and maps its keys to options.

Every error names the file and the key. Keys of earlier releases that the documentation still shows are accepted.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from ..settings import env
from ..settings.clouds import SageMakerSettings, TpuCommandSettings
from ..settings.enums import DistributedType, SageMakerDistributedType
from ..settings.launcher import LaunchSettings
from ..settings.option import OptionSpec, SettingsError, option_specs, short_repr
from .config_io import load, printable

_T = TypeVar("_T")

# Keys without an option: where the job runs, and how it is distributed.
_ROUTING_KEYS = ("compute_environment", "distributed_type")
# Sections of earlier releases whose keys are options at the file's top level.
LEGACY_SECTIONS = {"ipex_config": ("ipex", "use_xpu")}
_MAX_LISTED = 20
"""Maximum number of problems that an error lists."""
# Values of distributed_type in earlier releases -> their replacements.
LEGACY_DISTRIBUTED_TYPES = {"TPU": "XLA", "MPS": "NO"}
_COMMAND_LINE_ONLY = frozenset({"config_file", "quiet", "module", "no_python", "dry_run"})


class ConfigFile(NamedTuple):
    """A parsed configuration file.

    Attributes:
        path: Its path.
        values: Converted values by `OptionSpec.dest`.
        keys: The key of each value in the file, by `OptionSpec.dest`: ``fsdp_config.fsdp_version``.
        compute_environment: ``LOCAL_MACHINE`` or ``AMAZON_SAGEMAKER``.
        distributed_type: The value of that key, one of `DistributedType` (or SageMaker's); "" if the file leaves it to
            the host and to flags.
        sections: Names of the sections that are not empty.
        deepspeed_fields: Keys of the DeepSpeed section.
    """

    path: str
    values: dict[str, Any]
    keys: dict[str, str]
    compute_environment: str
    distributed_type: str
    sections: frozenset[str]
    deepspeed_fields: tuple[str, ...]


def cache_home() -> str:
    """Returns the folder of Hugging Face's caches: HF_HOME, else XDG_CACHE_HOME/huggingface, else ~/.cache/huggingface."""
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return os.path.expanduser(home)


def default_path() -> str:
    """Returns the path of the default configuration file."""
    return os.path.join(cache_home(), "accelerate", "default_config.yaml")


def load_config(path: str | None) -> ConfigFile | None:
    """Loads the given file, or the default file; returns None if that does not exist.

    Raises:
        SettingsError: if the given file does not exist, or its content cannot be used.
    """
    if path is None:
        default = default_path()
        return parse_content(load(default), default) if os.path.isfile(default) else None
    if not os.path.exists(path):
        raise SettingsError(
            f"configuration file {path} does not exist. Leave --config_file out to use {default_path()}, or write one "
            "with `accelerate config default --config_file FILE`."
        )
    return parse_content(load(path), path)


def parse_content(content: Mapping[str, Any], path: str) -> ConfigFile:
    """Parses a file's content.

    Args:
        content: From `config_io.load`.
        path: The file's path, for errors.

    Raises:
        SettingsError: for unknown keys and invalid values, all of them in one message.
    """
    found = _ContentParser()
    top, inside = key_tables()
    for key, value in content.items():
        if key in inside:
            found.section(key, value, inside[key])
        elif key not in _ROUTING_KEYS:
            found.put(top, key, key, value, near=(*top, *inside, *_ROUTING_KEYS))
    environment = found.attempt(_compute_environment, content) or "LOCAL_MACHINE"
    kind = found.attempt(_distributed_type, content, environment, found.sections)
    if found.problems:
        raise SettingsError(f"configuration file {path}{_format_problems(found.problems)}")
    if found.values.get("num_processes") == -1:  # the default of earlier releases, "not given"
        del found.values["num_processes"]
    deepspeed = content.get("deepspeed_config") or {}
    return ConfigFile(
        path=path,
        values=found.values,
        keys=found.keys,
        compute_environment=environment,
        distributed_type=kind or "",
        sections=frozenset(found.sections),
        deepspeed_fields=tuple(key for key in deepspeed if key != "deepspeed_config_file"),
    )


class _ContentParser:
    """Collects values and problems key by key."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.raw: dict[str, Any] = {}
        self.sections: set[str] = set()
        self.problems: list[str] = []

    def section(self, name: str, content: Any, table: Mapping[str, OptionSpec]) -> None:
        if content is None:
            return
        if not isinstance(content, Mapping):
            self.problems.append(f"{name}: expected keys and values of its own, found {short_repr(content)}.")
            return
        if content:
            self.sections.add(name)
        for key, value in content.items():
            self.put(table, key, f"{name}.{printable(key)}", value, near=table)

    def put(self, table: Mapping[str, OptionSpec], key: Any, where: str, value: Any, near: Iterable[str]) -> None:
        entry = table.get(key) if isinstance(key, str) else None
        if entry is None:
            self.problems.append(_unknown_key_message(key, printable(where), near))
        elif value is not None:
            other = self.keys.get(entry.dest)
            if other is not None and value != self.raw[entry.dest]:
                self.problems.append(f"{other} and {where} are the same option with different values: keep one.")
                return
            self.raw[entry.dest] = value
            not_given = entry.dest == "num_processes" and value == -1
            self.keys[entry.dest] = where
            self.values[entry.dest] = -1 if not_given else self.attempt(entry.convert, value, where)

    def attempt(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        """Calls a function; collects its error among the problems, and returns None."""
        try:
            return function(*arguments)
        except SettingsError as error:
            self.problems.append(str(error))
            return None


def key_tables() -> tuple[dict[str, OptionSpec], dict[str, dict[str, OptionSpec]]]:
    """Returns the options by key: those at the top level, and those of each section."""
    top: dict[str, OptionSpec] = {}
    inside: dict[str, dict[str, OptionSpec]] = {}
    for settings in (SageMakerSettings, TpuCommandSettings, LaunchSettings):
        for entry in option_specs(settings):
            if entry.dest in _COMMAND_LINE_ONLY or entry.option.secret:
                continue
            if entry.section is None or entry.section.key is None:
                top.update(dict.fromkeys(entry.keys, entry))
            else:
                inside.setdefault(entry.section.key, {}).update(dict.fromkeys(entry.keys, entry))
                if entry.dest == "dynamo_backend":  # at the top level in earlier releases
                    top[entry.dest] = entry
    for name, keys in LEGACY_SECTIONS.items():
        inside[name] = {key: top[key] for key in keys}
    return top, inside


def _unknown_key_message(key: Any, where: str, near: Iterable[str]) -> str:
    if any(entry.option.secret and key in entry.keys for entry in option_specs(LaunchSettings)):
        return (
            f"{where}: secrets do not belong in this file. Name a profile of the AWS command line (`profile: NAME`), "
            f"give --{key}, or set {str(key).upper()}."
        )
    home = _expected_location(key)
    if home is not None:
        return f"unknown key {where}. It belongs {home}."
    import difflib

    found = difflib.get_close_matches(printable(key), near, n=1)
    return f"unknown key {where}." + (f" Did you mean {found[0]}?" if found else "")


def _expected_location(key: Any) -> str | None:
    """Returns where a misplaced key belongs."""
    top, inside = key_tables()
    if key in top or key in inside:
        return "at the top of the file"
    return next((f"under {name}" for name, table in inside.items() if key in table and key == table[key].dest), None)


def _format_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return f": {problems[0]}"
    rest = len(problems) - _MAX_LISTED
    lines = [*problems[:_MAX_LISTED], *([f"… and {rest} more."] if rest > 0 else [])]
    return f" has {len(problems)} problems:" + "".join(f"\n  {line}" for line in lines)


def _compute_environment(content: Mapping[str, Any]) -> str:
    value = content.get("compute_environment") or "LOCAL_MACHINE"
    if value in ("LOCAL_MACHINE", "AMAZON_SAGEMAKER"):
        return str(value)
    raise SettingsError(f"compute_environment: expected LOCAL_MACHINE or AMAZON_SAGEMAKER, found {short_repr(value)}.")


_ENGINES = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP", "megatron_lm_config": "MEGATRON_LM"}


def _distributed_type(content: Mapping[str, Any], environment: str, sections: Iterable[str]) -> str:
    value = content.get("distributed_type")
    meant = [_ENGINES[section] for section in sections if section in _ENGINES]
    if "distributed_type" not in content and environment == "LOCAL_MACHINE" and not meant:
        return ""
    kinds: list[str] = [kind.value for kind in DistributedType]
    if environment == "AMAZON_SAGEMAKER":
        kinds = [kind.value for kind in SageMakerDistributedType]
    if value is False:  # YAML 1.1 reads a bare NO as false
        value = "NO"
    if isinstance(value, str):
        value = LEGACY_DISTRIBUTED_TYPES.get(value, value)
    if value in kinds:
        return str(value)
    raise SettingsError(
        f"distributed_type: expected one of {', '.join(kinds)}, "
        + (f"found {short_repr(value)}." if "distributed_type" in content else "but the key is missing.")
        + (f" Its sections are about {' and '.join(meant)}." if meant and "distributed_type" not in content else "")
    )
