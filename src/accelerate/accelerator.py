"""`Accelerator`: the public API of training scripts.

A façade: the constructor resolves the settings, joins the process group and selects the strategy, and methods delegate to
it. Nothing here branches on how the run is distributed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import torch

from . import data_loader as loading
from .checkpointing import CheckpointMixin
from .optimizer import AcceleratedOptimizer
from .parallelism_config import resolve_parallelism_config
from .precision import select_precision
from .runtime import collectives, world
from .runtime.memory import release_memory
from .runtime.process_control import ProcessControl
from .scheduler import AcceleratedScheduler
from .settings import resolve_args
from .settings.enums import PROFILE_PATTERN_NAME, DistributedType, DynamoBackend, FP8BackendType, RNGType
from .settings.fp8 import AORecipeKwargs, FP8RecipeKwargs, MSAMPRecipeKwargs, TERecipeKwargs
from .settings.handlers import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from .state import AcceleratorState, GradientState, is_initialized
from .strategies import Bundle, Strategy, StrategyConfig, select_strategy
from .strategies.accumulation import AccumulateContext, StepCounter, TokenWeightedMean
from .strategies.base import is_dispatched
from .strategies.bundle import sort_prepare_args
from .tracking import GeneralTracker, TrackingMixin, filter_trackers

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from .parallelism_config import ParallelismConfig
    from .settings.parallel import TorchTensorParallelPlugin
    from .settings.plugins.deepspeed import DeepSpeedPlugin
    from .settings.plugins.fsdp import FullyShardedDataParallelPlugin
    from .settings.plugins.megatron import MegatronLMPlugin

logger = logging.getLogger(__name__)

_T1 = TypeVar("_T1")
_T2 = TypeVar("_T2")
_T3 = TypeVar("_T3")
_T4 = TypeVar("_T4")
_T5 = TypeVar("_T5")
_T6 = TypeVar("_T6")
_Module = TypeVar("_Module", bound="nn.Module")
_Places: TypeAlias = list[bool | None] | None

_RECIPES = (FP8RecipeKwargs, TERecipeKwargs, AORecipeKwargs, MSAMPRecipeKwargs)
_HANDLERS = (
    *(AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs, ProfileKwargs),
    *_RECIPES,
)


class Accelerator(ProcessControl, CheckpointMixin, TrackingMixin):
    """Runs one training loop on any number of processes and any device.

    Args:
        device_placement: Move models, optimizers and batches to `device`.
        split_batches: Legacy alias of `DataLoaderConfiguration.split_batches`.
        mixed_precision: ``no``, ``fp16``, ``bf16`` (or ``fp8``); None uses the launcher's setting.
        gradient_accumulation_steps: Micro-batches per optimizer step; 1 uses the launcher's setting.
        cpu: Use the CPU even if an accelerator is available.
        dataloader_config: How loaders distribute data over processes.
        deepspeed_plugin: Settings of DeepSpeed, or several by name, of which the first is active.
        fsdp_plugin: Settings of FSDP.
        torch_tp_plugin: Legacy alias of `ParallelismConfig.tp_size`.
        megatron_lm_plugin: Settings of Megatron-LM.
        rng_types: Random number generators to synchronize at the start of each epoch.
        log_with: Trackers: names, `LoggerType` members, or instances of `GeneralTracker`.
        project_dir: Folder for checkpoints and logs.
        project_config: Folders for checkpoints and logs, and naming of checkpoints.
        gradient_accumulation_plugin: Settings of gradient accumulation.
        step_scheduler_with_optimizer: Step schedulers only after their optimizers stepped.
        kwargs_handlers: Settings of autocast, DDP, the gradient scaler, the process group and the profiler.
        dynamo_backend: Compile models with this backend of ``torch.compile``.
        dynamo_plugin: Settings of ``torch.compile``.
        deepspeed_plugins: Alias of `deepspeed_plugin`.
        parallelism_config: Sizes of the device mesh.
        downcast_bf16: On TPUs in bf16, keep fp64 at 32 bits (a legacy setting); no effect elsewhere.
        schedule_per_update: Step schedulers once per optimizer step. By default an optimizer step on N processes counts as
            N scheduler steps, since it consumes N batches.
        kwarg_handlers: Alias of `kwargs_handlers`.

    Raises:
        ValueError, TypeError: for settings that contradict each other or are not supported.

    Example:
        ```python
        accelerator = Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for inputs, targets in loader:
            loss = loss_function(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        ```
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = resolve_args.UNSET,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        torch_tp_plugin: TorchTensorParallelPlugin | None = None,
        megatron_lm_plugin: MegatronLMPlugin | None = None,
        rng_types: list[str | RNGType] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[KwargsHandler] | None = None,
        dynamo_backend: DynamoBackend | str | None = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        parallelism_config: ParallelismConfig | None = None,
        *,
        downcast_bf16: bool | str | None = None,
        schedule_per_update: bool = False,
        kwarg_handlers: list[KwargsHandler] | None = None,
    ) -> None:
        self.downcast_bf16 = downcast_bf16
        engines = resolve_args.one_of(deepspeed_plugin=deepspeed_plugin, deepspeed_plugins=deepspeed_plugins)
        distribution = _distribution(fsdp_plugin, engines, megatron_lm_plugin, torch_tp_plugin, parallelism_config)
        self.project_configuration = project_config or ProjectConfiguration(project_dir=project_dir)
        if project_dir is not None and self.project_dir is None:
            self.project_configuration.set_directories(project_dir)
        handlers = resolve_args.sort_handlers(kwargs_handlers or kwarg_handlers or [], _HANDLERS)
        self.autocast_handler: AutocastKwargs | None = handlers[AutocastKwargs]
        self.ddp_handler: DistributedDataParallelKwargs | None = handlers[DistributedDataParallelKwargs]
        self.scaler_handler: GradScalerKwargs | None = handlers[GradScalerKwargs]
        self.init_handler: InitProcessGroupKwargs | None = handlers[InitProcessGroupKwargs]
        self.profile_handler: ProfileKwargs | None = handlers[ProfileKwargs]
        self.fp8_recipe_handler = next((handlers[kind] for kind in _RECIPES if handlers[kind] is not None), None)
        plugin = resolve_args.gradient_accumulation(gradient_accumulation_plugin, gradient_accumulation_steps)
        dynamo = resolve_args.dynamo(dynamo_backend, dynamo_plugin)

        self.state = AcceleratorState(
            mixed_precision=mixed_precision,
            cpu=cpu,
            dynamo_plugin=dynamo,
            _from_accelerator=True,
            **distribution,
            **(self.init_handler.to_kwargs() if self.init_handler is not None else {}),
        )
        self.gradient_state = GradientState(plugin)
        self.device_placement = device_placement
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer

        precision = select_precision(self.mixed_precision, self.device, self.autocast_handler, self.scaler_handler)
        settings = StrategyConfig(
            precision=precision,
            dataloader_config=resolve_args.data_loader_config(dataloader_config, split_batches),
            rng_types=resolve_args.rng_types(rng_types),
            device_placement=device_placement,
            step_scheduler_with_optimizer=step_scheduler_with_optimizer,
            schedule_per_update=schedule_per_update,
            ddp=self.ddp_handler,
            dynamo=dynamo,
            fsdp=getattr(self.state, "fsdp_plugin", None),
            mesh=self.torch_device_mesh,
            parallelism_config=self.parallelism_config,
        )
        strategy = select_strategy(self.distributed_type, self.parallelism_config, fsdp=settings.fsdp)
        self.strategy: Strategy = strategy(world.current(), settings)
        self.precision = precision
        self.scaler = precision.scaler
        self.native_amp = self.mixed_precision in ("fp16", "bf16")
        self._counter: StepCounter = StepCounter(self.strategy)
        self._token_mean: TokenWeightedMean = TokenWeightedMean(self.strategy)

        self._models: list[nn.Module] = []
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._dataloaders: list[Any] = []
        self._custom_objects: list[Any] = []
        self.flag_tensor: torch.Tensor | None = None
        self.has_lomo_optimizer = False

        self.log_with = filter_trackers(log_with, self.logging_dir)
        self.trackers: list[GeneralTracker] = []

    # State -----------------------------------------------------------------------------------------------------------

    @property
    def distributed_type(self) -> DistributedType:
        """How the run is distributed."""
        kind: DistributedType = self.state.distributed_type
        return kind

    @property
    def num_processes(self) -> int:
        """Number of processes over all machines."""
        count: int = self.state.num_processes
        return count

    @property
    def process_index(self) -> int:
        """Rank of this process over all machines."""
        rank: int = self.state.process_index
        return rank

    @property
    def local_process_index(self) -> int:
        """Rank of this process on its machine."""
        rank: int = self.state.local_process_index
        return rank

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.state.device
        return device

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0 of the run."""
        return self.state.is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process on its machine."""
        return self.state.is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank of the run."""
        return self.state.is_last_process

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.state.use_distributed

    @property
    def multi_device(self) -> bool:
        """Whether the run uses several devices."""
        return self.use_distributed

    @property
    def mixed_precision(self) -> str:
        """``no``, ``fp16``, ``bf16`` or ``fp8``."""
        return self.state.mixed_precision

    @property
    def is_fsdp2(self) -> bool:
        """Whether the run uses FSDP2 (``fully_shard``)."""
        return self.state.is_fsdp2

    @property
    def fp8_backend(self) -> FP8BackendType:
        """The library for fp8, or ``NO``."""
        return FP8BackendType.NO

    @property
    def fp8_enabled(self) -> bool:
        """Whether models compute in fp8."""
        return self.mixed_precision == "fp8"

    @property
    def has_fp8_handler(self) -> bool:
        """Whether a recipe for fp8 was given."""
        return self.fp8_recipe_handler is not None

    @property
    def delayed_fp8_autocast(self) -> bool:
        """Whether models enter fp8's autocast after being wrapped; False without fp8."""
        return False

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The DeepSpeed plugin in use, or None."""
        return self.state.deepspeed_plugin

    @property
    def parallelism_config(self) -> ParallelismConfig | None:
        """The sizes of the device mesh, or None."""
        sizes: ParallelismConfig | None = self.state.parallelism_config
        return sizes

    @property
    def torch_device_mesh(self) -> Any:
        """The device mesh, or None."""
        return self.state.device_mesh

    @property
    def is_composable_parallelism_enabled(self) -> bool:
        """Whether several kinds of parallelism are combined."""
        return self.parallelism_config is not None

    @property
    def tensor_parallel_rank(self) -> int:
        """This process's rank in its tensor-parallel group."""
        return self._mesh_rank("tp")

    @property
    def pipeline_parallel_rank(self) -> int:
        """This process's rank in its pipeline-parallel group."""
        return self._mesh_rank("pp")

    @property
    def context_parallel_rank(self) -> int:
        """This process's rank in its context-parallel group."""
        return self._mesh_rank("cp")

    @property
    def data_parallel_rank(self) -> int:
        """Index of this process's model replica."""
        return self._mesh_rank("dp_replicate")

    @property
    def data_parallel_shard_rank(self) -> int:
        """This process's rank in its sharding group."""
        return self._mesh_rank("dp_shard")

    def _mesh_rank(self, dimension: str) -> int:
        if self.torch_device_mesh is None or dimension not in self.torch_device_mesh.mesh_dim_names:
            raise RuntimeError(f"this run has no {dimension!r} dimension: it was started without a parallelism_config.")
        rank: int = self.torch_device_mesh[dimension].get_local_rank()
        return rank

    # Data loading and accumulation -------------------------------------------------------------------------------------

    @property
    def dataloader_config(self) -> DataLoaderConfiguration:
        """How loaders distribute data over processes; applies to loaders prepared after it is set."""
        return self.strategy.config.dataloader_config

    @dataloader_config.setter
    def dataloader_config(self, config: DataLoaderConfiguration) -> None:
        self.strategy.config.dataloader_config = config

    @property
    def rng_types(self) -> list[str]:
        """Random number generators that are synchronized at the start of each epoch."""
        return self.strategy.config.rng_types

    @rng_types.setter
    def rng_types(self, rng_types: list[str | RNGType] | None) -> None:
        self.strategy.config.rng_types = resolve_args.rng_types(rng_types)

    @property
    def split_batches(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """See `DataLoaderConfiguration`."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, even_batches: bool) -> None:
        self.dataloader_config.even_batches = even_batches

    @property
    def use_seedable_sampler(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self.dataloader_config.use_stateful_dataloader

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        self.gradient_state.plugin_kwargs.update(GradientAccumulationPlugin(num_steps=steps).to_kwargs())

    @property
    def sync_gradients(self) -> bool:
        """Whether gradients are synchronized and the optimizer steps at this micro-batch."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, sync_gradients: bool) -> None:
        self.gradient_state._set_sync_gradients(sync_gradients)

    @property
    def step(self) -> int:
        """Micro-batches that `accumulate` has counted since a loader last ended."""
        return self._counter.step

    @step.setter
    def step(self, step: int) -> None:
        self._counter.step = step

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether any optimizer skipped its last step because fp16 gradients overflowed."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    @property
    def project_dir(self) -> str | os.PathLike[str] | None:
        """Folder for checkpoints and logs."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | os.PathLike[str] | None:
        """Folder for trackers that write files."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """The number of the next automatically named checkpoint."""
        return self.project_configuration.iteration

    @property
    def should_save_model(self) -> bool:
        """Whether this process writes files that are equal on all processes."""
        if self.project_configuration.save_on_each_node:
            return self.is_local_main_process
        return self.is_main_process

    # Synchronization -------------------------------------------------------------------------------------------------

    def wait_for_everyone(self) -> None:
        """Blocks until every process has called it."""
        self.state.wait_for_everyone()

    def set_trigger(self) -> None:
        """Sets this process's flag for `check_trigger`."""
        self.flag_tensor = torch.tensor(1, device=self.device)

    def check_trigger(self) -> bool:
        """Returns whether any process called `set_trigger` since the last call, and clears the flag. A collective."""
        flag = self.flag_tensor if self.flag_tensor is not None else torch.tensor(0, device=self.device)
        raised = world.current().collectives.all_reduce(flag).item() >= 1
        self.flag_tensor = None
        return raised

    set_breakpoint = set_trigger
    check_breakpoint = check_trigger

    # Prepare ---------------------------------------------------------------------------------------------------------

    @overload
    def prepare(self, a: _T1, /, *, device_placement: _Places = None) -> _T1: ...
    @overload
    def prepare(self, a: _T1, b: _T2, /, *, device_placement: _Places = None) -> tuple[_T1, _T2]: ...
    @overload
    def prepare(self, a: _T1, b: _T2, c: _T3, /, *, device_placement: _Places = None) -> tuple[_T1, _T2, _T3]: ...
    @overload
    def prepare(
        self, a: _T1, b: _T2, c: _T3, d: _T4, /, *, device_placement: _Places = None
    ) -> tuple[_T1, _T2, _T3, _T4]: ...
    @overload
    def prepare(
        self, a: _T1, b: _T2, c: _T3, d: _T4, e: _T5, /, *, device_placement: _Places = None
    ) -> tuple[_T1, _T2, _T3, _T4, _T5]: ...
    @overload
    def prepare(
        self, a: _T1, b: _T2, c: _T3, d: _T4, e: _T5, f: _T6, /, *, device_placement: _Places = None
    ) -> tuple[_T1, _T2, _T3, _T4, _T5, _T6]: ...
    @overload
    def prepare(self, *args: Any, device_placement: _Places = None) -> Any: ...
    def prepare(self, *args: Any, device_placement: list[bool | None] | None = None) -> Any:
        """Prepares models, optimizers, loaders and schedulers for the run, and returns them in the same order.

        Args:
            *args: Modules, optimizers, loaders and schedulers in any order. Prepared objects, None and objects of other
                types are returned unchanged, with a warning for likely mistakes (a dataset, a list of models).
            device_placement: For each argument, whether to move it to `device`; None uses the constructor's setting.

        Raises:
            ValueError: for an object that cannot be prepared, before any is modified.
        """
        placement = device_placement if device_placement is not None else [None] * len(args)
        if len(placement) != len(args):
            raise ValueError(
                f"device_placement needs one entry for each of the {len(args)} objects to prepare, found "
                f"{len(placement)}."
            )
        moved = frozenset(
            place for place, wanted in enumerate(placement) if (self.device_placement if wanted is None else wanted)
        )
        bundle = sort_prepare_args(
            args, on_device=moved, prepared=(*self._models, *self._optimizers, *self._schedulers)
        )
        self.strategy.check(bundle)
        self._register(self.strategy.prepare(bundle))
        # Schedulers come last, since they need the prepared optimizers.
        for place, scheduler in bundle.schedulers.items():
            bundle.schedulers[place] = self.prepare_scheduler(scheduler)
        results = bundle.in_order()
        return results[0] if len(results) == 1 else tuple(results)

    def prepare_model(
        self, model: _Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> _Module:
        """Prepares one model.

        Args:
            model: The module.
            device_placement: Move it to `device`; None uses the constructor's setting.
            evaluation_mode: Set up no gradient synchronization, for a model without training.
        """
        if any(model is known for known in self._models):
            return model
        moves = self.device_placement if device_placement is None else device_placement
        bundle = Bundle(models={0: model}, on_device=frozenset({0} if moves else ()), evaluation=evaluation_mode)
        self.strategy.check(bundle)
        self._register(self.strategy.prepare(bundle))
        prepared: Any = bundle.models[0]
        return prepared

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Prepares one optimizer."""
        moves = self.device_placement if device_placement is None else device_placement
        bundle = Bundle(optimizers={0: optimizer}, on_device=frozenset({0} if moves else ()))
        self.strategy.check(bundle)
        self._register(self.strategy.prepare(bundle))
        prepared: AcceleratedOptimizer = bundle.optimizers[0]
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepares one scheduler, whose optimizer must be prepared already."""
        prepared = scheduler
        if not isinstance(scheduler, AcceleratedScheduler):
            prepared = self.strategy.prepare_scheduler(scheduler, self._optimizers)
        _append_new(self._schedulers, prepared)
        return prepared

    def prepare_data_loader(
        self, data_loader: _T1, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> _T1:
        """Prepares one loader.

        Args:
            data_loader: A torch ``DataLoader``.
            device_placement: Move its batches to `device`; None uses the constructor's setting.
            slice_fn_for_dispatch: Slices the batch of rank 0 for each rank; by default along dimension 0.
        """
        moves = self.device_placement if device_placement is None else device_placement
        prepared: _T1 = self.strategy.prepare_data_loader(data_loader, moves, slice_fn_for_dispatch)
        _append_new(self._dataloaders, prepared)
        return prepared

    def _register(self, bundle: Bundle) -> None:
        for models, known in (
            (bundle.models, self._models),
            (bundle.optimizers, self._optimizers),
            (bundle.loaders, self._dataloaders),
        ):
            for prepared in models.values():
                _append_new(known, prepared)

    # Step ------------------------------------------------------------------------------------------------------------

    def backward(
        self, loss: torch.Tensor, *, num_items: int | float | torch.Tensor | None = None, **kwargs: Any
    ) -> None:
        """Runs the backward pass of a loss, scaled for gradient accumulation and fp16.

        Args:
            loss: A scalar: without `num_items` the mean over the micro-batch, which is divided by
                `gradient_accumulation_steps`.
            num_items: Number of items (tokens, samples) over which `loss` is a *sum*. Gradients are then averaged exactly
                over the items of all micro-batches of all ranks, also if their sizes differ.
            **kwargs: For ``Tensor.backward``; ``learning_rate`` for a LOMO optimizer.

        Raises:
            TypeError: for a loss that is not a tensor.

        Example:
            ```python
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = cross_entropy(model(batch["ids"]), batch["labels"], reduction="sum")
                    accelerator.backward(loss, num_items=(batch["labels"] != -100).sum())
                    optimizer.step()
                    optimizer.zero_grad()
            ```
        """
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"backward expects the loss as a tensor, found {type(loss).__name__}: {loss!r}.")
        learning_rate = kwargs.pop("learning_rate", None)
        if learning_rate is not None and self.has_lomo_optimizer:
            self.lomo_backward(loss, learning_rate)
        elif num_items is None:
            self.strategy.backward(loss, steps=self.gradient_state.num_steps, **kwargs)
        else:
            models = self._counter.active_models or self._models
            self._token_mean.add(num_items, models)
            self.strategy.backward(loss, steps=1, **kwargs)
            if self.gradient_state.sync_gradients and not self._counter.no_sync_depth:
                self._token_mean.divide(models)

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Runs the fused backward and step of LOMO optimizers, which never store all gradients at once."""
        lomo = [optimizer.optimizer for optimizer in self._optimizers if hasattr(optimizer.optimizer, "fused_backward")]
        if not lomo:
            raise ValueError("lomo_backward needs a prepared LOMO optimizer; use `backward` with any other.")
        for optimizer in lomo:
            optimizer.fused_backward(loss, learning_rate)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """Returns a context for one micro-batch, with one forward and backward.

        Gradients are synchronized, and optimizers step, in every `gradient_accumulation_steps`-th block, and at the last
        batch of a loader.

        Args:
            *models: The models whose gradients are accumulated.
        """
        return AccumulateContext(self._counter, models)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Disables gradient synchronization of a model for backwards inside the block."""
        self._counter.no_sync_depth += 1
        try:
            with self.strategy.no_sync(model):
                yield
        finally:
            self._counter.no_sync_depth -= 1

    @staticmethod
    @contextmanager
    def trigger_sync_in_backward(model: nn.Module) -> Iterator[None]:
        """Synchronizes gradients in a backward inside the block, after forwards under `no_sync`."""
        state = AcceleratorState()
        strategy = select_strategy(
            state.distributed_type, state.parallelism_config, fsdp=getattr(state, "fsdp_plugin", None)
        )
        with strategy.sync_in_backward(model):
            yield

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divides fp16 gradients by the loss scale, so that they can be inspected or clipped.

        Args:
            optimizer: One or several of the prepared optimizers; None selects all.
        """
        if self.scaler is not None and not self.sync_gradients:
            raise ValueError(
                "fp16 gradients cannot be unscaled or clipped while they are being accumulated: do so only "
                "`if accelerator.sync_gradients:`."
            )
        chosen = self._optimizers if optimizer is None else optimizer
        for one in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
            self.strategy.unscale_gradients(one)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """Scales gradients to a norm of at most `max_norm` and returns the norm before.

        Call it only if `sync_gradients` is true, after gradients are accumulated.
        """
        self.unscale_gradients()
        return self.strategy.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamps each gradient to ``[-clip_value, clip_value]``."""
        self.unscale_gradients()
        self.strategy.clip_grad_value_(parameters, clip_value)

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
        """Enables the run's mixed precision for code outside a prepared model's forward."""
        with self.precision.autocast(autocast_handler or self.autocast_handler):
            yield

    @contextmanager
    def join_uneven_inputs(self, joinables: Sequence[nn.Module], even_batches: bool | None = None) -> Iterator[None]:
        """Allows processes to iterate over different numbers of batches inside the block.

        Args:
            joinables: The prepared models that are trained in the block.
            even_batches: Overrides the loaders' `even_batches` in the block; None does not.
        """
        with loading.override_even_batches(self._dataloaders, even_batches), self.strategy.join(joinables):
            yield

    @contextmanager
    def maybe_context_parallel(
        self,
        buffers: list[torch.Tensor] | None = None,
        buffer_seq_dims: list[int] | None = None,
        no_restore_buffers: set[torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Shards sequences over ranks inside the block, in a run with context or sequence parallelism; else does nothing.

        Args:
            buffers: Tensors to shard along their sequence dimension.
            buffer_seq_dims: The sequence dimension of each.
            no_restore_buffers: Buffers that need not be restored after the block.
        """
        with self.strategy.context_parallel(buffers, buffer_seq_dims, no_restore_buffers):
            yield

    def deepspeed_ulysses_dl_adapter(self, dl: Any, model: nn.Module) -> Any:
        """Wraps a loader to shard its sequences for DeepSpeed's sequence parallelism; returns `dl` in other runs."""
        return self.strategy.sequence_parallel_loader(dl, model)

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profiles the block with `torch.profiler`.

        Args:
            profile_handler: Settings of the profiler; None uses the constructor's. With `output_trace_dir` each process
                exports a trace there.
        """
        handler = profile_handler or self.profile_handler or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is not None:
            os.makedirs(handler.output_trace_dir, exist_ok=True)
            name = PROFILE_PATTERN_NAME.format(suffix=self.process_index)
            profiler.export_chrome_trace(os.path.join(handler.output_trace_dir, name))
            self.wait_for_everyone()

    # Collectives -----------------------------------------------------------------------------------------------------

    def gather(self, tensor: _T1) -> _T1:
        """All-gathers a tree of tensors, concatenated along dimension 0."""
        return collectives.gather(tensor)

    def gather_for_metrics(self, input_data: _T1, use_gather_object: bool = False) -> _T1:
        """Gathers predictions, and drops samples that were repeated at the end of a loader for even batches.

        With context or sequence parallelism, per-rank outputs are unsharded first: tensors with the tokens of a shard in
        dimension 1 are concatenated along it, other floats are averaged; see docs/mesh.md.

        Args:
            input_data: A tree of tensors, or any objects (lists are concatenated over the ranks).
            use_gather_object: Gather tensors as objects, if their shapes differ or lists are wanted.

        Raises:
            ValueError: for other outputs, such as sums, that differ between the ranks of a sequence.
        """
        together = self.strategy.unshard_outputs(input_data)
        gathered: _T1 = loading.gather_for_metrics(
            together, self.gradient_state, use_gather_object=use_gather_object, data_ranks=self.strategy.data_shard
        )
        return gathered

    def reduce(self, tensor: _T1, reduction: str = "sum", scale: float = 1.0) -> _T1:
        """All-reduces a tree by ``sum``, ``mean``, ``max`` or ``min``, times `scale`; ``none`` returns the input."""
        return collectives.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: _T1, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> _T1:
        """Pads tensors along `dim` to the largest size over the ranks."""
        return collectives.pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    # Models and memory -------------------------------------------------------------------------------------------------

    def unwrap_model(self, model: _T1, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> _T1:
        """Unwraps a model from the containers of `prepare`.

        Args:
            model: A prepared model.
            keep_fp32_wrapper: Keep the mixed-precision wrapper of its forward.
            keep_torch_compile: Return a compiled model compiled.
        """
        unwrapped: _T1 = self.strategy.unwrap(model, keep_fp32_wrapper, keep_torch_compile)
        return unwrapped

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Returns the model's full state dict.

        Args:
            model: A prepared model.
            unwrap: Remove the prefixes of containers (``module.``) from FQNs.
        """
        return self.strategy.model_state(model) if unwrap else model.state_dict()

    def verify_device_map(self, model: nn.Module) -> bool:
        """Returns whether a model or a submodule is dispatched over several devices by a device map, or offloaded."""
        return is_dispatched([model])

    def free_memory(self, *objects: Any) -> list[None]:
        """Drops references to all prepared objects, releases cached memory, and returns a None for each of `objects`.

        Example:
            ```python
            model, optimizer = accelerator.free_memory(model, optimizer)
            ```
        """
        for known in (self._models, self._optimizers, self._schedulers, self._dataloaders):
            known.clear()
        self.step = 0
        return release_memory(*objects)

    def clear(self, *objects: Any) -> list[None]:
        """See `free_memory`."""
        return self.free_memory(*objects)

    def skip_first_batches(self, dataloader: DataLoader[_T1], num_batches: int = 0) -> DataLoader[_T1]:
        """Returns the loader without its first `num_batches` batches, to resume in the middle of an epoch."""
        return loading.skip_first_batches(dataloader, num_batches)

    def end_training(self) -> None:
        """Finishes background checkpoints and trackers, and destroys the process group."""
        self.wait_for_checkpoint()
        self._finish_trackers()
        self.state.destroy_process_group()

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerator:
        logger.info("deepcopy of an Accelerator returns the same object, which represents this process's run.")
        return self


def _append_new(known: list[Any], item: Any) -> None:
    if not any(item is other for other in known):
        known.append(item)


def _distribution(fsdp: Any, deepspeed: Any, megatron: Any, tensor_parallel: Any, sizes: Any) -> dict[str, Any]:
    """Resolves plugins and mesh from arguments, and from the launcher's variables if no state exists yet.

    Raises:
        TypeError: for an object that is not such a plugin.
        ValueError: before the process group is joined, for settings that contradict each other or fit no strategy.
    """
    plugins = resolve_args.plugins(fsdp, deepspeed, megatron, tensor_parallel, launched=not is_initialized())
    if not is_initialized():
        sizes = resolve_parallelism_config(sizes, tensor_parallel)
        select_strategy(plugins.distributed_type or DistributedType.NO, sizes, plugins)
    return {
        "fsdp_plugin": plugins.fsdp,
        "deepspeed_plugin": plugins.deepspeed,
        "megatron_lm_plugin": plugins.megatron,
        "torch_tp_plugin": plugins.tensor_parallel,
        "parallelism_config": sizes,
    }
