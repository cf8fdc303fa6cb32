"""What transformers and peft import from us, and what transformers imports once DeepSpeed is installed too."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "peft"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'accelerate[clients]'")
pytestmark = pytest.mark.slow


def names_imported(package: str) -> Iterator[tuple[str, str | None]]:
    """Yields (module, name) of each import of accelerate in a package, those inside functions included."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    for path in Path(spec.origin).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "accelerate" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.ImportFrom)
                and not node.level
                and (node.module or "").split(".")[0] == "accelerate"
            ):
                yield from ((node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "accelerate")


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_every_name_that_a_client_imports_exists(package: str) -> None:
    names = set(names_imported(package))
    assert ("accelerate.hooks", "AlignDevicesHook") in names  # so the search finds what it looks for
    missing = []
    for module, name in names:
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        if name is not None and not hasattr(found, name):
            missing.append(f"{module}.{name}")
    assert not missing


def test_a_trainer_trains_where_deepspeed_is_installed_and_not_used(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    (packages / "deepspeed").mkdir(parents=True)
    (packages / "deepspeed" / "__init__.py").write_text("")
    (packages / "deepspeed-0.18.0.dist-info").mkdir()
    (packages / "deepspeed-0.18.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.0\n"
    )
    code = f"""
import torch
import peft
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import is_deepspeed_available
assert is_deepspeed_available()
assert HfDeepSpeedConfig({{"zero_optimization": {{"stage": 3}}}}).is_zero3()
model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
data = [{{"input_ids": torch.arange(8), "labels": torch.arange(8)}}] * 8
arguments = TrainingArguments({str(tmp_path / "out")!r}, use_cpu=True, max_steps=2, report_to=[], save_strategy="no")
print("steps", Trainer(model, arguments, train_dataset=data).train().global_step)
"""
    paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps 2" in done.stdout


def test_a_trainer_finds_the_batch_size_that_fits(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    tried: list[int] = []

    class Large(GPT2LMHeadModel):
        def forward(
            self, input_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None, **others: Any
        ) -> Any:
            assert input_ids is not None
            tried.append(len(input_ids))
            if len(input_ids) > 3:
                torch.empty(2**60, dtype=torch.uint8)  # more than any machine has
            return super().forward(input_ids=input_ids, labels=labels, **others)

    model = Large(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    data: Any = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 32
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=3, report_to=[], save_strategy="no",
        auto_find_batch_size=True, per_device_train_batch_size=16,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.train().global_step == 3
    assert tried == [16, 8, 4, 2, 2, 2]


@pytest.fixture
def spread(tmp_path: Path) -> Any:
    """A model whose second of three layers is on the disk."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    undropped = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=3, n_head=1, **undropped)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    where = dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"], "cpu")
    where |= {f"transformer.h.{number}": "disk" if number == 1 else "cpu" for number in range(3)}
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload")
    assert model.transformer.h[1].attn.c_attn.weight.is_meta
    return model


def trainer_of(model: Any, folder: Path) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments

    data: Any = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=3, report_to=[], save_strategy="no", learning_rate=0.01
    )
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_trainer_names_parameters_on_the_disk_that_it_cannot_train(
    spread: Any, tmp_path: Path, adapters: bool
) -> None:
    if adapters:
        from peft import LoraConfig, get_peft_model

        spread = get_peft_model(
            spread, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        )
    with pytest.raises(ValueError, match=r"h\.1\..* is offloaded .*requires_grad_\(False\)"):
        trainer_of(spread, tmp_path).train()


def test_a_trainer_trains_around_frozen_layers_on_the_disk(spread: Any, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2LMHeadModel

    whole = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    for model in (spread, whole):
        model.transformer.h[1].requires_grad_(False)
        trainer_of(model, tmp_path).train()
    after = whole.state_dict()
    for name, value in spread.named_parameters():
        if not value.is_meta:
            torch.testing.assert_close(value, after[name])
            assert not torch.equal(after[name], before[name])


def test_adapters_train_in_layers_that_are_in_memory(spread: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        target_modules=["c_attn"],
        layers_to_transform=[0, 2],
        layers_pattern="h",
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(spread, adapters)
    trainer_of(model, tmp_path).train()
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 2 and all(bool(value.any()) for value in trained)
