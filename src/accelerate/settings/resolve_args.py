"""Resolves `Accelerator`'s arguments, plugins and the launcher's variables to settings, and reports contradictions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from . import env
from .enums import DistributedType, DynamoBackend, RNGType
from .handlers import DataLoaderConfiguration, GradientAccumulationPlugin, KwargsHandler, TorchDynamoPlugin

if TYPE_CHECKING:
    from .parallel import TorchTensorParallelPlugin
    from .plugins.deepspeed import DeepSpeedPlugin
    from .plugins.fsdp import FullyShardedDataParallelPlugin
    from .plugins.megatron import MegatronLMPlugin

UNSET: Any = object()
"""Sentinel default of an argument for which None is a value."""


def sort_handlers(handlers: Sequence[KwargsHandler], kinds: Sequence[type[KwargsHandler]]) -> dict[type, Any]:
    """Returns the handlers by class, with None for classes without one.

    Raises:
        TypeError: if a handler is an instance of none of the classes.
        ValueError: if two handlers are of one class.
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


def one_of(**spellings: Any) -> Any:
    """Returns the value of an argument that has several names, or None if it was not given.

    Raises:
        ValueError: if it was given under more than one name.
    """
    given = {name: value for name, value in spellings.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: they are one argument, pass one.")
    return next(iter(given.values()), None)


class Plugins(NamedTuple):
    """Plugins that select how a run is distributed.

    Attributes:
        fsdp, megatron, tensor_parallel: The plugin, or None.
        deepspeed: DeepSpeed plugins by name, of which the first is active; None without DeepSpeed.
    """

    fsdp: FullyShardedDataParallelPlugin | None = None
    deepspeed: dict[str, DeepSpeedPlugin] | None = None
    megatron: MegatronLMPlugin | None = None
    tensor_parallel: TorchTensorParallelPlugin | None = None

    @property
    def distributed_type(self) -> DistributedType | None:
        """Returns the distributed type that the plugins select, or None."""
        kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        return next((kind for kind, plugin in zip(kinds, self[:3], strict=True) if plugin is not None), None)

    def set_mixed_precision(self, wanted: str) -> str:
        """Sets the plugins' mixed precision and returns the one in effect."""
        engines = list((self.deepspeed or {}).values())
        for plugin in (self.fsdp, self.megatron, *engines):
            if plugin is not None:
                plugin.set_mixed_precision(wanted)
        # DeepSpeed's own configuration may enable it where the argument does not.
        return engines[0].mixed_precision if engines and wanted == "no" else wanted


def plugins(
    fsdp: Any = None, deepspeed: Any = None, megatron: Any = None, tensor_parallel: Any = None, *, launched: bool = True
) -> Plugins:
    """Returns the given plugins, and with `launched` those that the launcher's variables select.

    Raises:
        TypeError: if an object is not an instance of its plugin's class.
        ValueError: if more than one distributed type is selected.
    """
    if deepspeed is not None and not isinstance(deepspeed, dict):
        deepspeed = {"default": deepspeed}
    for name, plugin in (deepspeed or {}).items():
        _check_type(f"deepspeed_plugin {name!r}", plugin, _DEEPSPEED)
    _check_type("fsdp_plugin", fsdp, _FSDP)
    _check_type("megatron_lm_plugin", megatron, _MEGATRON)
    _check_type("torch_tp_plugin", tensor_parallel, "parallel:TorchTensorParallelPlugin")
    if launched and fsdp is None and env.flag("ACCELERATE_USE_FSDP"):
        fsdp = _plugin_class(_FSDP)()
    if launched and deepspeed is None and env.flag("ACCELERATE_USE_DEEPSPEED"):
        deepspeed = {"default": _plugin_class(_DEEPSPEED)()}
    if launched and megatron is None and env.flag("ACCELERATE_USE_MEGATRON_LM"):
        megatron = _plugin_class(_MEGATRON)()
    asked = {"FSDP": fsdp, "DeepSpeed": deepspeed, "Megatron-LM": megatron}
    names = [name for name, plugin in asked.items() if plugin is not None]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} are asked for at once, by plugins or by the launcher: a run is distributed in one of "
            "these ways."
        )
    return Plugins(fsdp, deepspeed or None, megatron, tensor_parallel)


# Imported on first use: most runs have none of them.
_FSDP = "plugins.fsdp:FullyShardedDataParallelPlugin"
_DEEPSPEED = "plugins.deepspeed:DeepSpeedPlugin"
_MEGATRON = "plugins.megatron:MegatronLMPlugin"


def _plugin_class(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def _check_type(name: str, plugin: Any, path: str) -> None:
    if plugin is not None and not isinstance(plugin, _plugin_class(path)):
        raise TypeError(f"{name} must be an instance of {path.partition(':')[2]}, found {plugin!r}.")


def gradient_accumulation(plugin: GradientAccumulationPlugin | None, steps: int) -> GradientAccumulationPlugin:
    """Returns the plugin, or one built from `steps`; 1, the default, reads the launcher's variable.

    Raises:
        ValueError: if both are given.
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
    """Returns the plugin, or one built from `backend` and the launcher's variables.

    Raises:
        ValueError: if both are given.
    """
    if backend is not None and plugin is not None:
        raise ValueError("dynamo_backend and dynamo_plugin are both given: set `backend` in the plugin.")
    if plugin is not None:
        return plugin
    return TorchDynamoPlugin(backend=backend) if backend is not None else TorchDynamoPlugin()  # type: ignore[arg-type]


def data_loader_config(config: DataLoaderConfiguration | None, split_batches: bool) -> DataLoaderConfiguration:
    """Returns the configuration, with `split_batches` replaced by the older argument if that was given."""
    config = config if config is not None else DataLoaderConfiguration()
    if split_batches is not UNSET:
        config.split_batches = split_batches
    return config


def rng_types(wanted: list[str | RNGType] | None) -> list[str]:
    """Returns the names of the random number generators; None selects the samplers' own.

    Raises:
        ValueError: if a name is unknown.
    """
    if wanted is None:
        return [RNGType.GENERATOR.value]
    unknown = [kind for kind in wanted if kind not in RNGType]
    if unknown:
        raise ValueError(f"rng_types={wanted!r}: {unknown} are unknown; choose from {RNGType.list()}.")
    return [RNGType(kind).value for kind in wanted]
