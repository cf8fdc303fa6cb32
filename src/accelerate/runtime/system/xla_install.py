"""Installs torch_xla, of the version that goes with the torch that is there: for notebooks that offer TPUs without it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys


def pip_arguments(torch_version: str, upgrade: bool) -> list[str]:
    """What pip is told, where `torch_version` is installed.

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
    """Installs torch_xla for the installed torch with pip; a notebook's kernel must be started anew afterwards.

    Args:
        upgrade: Bring torch to the newest version as well, and torch_xla to the one that goes with it.

    Raises:
        RuntimeError: when pip could not install it: not every version of torch has a torch_xla.

    Example:
        ```python
        install_xla()
        ```
    """
    arguments = pip_arguments(importlib.metadata.version("torch"), upgrade)
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"pip {' '.join(arguments)} failed: {said[-1] if said else f'exit code {done.returncode}'}")
