"""Trains a small convolutional network to read handwritten digits, and says how many of unseen ones it reads right.

The digits are the 1797 scans, of 8 by 8 pixels, that come with scikit-learn. The loop is plain PyTorch; the same file
runs on one process or many:

    python examples/digits.py
    accelerate launch --cpu --num_processes 2 examples/digits.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """The scans as float images in [0, 1] of shape [1, 8, 8] with their labels; three quarters of them to train on."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """The share of right answers, in per cent, over every sample of the loader, on all processes together."""
    model.eval()
    right = total = 0
    for images, labels in loader:
        with torch.no_grad():
            answers = model(images).argmax(dim=1)
        # From all processes, and without the samples that were repeated to fill the last batch.
        answers, labels = accelerator.gather_for_metrics((answers, labels))
        right += (answers == labels).sum().item()
        total += len(labels)
    return 100 * right / total


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small convolutional network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32, help="samples per process and step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as launched")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(args.seed)

    train_data, test_data = load_data(args.seed)
    train_loader = DataLoader(train_data, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_data, batch_size=256)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(train_loader))

    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )

    loss_function = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        model.train()
        # Only the main process shows a bar.
        for images, labels in tqdm(train_loader, desc=f"epoch {epoch + 1}/{args.epochs}"):
            with accelerator.accumulate(model):
                loss = loss_function(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    accuracy = evaluate(accelerator, model, test_loader)
    accelerator.print(f"accuracy: {accuracy:.1f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
