"""Trains a tiny GPT-2 with transformers' Trainer, as a user's script would; writes what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def main(folder: str, batch_size: int, steps: int, resume: bool) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    rows = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:32])
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        result = {
            "processes": trainer.accelerator.num_processes,
            "step": trainer.state.global_step,
            "eval_loss": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        }
        Path(folder, "result.json").write_text(json.dumps(result))
        trainer.save_model(f"{folder}/final")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "resume" in sys.argv)
