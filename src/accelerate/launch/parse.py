"""Parses the command line, and merges it with the configuration file and the defaults, in that order of precedence.

`split_args` parses argv, `merge_settings` merges it with a file, `parse` does both. Launcher flags go before the script;
everything after it is passed to the script.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..settings.clouds import SageMakerSettings, TpuCommandSettings
from ..settings.launcher import LaunchSettings
from ..settings.option import OptionSpec, SettingsError, build, option_specs
from . import config_file
from .config_file import ConfigFile

# Flags that select a training paradigm: one of them on the command line overrides distributed_type of the file.
_PARADIGMS = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")


class ParsedArgs(NamedTuple):
    """A parsed command line.

    Attributes:
        flags: Converted values of the flags that were given, by `OptionSpec.dest`.
        script: The script, or "" if there is none.
        script_args: Its arguments, unchanged.
        help: Whether ``-h`` is among the flags.
    """

    flags: dict[str, Any]
    script: str
    script_args: tuple[str, ...]
    help: bool


def parse(argv: Sequence[str]) -> LaunchSettings:
    """Returns the settings of the arguments after ``accelerate launch`` and of their configuration file.

    Raises:
        SettingsError: if they cannot be used.
    """
    return resolve_args(split_args(argv))[0]


def split_args(argv: Sequence[str]) -> ParsedArgs:
    """Separates the launcher's flags from the script and its arguments.

    Raises:
        SettingsError: for an unknown flag, or a missing or invalid value.
    """
    table = _flag_table()
    flags: dict[str, Any] = {}
    wants_help = False
    words = list(argv)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            position -= 1
            break
        if word in ("-h", "--help"):
            wants_help = True
            continue
        name, has_value, value = word.partition("=")
        if not word.startswith("--") and word[:2] in table and len(word) > 2:  # -t3
            name, has_value, value = word[:2], "=", word[2:].removeprefix("=")
        entry, fixed = _lookup_flag(table, name)
        if fixed is not None:
            if has_value:
                raise SettingsError(f"{name} takes no value, found {value!r}.")
            flags[entry.dest] = fixed
            continue
        if not has_value:
            if position == len(words) or _normalize_flag(words[position]) in table:
                raise SettingsError(f"{name} needs a value: {entry.option.help}.")
            value = words[position]
            position += 1
        converted = entry.convert(value, name)
        flags[entry.dest] = flags.get(entry.dest, ()) + converted if entry.type == "tuple[str, ...]" else converted
    rest = words[position:]
    return ParsedArgs(flags, rest[0] if rest else "", tuple(rest[1:]), wants_help)


def from_namespace(args: Any) -> ParsedArgs:
    """Converts the result of the launcher's argparse parser; options with their default count as not given."""
    given = getattr(args, "_given", ())
    flags: dict[str, Any] = {}
    for entry in option_specs(LaunchSettings):
        value = getattr(args, entry.dest, entry.option.default)
        if entry.type == "tuple[str, ...]":  # argparse collects lists
            value = tuple(value or ())
        if value != entry.option.default or entry.dest in given:
            flags[entry.dest] = value
    return ParsedArgs(flags, args.training_script or "", tuple(args.training_script_args or ()), help=False)


def resolve_args(words: ParsedArgs) -> tuple[LaunchSettings, ConfigFile | None]:
    """Returns the settings of a command line and its configuration file, and that file.

    Raises:
        SettingsError: if they cannot be used.
    """
    file = config_file.load_config(words.flags.get("config_file"))
    return merge_settings(words.flags, file, words.script, words.script_args), file


def _flag_table() -> dict[str, tuple[OptionSpec, bool | None]]:
    """Returns flag (with underscores) -> its option, and the value of a flag without an argument."""
    table: dict[str, tuple[OptionSpec, bool | None]] = {}
    for entry in option_specs(LaunchSettings):
        table.update(dict.fromkeys(entry.flags, (entry, True if entry.option.switch else None)))
        if entry.option.off is not None:
            table[entry.option.off] = (entry, False)
    return table


