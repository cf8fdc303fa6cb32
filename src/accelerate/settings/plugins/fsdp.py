"""`FullyShardedDataParallelPlugin`: the configuration of FSDP, versions 1 and 2.

A field left None is read from the launcher's ``FSDP_*`` variables and falls back to the plugin's default. Policies and
state-dict configurations are converted to torch's objects; torch is imported when a plugin is constructed.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .. import env
from ..enums import FSDP_AUTO_WRAP_POLICY, FSDP_SHARDING_STRATEGY
from ..env_defaults import default, resolve, variable

if TYPE_CHECKING:
    import torch
    from torch.distributed.fsdp import (
        BackwardPrefetch,
        CPUOffload,
        CPUOffloadPolicy,
        FullOptimStateDictConfig,
        FullStateDictConfig,
        MixedPrecision,
        MixedPrecisionPolicy,
        OffloadPolicy,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        ShardingStrategy,
        StateDictType,
    )

logger = logging.getLogger(__name__)

_TRANSFORMER, _BY_SIZE, _NO_WRAP = FSDP_AUTO_WRAP_POLICY
# Fields that only version 1 has -> the launcher's option.
_FIRST_VERSION_ONLY = {
    "sharding_strategy": "fsdp_sharding_strategy",
    "backward_prefetch": "fsdp_backward_prefetch",
    "forward_prefetch": "fsdp_forward_prefetch",
    "use_orig_params": "fsdp_use_orig_params",
    "sync_module_states": "fsdp_sync_module_states",
}
# Compute dtypes of mixed precisions, and aliases of torch's dtypes.
_COMPUTE_DTYPES = {"fp8": "bfloat16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class FullyShardedDataParallelPlugin:
    """Configures fully sharded data parallelism.

    Raises:
        ValueError: if a value is unknown, or does not exist in the version.

    Example:
        ```python
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator = Accelerator(fsdp_plugin=plugin)
        ```
    """

    fsdp_version: int | None = None
    """1: `torch.distributed.fsdp.FullyShardedDataParallel` (the default); 2: `fully_shard`."""
    sharding_strategy: str | int | ShardingStrategy | None = None
    """The sharding strategy, by name, number or member; FULL_SHARD. Version 1."""
    reshard_after_forward: str | bool | ShardingStrategy | None = None
    """Whether parameters are resharded after the forward; True. In version 1 an alias of `sharding_strategy`."""
    backward_prefetch: str | BackwardPrefetch | None = None
    """All-gather of the next unit in the backward: BACKWARD_PRE, BACKWARD_POST, NO_PREFETCH (None). Version 1."""
    mixed_precision_policy: dict[str, Any] | str | MixedPrecision | MixedPrecisionPolicy | None = None
    """torch's mixed-precision policy of this version, its arguments as a dict, or ``"bf16"``, ``"fp16"``."""
    auto_wrap_policy: Callable[..., Any] | Literal["transformer_based_wrap", "size_based_wrap", "no_wrap"] | None = None
    """Policy that selects the modules to wrap; `set_auto_wrap_policy` completes it for a model."""
    cpu_offload: bool | CPUOffload | CPUOffloadPolicy | OffloadPolicy | None = None
    """Whether parameters and gradients are offloaded to the CPU; False."""
    ignored_modules: Iterable[torch.nn.Module] | str | None = None
    """Modules that are not sharded, or a regular expression for their FQNs."""
    state_dict_type: str | int | StateDictType | None = None
    """Format of checkpoints: FULL_STATE_DICT (version 1's default), SHARDED_STATE_DICT (version 2's), LOCAL_STATE_DICT."""
    state_dict_config: FullStateDictConfig | ShardedStateDictConfig | None = None
    """Its class selects `state_dict_type` if that is unset; its fields have no effect."""
    optim_state_dict_config: FullOptimStateDictConfig | ShardedOptimStateDictConfig | None = None
    """Accepted without effect: states are always written from the CPU, in the format of `state_dict_type`."""
    limit_all_gathers: bool = True
    """Whether the CPU blocks so that at most two all-gathers are in flight. Version 1."""
    use_orig_params: bool | None = None
    """Whether a unit may mix frozen and trainable parameters; False. Version 2 always allows it."""
    param_init_fn: Callable[[torch.nn.Module], None] | None = None
    """Initializes a module on the meta device. Version 1."""
    sync_module_states: bool | None = None
    """Accepted without effect: parameters of rank 0 are broadcast in any case. Version 1."""
    forward_prefetch: bool | None = None
    """Whether the next unit is all-gathered during the forward; False. Version 1."""
    activation_checkpointing: bool | None = None
    """Whether activations of each unit are recomputed in the backward; False."""
    activation_checkpointing_offload: bool | None = None
    """Whether activations saved by checkpointing are offloaded to the CPU; False."""
    cpu_ram_efficient_loading: bool | None = None
    """Whether only rank 0 reads pretrained weights and broadcasts them; False."""
    transformer_cls_names_to_wrap: list[str] | None = None
    """Names of the classes that ``transformer_based_wrap`` wraps; None: the model's own `_no_split_modules`."""
    min_num_params: int | None = None
    """Minimum number of parameters of a unit of ``size_based_wrap``; 100,000,000."""

    def __post_init__(self) -> None:
        self.fsdp_version = resolve(self.fsdp_version, "fsdp_version", "fsdp_version")
        self._resolve_wrapping()
        self._resolve_memory()
        if self.fsdp_version == 1:
            self._resolve_first_version()
        else:
            self._resolve_second_version()
        self._resolve_state_dict_type()
        if isinstance(self.mixed_precision_policy, str):
            self.set_mixed_precision(self.mixed_precision_policy, override=True)
        self.validate_mixed_precision_policy()

    # Steps of making one ---------------------------------------------------------------------------------------------

    def _resolve_wrapping(self) -> None:
        if not callable(self.auto_wrap_policy):
            name = resolve(self.auto_wrap_policy, "auto_wrap_policy", "fsdp_auto_wrap_policy", _NO_WRAP)
            self.auto_wrap_policy = _policy_named(name)
            if name == _TRANSFORMER and self.transformer_cls_names_to_wrap is None:
                self.transformer_cls_names_to_wrap = _words(variable("fsdp_transformer_layer_cls_to_wrap"))
            if name == _BY_SIZE:
                self.min_num_params = resolve(self.min_num_params, "min_num_params", "fsdp_min_num_params")
        self.transformer_cls_names_to_wrap = _words(self.transformer_cls_names_to_wrap)
        if self.ignored_modules is None:
            self.ignored_modules = resolve(None, "ignored_modules", "fsdp_ignored_modules")
        if isinstance(self.ignored_modules, str):
            try:
                re.compile(self.ignored_modules)
            except re.error as error:
                raise ValueError(
                    f"ignored_modules={self.ignored_modules!r} is not a regular expression: {error}."
                ) from None
        elif self.ignored_modules is not None:
            self.ignored_modules = _modules(self.ignored_modules)

    def _resolve_memory(self) -> None:
        if self.cpu_offload is None or isinstance(self.cpu_offload, (bool, str)):
            self.cpu_offload = resolve(self.cpu_offload, "cpu_offload", "fsdp_offload_params")
        self.set_cpu_offload()
        self.validate_cpu_offload()
        for name in ("activation_checkpointing", "activation_checkpointing_offload", "cpu_ram_efficient_loading"):
            setattr(self, name, resolve(getattr(self, name), name, f"fsdp_{name}", otherwise=False))
        if self.activation_checkpointing_offload and not self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing_offload=True needs activation_checkpointing=True "
                "(--fsdp_activation_checkpointing true)."
            )

    def _resolve_first_version(self) -> None:
        from torch.distributed.fsdp import BackwardPrefetch

        self.sharding_strategy = self.reshard_after_forward = self._sharding_strategy()
        if not isinstance(self.backward_prefetch, BackwardPrefetch):
            name = resolve(self.backward_prefetch, "backward_prefetch", "fsdp_backward_prefetch")
            self.backward_prefetch = None if name in (None, "NO_PREFETCH") else BackwardPrefetch[name]
        asked = self.sync_module_states
        for name in ("forward_prefetch", "use_orig_params", "sync_module_states"):
            setattr(self, name, resolve(getattr(self, name), name, f"fsdp_{name}", otherwise=False))
        if self.cpu_ram_efficient_loading and not self.sync_module_states:
            if asked is not None:
                logger.warning(
                    "sync_module_states=False is overridden by cpu_ram_efficient_loading=True: only rank 0 reads the "
                    "weights, which must be broadcast."
                )
            self.sync_module_states = True

    def _sharding_strategy(self) -> ShardingStrategy:
        """Returns version 1's sharding strategy, which two fields (and two variables) can set."""
        from torch.distributed.fsdp import ShardingStrategy

        full = ShardingStrategy.FULL_SHARD
        given = [self.sharding_strategy, self.reshard_after_forward]
        if given == [None, None]:
            given = [variable("fsdp_sharding_strategy"), variable("fsdp_reshard_after_forward")]
        # The launcher always sets both variables: one that holds the default counts as unset.
        named = {_strategy(value) for value in given if value not in (None, "")}
        named = named - {full} or {full}
        if len(named) > 1:
            raise ValueError(
                f"sharding_strategy={given[0]!r} and reshard_after_forward={given[1]!r} contradict each other: both set the "
                "strategy of version 1, so set one of them."
            )
        return named.pop()

    def _resolve_second_version(self) -> None:
        for name, option in _FIRST_VERSION_ONLY.items():
            launched = variable(option) and resolve(None, name, option)
            if getattr(self, name) is not None or (launched and launched != default(option)):
                logger.warning("%s belongs to version 1 of FSDP and has no effect with fsdp_version=2.", name)
            setattr(self, name, None)
        given = resolve(self.reshard_after_forward, "reshard_after_forward", "fsdp_reshard_after_forward")
        if given not in ("true", "false"):
            raise ValueError(
                f"reshard_after_forward={given!r} is a sharding strategy of version 1: with fsdp_version=2 it is true or "
                "false. `accelerate to-fsdp2` converts a configuration file."
            )
        self.reshard_after_forward = given == "true"

    def _resolve_state_dict_type(self) -> None:
        kind = self.state_dict_type
        if kind is None and self.state_dict_config is not None:
            kind = type(self.state_dict_config).__name__.removesuffix("Config")  # FullStateDict, ShardedStateDict
            kind = {"FullStateDict": "FULL_STATE_DICT", "LocalStateDict": "LOCAL_STATE_DICT"}.get(
                kind, "SHARDED_STATE_DICT"
            )
        if kind is None:
            own = "FULL_STATE_DICT" if self.fsdp_version == 1 else "SHARDED_STATE_DICT"
            kind = resolve(None, "state_dict_type", "fsdp_state_dict_type", own)
        self.set_state_dict_type(kind)

    # Used by strategies ----------------------------------------------------------------------------------------------

    def set_state_dict_type(self, state_dict_type: str | int | StateDictType | None = None) -> None:
        """Sets the format of checkpoints, and its configurations unless they were given.

        Args:
            state_dict_type: Name, number or member; None keeps the current one.

        Raises:
            ValueError: if the type is unknown, or does not exist in version 2.
        """
        from torch.distributed import fsdp

        if state_dict_type is not None:
            wanted = _member(fsdp.StateDictType, state_dict_type, "state_dict_type")
            if self.state_dict_type not in (None, wanted) and isinstance(self.state_dict_type, fsdp.StateDictType):
                self.state_dict_config = self.optim_state_dict_config = None  # those of the other type
            self.state_dict_type = wanted
        if self.state_dict_type is fsdp.StateDictType.LOCAL_STATE_DICT and self.fsdp_version == 2:
            raise ValueError(
                "state_dict_type=LOCAL_STATE_DICT does not exist with fsdp_version=2: use SHARDED_STATE_DICT or "
                "FULL_STATE_DICT."
            )
        if self.state_dict_type is fsdp.StateDictType.FULL_STATE_DICT:
            self.state_dict_config = self.state_dict_config or fsdp.FullStateDictConfig(True, True)
            self.optim_state_dict_config = self.optim_state_dict_config or fsdp.FullOptimStateDictConfig(True, True)
        elif self.state_dict_type is fsdp.StateDictType.SHARDED_STATE_DICT:
            self.state_dict_config = self.state_dict_config or fsdp.ShardedStateDictConfig(True)
            self.optim_state_dict_config = self.optim_state_dict_config or fsdp.ShardedOptimStateDictConfig(True)

    def set_auto_wrap_policy(self, model: torch.nn.Module) -> None:
        """Completes a named policy with the classes of `model` to wrap, or the minimum size.

        Raises:
            ValueError: if the classes to wrap are not in the model, or neither plugin nor model names any.
        """
        from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

        if self.auto_wrap_policy is transformer_auto_wrap_policy:
            classes = self._classes_to_wrap(model)
            self.auto_wrap_policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
        elif self.auto_wrap_policy is size_based_auto_wrap_policy:
            least = self.min_num_params
            self.auto_wrap_policy = functools.partial(size_based_auto_wrap_policy, min_num_params=least)

    def _classes_to_wrap(self, model: torch.nn.Module) -> set[type]:
        here = {type(module).__name__: type(module) for module in model.modules()}
        named = self.transformer_cls_names_to_wrap
        wanted = named or list(getattr(model, "_no_split_modules", None) or [])
        missing = [name for name in wanted if name not in here]
        # A model family may list blocks of which a member has only some.
        if not wanted or (missing and (named or len(missing) == len(wanted))):
            problem = f"has no {', '.join(missing)}" if missing else "has no _no_split_modules"
            raise ValueError(
                f"{type(model).__name__} {problem}: name the classes to wrap in transformer_cls_names_to_wrap "
                f"(--fsdp_transformer_layer_cls_to_wrap). It is built of {', '.join(sorted(here))}."
            )
        return {here[name] for name in wanted if name in here}

    def set_mixed_precision(
        self, mixed_precision: str | torch.dtype, buffer_autocast: bool = False, override: bool = False
    ) -> None:
        """Sets the mixed-precision policy.

        Args:
            mixed_precision: ``fp16``, ``bf16``, ``fp8`` (which gathers and reduces in bf16), ``no``, or a dtype.
            buffer_autocast: Whether to cast buffers too, which stay float32 otherwise. Version 1.
            override: Whether to replace an existing policy.

        Raises:
            ValueError: if the precision is unknown.
        """
        from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

        if isinstance(self.mixed_precision_policy, dict):
            kind = MixedPrecision if self.fsdp_version == 1 else MixedPrecisionPolicy
            self.mixed_precision_policy = kind(**{name: _dtype(v) for name, v in self.mixed_precision_policy.items()})
        if mixed_precision == "no" or (self.mixed_precision_policy is not None and not override):
            return
        dtype = _dtype(mixed_precision)
        if self.fsdp_version == 1:
            buffers = dtype if buffer_autocast else _dtype("fp32")
            self.mixed_precision_policy = MixedPrecision(param_dtype=dtype, reduce_dtype=dtype, buffer_dtype=buffers)
        else:
            self.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)

    def validate_mixed_precision_policy(self) -> None:
        """Converts a dict to torch's policy and validates its class.

        Raises:
            ValueError: if the policy belongs to the other version; the message names the class to use.
        """
        from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

        if isinstance(self.mixed_precision_policy, dict):
            self.set_mixed_precision("no")
        self._check_type("mixed_precision_policy", (MixedPrecision,), (MixedPrecisionPolicy,))

    @property
    def offloads(self) -> bool:
        """Returns whether parameters and gradients are offloaded to the CPU."""
        from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy

        policy = self.cpu_offload
        return isinstance(policy, CPUOffloadPolicy) or (isinstance(policy, CPUOffload) and policy.offload_params)

    def set_cpu_offload(self) -> None:
        """Converts a bool in `cpu_offload` to torch's object."""
        from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, OffloadPolicy

        if isinstance(self.cpu_offload, bool):
            second = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
            self.cpu_offload = CPUOffload(self.cpu_offload) if self.fsdp_version == 1 else second

    def validate_cpu_offload(self) -> None:
        """Validates the class of the offload policy.

        Raises:
            ValueError: if it belongs to the other version; the message names the class to use.
        """
        from torch.distributed.fsdp import CPUOffload, OffloadPolicy

        self._check_type("cpu_offload", (CPUOffload,), (OffloadPolicy,))

    def _check_type(self, field: str, first: tuple[type, ...], second: tuple[type, ...]) -> None:
        value = getattr(self, field)
        allowed = first if self.fsdp_version == 1 else second
        if value is not None and not isinstance(value, allowed):
            raise ValueError(
                f"{field}={value!r}: with fsdp_version={self.fsdp_version} this is an instance of {allowed[0].__name__}."
            )


