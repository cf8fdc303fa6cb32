"""State of a run: `PartialState` (process and device), `AcceleratorState` (settings) and `GradientState` (the loop).

All instances of a class share one dictionary, so that ``PartialState()`` returns the same state everywhere. `runtime.world`
joins the process group, `runtime.process_control` runs blocks on some processes only.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .parallelism_config import resolve_parallelism_config
from .runtime import devices, world
from .runtime.process_control import ProcessControl
from .settings import env, resolve_args
from .settings.enums import DistributedType, PrecisionType

if TYPE_CHECKING:
    from .parallelism_config import ParallelismConfig
    from .settings.handlers import GradientAccumulationPlugin
    from .settings.plugins.deepspeed import DeepSpeedPlugin
    from .settings.resolve_args import Plugins


logger = logging.getLogger(__name__)


def is_initialized() -> bool:
    """Returns whether an `AcceleratorState` exists in this process."""
    return bool(AcceleratorState._shared_state)


class _SharedState:
    """Base class whose instances share one dictionary per class."""

    _shared_state: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        self.__dict__ = self._shared_state

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy, here or in another process, shows the state of that process

    @property
    def initialized(self) -> bool:
        """Whether the shared state has been filled."""
        return bool(self._shared_state)

    def __getattr__(self, name: str) -> Any:
        # Called only if there is no attribute of that name.
        if name.startswith("__") or name in self._shared_state:
            raise AttributeError(name)
        emptied = "" if self._shared_state else ", because its state was reset: create a new one"
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{emptied}.")


def _format_state(state: Any) -> str:
    backend = f"  Backend: {state.backend}" if state.backend else ""
    return (
        f"Distributed environment: {state.distributed_type}{backend}\n"
        f"Num processes: {state.num_processes}\n"
        f"Process index: {state.process_index}\n"
        f"Local process index: {state.local_process_index}\n"
        f"Device: {state.device}\n"
    )


class PartialState(_SharedState, ProcessControl):
    """Rank, world size and device of this process. Needs no `Accelerator`.

    Attributes:
        process_index: Rank over all machines.
        num_processes: Number of processes over all machines.
        local_process_index: Rank on this machine.
        device: The device of this process.
        distributed_type: How the run is distributed.
        backend: Communication backend; None for a single process.
        debug: Whether shapes are compared over the ranks before each collective.
        fork_launched: Whether `notebook_launcher` started this process.

    Args:
        cpu: Use the CPU even if an accelerator is available.
        **kwargs: For joining the process group: ``backend``, ``timeout``, ``init_method``.

    Raises:
        ValueError: If the launcher's variables contradict each other.
        RuntimeError: If peers do not respond within the timeout.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attributes: ClassVar[list[str]] = [
        "_cpu",
        "backend",
        "debug",
        "device",
        "distributed_type",
        "fork_launched",
        "local_process_index",
        "num_processes",
        "process_index",
    ]

    process_index: int
    num_processes: int
    local_process_index: int
    device: torch.device
    distributed_type: DistributedType
    backend: str | None
    debug: bool
    fork_launched: bool
    _cpu: bool

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        super().__init__()
        kwargs.pop("_from_accelerator", None)
        if self.initialized:
            if kwargs:
                logger.warning("this process has already joined its process group: %s is ignored.", kwargs)
            return
        here = world.current() if world.is_joined() and not kwargs and not cpu else world.join(cpu=cpu, **kwargs)
        self._cpu = cpu or env.flag("ACCELERATE_USE_CPU")
        self.process_index = here.rank
        self.num_processes = here.size
        self.local_process_index = here.local_rank
        self.device = here.device
        self.distributed_type = here.distributed_type
        self.backend = here.backend
        self.debug = here.debug
        self.fork_launched = here.fork_launched

    def __repr__(self) -> str:
        return _format_state(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if world.is_joined():  # collectives read these two from `World`
            if name == "debug":
                world.set_debug(value)
            elif name == "device" and value != world.current().device:
                world.set_device(torch.device(value))
        super().__setattr__(name, value)

    @staticmethod
    def _reset_state() -> None:
        """Clears the state; the process group stays initialized, and the next instance reuses it."""
        PartialState._shared_state.clear()
        world.forget()

    # Rank and device -------------------------------------------------------------------------------------------------

    @property
    def use_distributed(self) -> bool:
        """Whether there are other processes in the run."""
        return self.distributed_type != DistributedType.NO and self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0 of the run."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process on its machine."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank of the run."""
        return self.process_index == self.num_processes - 1

    @property
    def default_device(self) -> torch.device:
        """The device that this process uses by default."""
        return world.single_process_device(devices.DEVICES["cpu"] if self._cpu else devices.default_kind())

    def set_device(self) -> None:
        """Selects this process's device, as on joining the run, and makes it torch's current device."""
        device = world.current().device if self.use_distributed else self.default_device
        self.device = world.set_device(device).device

    # Synchronization -------------------------------------------------------------------------------------------------

    def wait_for_everyone(self) -> None:
        """Blocks until every process has called it."""
        world.current().collectives.barrier()

    def _check_joined(self) -> None:
        if not self.initialized:
            raise ValueError("the state is not initialized: create PartialState() or Accelerator() before decorating.")

    def destroy_process_group(self, group: Any = None) -> None:
        """Destroys the process group (the default one, or `group`), also in a process that `notebook_launcher` forked."""
        world.leave(group)


class AcceleratorState(_SharedState, ProcessControl):
    """`PartialState` and the settings of a run: precision, plugins, parallelism.

    Other attributes are those of `PartialState`.

    Args:
        mixed_precision: ``no``, ``fp16``, ``bf16`` or ``fp8``; None reads ``ACCELERATE_MIXED_PRECISION``, then
            ``MIXED_PRECISION``.
        cpu: Use the CPU even if an accelerator is available.

    Raises:
        ValueError: If the precision is unknown, or settings differ from those the run already has.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attributes: ClassVar[list[str]] = [
        *PartialState._known_attributes,
        "_mixed_precision",
        "deepspeed_plugins",
        "device_mesh",
        "dynamo_plugin",
        "parallelism_config",
        "torch_tp_plugin",
    ]

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: Any = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        wanted = None if mixed_precision is None else str(mixed_precision).lower()
        if wanted is not None and wanted not in PrecisionType:
            raise ValueError(f"mixed_precision={mixed_precision!r} is unknown: choose from {PrecisionType.list()}.")
        given = (fsdp_plugin, deepspeed_plugin, megatron_lm_plugin, torch_tp_plugin)
        if self.initialized:
            self._check_unchanged(cpu, wanted, resolve_args.plugins(*given, launched=False), parallelism_config)
            return
        plugins = resolve_args.plugins(*given)
        sizes = resolve_parallelism_config(parallelism_config, torch_tp_plugin)
        if wanted is None:
            plain = (
                env.get("MIXED_PRECISION") or "no"
            ).lower()  # for torchrun; other software may set it to other values
            default = plain if plain in PrecisionType.list() else "no"
            wanted = env.choice("ACCELERATE_MIXED_PRECISION", PrecisionType.list(), default)
        wanted = plugins.set_mixed_precision(wanted)
        if plugins.fsdp is not None and plugins.fsdp.offloads and not (PartialState._shared_state or world.is_joined()):
            kwargs["cpu_tensors"] = True
        partial = PartialState(cpu, **kwargs)
        if cpu and partial.device.type != "cpu":
            raise ValueError(_ALREADY_SET.format(setting="cpu=True"))
        mesh = sizes.get_device_mesh(partial.device.type) if sizes is not None else None
        self._mixed_precision = wanted
        self.dynamo_plugin = dynamo_plugin
        self.deepspeed_plugins = plugins.deepspeed
        self.torch_tp_plugin = torch_tp_plugin
        self.parallelism_config = sizes
        self.device_mesh = mesh
        if plugins.distributed_type is DistributedType.FSDP and partial.backend is None:
            logger.warning(
                "FSDP is configured, but there is a single process, which trains unsharded. Start several with "
                "`accelerate launch --use_fsdp --num_processes N`."
            )
        elif plugins.distributed_type is not None:
            self.distributed_type = plugins.distributed_type
        engines = {"fsdp_plugin": plugins.fsdp, "megatron_lm_plugin": plugins.megatron}
        self.__dict__.update({name: plugin for name, plugin in engines.items() if plugin is not None})
        if plugins.deepspeed is not None:
            self.select_deepspeed_plugin(next(iter(plugins.deepspeed)))

    def _check_unchanged(
        self, cpu: bool, mixed_precision: str | None, plugins: Plugins, parallelism_config: ParallelismConfig | None
    ) -> None:
        if cpu and self.device.type != "cpu":
            raise ValueError(_ALREADY_SET.format(setting="cpu=True"))
        if mixed_precision is not None and mixed_precision != self._mixed_precision:
            raise ValueError(_ALREADY_SET.format(setting=f"mixed_precision={mixed_precision!r}"))
        here = self.__dict__
        given = {
            "fsdp_plugin": (plugins.fsdp, here.get("fsdp_plugin")),
            "deepspeed_plugins": (plugins.deepspeed, here.get("deepspeed_plugins")),
            "megatron_lm_plugin": (plugins.megatron, here.get("megatron_lm_plugin")),
            "parallelism_config": (parallelism_config, here.get("parallelism_config")),
        }
        for name, (new, there) in given.items():
            if new is not None and new != there:
                raise ValueError(_ALREADY_SET.format(setting=f"this {name}"))

    def __repr__(self) -> str:
        text = _format_state(self) + f"\nMixed precision type: {self.mixed_precision}\n"
        return text if (plugin := self.deepspeed_plugin) is None else text + f"ds_config: {plugin.deepspeed_config}\n"

    def __getattr__(self, name: str) -> Any:
        # distributed_type, device …: those of PartialState, unless a strategy has set them here; likewise its methods.
        elsewhere = name in PartialState._known_attributes or hasattr(PartialState, name)
        if elsewhere and not name.startswith("__") and self._shared_state:
            return getattr(PartialState(), name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PartialState._known_attributes and name != "distributed_type":  # a strategy sets that one here
            setattr(PartialState(), name, value)
        else:
            super().__setattr__(name, value)

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Clears the settings, and with `reset_partial_state` the `PartialState`."""
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()

    @property
    def mixed_precision(self) -> str:
        """The mixed-precision dtype: ``no``, ``fp16``, ``bf16`` or ``fp8``."""
        precision: str = self._mixed_precision
        return precision

    @property
    def is_fsdp2(self) -> bool:
        """Whether the run uses FSDP version 2."""
        return self.distributed_type is DistributedType.FSDP and self.fsdp_plugin.fsdp_version == 2

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The DeepSpeed plugin in use, or None."""
        plugins: dict[str, DeepSpeedPlugin] = self.__dict__.get("deepspeed_plugins") or {}
        return next((plugin for plugin in plugins.values() if plugin.selected), None)

    def select_deepspeed_plugin(self, name: str | None = None) -> None:
        """Selects the DeepSpeed plugin of that name.

        Raises:
            ValueError: If there is none.
        """
        selected = self.get_deepspeed_plugin(name)
        for plugin in (self.deepspeed_plugins or {}).values():
            plugin._unselect()
        selected.select(_from_accelerator_state=True)

    def get_deepspeed_plugin(self, name: str | None) -> DeepSpeedPlugin:
        """Returns the DeepSpeed plugin of that name.

        Raises:
            ValueError: If there is none.
        """
        plugins: dict[str, DeepSpeedPlugin] = self.__dict__.get("deepspeed_plugins") or {}
        if name not in plugins:
            has = f"it has {', '.join(map(repr, plugins))}" if plugins else "it was started without DeepSpeed"
            raise ValueError(f"this run has no DeepSpeed plugin {name!r}: {has}.")
        return plugins[name]

    def destroy_process_group(self, group: Any = None) -> None:
        """See `PartialState.destroy_process_group`."""
        PartialState().destroy_process_group(group)

    @property
    def fork_launched(self) -> bool:
        """Whether `notebook_launcher` forked this process."""
        return PartialState().fork_launched

    @property
    def use_distributed(self) -> bool:
        """Whether there are other processes in the run."""
        return PartialState().use_distributed

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0 of the run."""
        return PartialState().is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process on its machine."""
        return PartialState().is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank of the run."""
        return PartialState().is_last_process

    def wait_for_everyone(self) -> None:
        """See `PartialState.wait_for_everyone`."""
        PartialState().wait_for_everyone()


_ALREADY_SET = (
    "the run already has other settings than {setting}, and they cannot be changed. Pass them to the first Accelerator "
    "(or PartialState) that is created; in a notebook, restart the kernel."
)


class GradientState(_SharedState):
    """State of a training loop: gradient accumulation, and the active data loader.

    Attributes:
        sync_gradients: Whether gradients are synchronized at this micro-step, so that the optimizer steps.
        plugin_kwargs: Settings of the `GradientAccumulationPlugin` that differ from its defaults.
        divided: Whether gradients have been divided by the number of items in a global batch since the last step.

    Args:
        gradient_accumulation_plugin: New settings; None keeps the current ones.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    sync_gradients: bool
    plugin_kwargs: dict[str, Any]
    divided: bool

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        super().__init__()
        if not self.initialized:
            self.sync_gradients = True
            self._references: list[weakref.ref[Any] | None] = [None]
            self.plugin_kwargs = {}
            self.divided = False
            self._is_xla_gradients_synced = False
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        """Clears the state; the next instance starts with defaults."""
        GradientState._shared_state.clear()

    # Settings --------------------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Number of micro-steps over which gradients are accumulated."""
        return self.plugin_kwargs.get("num_steps") or 1

    @property
    def adjust_scheduler(self) -> bool:
        """Whether schedulers step only when their optimizer does."""
        return bool(self.plugin_kwargs.get("adjust_scheduler", True))

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether gradients are always synchronized at the last batch of a loader."""
        return bool(self.plugin_kwargs.get("sync_with_dataloader", True))

    @property
    def sync_each_batch(self) -> bool:
        """Whether gradients are reduced at every micro-step, to save memory."""
        return bool(self.plugin_kwargs.get("sync_each_batch", False))

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        self.sync_gradients = sync_gradients
        self._is_xla_gradients_synced = False

    @property
    def is_xla_gradients_synced(self) -> bool:
        """Whether gradients of an XLA run have been reduced since the last step."""
        return self._is_xla_gradients_synced

    @is_xla_gradients_synced.setter
    def is_xla_gradients_synced(self, synced: bool) -> None:
        self._is_xla_gradients_synced = synced

    # Data loaders ----------------------------------------------------------------------------------------------------

    @property
    def dataloader_references(self) -> list[Any]:
        """The loaders being iterated over, outermost first, after an initial None."""
        return [None if reference is None else reference() for reference in self._references]

    @dataloader_references.setter
    def dataloader_references(self, loaders: list[Any]) -> None:
        self._references = [None if loader is None else weakref.ref(loader) for loader in loaders]

    @property
    def active_dataloader(self) -> Any:
        """The innermost loader being iterated over, or None."""
        reference = self._references[-1]
        return None if reference is None else reference()

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated over."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the current batch of the active loader is its last one."""
        loader = self.active_dataloader
        return False if loader is None else loader.end_of_dataloader

    @property
    def remainder(self) -> int:
        """Number of samples of the last batch, over all ranks, that are not padding; -1 if unknown."""
        loader = self.active_dataloader
        return -1 if loader is None else loader.remainder

    def _add_dataloader(self, dataloader: Any) -> None:
        self._references.append(weakref.ref(dataloader))

    def _remove_dataloader(self, dataloader: Any) -> None:
        # Innermost first, for a loader with two nested iterations. Dead references are removed too.
        for position in range(len(self._references) - 1, 0, -1):
            reference = self._references[position]
            if reference is not None and reference() is dataloader:
                del self._references[position]
                break
        self._references = [ref for ref in self._references if ref is None or ref() is not None]
