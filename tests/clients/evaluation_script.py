"""Evaluates a tiny BERT with transformers' Trainer on sets of several sizes; writes eval_loss beside the samples' losses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Stream(IterableDataset):
    """Samples, one after the other, of unknown length."""

    def __init__(self, samples: list[dict[str, torch.Tensor]]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.samples)


def main(folder: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=4
    )
    model = BertForSequenceClassification(config).eval()
    rows = torch.randint(0, 32, (72, 8), generator=torch.Generator().manual_seed(1))
    model.classifier.bias.data = torch.tensor([0.0, 1.0, 2.0, 3.0])  # so that losses differ
    data = [{"input_ids": row, "labels": row[0] % 4} for row in rows]
    with torch.no_grad():
        losses = [model(input_ids=one["input_ids"][None], labels=one["labels"][None]).loss.item() for one in data]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        average_tokens_across_devices=False,  # would multiply by the number of processes a loss that is a mean already
    )
    trainer = Trainer(model=model, args=arguments)
    found = {
        "66": trainer.evaluate(data[:66])["eval_loss"],
        "72": trainer.evaluate(data)["eval_loss"],
        "stream of 66": trainer.evaluate(Stream(data[:66]))["eval_loss"],
    }
    if trainer.is_world_process_zero():
        Path(folder, "result.json").write_text(json.dumps({"losses": losses, "found": found}))


if __name__ == "__main__":
    main(sys.argv[1])
