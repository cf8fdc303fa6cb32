"""Saves and loads checkpoints: atomic, checksummed, and resharded on load.

`manager` has the steps of a save, and `loading` those of a load, which checks everything before it changes anything. `items`
has the contents of a checkpoint, `sharded` the layout of torch.distributed.checkpoint, `storage` files and the commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.system.lazy import lazy_exports

if TYPE_CHECKING:
    from .errors import CheckpointError, LoadError, Problem, SaveError
    from .items.state_item import LoadItem, SaveItem
    from .loading import LoadReport
    from .mixin import CheckpointMixin
    from .model_files import clean_state_dict_for_safetensors, load, save
    from .preemption import EXIT_CODE

__all__ = [
    "EXIT_CODE",
    "CheckpointError",
    "CheckpointMixin",
    "LoadError",
    "LoadItem",
    "LoadReport",
    "Problem",
    "SaveError",
    "SaveItem",
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
        "LoadError": "errors",
        "LoadItem": "items.state_item",
        "LoadReport": "loading",
        "Problem": "errors",
        "SaveError": "errors",
        "SaveItem": "items.state_item",
        "clean_state_dict_for_safetensors": "model_files",
        "load": "model_files",
        "save": "model_files",
    },
)
