"""Kwargs handlers and configurations that `Accelerator` takes, as mutable dataclasses.

They hold and validate values, which are read when objects are prepared. torch is imported inside the methods that build
one of its objects.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import env
from .enums import DDPCommunicationHookType, DynamoBackend
from .env_defaults import default, resolve
from .plugins.comm_hooks import communication_hook

if TYPE_CHECKING:
    import os

    import torch


class KwargsHandler:
    """Base of dataclasses whose fields are keyword arguments of a class or function of torch."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields by name; containers are shallow copies."""
        names = [f.name for f in fields(self)] if is_dataclass(self) else list(vars(self))
        return {name: _copied(getattr(self, name)) for name in names}

    def to_kwargs(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults, so that torch's defaults apply to the rest.

        Example:
            >>> GradScalerKwargs(init_scale=1024.0).to_kwargs()
            {'init_scale': 1024.0}
        """
        defaults = self._defaults()
        return {
            name: value for name, value in self.to_dict().items() if name not in defaults or value != defaults[name]
        }

    def _defaults(self) -> dict[str, Any]:
        return type(self)().to_dict()


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


@dataclass
class AutocastKwargs(KwargsHandler):
    """Arguments of `torch.autocast`, for an `Accelerator` or for one ``accelerator.autocast(...)``.

    Example:
        ```python
        with accelerator.autocast(autocast_handler=AutocastKwargs(enabled=False)):
            loss = stable_loss(outputs.float())
        ```
    """

    enabled: bool = True
    """Whether to autocast at all."""
    cache_enabled: bool | None = None
    """Whether casts of weights are cached within the block; None: torch's default."""


@dataclass
class GradScalerKwargs(KwargsHandler):
    """Arguments of `torch.amp.GradScaler`, used by fp16 mixed precision."""

    init_scale: float = 65536.0
    """Initial loss scale."""
    growth_factor: float = 2.0
    """Factor applied to the scale after `growth_interval` steps without overflow."""
    backoff_factor: float = 0.5
    """Factor applied to the scale after an overflow."""
    growth_interval: int = 2000
    """Steps without overflow after which the scale grows."""
    enabled: bool = True
    """Whether to scale at all."""


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Arguments of `torch.nn.parallel.DistributedDataParallel`, and its communication hook.

    Example:
        ```python
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True, comm_hook=DDPCommunicationHookType.BF16)
        accelerator = Accelerator(kwargs_handlers=[ddp])
        ```
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    """Communication hook that compresses gradients; the member or its value (``"bf16"``)."""
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    """``FP16`` or ``BF16``: casts gradients before `comm_hook`."""
    comm_state_option: dict[str, Any] = field(default_factory=dict)
    """Arguments of `PowerSGDState`, such as ``{"matrix_approximation_rank": 2}``."""

    def __post_init__(self) -> None:
        self.comm_hook = _member(DDPCommunicationHookType, "comm_hook", self.comm_hook)
        self.comm_wrapper = _member(DDPCommunicationHookType, "comm_wrapper", self.comm_wrapper)
        wrappers = [DDPCommunicationHookType.NO, DDPCommunicationHookType.FP16, DDPCommunicationHookType.BF16]
        if self.comm_wrapper not in wrappers:
            raise ValueError(
                f"comm_wrapper={self.comm_wrapper.value!r} does not wrap a hook; it is one of 'no', 'fp16', 'bf16'. "
                f"For {self.comm_wrapper.value!r} itself, set comm_hook."
            )

    def to_dict(
        self, ignore_keys: tuple[str, ...] = ("comm_hook", "comm_wrapper", "comm_state_option")
    ) -> dict[str, Any]:
        """Returns the arguments of `DistributedDataParallel`: all fields but `ignore_keys`."""
        return {name: value for name, value in super().to_dict().items() if name not in ignore_keys}

    def register_comm_hook(self, model: torch.nn.parallel.DistributedDataParallel) -> None:
        """Registers the communication hook of the fields on `model`; ``NO`` registers none.

        All hooks work on every backend of torch.distributed, including bf16 on gloo.

        Args:
            model: The wrapped model, before its first backward pass. Gradients are averaged over its process group.

        Raises:
            ValueError: if `comm_state_option` has an option that the hook does not take.
        """
        group = getattr(model, "process_group", None)
        chosen = communication_hook(self.comm_hook, self.comm_wrapper, self.comm_state_option, group)
        if chosen is not None:
            state, hook = chosen
            model.register_comm_hook(state, hook)


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """Arguments of `torch.distributed.init_process_group`.

    Example:
        ```python
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=7200)])
        ```
    """

    backend: str | None = "nccl"
    """The communication backend, or one per device type (``cuda:nccl,cpu:gloo``). A backend that does not support the
    device in use (nccl on a CPU) is replaced by one that does."""
    init_method: str | None = None
    """URL of the rendezvous, ``tcp://…`` or ``file://…``; None reads the launcher's variables."""
    timeout: datetime.timedelta | float | None = None
    """Timeout of collectives, as a timedelta or in seconds; None: the backend's default."""

    def __post_init__(self) -> None:
        if self.timeout is None:
            return
        if isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool):
            self.timeout = datetime.timedelta(seconds=self.timeout)
        if not isinstance(self.timeout, datetime.timedelta):
            raise TypeError(f"timeout={self.timeout!r}: expected a datetime.timedelta or a number of seconds.")
        if self.timeout <= datetime.timedelta():
            raise ValueError(f"timeout={self.timeout!r}: expected more than zero seconds.")


