"""The documented handlers and configurations that `Accelerator` takes, as mutable dataclasses.

They only hold and check values: an object here is read when something is prepared. torch is imported inside the methods
that hand torch an object of its own.
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
    """Base of the dataclasses whose fields are the arguments of something in torch."""

    def to_dict(self) -> dict[str, Any]:
        """All fields by name. Containers are copied, everything else is shared."""
        names = [f.name for f in fields(self)] if is_dataclass(self) else list(vars(self))
        return {name: _copied(getattr(self, name)) for name in names}

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults, so that torch's own defaults hold for the rest.

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
    """How `torch.autocast` behaves, for a whole `Accelerator` or for one ``accelerator.autocast(...)``.

    Example:
        ```python
        with accelerator.autocast(autocast_handler=AutocastKwargs(enabled=False)):
            loss = stable_loss(outputs.float())
        ```
    """

    enabled: bool = True
    """Whether to autocast at all."""
    cache_enabled: bool | None = None
    """Whether casts of weights are kept for the length of the block; None: torch decides."""


@dataclass
class GradScalerKwargs(KwargsHandler):
    """Arguments of `torch.amp.GradScaler`, which mixed precision in fp16 uses."""

    init_scale: float = 65536.0
    """The factor the loss is multiplied with at first."""
    growth_factor: float = 2.0
    """What the scale is multiplied with after `growth_interval` steps without overflow."""
    backoff_factor: float = 0.5
    """What the scale is multiplied with after an overflow."""
    growth_interval: int = 2000
    """Steps without overflow after which the scale grows."""
    enabled: bool = True
    """Whether to scale at all."""


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Arguments of `torch.nn.parallel.DistributedDataParallel`, and how gradients travel.

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
    """How gradients are compressed on the wire; the member or its value (``"bf16"``)."""
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    """``FP16`` or ``BF16``: cast gradients before `comm_hook` sees them."""
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
        """The fields that `DistributedDataParallel` takes: all but `ignore_keys`."""
        return {name: value for name, value in super().to_dict().items() if name not in ignore_keys}

    def register_comm_hook(self, model: torch.nn.parallel.DistributedDataParallel) -> None:
        """Gives `model` the communication hook that the fields describe; with ``NO`` nothing happens.

        All hooks work on every backend of torch.distributed, bf16 on gloo included.

        Args:
            model: The wrapped model, before its first backward pass. Gradients are averaged over its process group.

        Raises:
            ValueError: when `comm_state_option` does not fit the hook.
        """
        group = getattr(model, "process_group", None)
        chosen = communication_hook(self.comm_hook, self.comm_wrapper, self.comm_state_option, group)
        if chosen is not None:
            state, hook = chosen
            model.register_comm_hook(state, hook)


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """How the process group is joined: arguments of `torch.distributed.init_process_group`.

    Example:
        ```python
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=7200)])
        ```
    """

    backend: str | None = "nccl"
    """The communication library, or one for each kind of device (``cuda:nccl,cpu:gloo``). One that cannot serve the device
    in use (nccl on a CPU) gives way to one that can."""
    init_method: str | None = None
    """The rendezvous, as ``tcp://…`` or ``file://…``; None reads the launcher's variables."""
    timeout: datetime.timedelta | float | None = None
    """How long a rank may keep the others waiting, as a timedelta or in seconds; None: the backend's default."""

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
    """What to record; None: everything this machine has."""
    schedule_option: dict[str, int] | None = None
    """``wait``, ``warmup`` and ``active`` steps, and optionally ``repeat``, ``skip_first``, ``skip_first_wait``."""
    on_trace_ready: Callable[[torch.profiler.profile], Any] | None = None
    """Called with the profiler whenever a trace is complete."""
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None
    """A folder into which each process exports its Chrome trace."""

    def build(self) -> torch.profiler.profile:
        """The profiler, not yet started.

        Raises:
            ValueError: for an unknown activity, or a schedule with unknown or missing keys.
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
            said = [f"{key!r} is missing" for key in missing] + [f"{key!r} is unknown" for key in unknown]
            raise ValueError(
                f"schedule_option={options!r}: {', '.join(said)}. It needs wait, warmup and active (numbers of steps) "
                "and may have repeat, skip_first and skip_first_wait."
            )
        return options


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How gradients are accumulated over several batches before the optimizer steps."""

    num_steps: int | None = None
    """Batches per optimizer step; None: what `Accelerator(gradient_accumulation_steps=)` says."""
    adjust_scheduler: bool = True
    """Whether a scheduler that is stepped each batch moves on only where the optimizer does."""
    sync_with_dataloader: bool = True
    """Whether the last batch of a loader ends the accumulation, complete or not."""
    sync_each_batch: bool = False
    """Reduce gradients over the ranks at each batch: more traffic, less memory under FSDP."""

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
    """How prepared loaders share the data between the ranks.

    Raises:
        ImportError: with `use_stateful_dataloader` where torchdata is not installed.
        ValueError: with `seed_samples` and without `use_stateful_dataloader`.
    """

    split_batches: bool = False
    """The loader's batch is shared out over the ranks; else every rank takes whole batches."""
    dispatch_batches: bool | None = None
    """Rank 0 reads and sends each rank its part. None: for iterable datasets only."""
    even_batches: bool = True
    """Repeat samples from the start so that every rank gets equally many batches of equal size."""
    use_seedable_sampler: bool = False
    """Shuffle by a sampler that depends on seed and epoch alone, so that any number of ranks sees one order."""
    data_seed: int | None = None
    """The seed of that sampler; None: torch's current default seed."""
    non_blocking: bool = False
    """Copy batches to the device without waiting; worth it with ``pin_memory=True``."""
    use_stateful_dataloader: bool = False
    """Build loaders on torchdata's `StatefulDataLoader`, which can save its position."""
    seed_samples: bool | None = None
    """Seed torch, numpy and Python before each sample is read, from the seed, the epoch and its index. None: in workers,
    with `use_stateful_dataloader` and `use_seedable_sampler`; True needs `use_stateful_dataloader`."""

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
    """Where a run keeps its checkpoints and logs."""

    project_dir: str | os.PathLike[str] | None = None
    """The folder of the project."""
    logging_dir: str | os.PathLike[str] | None = None
    """Where trackers write that need a folder; None: `project_dir`."""
    automatic_checkpoint_naming: bool = False
    """Accepted without effect: `save_state` without a folder numbers checkpoints below `project_dir`
    (``checkpoints/checkpoint_0`` …) in any case."""
    total_limit: int | None = None
    """How many automatically named checkpoints are kept; None: all."""
    iteration: int = 0
    """The number of the next checkpoint."""
    save_on_each_node: bool = False
    """Save on every machine, not just the first: for machines that share no disk."""

    def __post_init__(self) -> None:
        if self.total_limit is not None and self.total_limit < 1:
            raise ValueError(
                f"total_limit={self.total_limit}: expected 1 or more checkpoints to keep, or None for all."
            )
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | os.PathLike[str] | None = None) -> None:
        """Sets `project_dir`, and `logging_dir` with it unless that has been set."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """How models are compiled. A field left None is read from the launcher's ``ACCELERATE_DYNAMO_*`` variables.

    Raises:
        ValueError: for a backend or another value that is not known.
    """

    backend: DynamoBackend | None = None
    """The compiler, as member or name in any case; ``NO`` compiles nothing."""
    mode: str | None = None
    """``default``, ``reduce-overhead``, ``max-autotune`` or another mode of `torch.compile`."""
    fullgraph: bool | None = None
    """Fail where the model cannot be compiled as one graph."""
    dynamic: bool | None = None
    """Trace with variable shapes; None: torch decides."""
    options: Any = None
    """Options of the backend, instead of a mode."""
    disable: bool = False
    """Make compiling a no-op, for testing."""
    use_regional_compilation: bool | None = None
    """Compile one of a model's repeated blocks and use it for all: much less time to the first step."""

    def __post_init__(self) -> None:
        self.backend = _dynamo_backend(resolve(_plain(self.backend), "backend", "dynamo_backend"))
        if self.mode is None:  # torch has more modes than the launcher offers, so the text is taken as it is
            self.mode = env.get("ACCELERATE_DYNAMO_MODE") or default("dynamo_mode")
        self.fullgraph = resolve(self.fullgraph, "fullgraph", "dynamo_use_fullgraph")
        self.use_regional_compilation = resolve(
            self.use_regional_compilation, "use_regional_compilation", "dynamo_use_regional_compilation"
        )
        if self.dynamic is None and env.get("ACCELERATE_DYNAMO_USE_DYNAMIC"):
            self.dynamic = resolve(None, "dynamic", "dynamo_use_dynamic")

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, the backend as torch spells it (``"inductor"``)."""
        return {**super().to_dict(), "backend": _dynamo_backend(self.backend).value.lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments for `torch.compile`: what differs from the defaults, without `use_regional_compilation`."""
        kwargs = super().to_kwargs()
        kwargs.pop("use_regional_compilation", None)
        return kwargs

    def _defaults(self) -> dict[str, Any]:
        # What the fields are where no variable is set: a variable's value differs from the default too.
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
    # The launcher's files hold one name as it was once misspelt.
    return DynamoBackend(str(_plain(name)).upper().replace("TORHCHXLA", "TORCHXLA"))
