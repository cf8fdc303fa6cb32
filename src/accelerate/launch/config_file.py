"""The configuration file: where it is, how it is read, which option each of its keys means.

Every message names the file and the key. Keys of earlier releases that the documentation still shows are understood.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..settings import env
from ..settings.enums import DistributedType, SageMakerDistributedType
from ..settings.launcher import LaunchSettings
from ..settings.option import Entry, SettingsError, entries

# Keys that no launch option stands for: they say where the job runs, or other commands read them.
_OTHER_KEYS = frozenset(
    {
        "compute_environment",
        "distributed_type",
        "commands",
        "command_file",
        "tpu_name",
        "tpu_zone",
        # SageMaker
        "additional_args",
        "base_job_name",
        "ec2_instance_type",
        "iam_role_name",
        "image_uri",
        "profile",
        "py_version",
        "pytorch_version",
        "region",
        "sagemaker_inputs_file",
        "sagemaker_metrics_file",
        "transformers_version",
    }
)
# Sections of earlier releases whose keys are options today.
_OLD_SECTIONS = frozenset({"ipex_config"})
_FROM_THE_COMMAND_LINE_ONLY = frozenset({"config_file", "quiet", "module", "no_python"})


class ConfigFile(NamedTuple):
    """A configuration file, read.

    Attributes:
        path: Where it is.
        values: Converted values by `Entry.dest`.
        compute_environment: ``LOCAL_MACHINE`` or ``AMAZON_SAGEMAKER``.
        distributed_type: The file's key of that name, a member of `DistributedType` (or SageMaker's) by value.
        sections: Names of the sections that hold something.
        deepspeed_fields: Keys of the DeepSpeed section.
    """

    path: str
    values: dict[str, Any]
    compute_environment: str
    distributed_type: str
    sections: frozenset[str]
    deepspeed_fields: tuple[str, ...]


def cache_home() -> str:
    """The folder of Hugging Face's caches: HF_HOME, else XDG_CACHE_HOME/huggingface, else ~/.cache/huggingface."""
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return os.path.expanduser(home)


def default_path() -> str:
    """Where the configuration file is when nobody names another."""
    return os.path.join(cache_home(), "accelerate", "default_config.yaml")


def find(path: str | None) -> ConfigFile | None:
    """Reads the file named, else the default one, else gives None.

    Raises:
        SettingsError: when the file named does not exist, or its content cannot be used.
    """
    if path is None:
        default = default_path()
        return understand(load(default), default) if os.path.isfile(default) else None
    if not os.path.isfile(path):
        raise SettingsError(
            f"configuration file {path} does not exist. Leave --config_file out to use {default_path()}, or write one "
            "with `accelerate config default --config_file FILE`."
        )
    return understand(load(path), path)


def load(path: str) -> dict[str, Any]:
    """The file's content, yaml or json, as a mapping.

    Raises:
        SettingsError: when it is neither, or no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"configuration file {path} cannot be read: {error}") from None
    try:
        content = _json(text) if path.endswith(".json") else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"configuration file {path}: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"configuration file {path}: expected keys and values such as `num_processes: 2`, found {_short(content)}."
        )
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"configuration file {path}: expected a word as key, found {_short(key)}.")
    return content


def _json(text: str) -> Any:
    import json

    return json.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid yaml: {error}") from None


def understand(content: Mapping[str, Any], path: str) -> ConfigFile:
    """What a file's content says.

    Args:
        content: As `load` gives it.
        path: For the messages.

    Raises:
        SettingsError: for an unknown key or a value of the wrong kind.
    """
    top, inside = _tables()
    values: dict[str, Any] = {}
    sections: set[str] = set()
    for key, value in content.items():
        if value is None or key in _OTHER_KEYS:
            continue
        if key in inside or key in _OLD_SECTIONS:
            if not isinstance(value, Mapping):
                raise SettingsError(
                    f"configuration file {path}: {key}: expected keys and values of its own, found {_short(value)}."
                )
            if value:
                sections.add(key)
            table = inside.get(key, top)
            for inner, inner_value in value.items():
                entry = _known(table, inner, f"{key}.{inner}", path)
                _put(values, entry, inner_value, f"configuration file {path}: {key}.{inner}")
        else:
            entry = _known(top, key, key, path, (*inside, *_OTHER_KEYS))
            _put(values, entry, value, f"configuration file {path}: {key}")
    if values.get("num_processes") == -1:  # how earlier releases wrote "not said"
        del values["num_processes"]
    environment = content.get("compute_environment") or "LOCAL_MACHINE"
    deepspeed = content.get("deepspeed_config") or {}
    return ConfigFile(
        path=path,
        values=values,
        compute_environment=_compute_environment(environment, path),
        distributed_type=_distributed_type(content, environment, path),
        sections=frozenset(sections),
        deepspeed_fields=tuple(key for key in deepspeed if key != "deepspeed_config_file"),
    )


def _tables() -> tuple[dict[str, Entry], dict[str, dict[str, Entry]]]:
    """Options by the keys of the file's top level, and of each section."""
    top: dict[str, Entry] = {}
    inside: dict[str, dict[str, Entry]] = {}
    for entry in entries(LaunchSettings):
        if entry.dest in _FROM_THE_COMMAND_LINE_ONLY:
            continue
        if entry.section is None or entry.section.key is None:
            top.update(dict.fromkeys(entry.keys, entry))
        else:
            inside.setdefault(entry.section.key, {}).update(dict.fromkeys(entry.keys, entry))
            if entry.dest == "dynamo_backend":  # earlier releases wrote it at the top
                top[entry.dest] = entry
    return top, inside


def _known(table: Mapping[str, Entry], key: Any, shown: str, path: str, others: Iterable[str] = ()) -> Entry:
    if isinstance(key, str) and key in table:
        return table[key]
    import difflib

    near = difflib.get_close_matches(str(key), [*table, *others], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingsError(f"configuration file {path}: unknown key {shown}.{hint}")


def _put(values: dict[str, Any], entry: Entry, value: Any, where: str) -> None:
    if value is None:
        return
    if entry.dest == "num_processes" and value == -1:
        values[entry.dest] = -1
    else:
        values[entry.dest] = entry.convert(value, where)


def _compute_environment(value: Any, path: str) -> str:
    if value in ("LOCAL_MACHINE", "AMAZON_SAGEMAKER"):
        return str(value)
    raise SettingsError(
        f"configuration file {path}: compute_environment: expected LOCAL_MACHINE or AMAZON_SAGEMAKER, "
        f"found {_short(value)}."
    )


def _distributed_type(content: Mapping[str, Any], environment: str, path: str) -> str:
    value = content.get("distributed_type")
    kinds: list[str] = [kind.value for kind in DistributedType]
    if environment == "AMAZON_SAGEMAKER":
        kinds = [kind.value for kind in SageMakerDistributedType]
    if value is False:  # YAML 1.1 reads a bare NO as false
        value = "NO"
    if value == "TPU":
        value = "XLA"
    if value in kinds:
        return str(value)
    raise SettingsError(
        f"configuration file {path}: distributed_type: expected one of {', '.join(kinds)}, "
        + (f"found {_short(value)}." if "distributed_type" in content else "but the key is missing.")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