_ACTIVITIES = ("cpu", "xpu", "mtia", "cuda", "hpu")
_SCHEDULE_KEYS = ("wait", "warmup", "active", "repeat", "skip_first", "skip_first_wait")


@dataclass
class ProfileKwargs(KwargsHandler):
    """Arguments of `torch.profiler.profile`, for ``accelerator.profile()``.

    Example:
        ```python
        accelerator = Accelerator(kwargs_handlers=[ProfileKwargs(activities=["cpu"], record_shapes=True)])
        with accelerator.profile() as prof:
            train_one_step()
        print(prof.key_averages().table(sort_by="cpu_time_total", row_limit=10))
        ```
    """

    activities: list[Literal["cpu", "xpu", "mtia", "cuda", "hpu"]] | None = None
    """Activities to record; None: all that the machine supports."""
    schedule_option: dict[str, int] | None = None
    """``wait``, ``warmup`` and ``active`` steps, and optionally ``repeat``, ``skip_first``, ``skip_first_wait``."""
    on_trace_ready: Callable[[torch.profiler.profile], Any] | None = None
    """Called with the profiler when a trace is complete."""
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None
    """Folder into which each process exports its Chrome trace."""

    def build(self) -> torch.profiler.profile:
        """Returns the profiler, not yet started.

        Raises:
            ValueError: if an activity is unknown, or the schedule has unknown or missing keys.
        """
        import torch

        return torch.profiler.profile(
            activities=self._activities(),
            schedule=None if self.schedule_option is None else torch.profiler.schedule(**self._schedule()),
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )

    def _activities(self) -> list[torch.profiler.ProfilerActivity] | None:
        from torch.profiler import ProfilerActivity

        if self.activities is None:
            return None
        for name in self.activities:
            if name not in _ACTIVITIES or not hasattr(ProfilerActivity, name.upper()):
                known = [known for known in _ACTIVITIES if hasattr(ProfilerActivity, known.upper())]
                raise ValueError(f"activities has {name!r}; this torch can profile {', '.join(known)}.")
        return [getattr(ProfilerActivity, name.upper()) for name in self.activities]

    def _schedule(self) -> dict[str, int]:
        options = self.schedule_option or {}
        unknown = [key for key in options if key not in _SCHEDULE_KEYS]
        missing = [key for key in ("wait", "warmup", "active") if key not in options]
        if unknown or missing:
            problems = [f"{key!r} is missing" for key in missing] + [f"{key!r} is unknown" for key in unknown]
            raise ValueError(
                f"schedule_option={options!r}: {', '.join(problems)}. It needs wait, warmup and active (numbers of steps) "
                "and may have repeat, skip_first and skip_first_wait."
            )
        return options


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """Configures gradient accumulation over several batches per optimizer step."""

    num_steps: int | None = None
    """Batches per optimizer step; None: `Accelerator(gradient_accumulation_steps=)`."""
    adjust_scheduler: bool = True
    """Whether a scheduler that is stepped every batch advances only with the optimizer."""
    sync_with_dataloader: bool = True
    """Whether the last batch of a loader ends an incomplete accumulation."""
    sync_each_batch: bool = False
    """Whether gradients are reduced at every batch: more communication, less memory under FSDP."""

    def __post_init__(self) -> None:
        if self.num_steps is None:
            return
        try:
            self.num_steps = operator.index(self.num_steps)
        except TypeError:
            raise TypeError(f"num_steps={self.num_steps!r}: expected a whole number of batches, 1 or more.") from None
        if self.num_steps < 1:
            raise ValueError(
                f"num_steps={self.num_steps}: expected a number of batches, 1 or more (1: no accumulation)."
            )


