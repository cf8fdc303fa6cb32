"""Fully sharded training with torch's `FullyShardedDataParallel` (FSDP, version 1): each rank holds a shard of every unit.

The parameters of a unit are flattened into one FlatParameter, which is sharded evenly. Gradient norms are computed here,
over the shards: torch's own method computes them in float32 and for one model only.
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
from .base import Bundle, StrategyConfig
from .fsdp_base import FSDPStrategy, is_half, parameters_by_unit
from .parallel import bnb_params
from .parallel.grad_sync import grad_sync_enabled
from .parallel.materialize import broadcast_buffers, broadcast_params, initialize_meta_modules

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


class FSDP1Strategy(FSDPStrategy):
    """Shards the model, its gradients and optimizer states over ranks, as `sharding_strategy` specifies."""

    def __init__(self, world: World, config: StrategyConfig) -> None:
        super().__init__(world, config)
        assert isinstance(self.plugin.sharding_strategy, ShardingStrategy), "the plugin makes one of a name"
        # One rank has nothing to shard; torch comes to the same, with a warning.
        self._sharding_strategy = self.plugin.sharding_strategy if world.size > 1 else ShardingStrategy.NO_SHARD
        self._mesh = _mesh(config.mesh, world, self._sharding_strategy)
        self._process_groups = WeakIdKeyDictionary()  # parameter -> group over which it is sharded, or None

    def is_sharded(self, param: torch.Tensor) -> bool:
        return param in self._process_groups

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        for model in bundle.models.values():
            if isinstance(model, FullyShardedDataParallel):
                continue
            for params in self._flat_params(model).values():
                _check_uniform_dtype(params, self._params_to_upcast(params.values()))
                if not self.plugin.use_orig_params:
                    _check_flat_param(params, bundle.optimizers.values())

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        if isinstance(model, FullyShardedDataParallel):  # sharded by the user
            self.config.precision.wrap_forward(model.module)
            self._record_shard_groups(model)
            return model
        model = self.config.precision.convert(model)
        bnb_params.disable_cpu_repacking(model)
        self._initialize(model)
        units, ignored, before = self.select_wrap_modules(model), self._ignored_params(model), self._flat_params(model)
        self.apply_activation_checkpointing(units)
        self.config.precision.wrap_forward(model)
        device, comm = self.world.device, self.world.collectives
        broadcast_buffers(model, comm, device)
        wrapped = {}
        for unit in units:
            self._upcast_params(before[unit].values())
            broadcast_params(before[unit].values(), comm, device)
            wrapped[unit] = self._wrap(unit, ignored)
            _replace_module(model, unit, wrapped[unit])
            if device.type == "cpu":  # else freed memory of wrapped units adds up to the whole model
                malloc_trim()
        self._upcast_params(before[model].values())
        for param in ignored:
            self._upcast_params([param])
        whole = (param for param in ignored if not isinstance(param, DTensor))
        broadcast_params((*before[model].values(), *whole), comm, device)
        wrapped[model] = root = self._wrap(model, ignored)
        if not self.plugin.use_orig_params:
            for unit, params in before.items():
                handle = wrapped[unit]._handle
                if handle is not None:
                    self._param_map.update(dict.fromkeys(params.values(), handle.flat_param))
        self._record_shard_groups(root)
        self._reduce_ignored_grads(root, ignored)
        return self._compile(root)

    def _check_weights(self, models: Iterable[nn.Module]) -> None:
        if self.plugin.param_init_fn is None:  # else it initializes the weights of rank 0
            super()._check_weights(models)

    def _initialize(self, model: nn.Module) -> None:
        fill = self.plugin.param_init_fn
        if fill is not None:
            if self.world.rank == 0:
                initialize_meta_modules(model, fill, self.world.device)
            super()._check_weights([model])

    def _upcast_params(self, params: Iterable[nn.Parameter]) -> None:
        for param in self._params_to_upcast(params):
            param.data = param.data.float()

    def _wrap(self, unit: nn.Module, ignored: list[nn.Parameter]) -> FullyShardedDataParallel:
        plugin, policy = self.plugin, self.plugin.mixed_precision_policy
        if isinstance(policy, MixedPrecision):
            # As in version 2, inputs that a float32 buffer promoted are cast to the dtype of the unit's parameters.
            policy = replace(policy, cast_forward_inputs=True)
        with _ignore_no_shard_warning():
            return FullyShardedDataParallel(
                unit,
                sharding_strategy=self._sharding_strategy,
                device_mesh=self._mesh,
                device_id=self.world.device,
                mixed_precision=policy if isinstance(policy, MixedPrecision) else None,
                backward_prefetch=plugin.backward_prefetch,  # type: ignore[arg-type]  # the plugin makes it one
                forward_prefetch=bool(plugin.forward_prefetch),
                limit_all_gathers=plugin.limit_all_gathers,
                use_orig_params=bool(plugin.use_orig_params),
                ignored_states=ignored or None,
                # On the CPU, parameters are in place already.
                cpu_offload=plugin.cpu_offload if self.world.device.type != "cpu" else None,  # type: ignore[arg-type]
            )

    def _flat_params(self, model: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter]]:
        """Returns, for each unit, the parameters of its FlatParameter by FQN."""
        ignored, by_unit = set(self._ignored_params(model)), parameters_by_unit(model, self.select_wrap_modules(model))
        return {
            unit: {name: param for name, param in params.items() if param not in ignored}
            for unit, params in by_unit.items()
        }

    def _params_to_upcast(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters of a unit to cast to float32, in which the optimizer steps under mixed precision.

        A unit has one dtype: if one half-precision parameter is trained, all become float32.
        """
        mixed = getattr(self.plugin.mixed_precision_policy, "param_dtype", None) is not None
        halves = [param for param in params if is_half(param)]
        return halves if mixed and any(param.requires_grad for param in halves) else []

    def _record_shard_groups(self, model: FullyShardedDataParallel) -> None:
        """Records the process group of each parameter; those of units overwrite the entries of the root."""
        for param in model.parameters():
            self._process_groups[param] = None
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            handle = unit._handle
            if handle is not None and handle.uses_sharded_strategy:
                for param in (handle.flat_param, *(handle.flat_param._params or ())):
                    self._process_groups[param] = handle.process_group

    # Step ------------------------------------------------------------------------------------------------------------

    def _shard_groups(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        group = self._process_groups.get(param)
        return super()._shard_groups(param) if group is None else (group,)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        container = _container(model)
        return nullcontext() if container is None else _no_sync(container)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        container = _container(model)
        units = [] if container is None else FullyShardedDataParallel.fsdp_modules(container)
        before = [unit._sync_gradients for unit in units]
        for unit in units:  # as torch's no_sync does; in __dict__, since a module's attributes are typed as tensors
            unit.__dict__["_sync_gradients"] = True
        try:
            with grad_sync_enabled(container or model, True):
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


def _replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces every occurrence of a module in a model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@contextmanager
def _no_sync(container: FullyShardedDataParallel) -> Iterator[None]:
    with container.no_sync(), grad_sync_enabled(container, False):
        yield


def _container(model: nn.Module) -> FullyShardedDataParallel | None:
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, FullyShardedDataParallel) else None


