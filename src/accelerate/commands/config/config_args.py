"""Configuration files as objects, for programs that read or write them.

Parsing and validation are those of `launch.config_file`, which launching uses.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ...launch import config_file as files
from ...launch.config_io import dump, load, write
from ...settings.clouds import SageMakerSettings
from ...settings.enums import ComputeEnvironment, DistributedType, SageMakerDistributedType
from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError, option_specs

hf_cache_home = files.cache_home()
cache_dir = os.path.join(hf_cache_home, "accelerate")
default_yaml_config_file = files.default_path()
default_json_config_file = default_yaml_config_file  # one default, whatever its format
default_config_file = default_yaml_config_file

_C = TypeVar("_C", bound="BaseConfig")


def load_config_from_file(config_file: str | os.PathLike[str] | None) -> ClusterConfig | SageMakerConfig:
    """Reads a configuration file.

    Args:
        config_file: The file, YAML or JSON; None reads the default one.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if its content is invalid; the message names the key.
    """
    path = os.fspath(config_file) if config_file is not None else default_config_file
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"configuration file {path} does not exist. `accelerate config default` writes one; --config_file names "
            "another."
        )
    content = load(path)
    kind = SageMakerConfig if content.get("compute_environment") == "AMAZON_SAGEMAKER" else ClusterConfig
    return kind._from_content(content, path)


@dataclass
class BaseConfig:
    """Fields that all configurations share: compute environment, distributed type, precision."""

    compute_environment: ComputeEnvironment
    distributed_type: DistributedType | SageMakerDistributedType
    mixed_precision: str
    use_cpu: bool
    debug: bool

    def __post_init__(self) -> None:
        self.compute_environment = ComputeEnvironment(self.compute_environment)
        kinds = DistributedType if self.compute_environment == ComputeEnvironment.LOCAL_MACHINE else None
        self.distributed_type = (kinds or SageMakerDistributedType)(self.distributed_type)

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys and values of the file; keys without a value are omitted."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}
        return {name: value for name, value in plain.items() if value is not None}

    @staticmethod
    def process_config(config_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a file's content completed by defaults of the shared fields."""
        defaults = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "NO",
            "mixed_precision": "no",
            "use_cpu": False,
            "debug": False,
        }
        return {**defaults, **{key: value for key, value in config_dict.items() if value is not None}}

    @classmethod
    def from_yaml_file(cls: type[_C], yaml_file: str | os.PathLike[str] | None = None) -> _C:
        """Reads a YAML file; None reads the default one.

        Raises:
            ValueError: if its content is invalid.
        """
        path = os.fspath(yaml_file) if yaml_file is not None else default_yaml_config_file
        return cls._from_content(load(path), path)

    @classmethod
    def from_json_file(cls: type[_C], json_file: str | os.PathLike[str] | None = None) -> _C:
        """Reads a JSON file; None reads the default one.

        Raises:
            ValueError: if its content is invalid.
        """
        path = os.fspath(json_file) if json_file is not None else default_json_config_file
        return cls._from_content(load(path), path)

    @classmethod
    def _from_content(cls: type[_C], content: Mapping[str, Any], path: str) -> _C:
        understood = files.parse_content(content, path)
        values = cls.process_config(content)
        values["distributed_type"] = understood.distributed_type or "NO"
        for entry in (*option_specs(LaunchSettings), *option_specs(SageMakerSettings)):
            top = entry.section is None or entry.section.key is None
            if top and entry.key in content and entry.dest in understood.values:
                value = understood.values[entry.dest]
                values[entry.key] = list(value) if isinstance(value, tuple) else value
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except SettingsError as error:
            raise SettingsError(f"configuration file {path}: {error}") from None

    def to_yaml_file(self, yaml_file: str | os.PathLike[str]) -> None:
        """Writes a YAML file atomically, with keys in alphabetical order."""
        write(yaml_file, dump(self.to_dict()))

    def to_json_file(self, json_file: str | os.PathLike[str]) -> None:
        """Writes a JSON file atomically, with keys in alphabetical order."""
        write(json_file, dump(self.to_dict(), as_json=True))


@dataclass
class ClusterConfig(BaseConfig):
    """A configuration of the user's own machines. Options of a section are in a nested mapping."""

    num_processes: int = -1
    machine_rank: int = 0
    num_machines: int = 1
    gpu_ids: str | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    rdzv_backend: str | None = "static"
    same_network: bool | None = False
    main_training_function: str = "main"
    enable_cpu_affinity: bool = False
    fp8_config: dict[str, Any] | None = None
    deepspeed_config: dict[str, Any] | None = None
    fsdp_config: dict[str, Any] | None = None
    parallelism_config: dict[str, Any] | None = None
    megatron_lm_config: dict[str, Any] | None = None
    mpirun_config: dict[str, Any] | None = None
    downcast_bf16: bool = False
    tpu_name: str | None = None
    tpu_zone: str | None = None
    tpu_use_cluster: bool = False
    tpu_use_sudo: bool = False
    command_file: str | None = None
    commands: list[str] | None = None
    tpu_vm: list[str] | None = None
    tpu_env: list[str] | None = None
    dynamo_config: dict[str, Any] | None = None


@dataclass
class SageMakerConfig(BaseConfig):
    """A configuration for Amazon SageMaker.

    Raises:
        ValueError: if the instance type or the role is missing.
    """

    ec2_instance_type: str = ""
    iam_role_name: str = ""
    image_uri: str | None = None
    profile: str | None = None
    region: str = SageMakerSettings.region
    num_machines: int = 1
    gpu_ids: str = "all"
    base_job_name: str = SageMakerSettings.base_job_name
    pytorch_version: str = SageMakerSettings.pytorch_version
    transformers_version: str = SageMakerSettings.transformers_version
    py_version: str = SageMakerSettings.py_version
    sagemaker_inputs_file: str | None = None
    sagemaker_metrics_file: str | None = None
    additional_args: dict[str, Any] | None = None
    dynamo_config: dict[str, Any] | None = None
    enable_cpu_affinity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("ec2_instance_type", "iam_role_name") if not getattr(self, name)]
        if missing:
            raise SettingsError(f"a configuration for Amazon SageMaker needs {' and '.join(missing)}.")
