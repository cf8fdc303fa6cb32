"""`Strategy`: prepares objects, synchronizes gradients and lists checkpoint entries. The base class is a single process.

`Bundle` carries the objects of one ``prepare`` call through ``check`` and ``prepare`` and returns them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..data_loader.mesh import data_shard_of_mesh
from ..optimizer import AcceleratedOptimizer
from ..runtime.devices import with_index
from ..runtime.system.lazy import loaded_classes
from ..runtime.tensors.forward import extract_model_from_parallel
from ..runtime.world import DataShard, World
from ..scheduler import AcceleratedScheduler
from ..settings import env
from ..settings.enums import DistributedType, DynamoBackend
from ..settings.handlers import DataLoaderConfiguration
from .parallel.mesh import sync_rng

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from ..checkpointing import LoadItem, SaveItem
    from ..parallelism_config import ParallelismConfig
    from ..precision import Precision
    from ..settings.handlers import DistributedDataParallelKwargs, TorchDynamoPlugin
    from ..settings.plugins.fsdp import FullyShardedDataParallelPlugin
    from ..settings.resolve_args import Plugins
    from .parallel.context.manager import ContextParallelManager

_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


@dataclass
class Bundle:
    """The objects of one ``prepare`` call, by type and position.

    Attributes:
        models, optimizers, schedulers, loaders, others: Position in the call -> object. `others` are returned unchanged.
        on_device: Positions of the objects to move to the device of the run.
        evaluation: Whether models are used without gradients, and need no synchronization.
    """

    models: dict[int, nn.Module] = field(default_factory=dict)
    optimizers: dict[int, Any] = field(default_factory=dict)
    schedulers: dict[int, Any] = field(default_factory=dict)
    loaders: dict[int, Any] = field(default_factory=dict)
    others: dict[int, Any] = field(default_factory=dict)
    on_device: frozenset[int] = frozenset()
    evaluation: bool = False

    def in_order(self) -> list[Any]:
        """Returns all objects in the order of the call."""
        everything = {**self.models, **self.optimizers, **self.schedulers, **self.loaders, **self.others}
        return [everything[index] for index in sorted(everything)]


@dataclass
class StrategyConfig:
    """Configuration of a run, besides its `World`.

    Attributes:
        precision: Precision in which models compute.
        device_placement: Default of moving models, optimizers and batches to the device of the run.
        step_scheduler_with_optimizer: Whether schedulers step only if their optimizers did.
        schedule_per_update: Whether schedulers step once per update, whatever the number of processes.
        ddp: Arguments for DistributedDataParallel.
        dynamo: Options of torch.compile.
        fsdp: Options of FSDP.
        mesh: The device mesh.
        parallelism_config: Sizes of the mesh, and options of its dimensions.
        dataloader_config: How data is divided over processes.
        rng_types: Random number generators to synchronize at the start of each epoch.
    """

    precision: Precision
    dataloader_config: DataLoaderConfiguration = field(default_factory=DataLoaderConfiguration)
    rng_types: list[str] = field(default_factory=list)
    device_placement: bool = True
    step_scheduler_with_optimizer: bool = True
    schedule_per_update: bool = False
    ddp: DistributedDataParallelKwargs | None = None
    dynamo: TorchDynamoPlugin | None = None
    fsdp: FullyShardedDataParallelPlugin | None = None
    mesh: DeviceMesh | None = None
    parallelism_config: ParallelismConfig | None = None


class Strategy:
    """Strategy of a single process, and base of the others.

    Args:
        world: This process and its peers.
        config: Configuration of the run.
    """

    distributed_types: ClassVar[tuple[DistributedType, ...]] = (DistributedType.NO,)
    optimizer_class: ClassVar[type[AcceleratedOptimizer]] = AcceleratedOptimizer
    scheduler_class: ClassVar[type[AcceleratedScheduler]] = AcceleratedScheduler
    supports_local_sgd: bool = True
    """Whether each rank holds a whole model that it can train without communication."""
    can_save_mid_accumulation: ClassVar[bool] = True
    """Whether a checkpoint can hold partly accumulated gradients."""
    supported_mesh_dims: ClassVar[frozenset[str]] = frozenset({"dp_replicate"})
    """Dimensions of the device mesh that this strategy supports."""

    def __init__(self, world: World, config: StrategyConfig) -> None:
        self.world = world
        self.config = config
        self._cp_manager = _make_cp_manager(config)
        if self._cp_manager is not None:
            self.supports_local_sgd = False  # ranks that share a sequence need equal weights

    @classmethod
    def check_plugins(cls, plugins: Plugins) -> None:
        """Raises if this strategy does not support the plugins, before the process group is initialized.

        Raises:
            ValueError: naming the unsupported option.
        """

    @classmethod
    def check_parallelism(cls, parallelism_config: ParallelismConfig) -> None:
        """Raises if this strategy does not support details of the device mesh, before the process group is initialized.

        Raises:
            ValueError: naming the unsupported option.
        """
        from .parallel.context.backends import validate_config

        validate_config(parallelism_config)

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        """Raises if an object cannot be prepared, before anything changes.

        Raises:
            ValueError: naming the object and the remedy.
        """
        _check_placeholders(bundle.others.values())
        for index, model in bundle.models.items():
            if self._cp_manager is not None:
                self._cp_manager.check_model(model)
            _check_parameters(model, moves=index in bundle.on_device)
            if not bundle.evaluation and bundle.optimizers:
                _check_quantized(model, self.world)
        for index, optimizer in bundle.optimizers.items():
            _check_optimizer(optimizer, bundle.models.values(), moves=index in bundle.on_device)

    def prepare(self, bundle: Bundle) -> Bundle:
        """Prepares the models, optimizers and loaders of a bundle, and returns it."""
        for index, model in bundle.models.items():
            bundle.models[index] = self.prepare_model(model, index in bundle.on_device, bundle.evaluation)
            if self._cp_manager is not None:
                self._cp_manager.register_hooks(bundle.models[index])
        for index, optimizer in bundle.optimizers.items():
            bundle.optimizers[index] = self.prepare_optimizer(optimizer, index in bundle.on_device)
        for index, loader in bundle.loaders.items():
            bundle.loaders[index] = self.prepare_data_loader(loader, index in bundle.on_device)
        return bundle

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        """Converts, moves and wraps one model."""
        model = self.config.precision.convert(model)
        self.config.precision.wrap_forward(model)
        if on_device and not _is_dispatched(model):
            model = model.to(self.world.device)
        if not evaluation:
            model = self.wrap_model(model)
        return self._compile(model)

    def _compile(self, model: nn.Module) -> nn.Module:
        plugin = self.config.dynamo
        if plugin is None or plugin.backend is DynamoBackend.NO:
            return model
        from .parallel.compile import allow_tf32, compile_model  # imports torch's compiler

        if self.config.precision.name == "no" and self.world.device.type == "cuda":
            allow_tf32()
        return compile_model(model, plugin)

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Wraps a model so that its gradients are synchronized between ranks."""
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, on_device: bool) -> AcceleratedOptimizer:
        """Wraps an optimizer; a wrapped one is returned unchanged."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return optimizer
        return self.optimizer_class(optimizer, device_placement=on_device, scaler=self.config.precision.scaler)

    def prepare_scheduler(self, scheduler: Any, optimizers: Sequence[AcceleratedOptimizer]) -> AcceleratedScheduler:
        """Wraps a scheduler, tied to its own optimizer if that is among `optimizers`, else to all of them."""
        own = getattr(scheduler, "optimizer", None)
        matching = [optimizer for optimizer in optimizers if own is optimizer or own is optimizer.optimizer]
        return self.scheduler_class(
            scheduler,
            matching or list(optimizers),
            step_with_optimizer=self.config.step_scheduler_with_optimizer,
            split_batches=self.config.dataloader_config.split_batches,
            per_update=self.config.schedule_per_update,
        )

    def prepare_data_loader(self, loader: Any, on_device: bool, slice_fn: Any = None) -> Any:
        """Builds the loader of this rank's shard of the data; a prepared one is returned unchanged.

        Args:
            loader: A torch ``DataLoader``.
            on_device: Whether to move its batches to the device of the run.
            slice_fn: Slices a batch for the ranks if rank 0 reads for all; None slices along dimension 0.
        """
        from ..data_loader import DataLoaderDispatcher, DataLoaderShard, build_loader, plan_data
        from ..data_loader.stream_shards import supports_lockstep

        if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
            return loader
        config = self.config
        ranks = self.data_shard()
        plan = plan_data(
            loader,
            config.dataloader_config,
            ranks,
            put_on_device=on_device,
            rng_types=config.rng_types,
            slice_fn=slice_fn,
            lockstep=supports_lockstep(ranks),
        )
        return build_loader(plan, self.world.device, config.mesh)

    def data_shard(self) -> DataShard:
        """Returns the shard of the data that this rank reads."""
        if self.config.mesh is not None:
            return data_shard_of_mesh(self.config.mesh)
        return DataShard(self.world.rank, self.world.size)

    def sync_rng(self) -> None:
        """Broadcasts RNG states between ranks that hold parts of one model; a load may have made them differ."""
        sync_rng(self.world, self.config.mesh)

    # Step ------------------------------------------------------------------------------------------------------------

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Returns a context whose backward leaves gradients local."""
        # A model that the user has wrapped has its own method.
        own: Callable[[], AbstractContextManager[Any]] | None = getattr(model, "no_sync", None)
        return own() if own is not None else nullcontext()

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        """Returns a context whose backward synchronizes gradients although the forward ran under `no_sync`."""
        yield

    def backward(self, loss: torch.Tensor, *, steps: int, **kwargs: Any) -> None:
        """Adds the gradients of ``loss / steps``.

        Args:
            loss: A scalar.
            steps: Micro-steps per update.
            **kwargs: For ``Tensor.backward``.
        """
        if steps > 1:
            loss = loss / steps
        scaler = self.config.precision.scaler
        if scaler is not None:
            loss = scaler.scale(loss)
        loss.backward(**kwargs)

    def unscale_gradients(self, optimizer: AcceleratedOptimizer) -> None:
        """Divides the optimizer's gradients by the loss scale, once per step."""
        scaler = self.config.precision.scaler
        if scaler is None:
            return
        scaler.unscale_(unwrap_optimizer(optimizer))

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """See ``torch.nn.utils.clip_grad_norm_``."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """See ``torch.nn.utils.clip_grad_value_``."""
        torch.nn.utils.clip_grad_value_(parameters, clip_value)

    def context_parallel(
        self,
        buffers: Sequence[torch.Tensor] | None,
        dims: Sequence[int] | None,
        no_restore: Iterable[torch.Tensor] | None,
    ) -> AbstractContextManager[Any]:
        """Returns a context that shards sequences over ranks, if the mesh has a dimension for it."""
        return nullcontext() if self._cp_manager is None else self._cp_manager.shard_buffers(buffers, dims, no_restore)

    def unshard_outputs(self, data: Any) -> Any:
        """Unshards outputs of ranks that share sequences, equally on each; see `unshard_outputs`."""
        return data if self._cp_manager is None else self._cp_manager.unshard_outputs(data, self.world.device)

    def sequence_parallel_loader(self, loader: Any, model: nn.Module) -> Any:
        """Returns the loader unchanged: only DeepSpeed needs a loader that shards sequences.

        Raises:
            ValueError: in a run with sequence parallelism.
        """
        if self._cp_manager is not None:
            self._cp_manager.backend.check_data_loader()
        return loader

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Returns a context in which ranks may have different numbers of batches."""
        yield

    # State -----------------------------------------------------------------------------------------------------------

    def unwrap(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """Returns the model inside the wrappers of `prepare`."""
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """Returns the model's full state dict."""
        state: dict[str, Any] = self.unwrap(model, keep_torch_compile=False).state_dict()
        return state

    def state_to_save(self, model: nn.Module) -> dict[str, Any]:
        """Returns the state that a checkpoint saves of a model: the full state, or the shards of this rank."""
        return self.model_state(model)

    def save_items(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[AcceleratedOptimizer],
        weights: Sequence[dict[str, Any]],
        *,
        safe: bool = True,
    ) -> list[SaveItem]:
        """Creates the items of a checkpoint that save models and optimizers.

        Args:
            models: Prepared models, which own the optimizers' parameters.
            optimizers: Prepared optimizers.
            weights: The models' states, as `state_to_save` returns them.
            safe: Save whole models as safetensors.
        """
        from ..checkpointing.items.model_items import save_model, save_optimizer

        items = [save_model(index, state, safe) for index, state in enumerate(weights)]
        return items + [save_optimizer(index, unwrap_optimizer(each)) for index, each in enumerate(optimizers)]

    def load_model_items(self, folder: Path, models: Sequence[nn.Module], options: dict[str, Any]) -> list[LoadItem]:
        """Creates the items that load models, from the layout that the checkpoint has.

        Args:
            folder: Checkpoint folder.
            models: Prepared models.
            options: For ``load_state_dict`` of whole models.
        """
        from ..checkpointing.items.model_items import load_model

        bare = [self.unwrap(model, keep_torch_compile=False) for model in models]
        return [load_model(folder, i, model, sharded=False, options=options) for i, model in enumerate(bare)]

    def load_optimizer_items(
        self, folder: Path, optimizers: Sequence[AcceleratedOptimizer], models: Sequence[nn.Module]
    ) -> list[LoadItem]:
        """Creates the items that load optimizers; `models` provide the names of their parameters."""
        from ..checkpointing.items.model_items import load_optimizer

        bare = [self.unwrap(model, keep_torch_compile=False) for model in models]
        return [load_optimizer(folder, i, unwrap_optimizer(o), bare, sharded=False) for i, o in enumerate(optimizers)]


def unwrap_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer inside a prepared one."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _make_cp_manager(config: StrategyConfig) -> ContextParallelManager | None:
    if config.mesh is None:  # a run without a mesh does not import how sequences are shared
        return None
    from .parallel.context.manager import context_parallel_manager

    return context_parallel_manager(config.mesh, config.parallelism_config)


def _is_dispatched(model: nn.Module) -> bool:
    """Returns whether the model has a device map over several devices or offloaded weights, which a move would undo."""
    return _has_device_map(model) or any(map(_is_offloaded, model.modules()))


def is_dispatched(models: Iterable[nn.Module]) -> bool:
    """Returns whether any module of these models has a device map over several devices, or is offloaded."""
    return any(_has_device_map(module) or _is_offloaded(module) for model in models for module in model.modules())


def _has_device_map(model: nn.Module) -> bool:
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def _is_offloaded(module: nn.Module) -> bool:
    if "_hf_hook" not in module.__dict__:
        return False
    from ..offload.hooks.align import has_offloaded_params  # imported by whoever attached the hook

    return has_offloaded_params(module)


def _check_placeholders(objects: Iterable[Any]) -> None:
    """Raises for placeholders of optimizers and schedulers of an engine, in a run without that engine."""
    placeholders = loaded_classes(
        "accelerate.settings.plugins.deepspeed:DummyOptim",
        "accelerate.settings.plugins.deepspeed:DummyScheduler",
        "accelerate.settings.plugins.megatron:MegatronLMDummyScheduler",
    )
    for item in objects:
        if isinstance(item, placeholders):
            raise ValueError(
                f"{type(item).__name__} stands for an object that DeepSpeed or Megatron-LM makes from its configuration, "
                "and this run uses neither: pass an optimizer or a scheduler of torch."
            )


def _check_parameters(model: nn.Module, moves: bool) -> None:
    name = type(model).__name__
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, _UNINITIALIZED):
            raise ValueError(
                f"parameter {key!r} of {name} has no shape yet (a lazy module): run one batch through the model before "
                "`prepare`, and create its optimizer after that."
            )
        if moves and tensor.is_meta and not _is_dispatched(model):
            raise ValueError(
                f"parameter {key!r} of {name} is on the meta device and holds no values: give the model memory with "
                "`model.to_empty(device=accelerator.device)` and load its weights before `prepare`, or prepare it with "
                "`device_placement=False`."
            )


