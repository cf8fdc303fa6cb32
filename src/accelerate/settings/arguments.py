"""What `Accelerator`'s arguments, its plugins and the launcher's variables come to, or why they contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import env
from .enums import DynamoBackend, RNGType
from .handlers import DataLoaderConfiguration, GradientAccumulationPlugin, KwargsHandler, TorchDynamoPlugin

UNSET: Any = object()
"""The default of an argument for which None would mean something."""


def sort_handlers(handlers: Sequence[KwargsHandler], kinds: Sequence[type[KwargsHandler]]) -> dict[type, Any]:
    """The handlers by kind, None for those that were not given.

    Raises:
        TypeError: for something that is none of the kinds.
        ValueError: for two of one kind.
    """
    sorted_: dict[type, Any] = dict.fromkeys(kinds)
    for handler in handlers:
        kind = next((kind for kind in kinds if isinstance(handler, kind)), None)
        if kind is None:
            known = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"kwargs_handlers takes instances of {known}; found {handler!r}.")
        if sorted_[kind] is not None:
            raise ValueError(f"kwargs_handlers has two {kind.__name__}: pass one.")
        sorted_[kind] = handler
    return sorted_


def refuse_later_features(**plugins: Any) -> None:
    """Asking for what this version does not have must not pass silently.

    Raises:
        ValueError: naming the plugins and variables that ask for it.
    """
    asked = [name for name, plugin in plugins.items() if plugin is not None]
    variables = {
        "fsdp_plugin": "ACCELERATE_USE_FSDP",
        "deepspeed_plugin": "ACCELERATE_USE_DEEPSPEED",
        "megatron_lm_plugin": "ACCELERATE_USE_MEGATRON_LM",
        "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
    }
    asked += [f"{name} ({variable})" for name, variable in variables.items() if env.flag(variable)]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: sharded and model-parallel training are not part of this version, which trains on one "
            "process and on data-parallel ranks (DDP)."
        )


def accumulation(plugin: GradientAccumulationPlugin | None, steps: int) -> GradientAccumulationPlugin:
    """The plugin; without one, of `steps`, where 1 means "not said" and takes the launcher's variable.

    Raises:
        ValueError: when both are given.
    """
    if plugin is not None:
        if steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={steps} and gradient_accumulation_plugin are both given: set "
                "`num_steps` in the plugin."
            )
        return plugin
    if steps == 1:
        steps = env.integer("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    return GradientAccumulationPlugin(num_steps=steps)


def dynamo(backend: DynamoBackend | str | None, plugin: TorchDynamoPlugin | None) -> TorchDynamoPlugin:
    """The plugin; without one, of `backend` and the launcher's variables.

    Raises:
        ValueError: when both are given.
    """
    if backend is not None and plugin is not None:
        raise ValueError("dynamo_backend and dynamo_plugin are both given: set `backend` in the plugin.")
    if plugin is not None:
        return plugin
    return TorchDynamoPlugin(backend=backend) if backend is not None else TorchDynamoPlugin()  # type: ignore[arg-type]


def loading(config: DataLoaderConfiguration | None, split_batches: bool) -> DataLoaderConfiguration:
    """The configuration, with the older argument `split_batches` taken over if it was given."""
    config = config if config is not None else DataLoaderConfiguration()
    if split_batches is not UNSET:
        config.split_batches = split_batches
    return config


def rng_types(wanted: list[str | RNGType] | None) -> list[str]:
    """The generators' names; None: the samplers' own.

    Raises:
        ValueError: for names that do not exist.
    """
    if wanted is None:
        return [RNGType.GENERATOR.value]
    unknown = [kind for kind in wanted if kind not in RNGType]
    if unknown:
        raise ValueError(f"rng_types={wanted!r}: {unknown} are unknown; choose from {RNGType.list()}.")
    return [RNGType(kind).value for kind in wanted]
