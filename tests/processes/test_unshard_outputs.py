"""What ranks that share sequences gather for metrics is what one rank would have of the whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState

ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _made(tokens: torch.Tensor) -> dict[str, Any]:
    """What a model and its losses make of a batch of sequences."""
    errors = (tokens - 1).square()
    return {
        "predictions": (tokens > 0).long(),
        "hits": tokens > 0.5,
        "logits": (torch.stack([tokens, -tokens], -1), [tokens.bfloat16()]),
        "per sample": errors.mean(1),
        "sum and count": (errors.sum(), torch.tensor(float(tokens.numel()))),
        "halves": errors.mean(1).to(torch.bfloat16),
        "repeated": mse_loss(tokens, torch.ones_like(tokens)).repeat(len(tokens)),
    }


def _gathered(sizes: dict[str, int], length: int) -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(**sizes))
    ranks, rank = 2, accelerator.process_index % 2
    data = ROWS[:, :length]
    loader = accelerator.prepare(DataLoader(data, batch_size=3 if accelerator.num_processes == 2 else 2))
    seen, stacked = [], []
    for batch in loader:
        with accelerator.maybe_context_parallel([tokens := batch.clone()], [1]):
            made = _made(tokens)
        stacked.append(made["predictions"])
        found = accelerator.gather_for_metrics(made)
        seen.append(found)
        # What each has whole, and objects: as the first has them.
        assert torch.equal(accelerator.gather_for_metrics(batch > 0), accelerator.gather_for_metrics(batch) > 0)
        names = accelerator.gather_for_metrics([f"{rank}-{index}" for index in range(len(batch))])
        assert {name[0] for name in names} == {"0"} and len(names) == len(found["predictions"])
        assert accelerator.gather_for_metrics([float(rank)] * len(batch)) == [0.5] * len(names)
        with pytest.raises(
            ValueError, match=rf"torch.int64 and shape \(\) .* 2 ranks .* shard of {length // ranks} out of"
        ):
            accelerator.gather_for_metrics(made["predictions"].numel() + torch.tensor(rank))
        with pytest.raises(ValueError, match=r"torch.float64 and shape \(\d+, 2\) .* as \(samples, tokens, \.\.\.\)"):
            accelerator.gather_for_metrics(made["logits"][0].flatten(0, 1))
        assert accelerator.gather_for_metrics(torch.tensor(7)).unique().item() == 7
    expected = _made(data)
    for name in ("predictions", "hits", "per sample"):
        torch.testing.assert_close(torch.cat([one[name] for one in seen]), expected[name], rtol=0, atol=1e-12)
    assert torch.equal(torch.cat([one["logits"][0] for one in seen]), expected["logits"][0])
    assert torch.equal(torch.cat([one["logits"][1][0] for one in seen]), expected["logits"][1][0])
    torch.testing.assert_close(torch.cat([one["halves"] for one in seen]), expected["halves"])
    assert seen[0]["halves"].dtype == torch.bfloat16
    together = accelerator.gather_for_metrics(torch.tensor([accelerator.process_index // 2]))
    assert together.tolist() == list(range(accelerator.num_processes // 2))  # outside of any loop
    if accelerator.num_processes == 2:
        torch.testing.assert_close(seen[0]["repeated"], expected["per sample"][:3].mean().repeat(3))
        total, count = (sum(one["sum and count"][index] for one in seen) for index in (0, 1))
        torch.testing.assert_close((total / count).squeeze(), expected["per sample"].mean())
        # After the loop, and in one without blocks, where a part's length means nothing.
        assert torch.equal(accelerator.gather_for_metrics(torch.cat(stacked)), expected["predictions"])
        for batch in accelerator.prepare(DataLoader(data, batch_size=5)):
            classes = batch[:, : length // ranks] > 0
            assert torch.equal(accelerator.gather_for_metrics(classes), classes)
            assert accelerator.gather_for_metrics(torch.tensor([[rank]])).item() == 0


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({"cp_size": 2}, 8),  # a piece from the head and one from the tail
        ({"cp_size": 2}, 6),  # one piece each
        ({"sp_size": 2}, 8),
        ({"dp_replicate_size": 2, "cp_size": 2}, 8),
        ({"dp_replicate_size": 2, "sp_size": 2}, 8),
    ],
)
def test_what_is_gathered_is_of_whole_sequences(sizes: dict[str, int], length: int, run_ranks: Any) -> None:
    ranks = 2 if len(sizes) == 1 else 4
    run_ranks(ranks, _gathered, sizes, length)