def _normalize_flag(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


def _lookup_flag(table: Mapping[str, tuple[OptionSpec, bool | None]], name: str) -> tuple[OptionSpec, bool | None]:
    found = table.get(_normalize_flag(name))
    if found is not None:
        return found
    import difflib

    near = difflib.get_close_matches(_normalize_flag(name), table, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingsError(
        f"unknown flag {name}.{hint} The launcher's flags come before the script, the script's own after it."
    )


def merge_settings(
    flags: Mapping[str, Any], file: ConfigFile | None, script: str, script_args: Iterable[str]
) -> LaunchSettings:
    """Merges flags and a file, by `OptionSpec.dest`: a flag overrides the file, and the file the default.

    Raises:
        SettingsError: if flags contradict each other.
    """
    values = {dest: chosen.value for dest, chosen in merge_values(flags, file).items()}
    rest: dict[str, Any] = {}
    if file is not None:
        rest = {"compute_environment": file.compute_environment, "deepspeed_fields": file.deepspeed_fields}
        rest |= _cloud_settings(file)
        if file.distributed_type.startswith("MULTI_"):
            rest["device"] = _device_type(file.distributed_type)
    if values.get("dynamo_backend") == "torhchxla_trace_once":
        values["dynamo_backend"] = "torchxla_trace_once"
    return build(LaunchSettings, values, script=script, script_args=tuple(script_args), **rest)


class SourcedValue(NamedTuple):
    """A value and its source, ``flag`` or ``file``; the detail is the key in the file."""

    value: Any
    source: str
    detail: str = ""


def merge_values(flags: Mapping[str, Any], file: ConfigFile | None) -> dict[str, SourcedValue]:
    """Returns the values of flags and a file, by `OptionSpec.dest`; a flag overrides the file.

    Raises:
        SettingsError: if flags contradict each other.
    """
    if flags.get("cpu") and flags.get("multi_gpu"):
        raise SettingsError("--cpu and --multi_gpu contradict each other: give one of them.")
    chosen = _file_values(flags, file) if file is not None else {}
    return chosen | {dest: SourcedValue(value, "flag") for dest, value in flags.items()}


def _file_values(flags: Mapping[str, Any], file: ConfigFile) -> dict[str, SourcedValue]:
    """Returns the file's values, with those that its distributed_type implies, unless a flag overrides it."""
    chosen = {dest: SourcedValue(value, "file", file.keys[dest]) for dest, value in file.values.items()}

    def imply(dest: str, value: Any, key: str) -> None:
        chosen[dest] = SourcedValue(value, "file", key)

    if "parallelism_config" in file.sections:
        imply("use_parallelism_config", True, "parallelism_config")
    if any(flags.get(name) for name in _PARADIGMS):
        if flags.get("multi_gpu"):
            chosen.pop("cpu", None)
        return chosen
    kind = file.distributed_type
    on_cpu = flags.get("cpu") or file.values.get("cpu")
    key = f"distributed_type {kind}"
    if kind == "NO" and file.compute_environment == "LOCAL_MACHINE":
        imply("num_processes", 1, key)  # takes precedence over other keys of the file
    elif kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        imply(f"use_{kind.lower()}", True, key)
    elif kind == "MULTI_CPU":
        imply("cpu", True, key)
    elif kind == "XLA" and not on_cpu:
        imply("tpu", True, key)
    elif kind.startswith("MULTI_") and not on_cpu:
        imply("multi_gpu", True, key)
    return chosen


def _cloud_settings(file: ConfigFile) -> dict[str, Any]:
    """Returns the file's settings for Amazon SageMaker, or for a TPU pod."""
    if file.compute_environment == "AMAZON_SAGEMAKER":
        return {"sagemaker": build(SageMakerSettings, file.values, distributed=file.distributed_type)}
    return {"pod": build(TpuCommandSettings, file.values)}


def _device_type(distributed_type: str) -> str:
    """Returns the device type, as in `runtime.devices`, of a MULTI_… value of distributed_type."""
    name = distributed_type.removeprefix("MULTI_").lower()
    return "cuda" if name == "gpu" else name
