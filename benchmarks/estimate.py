"""`accelerate estimate-memory` beside the memory of real training steps, in one table.

    python benchmarks/estimate.py [--only WORD] [--json]

Both sides get the same flags: the estimate from `accelerate estimate-memory`, the figure beside it from a run of this file
that `accelerate launch` starts. A rank's peak is the most anonymous memory (VmHWM, set back before the step, less mapped
files) of its third step, less what it held before there was a model, in a fresh process whose allocator takes and gives back
every block of 64 KB directly: with what kernels work on inside. The second ratio, for one process, is to what torch's own
profiler sees allocated. Weights, gradients and Adam's state are counted by storage, and must be equal to the byte.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BYTES = 1024**2
PARTS = ("weights", "gradients", "optimizer")
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
FSDP = ("--num_processes", "2", "--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_version")
FSDP1, FSDP2 = (*FSDP, "1"), (*FSDP, "2")


@dataclass(frozen=True)
class Case:
    """A model, a batch, and flags of the launcher."""

    model: str
    batch: int
    tokens: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the table calls it."""
        told = " ".join(word.removeprefix("--").removeprefix("fsdp_") for word in self.flags if word not in FSDP[2:5])
        return f"{self.model} {self.batch}x{self.tokens} {told}".strip()


ALONE = [Case(model, *shape) for model in ("bert", "gpt2", "llama") for shape in ((4, 128), (8, 256))]
CASES = [
    *ALONE,
    Case("bert", 4, 128, ("--mixed_precision", "bf16")),
    Case("llama", 4, 128, ("--num_processes", "2")),
    Case("llama", 4, 128, FSDP2),
    Case("llama", 4, 128, (*FSDP2, "--fsdp_reshard_after_forward", "false")),
    Case("llama", 4, 128, (*FSDP2, "--mixed_precision", "bf16")),
    Case("llama", 4, 128, (*FSDP2, "--fsdp_activation_checkpointing", "true")),
    Case("llama", 8, 256, (*FSDP2, "--fsdp_activation_checkpointing", "true")),
    Case("llama", 4, 128, FSDP1),
    Case("llama", 4, 128, (*FSDP1, "--fsdp_sharding_strategy", "SHARD_GRAD_OP")),
    Case("llama", 4, 128, (*FSDP1, "--mixed_precision", "bf16")),
    Case("gpt2", 4, 128, FSDP2),
]


def config(model: str) -> Any:
    """The configuration of a model."""
    import transformers

    if model == "bert":
        return transformers.BertConfig(architectures=["BertForMaskedLM"])
    if model == "gpt2":
        return transformers.GPT2Config(architectures=["GPT2LMHeadModel"])
    return transformers.LlamaConfig(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    )


# A rank ---------------------------------------------------------------------------------------------------------------


def status(key: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def stored(tensors: Iterable[Any]) -> int:
    """Bytes of storage behind tensors, each storage once."""
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def allocated(step: Callable[[], None]) -> int:
    """The most bytes that torch allocates in a step beyond what there was, by its profiler, which sees every allocation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def measure(folder: Path, batch: int, tokens: int) -> None:
    """Trains as a script does, and writes what this rank held."""
    import torch
    import transformers

    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    configuration = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, configuration.architectures[0])  # its code is no part of the model
    torch.nn.Linear(64, 64)(torch.zeros(64, 64)).sum().backward()  # what the first step of any model loads
    accelerator.wait_for_everyone()
    gc.collect()
    before = status("RssAnon")
    model = kind(configuration).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    found: dict[str, int] = {}

    def step(look: bool = False) -> None:
        output = model(input_ids=ids, labels=ids)
        accelerator.backward(output.loss)
        if look:
            inner = getattr(optimizer, "optimizer", optimizer)
            found["weights"] = stored((*model.parameters(), *model.buffers()))
            found["gradients"] = stored(p.grad for p in model.parameters() if p.grad is not None)
            found["optimizer"] = stored(value for state in inner.state.values() for value in state.values())
        optimizer.step()
        optimizer.zero_grad()

    step()
    step(look=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    accelerator.wait_for_everyone()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    found["peak"] = status("VmHWM") - status("RssFile") - status("RssShmem") - before  # what is no tensor left out
    if accelerator.num_processes == 1:
        found["allocated"] = found["weights"] + found["optimizer"] + allocated(step)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


# The table ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """An estimate and what was measured, in bytes; of ranks, the one that held most."""

    name: str
    estimate: int
    measured: int
    allocated: int | None
    exact: bool

    @property
    def ratios(self) -> tuple[float, float | None]:
        """Estimate over what was measured, and over what torch allocated."""
        return self.estimate / self.measured, self.estimate / self.allocated if self.allocated else None


def compare(case: Case) -> Row:
    """Estimates and measures a case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config(case.model).save_pretrained(folder)
        shape = ("--batch_size", str(case.batch), "--sequence_length", str(case.tokens))
        flags = ("--cpu", *(case.flags or ("--num_processes", "1")))
        report = json.loads(_accelerate("estimate-memory", name, "--json", *shape, *flags))
        guess = report["training_step"]["rank"]
        _accelerate("launch", *flags, __file__, "--measure", name, *shape)
        ranks = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    most = max(ranks, key=lambda rank: rank["peak"])
    exact = all(guess[part] == max(rank[part] for rank in ranks) for part in PARTS)
    return Row(case.name, guess["peak"], most["peak"], most.get("allocated"), exact)


def _accelerate(*words: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sequence_length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure, args.batch_size, args.sequence_length)
        return
    if not args.json:
        print(f"{'MB':<60}{'estimate':>9}{'measured':>9}{'ratio':>7}{'torch':>7}  parts equal")
    for case in CASES:
        if args.only not in case.name:
            continue
        row = compare(case)
        ratio, of_torch = row.ratios
        if args.json:
            print(json.dumps({**asdict(row), "ratios": row.ratios}), flush=True)
            continue
        figures = f"{row.estimate / BYTES:>9.1f}{row.measured / BYTES:>9.1f}{ratio:>7.3f}"
        figures += "       " if of_torch is None else f"{of_torch:>7.3f}"
        print(f"{row.name:<60}{figures}  {'yes' if row.exact else 'no'}", flush=True)


if __name__ == "__main__":
    main()
