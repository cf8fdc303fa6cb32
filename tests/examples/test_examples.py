"""The examples are started as their docstrings say, and reach what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(script: str, *arguments: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs an example with python, or under the launcher on CPU processes."""
    command = [sys.executable]
    if processes is not None:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", str(processes)]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # on a busy machine, more threads wait for each other
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def accuracy(output: str) -> float:
    last = output.splitlines()[-1]
    found = re.fullmatch(r"accuracy: (\d+\.\d) %", last)
    assert found, f"the last line is {last!r}"
    return float(found[1])


def test_digits_on_two_processes() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'accelerate[examples]'")
    done = start("digits.py", processes=2)
    assert accuracy(done.stdout) >= 97
    assert done.stdout.count("accuracy") == 1
    # One bar an epoch: a second process would show its own.
    assert len(re.findall(r"epoch 1/10: 100%", done.stderr)) <= 2
    assert "22/22" in done.stderr and "43/43" not in done.stderr


def test_digits_accumulates_in_bf16() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'accelerate[examples]'")
    arguments = ["--epochs=1", "--gradient_accumulation_steps=2", "--mixed_precision=bf16"]
    assert accuracy(start("digits.py", *arguments, processes=2).stdout) > 50


def test_language_model_learns_and_writes() -> None:
    arguments = ["--characters=20000", "--epochs=2", "--sample=20", "--batch_size=8"]
    lines = start("language_model.py", *arguments).stdout.splitlines()
    perplexities = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("epoch ")]
    assert len(perplexities) == 2
    assert perplexities[1] < perplexities[0] < 128  # 128 would be guessing
    assert any(line.startswith("def ") for line in lines)


def test_prompts_are_split_between_processes() -> None:
    pytest.importorskip("transformers", reason="the model is transformers': pip install 'accelerate[clients]'")
    alone = start("distributed_inference.py").stdout.splitlines()
    lines = start("distributed_inference.py", processes=2).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"process {rank}" for rank in (0, 0, 0, 1, 1)]
    assert [line.split(": ", 1)[1] for line in lines] == [line.split(": ", 1)[1] for line in alone]


def test_pipelined_inference() -> None:
    pytest.importorskip("transformers", reason="the model is transformers': pip install 'accelerate[clients]'")
    output = start("pipelined_inference.py", "--layers=4", processes=2).stdout
    assert "cut before transformer.h.2" in output
    shares = re.findall(r"process (\d) holds ([\d,]+) of ([\d,]+) weights", output)
    assert sorted(rank for rank, _, _ in shares) == ["0", "1"]
    assert all(int(held.replace(",", "")) < 0.6 * int(total.replace(",", "")) for _, held, total in shares)
    differences = re.findall(r"(\d) rows: .*, (\S+) from the whole model's", output)
    assert [rows for rows, _ in differences] == ["8", "5"]
    assert all(float(difference) < 1e-5 for _, difference in differences)


def test_quantized_model() -> None:
    pytest.importorskip("transformers", reason="the model is transformers': pip install 'accelerate[clients]'")
    pytest.importorskip("bitsandbytes", reason="it quantizes: pip install 'accelerate[quantization]'")
    lines = start("quantized.py").stdout.splitlines()
    whole, eight, four = (float(re.search(r": ([\d.]+) MB", line)[1]) for line in lines)  # type: ignore[index]
    assert four < eight < 0.3 * whole
    errors = [float(re.search(r"logits ([\d.]+)%", line)[1]) for line in lines[1:]]  # type: ignore[index]
    assert errors[0] < 3 < errors[1] < 30
