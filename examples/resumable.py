"""Trains the network of digits.py so that it may be killed at any moment and started again with the same command.

It goes on where it was, bit for bit, and on another number of processes it sees the samples in the same order:

    accelerate launch --cpu --num_processes 2 --max_restarts 3 examples/resumable.py --project_dir run

A process that is killed has all of them start again from the newest checkpoint, three times at most. Asked to stop
(SIGTERM, as schedulers send it ahead of time), the run saves and leaves with code 75: nothing failed, start it again.

Needs `pip install "accelerate[examples,stateful]"`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.checkpointing import EXIT_CODE
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import ProjectConfiguration, set_seed


class Digits(Dataset[Any]):
    """Scans of 8 by 8 pixels with their labels.

    Args:
        images, labels: The scans, in [0, 1], and what they show.
        shifted: Move each scan by up to a pixel, another way each time.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, shifted: bool) -> None:
        self.images, self.labels, self.shifted = images, labels, shifted

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.shifted:
            # Whichever process reads the sample, and resumed or not, these are the same numbers: the loader seeds them by
            # its own seed, the epoch and the index.
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = nn.functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


class Progress:
    """What the loop has to remember besides what is prepared; saved and loaded with the rest."""

    def __init__(self) -> None:
        self.steps = 0
        self.loss = 0.0  # summed up over the epoch

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.loss = state["steps"], state["loss"]


def load_data(seed: int) -> tuple[Digits, Digits]:
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    return Digits(images[train], labels[train], shifted=True), Digits(images[test], labels[test], shifted=False)


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = total = 0
    for images, labels in loader:
        with torch.no_grad():
            answers = model(images).argmax(dim=1)
        answers, labels = accelerator.gather_for_metrics((answers, labels))
        right += (answers == labels).sum().item()
        total += len(labels)
    return 100 * right / total


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on handwritten digits; may be killed and started again.")
    parser.add_argument("--project_dir", type=Path, default=Path("run"), help="where checkpoints and the model go")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=32, help="samples of all processes together at a step")
    parser.add_argument("--workers", type=int, default=1, help="of each process, that read data")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--save_every", type=int, default=40, help="steps from one checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    accelerator = Accelerator(
        project_config=ProjectConfiguration(
            project_dir=str(args.project_dir), automatic_checkpoint_naming=True, total_limit=2
        ),
        dataloader_config=DataLoaderConfiguration(
            use_stateful_dataloader=True,  # where the loop stands is saved
            use_seedable_sampler=True,  # the order does not depend on the number of processes
            data_seed=args.seed,
            split_batches=True,  # nor does the size of a step
        ),
    )
    set_seed(args.seed)

    train_data, test_data = load_data(args.seed)
    train_loader = DataLoader(train_data, batch_size=args.batch_size, shuffle=True, num_workers=args.workers)
    test_loader = DataLoader(test_data, batch_size=256)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(train_loader))
    progress = Progress()

    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )
    accelerator.register_for_checkpointing(progress)

    report = accelerator.resume()  # the newest checkpoint that is whole; None at the first start
    if report is not None:
        accelerator.print(f"going on from {report.folder.name}, step {progress.steps}")

    loss_function = nn.CrossEntropyLoss()
    assert isinstance(train_loader, DataLoaderShard)  # it counts epochs
    for epoch in range(train_loader.iteration, args.epochs):
        model.train()
        for images, labels in train_loader:
            loss = loss_function(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.steps += 1
            progress.loss += loss.item()

            if accelerator.should_stop:  # the same on all processes, at the same step
                accelerator.save_state()
                accelerator.print(f"stopped on request at step {progress.steps}")
                accelerator.end_training()
                sys.exit(EXIT_CODE)
            if progress.steps % args.save_every == 0:
                accelerator.save_state(asynchronous=True)  # written while the training goes on
        accelerator.print(f"epoch {epoch + 1}: loss {progress.loss / len(train_loader):.6f}")
        progress.loss = 0.0

    accuracy = evaluate(accelerator, model, test_loader)
    accelerator.save_model(model, args.project_dir / "model")
    accelerator.print(f"accuracy: {accuracy:.1f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