@dataclass
class DataLoaderConfiguration:
    """Configures how prepared loaders shard data over ranks.

    Raises:
        ImportError: if `use_stateful_dataloader` is set and torchdata is not installed.
        ValueError: if `seed_samples` is set without `use_stateful_dataloader`.
    """

    split_batches: bool = False
    """Whether each batch of the loader is split over the ranks; otherwise every rank takes whole batches."""
    dispatch_batches: bool | None = None
    """Whether rank 0 reads all data and sends each rank its slice. None: for iterable datasets only."""
    even_batches: bool = True
    """Whether samples from the start are repeated so that all ranks get the same number of batches of the same size."""
    use_seedable_sampler: bool = False
    """Whether to shuffle by a sampler that depends on seed and epoch alone, so the order is equal on any number of ranks."""
    data_seed: int | None = None
    """The seed of that sampler; None: torch's current default seed."""
    non_blocking: bool = False
    """Whether batches are copied to the device asynchronously; effective with ``pin_memory=True``."""
    use_stateful_dataloader: bool = False
    """Whether loaders are built on torchdata's `StatefulDataLoader`, which saves its position."""
    seed_samples: bool | None = None
    """Whether torch, numpy and Python are seeded before each sample, by seed, epoch and index. None: in workers, with
    `use_stateful_dataloader` and `use_seedable_sampler`; True needs `use_stateful_dataloader`."""

    def __post_init__(self) -> None:
        if self.seed_samples and not self.use_stateful_dataloader:
            raise ValueError(
                "seed_samples=True needs use_stateful_dataloader=True, which keeps the seed with the position."
            )
        if not self.use_stateful_dataloader:
            return
        try:
            importlib.import_module("torchdata.stateful_dataloader")
        except ImportError as error:
            raise ImportError(
                "use_stateful_dataloader=True needs torchdata 0.8 or later: `pip install 'accelerate[stateful]'`, or "
                "leave it False."
            ) from error


@dataclass
class ProjectConfiguration:
    """Folders of a run's checkpoints and logs."""

    project_dir: str | os.PathLike[str] | None = None
    """The folder of the project."""
    logging_dir: str | os.PathLike[str] | None = None
    """Folder for trackers that need one; None: `project_dir`."""
    automatic_checkpoint_naming: bool = False
    """Accepted without effect: `save_state` without a folder numbers checkpoints below `project_dir`
    (``checkpoints/checkpoint_0`` …) in any case."""
    total_limit: int | None = None
    """Maximum number of automatically named checkpoints to keep; None: all."""
    iteration: int = 0
    """The number of the next checkpoint."""
    save_on_each_node: bool = False
    """Whether to save on every machine instead of the first alone, for machines without a shared disk."""

    def __post_init__(self) -> None:
        if self.total_limit is not None and self.total_limit < 1:
            raise ValueError(
                f"total_limit={self.total_limit}: expected 1 or more checkpoints to keep, or None for all."
            )
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | os.PathLike[str] | None = None) -> None:
        """Sets `project_dir`, and `logging_dir` if it is unset."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """Arguments of `torch.compile`. A field left None is read from the launcher's ``ACCELERATE_DYNAMO_*`` variables.

    Raises:
        ValueError: if the backend or another value is unknown.
    """

    backend: DynamoBackend | None = None
    """The compiler backend, as member or case-insensitive name; ``NO`` disables compilation."""
    mode: str | None = None
    """``default``, ``reduce-overhead``, ``max-autotune`` or another mode of `torch.compile`."""
    fullgraph: bool | None = None
    """Whether to raise if the model does not compile to a single graph."""
    dynamic: bool | None = None
    """Whether to trace dynamic shapes; None: torch decides."""
    options: Any = None
    """Options of the backend, as an alternative to `mode`."""
    disable: bool = False
    """Whether compilation is a no-op, for testing."""
    use_regional_compilation: bool | None = None
    """Whether to compile a model's repeated block once and reuse it, to shorten the time to the first step."""

    def __post_init__(self) -> None:
        self.backend = _dynamo_backend(resolve(_plain(self.backend), "backend", "dynamo_backend"))
        if self.mode is None:  # torch has more modes than the launcher offers, so the text is not validated
            self.mode = env.get("ACCELERATE_DYNAMO_MODE") or default("dynamo_mode")
        self.fullgraph = resolve(self.fullgraph, "fullgraph", "dynamo_use_fullgraph")
        self.use_regional_compilation = resolve(
            self.use_regional_compilation, "use_regional_compilation", "dynamo_use_regional_compilation"
        )
        if self.dynamic is None and env.get("ACCELERATE_DYNAMO_USE_DYNAMIC"):
            self.dynamic = resolve(None, "dynamic", "dynamo_use_dynamic")

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields by name, the backend by torch's name (``"inductor"``)."""
        return {**super().to_dict(), "backend": _dynamo_backend(self.backend).value.lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """Returns the arguments of `torch.compile` that differ from the defaults."""
        kwargs = super().to_kwargs()
        kwargs.pop("use_regional_compilation", None)
        return kwargs

    def _defaults(self) -> dict[str, Any]:
        # The launcher's defaults, not the variables': a value set by a variable counts as changed.
        return {
            "backend": default("dynamo_backend"),
            "mode": default("dynamo_mode"),
            "fullgraph": default("dynamo_use_fullgraph"),
            "dynamic": None,
            "options": None,
            "disable": False,
            "use_regional_compilation": default("dynamo_use_regional_compilation"),
        }


def _member(kind: type[DDPCommunicationHookType], field_name: str, value: Any) -> DDPCommunicationHookType:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{field_name}={value!r}: expected one of {kind.list()}.") from None


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, DynamoBackend) else value


def _dynamo_backend(name: Any) -> DynamoBackend:
    # Older configuration files hold one name with a typo.
    return DynamoBackend(str(_plain(name)).upper().replace("TORHCHXLA", "TORCHXLA"))
