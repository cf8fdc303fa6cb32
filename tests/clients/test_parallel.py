"""A Llama of transformers whose tensors, or sequences, are shared over ranks: the same training as on one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import AcceleratorState
from tests.helpers.releases import FSDP2_ON_CPU, TP_OF_TRANSFORMERS

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    where = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


def _train(
    folder: Path, sizes: dict[str, int] | None, cut_by: str = "prepare", fsdp: bool = False, masked: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms of four steps, and the weights they come to."""
    accelerator = Accelerator(
        cpu=True,
        parallelism_config=None if sizes is None else ParallelismConfig(**sizes),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        if fsdp
        else None,
    )
    more: dict[str, Any] = {}
    if cut_by == "transformers":
        more = {"tp_plan": "auto", "device_mesh": accelerator.torch_device_mesh["tp"]}
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **more).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    told = []
    cuts = {"cp_size": 1, "sp_size": 1, **(sizes or {})}
    copies = accelerator.num_processes // (cuts["cp_size"] * cuts["sp_size"])  # ranks that have seen the same tokens
    for step in range(4):
        ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(step))
        batch = {"input_ids": ids, "position_ids": torch.arange(12).expand(2, -1)}
        labels = pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
        labels[:, 2:4] = -100  # the ranks' parts count differently many tokens
        if masked:
            batch["attention_mask"] = torch.ones_like(ids)
        whole = [*batch.values(), labels]
        with accelerator.maybe_context_parallel(whole, [1] * len(whole), no_restore_buffers=set(whole)):
            logits = model(**batch, use_cache=False).logits  # with a cache, positions are not looked at
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            accelerator.backward(loss, num_items=(labels != -100).sum())
        told.append(float(accelerator.reduce(loss.detach(), "sum")) / copies)
        told.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return told, {name: value.detach().clone() for name, value in accelerator.get_state_dict(model).items()}


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensors, loaded by transformers": (2, {"sizes": {"tp_size": 2}, "cut_by": "transformers"}),
    "tensors, by the model's plan": (2, {"sizes": {"tp_size": 2}}),
    "sequences": (2, {"sizes": {"cp_size": 2}}),
    "sequences, with a mask of ones": (2, {"sizes": {"cp_size": 2}, "masked": True}),
    "shards over sequences": (2, {"sizes": {"cp_size": 2}, "fsdp": True}),
    "sequences, heads exchanged": (2, {"sizes": {"sp_size": 2}, "masked": True}),
}


@pytest.fixture(scope="module")
def alone(rank_pool: Any, folder: Path) -> Any:
    return rank_pool.run(1, _train, folder, None, env={"HF_HUB_OFFLINE": "1"})[0]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(name, marks=FSDP2_ON_CPU if "fsdp" in way[1] else TP_OF_TRANSFORMERS if "cut_by" in way[1] else ())
        for name, way in WAYS.items()
    ],
)
def test_a_llama_trains_as_on_one_rank(way: str, folder: Path, run_ranks: Any, alone: Any) -> None:
    ranks, arguments = WAYS[way]
    results = run_ranks(ranks, _train, folder, **arguments, env={"HF_HUB_OFFLINE": "1"})
    for told, _ in results:
        assert told == pytest.approx(alone[0], rel=1e-9)
    for name, value in alone[1].items():
        torch.testing.assert_close(results[0][1][name], value, rtol=0, atol=1e-10)


# What ranks that share sequences are passed ---------------------------------------------------------------------------


