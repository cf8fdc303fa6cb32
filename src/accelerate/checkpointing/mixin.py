"""The part of `Accelerator` that saves and resumes: docstrings and a line of delegation each."""

from __future__ import annotations

import os
import signal
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..logging import get_logger
from ..runtime import world

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from .items.training_state import TrainingState
    from .loading import LoadReport
    from .manager import CheckpointManager
    from .preemption import PreemptionHandler

logger = get_logger(__name__)


class CheckpointMixin:
    """What an `Accelerator` does with checkpoints."""

    if TYPE_CHECKING:
        strategy: Any
        project_configuration: Any
        _custom_objects: list[Any]

    @cached_property
    def _checkpoints(self) -> CheckpointManager:
        from .manager import CheckpointManager

        bound = weakref.WeakMethod(self._run)  # a reference cycle would keep models alive until the collector runs

        def run() -> TrainingState:
            method = bound()
            assert method is not None, "the Accelerator calls its own checkpoints"
            return method()

        return CheckpointManager(run, self.strategy, self.project_configuration)

    def _run(self: Any) -> TrainingState:
        from .items.training_state import TrainingState

        return TrainingState(
            world.current(),
            self._models,
            self._optimizers,
            self._schedulers,
            self._dataloaders,
            self._custom_objects,
            self.scaler,
            self.step,
            set_step=lambda step: setattr(self, "step", step),
            items=lambda: self._token_mean.items,
            set_items=lambda items: setattr(self._token_mean, "items", items),
        )

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        asynchronous: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path | str:
        """Saves the whole state of the run: models, optimizers, schedulers, scaler, random states, positions of stateful
        loaders, accumulated gradients and registered objects. All processes call this together.

        The checkpoint is written beside its folder and moved there when it is complete and on disk; one that was there
        before is untouched until then. Each file's size and checksum are kept with it.

        Args:
            output_dir: The folder, or a URL such as ``s3://bucket/run/step_100`` (extra ``remote``). None: numbered below
                ``project_dir/checkpoints``, of which ``ProjectConfiguration.total_limit`` are kept.
            safe_serialization: Models as safetensors; else as `torch.save` writes them.
            asynchronous: Return when the state has been copied, and write it meanwhile. The next save or load,
                `wait_for_checkpoint`, `end_training` and the end of the process wait for it; a failure is raised there.
            **save_model_func_kwargs: For engines that save models themselves.

        Returns:
            The checkpoint's folder, or its URL.

        Raises:
            SaveError: on every process, when any could not write its part; nothing that was there has changed.
            TypeError: without `output_dir` and ``project_dir``.
            ValueError: when the next number is taken by a checkpoint that was not resumed from.
            RuntimeError: when only some processes call this.
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
        """Loads what `save_state` saved, on this or another number of processes. All processes call this together.

        Everything is checked before anything is changed: checksums, what is missing, what is extra, shapes.

        Args:
            input_dir: The folder, or a URL. None: the newest valid one below ``project_dir/checkpoints``.
            load_kwargs: For `torch.load`. Code in files never runs.
            strict: Refuse a checkpoint that does not fit as a whole; False loads what fits and reports the rest.
            **load_model_func_kwargs: For the models' ``load_state_dict``.

        Returns:
            What was loaded, left out (with ``strict=False``) and passed over.

        Raises:
            LoadError (a ValueError): on every process, listing everything that was found. When a registered object, a
                scheduler or the scaler raises in its ``load_state_dict``, those loaded before it get their old states back.
                The error's ``changed`` lists what is not as it was: it is empty, except after hooks, and where a model or an
                optimizer raises although names, types and shapes fit.
        """
        load_model_func_kwargs.pop(
            "map_location", None
        )  # states are read over a memory map and copied to where they go
        return self._checkpoints.load(
            input_dir, load_kwargs=load_kwargs, strict=strict, model_options=load_model_func_kwargs
        )

    def resume(self, *, strict: bool = True) -> LoadReport | None:
        """Loads the newest valid checkpoint below ``project_dir/checkpoints``, if there is one: the line that makes a script
        restartable. Checkpoints saved from here on are numbered behind those that are there.

        Args:
            strict: As for `load_state`.

        Returns:
            What was loaded; None at the first start.

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
            SaveError: when it failed.
        """
        self._checkpoints.wait()

    @cached_property
    def _stop_request(self) -> PreemptionHandler:
        from .preemption import PreemptionHandler

        return PreemptionHandler()

    def stop_on(self, *signals: int) -> None:
        """Has signals make `should_stop` true, instead of ending the process.

        Args:
            *signals: Such as ``signal.SIGTERM`` and ``signal.SIGUSR1``.

        Raises:
            ValueError: on another thread than the main one.
        """
        self._stop_request.watch(*signals)

    @property
    def should_stop(self) -> bool:
        """Whether any process was asked to stop, by SIGTERM unless `stop_on` named other signals. It is watched from the
        first time this is read; all processes read it together, and get the same answer at the same step.

        Example:
            ```python
            if accelerator.should_stop:
                accelerator.save_state()
                accelerator.end_training()
                sys.exit(75)  # accelerate.checkpointing.EXIT_CODE: stopped on request, to be started again
            ```
        """
        if not self._stop_request.watching:
            self._stop_request.watch(signal.SIGTERM)
        return self._stop_request.agreed()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Makes objects part of every checkpoint.

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
        """Hooks of `save_state` by handle, under the name that other libraries look them up by."""
        return self._checkpoints.save_hooks

    @property
    def _load_model_state_pre_hook(self) -> OrderedDict[int, Callable[..., None]]:
        """Hooks of `load_state` by handle, under the name that other libraries look them up by."""
        return self._checkpoints.load_hooks

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Has `hook` called by `save_state` before anything is written.

        Args:
            hook: Called as ``hook(models, weights, output_dir)``. `weights` lists the models' states; those that it takes
                out of the list are not saved. Of a model in shards, a state has the names, and this process's parts.
                `output_dir` is where the checkpoint is being written: what the hook writes there is part of it.

        Returns:
            A handle whose ``remove()`` removes the hook.
        """
        return self._checkpoints.add_hook(self._checkpoints.save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Has `hook` called by `load_state` before models are loaded.

        Args:
            hook: Called as ``hook(models, input_dir)``. Models it takes out of the list are not loaded.

        Returns:
            A handle whose ``remove()`` removes the hook.
        """
        return self._checkpoints.add_hook(self._checkpoints.load_hooks, hook)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Saves an object once a run (or once a machine, with ``save_on_each_node``).

        Args:
            obj: What to save.
            f: A path, a URL or an open binary file.
            safe_serialization: As safetensors: `obj` is then a dictionary of tensors.
        """
        from . import model_files

        model_files.save(
            obj,
            f,
            save_on_each_node=self.project_configuration.save_on_each_node,
            safe_serialization=safe_serialization,
        )

    def save_model(
        self: Any,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Saves a model's weights in files that other programs load: one, or several with an index.

        Args:
            model: A prepared model, or any other.
            save_directory: The folder, or a URL. When that is a file, an error is logged and nothing saved.
            max_shard_size: Largest size of a file, such as ``"5GB"``.
            safe_serialization: As safetensors; else as `torch.save` writes them.

        Raises:
            RuntimeError: when tensors have no values (device meta).
            SaveError: on the other processes that call this, which wait for the one that writes, when it failed.
        """
        from . import model_files
        from .consensus import wait_for_writer
        from .storage import remote

        here = world.current()
        writer = here.rank - here.local_rank if self.project_configuration.save_on_each_node else 0
        with wait_for_writer(f"save_model to {save_directory}", writer):
            state = self.get_state_dict(model)
            if not self.should_save_model:
                return

            def write(folder: Path) -> None:
                model_files.save_model(model, state, folder, max_shard_size, safe_serialization)

            if remote.is_url(save_directory):
                remote.upload_folder(str(save_directory), write)
                return
            folder = Path(os.path.expanduser(save_directory))
            if folder.is_file():
                logger.error(f"save_model needs a folder, and {folder} is a file: nothing was saved.")
            else:
                write(folder)
