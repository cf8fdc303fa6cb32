"""``accelerate estimate-memory --num_processes ...``: the memory of each rank, for given flags of `accelerate launch`.

The launcher's flags, or a configuration file, are converted to a `Sharding`; units are wrapped as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...settings.launcher import LaunchSettings
from ...settings.option import OptionSpec, SettingsError, option_specs
from ..parsers import add
from .empty_model import EstimateError
from .sharding import Sharding

if TYPE_CHECKING:
    from torch import nn

    from ...settings.plugins.fsdp import FullyShardedDataParallelPlugin

# The launcher's options that affect memory.
_OPTIONS = (
    "config_file",
    "cpu",
    "mixed_precision",
    "num_processes",
    "num_machines",
    "use_fsdp",
    "fsdp_version",
    "fsdp_sharding_strategy",
    "fsdp_reshard_after_forward",
    "fsdp_offload_params",
    "fsdp_auto_wrap_policy",
    "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_min_num_params",
    "fsdp_backward_prefetch",
    "fsdp_use_orig_params",
    "fsdp_activation_checkpointing",
    "parallelism_config_dp_replicate_size",
    "parallelism_config_dp_shard_size",
)
_SPLIT = ("tp_size", "cp_size", "sp_size")
_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


class RankPlan(NamedTuple):
    """A plan of distributed training.

    Attributes:
        processes: Number of processes.
        precision: ``no``, ``bf16``, ``fp16`` or ``fp8``.
        sharding: The sharding strategy.
        units: Selects the modules to wrap.
        checkpoint: Whether units recompute their activations.
        on_cpu: Whether processes compute on the CPU.
        title: A description for the report.
    """

    processes: int
    precision: str
    sharding: Sharding
    units: Callable[[nn.Module], Sequence[nn.Module]]
    checkpoint: bool
    on_cpu: bool
    title: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the launcher's flags to the command's parser; flags that are not given are missing from its namespace."""
    group: Any = parser.add_argument_group(
        "Memory of each rank", "flags of `accelerate launch`; a flag of FSDP implies --use_fsdp"
    )
    for entry in option_specs(LaunchSettings):
        if entry.dest not in _OPTIONS:
            continue
        given: dict[str, Any] = {"dest": entry.dest, "default": argparse.SUPPRESS}
        if entry.option.switch:
            given["action"] = "store_true"
        else:
            word = "YES" if entry.type.startswith("bool") else entry.dest.rpartition("_")[2].upper()
            given |= {"type": _converter(entry), "metavar": word}
        choices = ", ".join(map(str, entry.option.choices or ()))
        shown, *others = entry.flags
        add(group, shown, help=f"{entry.option.help}: {choices}" if choices else entry.option.help, **given)
        if others:
            add(group, *others, help=argparse.SUPPRESS, **given)


def _converter(entry: OptionSpec) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return entry.convert(text, entry.flags[0])
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{entry.flags[0]}: ")) from None

    return convert


def parse_settings(args: argparse.Namespace) -> LaunchSettings | None:
    """Returns the launcher's settings from flags and configuration file, or None if no flag was given.

    Raises:
        EstimateError: if they are invalid.
    """
    from ...launch import config_file, parse

    flags = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    if not flags.keys() - {"cpu"}:
        return None
    if any(name.startswith("fsdp_") for name in flags):
        flags["use_fsdp"] = True
    if any(name.startswith("parallelism_config_") for name in flags):
        flags["use_parallelism_config"] = True
    try:
        file = config_file.load_config(flags["config_file"]) if "config_file" in flags else None
        return parse.merge_settings(flags, file, "", ())
    except SettingsError as error:
        raise EstimateError(str(error)) from error