def _check_quantized(model: nn.Module, world: World) -> None:
    """Raises for training a model whose weights are all quantized, or on another device. Adapters can be trained."""
    bits = next((n for n in (8, 4) if getattr(model, f"is_loaded_in_{n}bit", False)), None)
    if bits is None:
        return
    name = f"{type(model).__name__}, which is quantized to {bits} bits,"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{name} has no trainable weights, since quantized ones are frozen. Add adapters to it (peft), or prepare it "
            "without an optimizer, for inference."
        )
    devices = {with_index(d) if d != "disk" else d for d in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"{name} is spread over {', '.join(sorted(map(str, devices)))} and cannot be trained: load it without a "
            "device_map, so that all of it goes to this process's device."
        )
    from ..offload.tensors import check_device_same

    there = next(iter(devices), world.device)
    if not check_device_same(there, world.device) and not env.flag("ACCELERATE_BYPASS_DEVICE_MAP"):
        raise ValueError(
            f"{name} is on {there}, and this process trains on {world.device}: load it with "
            f"device_map={{'': '{world.device}'}}; moving it would change its weights."
        )


def _check_optimizer(optimizer: Any, models: Iterable[nn.Module], moves: bool) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(isinstance(param, _UNINITIALIZED) for param in params):
        raise ValueError(
            "the optimizer holds parameters that have no shape yet (a lazy module): run one batch through the "
            "model, then create the optimizer, then call `prepare`."
        )
    empty = {param for param in params if param.is_meta}
    if not empty:
        return
    offloaded = {
        param: f"{name!r} of {type(model).__name__}"
        for model in models
        if is_dispatched([model])
        for name, param in model.named_parameters()
        if param in empty
    }
    trained = [name for param, name in offloaded.items() if param.requires_grad]
    if trained:
        raise ValueError(
            f"parameter {trained[0]} is offloaded (so are {len(trained) - 1} others), and what is offloaded cannot be "
            "trained: keep these layers on a device (device_map, max_memory), or freeze them with `requires_grad_(False)` "
            "before the optimizer is created. Adapters (peft) can be trained in layers that are not offloaded."
        )
    if moves and not empty <= offloaded.keys():
        raise ValueError(
            "the optimizer holds parameters on the meta device, which are replaced when the model is given "
            "memory: create the optimizer after `model.to_empty(...)`, then call `prepare`."
        )


def check_device_map(models: Iterable[nn.Module]) -> None:
    """Raises for models on several devices: each rank needs a whole model of its own.

    Raises:
        ValueError: for a device map or offloaded weights. ``ACCELERATE_BYPASS_DEVICE_MAP=true`` skips the check.
    """
    if is_dispatched(models) and not env.flag("ACCELERATE_BYPASS_DEVICE_MAP"):
        raise ValueError(
            "a model spread over several devices by a device map, or offloaded, cannot be trained on several processes: "
            "load it without `device_map`, or start one process."
        )
