"""Installs the torch_xla that matches the installed torch, for notebooks with TPUs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys


def pip_arguments(torch_version: str, upgrade: bool) -> list[str]:
    """Returns the arguments of pip for an installed torch version.

    Example:
        >>> pip_arguments("2.9.0+cu128", upgrade=False)
        ['install', 'torch_xla[tpu]==2.9.*']
    """
    from packaging.version import Version

    if upgrade:
        return ["install", "--upgrade", "torch", "torch_xla[tpu]"]
    version = Version(torch_version)
    return ["install", f"torch_xla[tpu]=={version.major}.{version.minor}.*"]


def install_xla(upgrade: bool = False) -> None:
    """Installs the matching torch_xla with pip. Restart the notebook's kernel afterwards.

    Args:
        upgrade: Upgrade torch to the newest version as well.

    Raises:
        RuntimeError: if pip fails; not every version of torch has a torch_xla.

    Example:
        ```python
        install_xla()
        ```
    """
    arguments = pip_arguments(importlib.metadata.version("torch"), upgrade)
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(
            f"pip {' '.join(arguments)} failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
        )