def make_plan(settings: LaunchSettings) -> RankPlan:
    """Returns the plan of a run with these settings.

    Raises:
        EstimateError: if the settings contradict each other or select an engine that is not supported.
    """
    mesh = settings.parallelism if settings.use_parallelism_config else None
    for name, asked in (
        ("DeepSpeed", settings.use_deepspeed),
        ("Megatron-LM", settings.use_megatron_lm),
        *((f"parallelism_config_{name}", mesh is not None and getattr(mesh, name) > 1) for name in _SPLIT),
    ):
        if asked:
            raise EstimateError(f"estimates do not support {name}: leave it out for an upper bound.")
    processes, precision = settings.processes, settings.mixed_precision or "no"
    if not settings.use_fsdp:
        sharding = Sharding(version=0, buckets=processes > 1)
        return RankPlan(
            processes,
            precision,
            sharding,
            lambda model: (),
            False,
            settings.on_cpu,
            _title(processes, "DDP", precision),
        )
    plugin = _plugin(settings)
    kind = getattr(plugin.sharding_strategy, "name", "")
    hybrid = kind in _HYBRID
    if mesh is not None and mesh.dp_shard_size > 1:
        ranks = mesh.dp_shard_size
    elif mesh is not None and mesh.dp_replicate_size > 1:
        ranks = processes // mesh.dp_replicate_size
    else:
        ranks = settings.processes_here if hybrid else processes
    if processes % max(ranks, 1) or ranks < 1:
        raise EstimateError(f"{processes} processes cannot be divided into sharding groups of {ranks}.")
    whole = kind == "NO_SHARD" or ranks == 1
    sharding = Sharding(
        ranks=ranks,
        version=0 if whole else plugin.fsdp_version or 1,
        frees=str(plugin.reshard_after_forward) == "True" or kind in ("FULL_SHARD", "HYBRID_SHARD"),
        compute=2 if precision != "no" and not whole else None,
        offload=settings.fsdp.offload_params and not settings.on_cpu,
        prefetch=plugin.fsdp_version == 2 or getattr(plugin.backward_prefetch, "name", "") == "BACKWARD_PRE",
        original=bool(plugin.use_orig_params),
        copies=settings.on_cpu,
    )
    shape = f"FSDP {plugin.fsdp_version}" + (f", {kind.lstrip('_')}" if kind else "")
    if 1 < ranks < processes:
        shape += f", shards over {ranks}"
    return RankPlan(
        processes,
        precision,
        sharding,
        _chooser(plugin),
        bool(plugin.activation_checkpointing),
        settings.on_cpu,
        _title(processes, shape, precision),
    )


def _plugin(settings: LaunchSettings) -> FullyShardedDataParallelPlugin:
    from ...settings.plugins.fsdp import FullyShardedDataParallelPlugin

    fsdp = settings.fsdp
    first = {
        "sharding_strategy": fsdp.sharding_strategy,
        "backward_prefetch": fsdp.backward_prefetch or "NO_PREFETCH",
        "use_orig_params": fsdp.use_orig_params,
    }
    try:
        return FullyShardedDataParallelPlugin(
            fsdp_version=fsdp.version,
            reshard_after_forward=fsdp.reshard_after_forward,
            auto_wrap_policy=fsdp.auto_wrap_policy or "NO_WRAP",  # type: ignore[arg-type]  # a file's spelling
            transformer_cls_names_to_wrap=fsdp.transformer_layer_cls_to_wrap,  # type: ignore[arg-type]  # comma-separated
            min_num_params=fsdp.min_num_params,
            cpu_offload=fsdp.offload_params,
            activation_checkpointing=fsdp.activation_checkpointing,
            cpu_ram_efficient_loading=False,
            **(first if fsdp.version == 1 else {}),  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise EstimateError(str(error)) from error


def _chooser(plugin: FullyShardedDataParallelPlugin) -> Callable[[nn.Module], Sequence[nn.Module]]:
    def choose(model: nn.Module) -> Sequence[nn.Module]:
        import copy

        from ...strategies.fsdp_base import find_units

        policy = copy.copy(plugin)
        try:
            policy.set_auto_wrap_policy(model)
        except ValueError as error:
            raise EstimateError(str(error)) from error
        return find_units(model, policy.auto_wrap_policy) if callable(policy.auto_wrap_policy) else ()

    return choose


def _title(processes: int, shape: str, precision: str) -> str:
    words = f"each of {processes} ranks, {shape}" if processes > 1 else "one process"
    return words + ("" if precision == "no" else f", mixed {precision}")
