"""A progress bar that only one process of each machine draws.

Neither torch nor tqdm is imported before a bar is asked for.
"""

from __future__ import annotations

from typing import Any


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """`tqdm.auto.tqdm`, drawn by the first process of each machine; the others iterate without a bar.

    Args:
        *args: As for `tqdm.auto.tqdm`: the iterable first.
        main_process_only: False draws a bar on every process.
        **kwargs: As for `tqdm.auto.tqdm`.

    Raises:
        ValueError: when a bool comes where the iterable belongs.

    Example:
        ```python
        for batch in tqdm(train_loader, desc="training"):
            ...
        ```
    """
    if args and isinstance(args[0], bool):
        raise ValueError(
            f"tqdm({args[0]}, ...): the first argument is what to iterate over. "
            f"Pass main_process_only={args[0]} by name."
        )
    from tqdm.auto import tqdm as bar

    from . import world

    if main_process_only and world.current().local_rank != 0:
        kwargs["disable"] = True
    return bar(*args, **kwargs)
