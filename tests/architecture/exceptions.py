"""Where a rule does not hold, and why. An entry that no longer applies makes the tests fail, as a missing one does."""

from __future__ import annotations

ENVIRONMENT = {"settings/env.py": "the one reader and writer of the process environment"}

FORWARD = {"runtime/forward.py": "the one place that wraps and unwraps a forward"}

DISTRIBUTED_TYPE = {
    "state.py": "shows the user which kind is at work",
}

HOW_SHARDED = {
    "accelerator.py: Accelerator._mesh_rank": "tells a person a rank's place on the mesh",
    "checkpointing/pieces.py: _layout_of_dtensor": "where a tensor of any mesh lies, not which mesh it is",
    "data_loader/mesh.py: data_ranks_of_mesh": "turns a mesh into who reads which part, which is all that loaders know",
    "data_loader/dispatch.py: DataLoaderDispatcher.ranks": "the documented argument torch_device_mesh",
    "data_loader/prepare.py: _ranks": "the documented argument torch_device_mesh",
}

UNSAFE_LOADING: dict[str, str] = {}

SHELL: dict[str, str] = {}

SHOP_WINDOW = {
    "utils": "its modules may name each other",
    "test_utils": "stands above it: its scripts are run as a user's would be",
}

LONG_FILE = 520
"""About 500 lines."""

LONG_FILES: dict[str, tuple[int, str]] = {
    "accelerator.py": (920, "the façade: one method each, mostly docstrings"),
    "state.py": (660, "three documented classes whose members are mostly docstrings"),
}

LONG_FUNCTIONS: dict[str, str] = {}
