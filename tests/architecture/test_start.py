"""A run imports, at each stage, nothing heavy beyond what torch itself loads, and nothing of ours that it does not use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each stage collects the modules it added. With several ranks a plain container of torch is made first: torch imports its
# compiler with it. There is no optimizer, with which torch does so too: that would hide what we import.
SCRIPT = """
import json, sys, tempfile
import torch
from torch.utils.data import DataLoader, TensorDataset

before, stages = set(sys.modules), {}

def stage(name):
    global before
    stages[name], before = sorted(set(sys.modules) - before), set(sys.modules)

from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
stage("construct")
model = torch.nn.Linear(3, 1)
if accelerator.num_processes > 1:
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))(torch.ones(1, 3)).sum().backward()
stage("torch")
model, loader = accelerator.prepare(model, DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2))
stage("prepare")
for (inputs,) in loader:
    with accelerator.accumulate(model):
        loss = model(inputs).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
accelerator.gather_for_metrics(loss.detach())
stage("step")
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder + "/checkpoint")
    accelerator.wait_for_everyone()
stage("save")
if accelerator.is_main_process:
    print("STAGES", json.dumps(stages))
accelerator.end_training()
"""
STAGES = ("construct", "prepare", "step", "save")
# Of ours, what takes part in some runs only, and from which stage on it may be there.
PARTS = {
    "accelerate.big_modeling": None,
    "accelerate.commands": None,
    "accelerate.data_loader.base": "prepare",
    "accelerate.data_loader.batches.batch_broadcast": None,
    "accelerate.checkpointing.manager": "save",
    "accelerate.hooks": "save",
    "accelerate.inference": None,
    "accelerate.launch": None,
    "accelerate.offload": "save",
    "accelerate.quantization": None,
    "accelerate.settings.plugins.deepspeed": None,
    "accelerate.settings.plugins.fsdp": None,
    "accelerate.settings.plugins.megatron": None,
    "accelerate.strategies.parallel.context.manager": None,
    "accelerate.strategies.fsdp1": None,
    "accelerate.strategies.fsdp2": None,
    "accelerate.strategies.tensor_parallel": None,
    "accelerate.utils": None,
}
# Beyond torch, the standard library and ours, what a stage needs.
NEEDED = {"save": ("msgspec", "numpy", "safetensors")}


def stages(folder: Path, ranks: int, script: str = SCRIPT) -> dict[str, list[str]]:
    """Runs the script, and returns the modules that each stage added on rank 0."""
    path = folder / "script.py"
    path.write_text(script)
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", f"--num_processes={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "STAGES " in line)
    found: dict[str, list[str]] = json.loads(line.partition("STAGES ")[2])
    return found


def needless(found: dict[str, list[str]]) -> list[str]:
    """What the stages imported and should not have, as "stage: module"."""
    wrong = []
    for position, stage in enumerate(STAGES):
        for module in found[stage]:
            top = module.partition(".")[0]
            early = any(
                (module == part or module.startswith(f"{part}.")) and (first is None or position < STAGES.index(first))
                for part, first in PARTS.items()
            )
            heavy = module.startswith(("torch.distributed.", "torch._dynamo", "torch.fx", "torch._inductor"))
            foreign = top not in {"accelerate", "torch", *NEEDED.get(stage, ()), *sys.stdlib_module_names}
            if early or heavy or (foreign and not top.startswith(("_", "cython"))):
                wrong.append(f"{stage}: {module}")
    return wrong


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_imports_what_it_uses(tmp_path: Path, ranks: int) -> None:
    found = stages(tmp_path, ranks)
    assert "accelerate.state" in found["construct"]
    assert not needless(found)


def test_a_needless_import_is_noticed(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "accelerator = ", "import torch.distributed.tensor, accelerate.hooks, yaml\naccelerator = ", 1
    )
    wrong = needless(stages(tmp_path, 1, script))
    assert {"construct: torch.distributed.tensor", "construct: accelerate.hooks", "construct: yaml"} <= set(wrong)
