"""Which variables a report shows, and which it only mentions."""

from __future__ import annotations

from accelerate.commands.env import variables


def test_secrets_are_mentioned_and_not_shown() -> None:
    found = variables(
        {
            "HF_TOKEN": "a",
            "WANDB_API_KEY": "b",
            "AWS_SECRET_ACCESS_KEY": "c",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_BASE_URL": "https://me:word@host/",
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "HOME": "/root",
        }
    )
    assert found == {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "AWS_SECRET_ACCESS_KEY": "(set, not shown)",
        "HF_TOKEN": "(set, not shown)",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_API_KEY": "(set, not shown)",
        "WANDB_BASE_URL": "https://***@host/",
    }