def _masked_and_refused(folder: Path, output: Path) -> None:
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    rows = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[1, :3] = False  # in front, where a causal mask alone would not do
    whole = kept[:, None, None] & torch.ones(8, 8, dtype=torch.bool).tril() | torch.eye(8, dtype=torch.bool)
    expected = model(rows, attention_mask=whole).logits.chunk(2, 1)[accelerator.process_index]
    model = accelerator.prepare(model)
    tokens, positions, part = rows.clone(), torch.arange(8).expand(2, -1).clone(), kept.long()
    with accelerator.maybe_context_parallel([tokens, positions, part], [1, 1, 1]):
        found = model(tokens, position_ids=positions, attention_mask=whole).logits
        if not accelerator.is_main_process:
            part[1, 0] = 0  # each rank makes a mask of its tokens, so that both refuse
        with pytest.raises(ValueError, match=r"\(\.\.\., 8, 8\) or \(\.\.\., 1, 8\) for 2 ranks with 4 tokens"):
            model(tokens, position_ids=positions, attention_mask=part)
        with pytest.raises(ValueError, match="LlamaForCausalLM got no position_ids"):
            model(tokens)
        with pytest.raises(ValueError, match="got an attention_mask of all 8 tokens and would apply its beginning"):
            model(tokens, kept.long(), positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "sliding_window": 6}
    config = transformers.MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    narrow = accelerator.prepare(transformers.MistralForCausalLM(config))
    with pytest.raises(ValueError) as caught, accelerator.maybe_context_parallel([tokens, positions], [1, 1]):
        narrow(tokens, position_ids=positions)
    assert "MistralAttention limits attention to 6 tokens (sliding_window), and sequences have 8" in str(caught.value)

    AcceleratorState._reset_state(True)
    arguments = transformers.TrainingArguments(
        str(output), use_cpu=True, report_to=[], max_steps=1, parallelism_config=ParallelismConfig(sp_size=2)
    )
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    trainer = transformers.Trainer(plain, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    with pytest.raises(ValueError, match="and so does transformers' Trainer with sp_size above 1"):
        trainer.train()


def test_masks_are_whole_and_what_would_go_wrong_in_silence_is_refused(
    folder: Path, tmp_path: Path, run_ranks: Any
) -> None:
    run_ranks(2, _masked_and_refused, folder, tmp_path, env={"HF_HUB_OFFLINE": "1"})


# Trainer's evaluation -------------------------------------------------------------------------------------------------


def _evaluated(folder: Path, output: Path, sizes: dict[str, int] | None) -> tuple[dict[str, float], Any, Any, Any]:
    """What Trainer makes of 5 sequences, in batches of 2, and passes to `compute_metrics`."""
    torch.set_num_threads(1)
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.extend((prediction.predictions, prediction.label_ids, prediction.inputs))
        return {"right": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    rows = torch.randint(0, 32, (5, 8), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[1, 5:] = -100  # the ranks' parts count differently many tokens
    labels[2:, 1] = -100
    arguments = transformers.TrainingArguments(
        str(output),
        use_cpu=True,
        report_to=[],
        per_device_eval_batch_size=2,
        include_for_metrics=["inputs"],
        disable_tqdm=True,
        **({} if sizes is None else {"parallelism_config": ParallelismConfig(**sizes)}),
    )
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    trainer = transformers.Trainer(model, arguments, eval_dataset=data, compute_metrics=compute_metrics)
    found = trainer.evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_right")}, *seen


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"tp_size": 2}], ids=["sequences", "tensors"])
def test_trainer_evaluates_as_on_one_rank(
    sizes: dict[str, int], folder: Path, tmp_path: Path, run_ranks: Any, rank_pool: Any
) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    (alone,) = rank_pool.run(1, _evaluated, folder, tmp_path, None, env=offline)
    for found in run_ranks(2, _evaluated, folder, tmp_path, sizes, env=offline):
        assert found[0] == pytest.approx(alone[0], rel=1e-6)  # transformers computes losses in 32 bits
        for mine, other in zip(found[1:], alone[1:], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=0, atol=1e-9)


# Trainer's checkpoints ------------------------------------------------------------------------------------------------


def _trained(folder: Path, output: Path, sizes: dict[str, int] | None, resumes: bool = False) -> list[float]:
    """Losses of four steps, of which the last two may be those of a run that goes on; the weights are in ``final``."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    rows = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    shared: dict[str, Any] = {}
    if sizes is not None:
        shared = {"parallelism_config": ParallelismConfig(**sizes), "fsdp": "full_shard auto_wrap"}
        shared["fsdp_config"] = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}
    arguments = transformers.TrainingArguments(
        str(output),
        use_cpu=True,
        report_to=[],
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        **shared,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2") if resumes else None)
    trainer.save_model(str(output / "final"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@FSDP2_ON_CPU
def test_trainer_saves_and_resumes_with_tensors_shared(
    folder: Path, tmp_path: Path, run_ranks: Any, rank_pool: Any
) -> None:
    offline, load = {"HF_HUB_OFFLINE": "1"}, transformers.LlamaForCausalLM.from_pretrained
    (alone,) = rank_pool.run(1, _trained, folder, tmp_path / "alone", None, env=offline)
    expected = load(tmp_path / "alone" / "final").state_dict()
    for resumes in (False, True):
        for losses in run_ranks(2, _trained, folder, tmp_path, {"tp_size": 2}, resumes, env=offline):
            assert losses == pytest.approx(alone, rel=1e-5)
        assert (tmp_path / "checkpoint-4" / "optimizer.bin").exists()
        for name, value in load(tmp_path / "final").state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
        for folder_of_end in ("final", "checkpoint-4"):
            shutil.rmtree(tmp_path / folder_of_end)