def _mesh(mesh: DeviceMesh | None, world: World, strategy: ShardingStrategy) -> DeviceMesh:
    """Returns the mesh of shards, with a dimension of replicas for a hybrid strategy.

    Raises:
        ValueError: for a mesh that does not fit the strategy, or on which torch would not synchronize gradients.
    """
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if strategy in _HYBRID:
        name = strategy.name.lstrip("_")
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
            f"sharding_strategy {strategy.name} goes with dp_shard_size alone: replicas of shards (dp_replicate_size) are "
            "HYBRID_SHARD (--fsdp_sharding_strategy HYBRID_SHARD)."
        )
    return mesh["dp_shard"]


def _check_uniform_dtype(params: dict[str, nn.Parameter], upcast: Sequence[nn.Parameter]) -> None:
    """Raises unless all parameters of a unit have one dtype, as its FlatParameter requires."""
    widened = set(map(id, upcast))
    dtypes: dict[torch.dtype, str] = {}
    for name, param in params.items():
        dtypes.setdefault(torch.float32 if id(param) in widened else param.dtype, name)
    if len(dtypes) > 1:
        listed = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        raise ValueError(
            f"a unit of FSDP 1 needs parameters of one dtype, but {listed}: convert them, choose other units "
            "(auto_wrap_policy), or use fsdp_version=2."
        )


def _check_flat_param(params: dict[str, nn.Parameter], optimizers: Iterable[Any]) -> None:
    """Raises unless a unit without original parameters is trained or frozen as a whole, in one parameter group."""
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
def _ignore_no_shard_warning() -> Iterator[None]:
    """Silences torch's warning that NO_SHARD is equivalent to DistributedDataParallel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NO_SHARD.*")
        yield
