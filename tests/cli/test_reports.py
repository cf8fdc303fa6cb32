"""`accelerate env`, `estimate-memory` and `merge-weights` as typed."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accelerate.commands import accelerate_cli
from tests.cli.conftest import Run

DATA = Path(__file__).resolve().parents[1] / "data"
CASES: list[dict[str, Any]] = json.loads((DATA / "launch_behaviors.json").read_text())
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed (the extra estimate)"
)


def labels(text: str) -> list[str]:
    return [line[2:].split(":")[0] for line in text.splitlines() if line.startswith("- ")]


def test_env_reports_what_a_report_needs(accelerate: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    done = accelerate("env", "--config_file", "c.yaml", CUDA_VISIBLE_DEVICES="", HF_TOKEN="hidden", NCCL_DEBUG="INFO")
    assert done.returncode == 0, done.stderr
    observed = next(case for case in CASES if case["name"] == "cli.env")["output"]["bullet_labels"]
    more = ["CPU cores", "Environment variables", "Optional packages"]
    assert labels(done.stdout) == [*observed[:-1], "`Accelerate` config passed", *more]
    assert "\t- num_processes: 2" in done.stdout and "\t- distributed_type: MULTI_CPU" in done.stdout
    assert "\t- HF_TOKEN: (set, not shown)" in done.stdout and "\t- NCCL_DEBUG: INFO" in done.stdout
    assert "hidden" not in done.stdout and "\t- safetensors: " in done.stdout


def test_env_reports_on_what_is_broken(accelerate: Run, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: no such file')")
    (tmp_path / "c.yaml").write_text("num_processes: many\ndistributed_type: NO\n")
    done = accelerate("env", "--json", "--config_file", "c.yaml", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "num_processes" in done.stderr
    report = json.loads(done.stdout)
    assert "libtorch.so" in report["pytorch_version"] and "num_processes" in report["accelerate_config_passed"]
    assert report["python_version"] == ".".join(map(str, sys.version_info[:3]))
    missing = accelerate("env", "--config_file", "nothing.yaml")
    assert missing.returncode == 2 and missing.stderr == (
        "accelerate env: configuration file nothing.yaml does not exist.\n"
    )


def model_folder(folder: Path) -> str:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(folder)
    return str(folder)


@needs_transformers
def test_an_estimate_is_a_table(accelerate: Run, tmp_path: Path) -> None:
    done = accelerate(
        "estimate-memory", model_folder(tmp_path / "m"), "--dtypes", "float32", "int8", "--batch-size", "2"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert "│ dtype   │ Largest Layer │ Total Size │ Training using Adam │" in done.stdout
    assert "│ int8    │" in done.stdout and "float16" not in done.stdout
    assert "A training step of GPT2LMHeadModel, batch size 2, 128 tokens each" in done.stdout


@needs_transformers
def test_an_estimate_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "m")
    capfd.readouterr()
    assert accelerate_cli.main(["estimate-memory", f"{folder}/config.json", "--json", "--sequence_length", "16"]) == 0
    out, errors = capfd.readouterr()
    assert errors == ""
    report = json.loads(out)
    assert set(report["dtypes"]) == {"float32", "float16", "int8", "int4"}
    total = report["dtypes"]["float32"]["total"]
    assert report["dtypes"]["int4"]["total"] == total // 8 and report["dtypes"]["int4"]["training_with_adam"] is None
    step = report["training_step"]
    assert (step["class"], step["batch_size"], step["sequence_length"]) == ("GPT2LMHeadModel", 1, 16)
    assert step["precisions"]["float32"]["weights"] == total


def test_shards_are_merged(accelerate: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import warnings

    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks that there is one process
        dcp.save({"model": {"a": torch.arange(5.0)}}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0")
    done = accelerate("merge-weights", "pytorch_model_fsdp_0/", "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote out\n", "")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], torch.arange(5.0))
    # The others in this process: a new one imports torch.
    os.chdir(tmp_path)
    merge = ["merge-weights", "pytorch_model_fsdp_0/", "out"]
    assert accelerate_cli.main([*merge, "--unsafe-serialization", "--remove-checkpoint-dir"]) == 0
    assert (tmp_path / "out" / "pytorch_model.bin").exists()
    capfd.readouterr()
    assert accelerate_cli.main(merge) == 2
    errors = capfd.readouterr().err
    assert "0: no such folder." in errors and len(errors.splitlines()) == 1
    assert accelerate_cli.main([*merge, "--max_shard_size", "much"]) == 2
    assert "'much'" in capfd.readouterr().err
