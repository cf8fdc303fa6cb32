"""Progress bar on one process per machine. Imports torch and tqdm on the first call only."""

from __future__ import annotations

from typing import Any


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """Wraps `tqdm.auto.tqdm` to show the bar on the first process of each machine only.

    Args:
        *args: As for `tqdm.auto.tqdm`: the iterable first.
        main_process_only: False shows a bar on every process.
        **kwargs: As for `tqdm.auto.tqdm`.

    Raises:
        ValueError: if the first positional argument is a bool instead of the iterable.

    Example:
        ```python
        for batch in tqdm(train_loader, desc="training"):
            ...
        ```
    """
    if args and isinstance(args[0], bool):
        raise ValueError(
            f"tqdm({args[0]}, ...): the first argument must be the iterable. Pass main_process_only={args[0]} by keyword."
        )
    from tqdm.auto import tqdm as bar

    from . import world

    if main_process_only and world.current().local_rank != 0:
        kwargs["disable"] = True
    return bar(*args, **kwargs)
