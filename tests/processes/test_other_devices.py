"""Devices that a library of their own brings to torch, played by a stub of it: what a lone process calls them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# torch takes the name of such a device once for the life of a process.
_STUB = """
import types
import torch

torch.utils.rename_privateuse1_backend("{name}")

def set_device(device):
    if torch.device(device).index is None:
        raise ValueError(f"expected a device with an index, found {{device}}")

module = types.ModuleType("torch.{name}")
module.is_available = lambda: True
module.device_count = lambda: 4
module.current_device = lambda: 2
module.set_device = set_device
module.manual_seed_all = lambda seed: None
module.is_initialized = lambda: True
module._is_in_bad_fork = lambda: False
torch._register_device_module("{name}", module)
"""
_SCRIPT = """
from accelerate import Accelerator, PartialState
device = Accelerator().device
PartialState().set_device()
print(device, PartialState().device)
"""


@pytest.mark.parametrize("name", ["npu", "mlu"])
def test_a_lone_process_has_a_device_with_an_index(name: str, tmp_path: Path) -> None:
    (tmp_path / f"torch_{name}.py").write_text(_STUB.format(name=name))
    script = tmp_path / "script.py"  # beside the stub, so that it is found
    script.write_text(_SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [f"{name}:2", f"{name}:2"], done.stderr
