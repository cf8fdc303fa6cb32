"""The methods of `Accelerator` that save and load: docstrings, and delegation to its `CheckpointManager`."""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..logging import get_logger
from ..runtime import world

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from ..settings.handlers import ProjectConfiguration
    from .items.state_item import CheckpointStrategy, HasItems, HasStep
    from .loading import LoadReport
    from .manager import CheckpointManager
    from .preemption import PreemptionHandler

logger = get_logger(__name__)


class CheckpointMixin:
    """Saves and loads the objects that an `Accelerator` has prepared."""

    if TYPE_CHECKING:
        strategy: CheckpointStrategy
        project_configuration: ProjectConfiguration
        scaler: torch.amp.GradScaler | None
        _models: list[nn.Module]
        _optimizers: list[Any]
        _schedulers: list[Any]
        _dataloaders: list[Any]
        _custom_objects: list[Any]
        _counter: HasStep
        _token_mean: HasItems

        @property
        def should_save_model(self) -> bool: ...

        def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]: ...

    @cached_property
    def _checkpoints(self) -> CheckpointManager:
        from ..state import GradientState
        from .items.state_item import TrainingState
        from .manager import CheckpointManager

        run = TrainingState(
            self._models,
            self._optimizers,
            self._schedulers,
            self._dataloaders,
            self._custom_objects,
            self.scaler,
            self._counter,
            self._token_mean,
            GradientState(),
        )
        return CheckpointManager(run, self.strategy, self.project_configuration)

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        asynchronous: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path | str:
        """Saves the whole state of the run: models, optimizers, schedulers, scaler, random states, positions of stateful
        loaders, accumulated gradients and registered objects. Collective: all processes call it.

        The checkpoint is written beside its folder, and renamed when it is complete and synced to disk. An existing
        checkpoint is untouched until then. A manifest records size and checksums of each file.

        Args:
            output_dir: The folder, or a URL such as ``s3://bucket/run/step_100`` (extra ``remote``). None: numbered below
                ``project_dir/checkpoints``, of which ``ProjectConfiguration.total_limit`` are kept.
            safe_serialization: Save models as safetensors, otherwise in `torch.save`'s format.
            asynchronous: Return when the state has been copied, and write it in the background. The next save or load,
                `wait_for_checkpoint`, `end_training` and the end of the process wait for it, and raise its error.
            **save_model_func_kwargs: For engines that save models themselves.

        Returns:
            The checkpoint's folder, or its URL.

        Raises:
            SaveError: on every process, if any could not write its files. Existing checkpoints are untouched.
            TypeError: without `output_dir` and ``project_dir``.
            ValueError: if the next number is taken by a checkpoint that was not resumed from.
            RuntimeError: in debug mode, if the call is in a branch that only some processes take.
        """
        return self._checkpoints.save(output_dir, safe_serialization, asynchronous)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        strict: bool = True,
        **load_model_func_kwargs: Any,
    ) -> LoadReport:
        """Loads a checkpoint of `save_state`, on the same or another number of processes. Collective.

        Everything is checked before anything changes: checksums, missing and extra entries, shapes.

        Args:
            input_dir: The folder, or a URL. None: the newest valid one below ``project_dir/checkpoints``.
            load_kwargs: For `torch.load`. Code in files never runs.
            strict: Reject a checkpoint with any mismatch; False loads what matches and reports the rest.
            **load_model_func_kwargs: For the models' ``load_state_dict``.

        Returns:
            A report with mismatches that were skipped (``strict=False``), and newer folders that are not valid.

        Raises:
            LoadError (a ValueError): on every process, listing everything that was found. If a registered object, a
                scheduler or the scaler raises in its ``load_state_dict``, those loaded before it are restored. The error's
                ``changed`` lists everything that has changed: nothing, except after hooks, and if a model or an optimizer
                raises although names, types and shapes match.
        """
        load_model_func_kwargs.pop("map_location", None)  # files are mapped, and copied to the device of each object
        return self._checkpoints.load(
            input_dir, load_kwargs=load_kwargs, strict=strict, model_options=load_model_func_kwargs
        )

    def resume(self, *, strict: bool = True) -> LoadReport | None:
        """Loads the newest valid checkpoint below ``project_dir/checkpoints``, if there is one, so that a script can be
        restarted. Later checkpoints are numbered after the existing ones.

        Args:
            strict: As for `load_state`.

        Returns:
            The report of `load_state`; None at the first start.

        Example:
            ```python
            accelerator.resume()
            for epoch in range(loader.iteration, epochs):
                for batch in loader:
                    ...
            ```
        """
        return self._checkpoints.resume(strict=strict)

    def wait_for_checkpoint(self) -> None:
        """Waits for ``save_state(asynchronous=True)`` to finish.

        Raises:
            SaveError: if it failed.
        """
        self._checkpoints.wait()

    @cached_property
    def _preemption(self) -> PreemptionHandler:
        from .preemption import PreemptionHandler

        return PreemptionHandler()

    def stop_on(self, *signals: int) -> None:
        """Makes signals set `should_stop`, instead of ending the process.

        Args:
            *signals: Such as ``signal.SIGTERM`` and ``signal.SIGUSR1``.

        Raises:
            ValueError: on a thread other than the main one.
        """
        self._preemption.watch(*signals)

    @property
    def should_stop(self) -> bool:
        """Whether any process has received SIGTERM, or a signal of `stop_on`. Collective: all processes read it at the
        same step and get the same value. Signals are handled from the first time it is read.

        Example:
            ```python
            if accelerator.should_stop:
                accelerator.save_state()
                accelerator.end_training()
                sys.exit(75)  # accelerate.checkpointing.EXIT_CODE: stopped on request, to be started again
            ```
        """
        if not self._preemption.watching:
            self._preemption.watch(signal.SIGTERM)
        return self._preemption.agreed()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Adds objects to every checkpoint.

        Raises:
            ValueError: for objects without ``state_dict`` and ``load_state_dict``.
        """
        lacking = [o for o in objects if not (hasattr(o, "state_dict") and hasattr(o, "load_state_dict"))]
        if lacking:
            raise ValueError(
                "only objects with `state_dict` and `load_state_dict` can be part of a checkpoint; these lack them: "
                + ", ".join(type(o).__name__ for o in lacking)
            )
        self._custom_objects.extend(objects)

    @property
    def _save_model_state_pre_hook(self) -> OrderedDict[int, Callable[..., None]]:
        """Hooks of `save_state` by handle, under the name that other libraries use."""
        return self._checkpoints.save_hooks

    @property
    def _load_model_state_pre_hook(self) -> OrderedDict[int, Callable[..., None]]:
        """Hooks of `load_state` by handle, under the name that other libraries use."""
        return self._checkpoints.load_hooks

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Registers a hook that `save_state` calls before it writes.

        Args:
            hook: Called as ``hook(models, weights, output_dir)``. `weights` lists the models' states; a state that the hook
                removes from the list is not saved. The state of a sharded model has the shards of this process.
                `output_dir` is the staging folder: files that the hook writes there are part of the checkpoint.

        Returns:
            A handle whose ``remove()`` removes the hook.
        """
        return self._checkpoints.add_hook(self._checkpoints.save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Registers a hook that `load_state` calls before it loads models.

        Args:
            hook: Called as ``hook(models, input_dir)``. A model that the hook removes from the list is not loaded.

        Returns:
            A handle whose ``remove()`` removes the hook.
        """
        return self._checkpoints.add_hook(self._checkpoints.load_hooks, hook)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Saves an object on the main process (with ``save_on_each_node``, on the first process of each machine).

        Args:
            obj: The object.
            f: A path, a URL or an open binary file.
            safe_serialization: Save `obj`, a dictionary of tensors, as safetensors.
        """
        from . import model_files

        model_files.save(
            obj,
            f,
            save_on_each_node=self.project_configuration.save_on_each_node,
            safe_serialization=safe_serialization,
        )

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Saves a model's weights for other programs: in one file, or in several with an index.

        Args:
            model: A prepared model, or any other.
            save_directory: The folder, or a URL. If it is a file, an error is logged and nothing is saved.
            max_shard_size: Largest size of a file, such as ``"5GB"``.
            safe_serialization: Save as safetensors, otherwise in `torch.save`'s format.

        Raises:
            RuntimeError: if tensors have no values (meta device).
            SaveError: on the other processes that call it, which wait for the one that writes, if it failed.
        """
        from . import model_files
        from .consensus import wait_for_writer
        from .storage.filenames import is_url
        from .storage.remote import upload_folder

        here = world.current()
        writer = here.rank - here.local_rank if self.project_configuration.save_on_each_node else 0
        with wait_for_writer(f"save_model to {save_directory}", writer):
            state = self.get_state_dict(model)
            if not self.should_save_model:
                return

            def write(folder: Path) -> None:
                model_files.save_model(model, state, folder, max_shard_size, safe_serialization)

            if is_url(save_directory):
                upload_folder(str(save_directory), write)
                return
            folder = Path(os.path.expanduser(save_directory))
            if folder.is_file():
                logger.error(f"save_model needs a folder, and {folder} is a file: nothing was saved.")
            else:
                write(folder)
