"""``accelerate config``: the configuration file, and the classes that stand for it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import config_command, get_config_parser, main

if TYPE_CHECKING:
    from .config_args import (
        BaseConfig,
        ClusterConfig,
        SageMakerConfig,
        cache_dir,
        default_config_file,
        default_json_config_file,
        default_yaml_config_file,
        load_config_from_file,
    )

__all__ = [
    "BaseConfig",
    "ClusterConfig",
    "SageMakerConfig",
    "cache_dir",
    "config_command",
    "default_config_file",
    "default_json_config_file",
    "default_yaml_config_file",
    "get_config_parser",
    "load_config_from_file",
    "main",
]


def __getattr__(name: str) -> Any:
    # The command's help should not wait for the classes.
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.config_args"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