def _member(kind: Any, value: Any, field: str) -> Any:
    """Returns a member of one of torch's enumerations, given as member, name or number."""
    if isinstance(value, kind):
        return value
    for member in kind:
        if str(value).upper() in (member.name.lstrip("_"), str(member.value)):
            return member
    names = ", ".join(member.name.lstrip("_") for member in kind)
    raise ValueError(f"{field}={value!r}: expected one of {names}.")


def _strategy(value: Any) -> ShardingStrategy:
    from torch.distributed.fsdp import ShardingStrategy

    word = str(value).lower()
    if word in ("true", "false"):  # version 2's notation
        return ShardingStrategy.FULL_SHARD if word == "true" else ShardingStrategy.SHARD_GRAD_OP
    if isinstance(value, ShardingStrategy):
        return value
    if word.upper() not in FSDP_SHARDING_STRATEGY and word not in "12345":
        raise ValueError(
            f"sharding_strategy={value!r}: expected one of {', '.join(FSDP_SHARDING_STRATEGY)} (or 1 to 5)."
        )
    strategy: ShardingStrategy = _member(ShardingStrategy, value, "sharding_strategy")
    return strategy


def _policy_named(name: str) -> Callable[..., Any] | None:
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    return {_TRANSFORMER: transformer_auto_wrap_policy, _BY_SIZE: size_based_auto_wrap_policy, _NO_WRAP: None}[name]


