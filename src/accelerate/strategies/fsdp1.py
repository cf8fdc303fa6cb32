"""Fully sharded training with torch's `FullyShardedDataParallel` (FSDP, version 1): each rank holds a piece of every unit.

The parameters of a unit lie flattened behind each other, and each rank holds an equal piece of that. Norms are taken here,
over the pieces: torch's own way computes them in float32 and knows one model only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..checkpointing.sharded.compat import unwrap_optimizer
from ..runtime.memory import malloc_trim
from ..runtime.tensors.forward import is_compiled_module
from ..runtime.world import World
from .base import Bundle, RunSettings
from .fsdp_base import ShardedStrategy, is_half, parameters_by_unit
from .parallel import bnb_params
from .parallel.grad_sync import averaging
from .parallel.materialize import initialise, receive, receive_buffers

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


class FlatShards(ShardedStrategy):
    """Every rank holds a piece of the model, of its gradients and of its optimizers' states, as the strategy says."""

    def __init__(self, world: World, settings: RunSettings) -> None:
        super().__init__(world, settings)
        assert isinstance(self.plugin.sharding_strategy, ShardingStrategy), "the plugin makes one of a name"
        # One rank has nothing to shard; torch comes to the same, with a warning.
        self._kind = self.plugin.sharding_strategy if world.size > 1 else ShardingStrategy.NO_SHARD
        self._mesh = _mesh(settings.mesh, world, self._kind)
        self._groups = WeakIdKeyDictionary()  # sharded parameter -> the ranks that share it, None: each has it whole

    def is_sharded(self, param: torch.Tensor) -> bool:
        return param in self._groups

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        for model in bundle.models.values():
            if isinstance(model, FullyShardedDataParallel):
                continue
            for params in self._flat(model).values():
                _check_types(params, self._upcast(params.values()))
                if not self.plugin.use_orig_params:
                    _check_flat(params, bundle.optimizers.values())

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        if isinstance(model, FullyShardedDataParallel):  # sharded by the user
            self.settings.precision.wrap_forward(model.module)
            self._remember(model)
            return model
        model = self.settings.precision.convert(model)
        bnb_params.leave_packing(model)
        self._initialise(model)
        units, ignored, before = self.units_of(model), self._ignored(model), self._flat(model)
        self.recompute(units)
        self.settings.precision.wrap_forward(model)
        device, comm = self.world.device, self.world.collectives
        receive_buffers(model, comm, device)
        wrapped = {}
        for unit in units:
            self._widen(before[unit].values())
            receive(before[unit].values(), comm, device)
            wrapped[unit] = self._wrap(unit, ignored)
            _replace(model, unit, wrapped[unit])
            if device.type == "cpu":  # else units that were cut would add up to the whole model
                malloc_trim()
        self._widen(before[model].values())
        for param in ignored:
            self._widen([param])
        whole = (param for param in ignored if not isinstance(param, DTensor))
        receive((*before[model].values(), *whole), comm, device)
        wrapped[model] = root = self._wrap(model, ignored)
        if not self.plugin.use_orig_params:
            for unit, params in before.items():
                handle = wrapped[unit]._handle
                if handle is not None:
                    self._replaced.update(dict.fromkeys(params.values(), handle.flat_param))
        self._remember(root)
        self._average_whole(root, ignored)
        return self._compiled(root)

    def _check_weights(self, models: Iterable[nn.Module]) -> None:
        if self.plugin.param_init_fn is None:  # that makes what rank 0 lacks
            super()._check_weights(models)

    def _initialise(self, model: nn.Module) -> None:
        fill = self.plugin.param_init_fn
        if fill is not None:
            if self.world.rank == 0:
                initialise(model, fill, self.world.device)
            super()._check_weights([model])

    def _widen(self, params: Iterable[nn.Parameter]) -> None:
        for param in self._upcast(params):
            param.data = param.data.float()

    def _wrap(self, unit: nn.Module, ignored: list[nn.Parameter]) -> FullyShardedDataParallel:
        plugin, policy = self.plugin, self.plugin.mixed_precision_policy
        if isinstance(policy, MixedPrecision):
            # What a float32 buffer widens on the way comes to a unit in the format of its parameters, as in version 2.
            policy = replace(policy, cast_forward_inputs=True)
        with _without_hints():
            return FullyShardedDataParallel(
                unit,
                sharding_strategy=self._kind,
                device_mesh=self._mesh,
                device_id=self.world.device,
                mixed_precision=policy if isinstance(policy, MixedPrecision) else None,
                backward_prefetch=plugin.backward_prefetch,  # type: ignore[arg-type]  # the plugin makes it one
                forward_prefetch=bool(plugin.forward_prefetch),
                limit_all_gathers=plugin.limit_all_gathers,
                use_orig_params=bool(plugin.use_orig_params),
                ignored_states=ignored or None,
                # torch's offload moves between another device and the CPU; there, parameters are where they should be.
                cpu_offload=plugin.cpu_offload if self.world.device.type != "cpu" else None,  # type: ignore[arg-type]
            )

    def _flat(self, model: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter]]:
        """Of each unit, the parameters that are to lie in one tensor, by name."""
        ignored, by_unit = set(self._ignored(model)), parameters_by_unit(model, self.units_of(model))
        return {
            unit: {name: param for name, param in params.items() if param not in ignored}
            for unit, params in by_unit.items()
        }

    def _upcast(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters of a unit that become float32, in which the optimizer steps under mixed precision.

        A unit has one number format: where one of it is trained in half precision, all become float32.
        """
        mixed = getattr(self.plugin.mixed_precision_policy, "param_dtype", None) is not None
        halves = [param for param in params if is_half(param)]
        return halves if mixed and any(param.requires_grad for param in halves) else []

    def _remember(self, model: FullyShardedDataParallel) -> None:
        """Notes who shares each parameter; units inside are asked after the whole, which sees theirs too."""
        for param in model.parameters():
            self._groups[param] = None
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            handle = unit._handle
            if handle is not None and handle.uses_sharded_strategy:
                for param in (handle.flat_param, *(handle.flat_param._params or ())):
                    self._groups[param] = handle.process_group

    # Step ------------------------------------------------------------------------------------------------------------

    def _cut_over(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        group = self._groups.get(param)
        return super()._cut_over(param) if group is None else (group,)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        container = _container(model)
        return nullcontext() if container is None else _held_back(container)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        container = _container(model)
        units = [] if container is None else FullyShardedDataParallel.fsdp_modules(container)
        before = [unit._sync_gradients for unit in units]
        for unit in units:  # as torch's no_sync does; in __dict__, since a module's attributes are typed as tensors
            unit.__dict__["_sync_gradients"] = True
        try:
            with averaging(container or model, True):
                yield
        finally:
            for unit, flag in zip(units, before, strict=True):
                unit.__dict__["_sync_gradients"] = flag

    # State -----------------------------------------------------------------------------------------------------------

    def unwrap(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        container = _container(model) if isinstance(model, nn.Module) else None
        if container is None:
            return super().unwrap(model, keep_fp32_wrapper, keep_torch_compile)
        inner = super().unwrap(container.module, keep_fp32_wrapper, keep_torch_compile)
        if keep_torch_compile and is_compiled_module(model):
            return type(model)(inner, model.dynamo_ctx)
        return inner


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in every place of another."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@contextmanager
def _held_back(container: FullyShardedDataParallel) -> Iterator[None]:
    with container.no_sync(), averaging(container, False):
        yield


def _container(model: nn.Module) -> FullyShardedDataParallel | None:
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, FullyShardedDataParallel) else None


def _mesh(mesh: DeviceMesh | None, world: World, kind: ShardingStrategy) -> DeviceMesh:
    """The ranks that share parameters, and for a hybrid strategy those that hold replicas.

    Raises:
        ValueError: for a mesh that does not go with the strategy, or on which torch would not synchronise gradients.
    """
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if kind in _HYBRID:
        name = kind.name.lstrip("_")
        if mesh is not None:
            if "dp_replicate" in names and "dp_shard" in names:
                return mesh["dp_replicate", "dp_shard"]
            raise ValueError(f"sharding_strategy {name} needs dp_replicate_size and dp_shard_size above 1.")
        if world.local_size == 1:  # torch would leave each process with gradients of its own
            raise ValueError(
                f"sharding_strategy {name} with one process a machine has nothing to shard: use FULL_SHARD, or NO_SHARD "
                "to keep whole replicas."
            )
        shape = (world.size // world.local_size, world.local_size)
        return init_device_mesh(world.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    if mesh is None:
        return init_device_mesh(world.device.type, (world.size,))
    if "dp_replicate" in names or "dp_shard" not in names:
        raise ValueError(
            f"sharding_strategy {kind.name} goes with dp_shard_size alone: replicas of shards (dp_replicate_size) are "
            "HYBRID_SHARD (--fsdp_sharding_strategy HYBRID_SHARD)."
        )
    return mesh["dp_shard"]


def _check_types(params: dict[str, nn.Parameter], upcast: Sequence[nn.Parameter]) -> None:
    """Parameters of one unit lie in one tensor, so they have one number format."""
    wide = set(map(id, upcast))
    kinds: dict[torch.dtype, str] = {}
    for name, param in params.items():
        kinds.setdefault(torch.float32 if id(param) in wide else param.dtype, name)
    if len(kinds) > 1:
        listed = ", ".join(f"{name!r} is {kind}" for kind, name in kinds.items())
        raise ValueError(
            f"a unit of FSDP 1 has parameters of one number format, but {listed}: convert them, choose other units "
            "(auto_wrap_policy), or use fsdp_version=2."
        )


def _check_flat(params: dict[str, nn.Parameter], optimizers: Iterable[Any]) -> None:
    """Without the original parameters, a unit is one parameter: trained or not, in one group of one optimizer."""
    advice = "set use_orig_params=True (--fsdp_use_orig_params true)."
    trained = {param.requires_grad: name for name, param in params.items()}
    if len(trained) > 1:
        raise ValueError(
            f"{trained[True]!r} is trained and {trained[False]!r} is frozen, and both are in one unit: {advice}"
        )
    for inner in map(unwrap_optimizer, optimizers):
        groups = [{id(param) for param in group["params"]} for group in inner.param_groups]
        places = {
            next((i for i, group in enumerate(groups) if id(param) in group), None): name
            for name, param in params.items()
        }
        if len(places) > 1:
            one, other = list(places.values())[:2]
            raise ValueError(
                f"{one!r} and {other!r} are in one unit, but not in one parameter group of {type(inner).__name__}: {advice}"
            )


@contextmanager
def _without_hints() -> Iterator[None]:
    """Keeps torch from saying that NO_SHARD, which was asked for, is like DistributedDataParallel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NO_SHARD.*")
        yield
