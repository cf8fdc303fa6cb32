"""Checkpoints that can be killed, resumed and trusted.

`entries` and its neighbours say what is in one, `commit` how it lands on disk, `loading` how it is checked before anything
changes; `session` puts them in order for an `Accelerator`, whose methods are in `methods`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.system.lazy import lazy_exports

if TYPE_CHECKING:
    from .errors import CheckpointError, LoadError, Problem, SaveError
    from .items.state_item import Entry
    from .loading import LoadReport
    from .mixin import CheckpointMixin
    from .model_files import clean_state_dict_for_safetensors, load, save
    from .preemption import EXIT_CODE

__all__ = [
    "EXIT_CODE",
    "CheckpointError",
    "CheckpointMixin",
    "Entry",
    "LoadError",
    "LoadReport",
    "Problem",
    "SaveError",
    "clean_state_dict_for_safetensors",
    "load",
    "save",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "EXIT_CODE": "preemption",
        "CheckpointError": "errors",
        "CheckpointMixin": "mixin",
        "Entry": "items.state_item",
        "LoadError": "errors",
        "LoadReport": "loading",
        "Problem": "errors",
        "SaveError": "errors",
        "clean_state_dict_for_safetensors": "model_files",
        "load": "model_files",
        "save": "model_files",
    },
)