def _modules(given: Any) -> list[Any]:
    """Returns the modules of an iterable as a list."""
    from torch import nn

    modules = [given] if isinstance(given, nn.Module) else list(given) if isinstance(given, Iterable) else [given]
    wrong = next((item for item in modules if not isinstance(item, nn.Module)), None)
    if wrong is not None:
        raise ValueError(
            f"ignored_modules holds {type(wrong).__name__} {wrong!r}: expected modules, or one regular expression for the "
            "FQNs of modules."
        )
    return modules


def _words(names: Any) -> list[str] | None:
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    return list(names) if names else None


def _dtype(name: Any) -> Any:
    """Returns torch's dtype by name; a value that is not a string is returned unchanged."""
    if not isinstance(name, str):
        return name
    import torch

    dtype = getattr(torch, _COMPUTE_DTYPES.get(name, name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype: expected 'no', {', '.join(map(repr, _COMPUTE_DTYPES))} or a dtype.")
    return dtype


def enable_fsdp_ram_efficient_loading() -> None:
    """Makes ``from_pretrained`` read weights on rank 0 only."""
    env.publish({"ACCELERATE_USE_FSDP": "True", "FSDP_CPU_RAM_EFFICIENT_LOADING": "True"})


def disable_fsdp_ram_efficient_loading() -> None:
    """Makes ``from_pretrained`` read weights on every rank."""
    env.publish({"FSDP_CPU_RAM_EFFICIENT_LOADING": "False"})
