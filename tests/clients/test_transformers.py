"""transformers and peft on top of ours: Trainer alone and on two processes, save and resume, models spread over a disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")

SCRIPT = Path(__file__).parent / "trainer_script.py"
EVALUATION = Path(__file__).parent / "evaluation_script.py"
pytestmark = pytest.mark.slow


def run(script: Path, folder: Path, *arguments: str, processes: int = 1) -> dict[str, Any]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", str(processes)]
    done = subprocess.run([*start, str(script), str(folder), *arguments], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def train(folder: Path, batch_size: int, steps: int, *, processes: int = 1, resume: bool = False) -> dict[str, Any]:
    arguments = [str(batch_size), str(steps), *(["resume"] if resume else [])]
    return run(SCRIPT, folder, *arguments, processes=processes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A training on one process: its folder and its figures."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, 8, 4)


def test_a_trainer_resumes_where_it_was(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, whole = alone
    assert whole["step"] == 4 and whole["processes"] == 1 and whole["eval_loss"][1] < whole["eval_loss"][0]
    again = tmp_path / "again"
    shutil.copytree(folder / "checkpoint-2", again / "checkpoint-2")
    assert train(again, 8, 4, resume=True) == whole
    before, after = weights(folder), weights(again)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_two_processes_train_what_one_does(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, one = alone
    two = train(tmp_path / "two", 4, 4, processes=2)
    assert two["processes"] == 2 and two["step"] == 4
    before, after = weights(folder), weights(tmp_path / "two")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_shows_the_mean_over_all_samples(tmp_path: Path, processes: int) -> None:
    result = run(EVALUATION, tmp_path, processes=processes)
    found, losses = result["found"], torch.tensor(result["losses"])
    # A rank's loss is that of its whole batch, what was repeated to fill it included: two processes have each other's.
    of_last = losses[[64, 65]] if processes == 1 else losses[[64, 65, 0, 1, 2, 3, 4, 5]]
    of_66 = (losses[:64].sum() + 2 * of_last.mean()) / 66
    assert found["66"] == pytest.approx(of_66.item(), rel=1e-5)
    assert found["72"] == pytest.approx(losses.mean().item(), rel=1e-5)
    # Two processes that are sent their rows have one each, so that nothing is repeated.
    assert found["stream of 66"] == pytest.approx(losses[:66].mean().item(), rel=1e-5)


def tiny() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=3, n_head=2)).eval()


def test_a_pretrained_model_spread_over_memory_and_disk(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model, ids = tiny(), torch.randint(0, 32, (2, 8))
    model.save_pretrained(tmp_path / "model")
    where = {"transformer.wte": "cpu", "lm_head": "cpu", "transformer.wpe": "disk", "transformer.ln_f": "disk"}
    where |= {f"transformer.h.{number}": "disk" if number else "cpu" for number in range(3)}
    spread = GPT2LMHeadModel.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload")
    assert spread.hf_device_map == where
    assert spread.transformer.h[1].attn.c_attn.weight.is_meta
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, model(ids).logits)
    made = spread.generate(ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(made, model.generate(ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0))
    spread.save_pretrained(tmp_path / "again")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "again", device_map="cpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("kind", ["auto", "sequential"])
def test_a_map_made_for_little_memory(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny(), torch.randint(0, 32, (2, 3))
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=kind, max_memory={"cpu": 30_000}, offload_folder=tmp_path / "offload"
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(ids, **options), model.generate(ids, **options))


def test_ours_spreads_a_model_of_theirs(tmp_path: Path) -> None:
    import accelerate

    model, ids = tiny(), torch.randint(0, 32, (2, 8))
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size="20KB")
    with accelerate.init_empty_weights():
        empty = type(model)(model.config).eval()
    empty.tie_weights()
    accelerate.load_checkpoint_and_dispatch(
        empty,
        tmp_path,
        device_map="auto",
        max_memory={"cpu": 30_000},
        no_split_module_classes=["GPT2Block"],
        strict=True,
    )
    assert "disk" in empty.hf_device_map.values()
    with torch.no_grad():
        assert torch.equal(empty(ids).logits, model(ids).logits)


def test_an_adapter_on_an_offloaded_model() -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'accelerate[clients]'")
    import accelerate

    ids = torch.randint(0, 32, (2, 8))
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    adapted = peft.get_peft_model(tiny(), config).eval()
    with torch.no_grad():
        before = adapted(ids).logits
        accelerate.cpu_offload(adapted, torch.device("cpu"))
        assert all(parameter.is_meta for parameter in adapted.parameters())
        assert torch.equal(adapted(ids).logits, before)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, before, rtol=1e-4, atol=1e-4)
