"""`accelerate estimate-memory` told how a run is launched, or what each device may take."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from accelerate.commands.estimate import command, device_map, per_rank
from accelerate.commands.estimate.sharding import Sharding

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed (the extra estimate)"
)
WRAP = ("--fsdp_auto_wrap_policy", "transformer_based_wrap")


def planned(*words: str) -> per_rank.RankPlan:
    settings = per_rank.parse_settings(command.estimate_command_parser().parse_args(["model", *words]))
    assert settings is not None
    return per_rank.make_plan(settings)


# How ranks share ------------------------------------------------------------------------------------------------------


def test_flags_become_a_sharding() -> None:
    assert planned("--num_processes", "4").sharding == Sharding(version=0, buckets=True)
    assert planned("--num_processes", "1").sharding == Sharding(version=0)
    found = planned("--num-processes", "4", "--fsdp_version", "2", "--mixed_precision", "bf16")
    assert found.sharding == Sharding(ranks=4, version=2, compute=2, original=False)
    assert found.title == "each of 4 ranks, FSDP 2, mixed bf16"
    found = planned("--num_processes", "4", "--fsdp_sharding_strategy", "SHARD_GRAD_OP", "--cpu")
    assert found.sharding == Sharding(ranks=4, version=1, frees=False, prefetch=False, copies=True) and found.on_cpu
    found = planned("--num_processes", "4", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "false")
    assert not found.sharding.frees and found.title == "each of 4 ranks, FSDP 2"
    offload = ("--num_processes", "2", "--fsdp_offload_params", "true", "--fsdp_version", "2")
    assert planned(*offload).sharding.offload and not planned(*offload, "--cpu").sharding.offload
    assert planned("--num_processes", "2", "--fsdp_sharding_strategy", "NO_SHARD").sharding.version == 0
    assert planned("--num_processes", "2", *WRAP, "--fsdp_activation_checkpointing", "true").checkpoint


def test_replicas_of_shards() -> None:
    hybrid = ("--num_processes", "8", "--num_machines", "2", "--fsdp_sharding_strategy", "HYBRID_SHARD")
    assert planned(*hybrid).sharding.ranks == 4
    assert planned(*hybrid).title == "each of 8 ranks, FSDP 1, HYBRID_SHARD, shards over 4"
    mesh = ("--num_processes", "8", "--fsdp_version", "2", "--parallelism_config_dp_replicate_size", "4")
    assert planned(*mesh).sharding.ranks == 2
    assert planned(*mesh, "--parallelism_config_dp_shard_size", "2").sharding.ranks == 2


def test_a_configuration_file_says_it_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 4\nmixed_precision: bf16\nfsdp_config:\n  fsdp_version: 2\n"
    )
    file = ("--config_file", str(tmp_path / "run.yaml"))
    flags = ("--use_fsdp", "--num_processes", "4", "--mixed_precision", "bf16", "--fsdp_version", "2")
    assert planned(*file)._replace(units=len) == planned(*flags)._replace(units=len)
    assert planned(*file, "--num_processes", "2").sharding.ranks == 2


SIZED = ("--use_fsdp", "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP")


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("--use_fsdp",), ()),
        (("--use_fsdp", "--fsdp_backward_prefetch", "BACKWARD_PRE"), ("--use_fsdp",)),
        (("--use_fsdp", "--fsdp_use_orig_params", "false"), ("--use_fsdp",)),
        ((*SIZED, "--fsdp_min_num_params", "4"), SIZED),
        ((*SIZED, "--fsdp_min_num_params", "4"), ("--use_fsdp",)),
    ],
)
def test_each_flag_changes_the_plan(words: tuple[str, ...], without: tuple[str, ...]) -> None:
    from torch import nn

    def seen(*more: str) -> list[object]:
        plan = planned("--num_processes", "2", *more)
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
        return [plan._replace(units=len), len(plan.units(model))]

    assert seen(*words) != seen(*without)


# As typed -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Config(n_layer=4, n_embd=64, n_head=2, vocab_size=500, architectures=["GPT2LMHeadModel"]).save_pretrained(
        folder
    )
    return str(folder)


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code: Any = command.main(words)
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    return code, said.out, said.err


@needs_transformers
def test_what_each_rank_holds(gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("--num_processes", "2", "--fsdp_version", "2", *WRAP, "--sequence_length", "16", "--dtypes", "float32")
    code, out, err = typed(capsys, gpt2, *run)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert "A training step of GPT2LMHeadModel, batch size 1, 16 tokens each" in out and "│ Gathered    │" in out
    reports = [
        json.loads(typed(capsys, gpt2, "--json", *run, *more)[1]) for more in ((), ("--mixed_precision", "bf16"))
    ]
    step, mixed = (report["training_step"] for report in reports)
    assert step["plan"] == "each of 2 ranks, FSDP 2" and step["rank"]["host"] == 0
    total = reports[0]["dtypes"]["float32"]["total"]
    assert total / 2 <= step["rank"]["weights"] < total / 2 * 1.05
    assert step["rank"]["weights"] == mixed["rank"]["weights"] and mixed["rank"]["gathered"] < step["rank"]["gathered"]
    saved = json.loads(typed(capsys, gpt2, "--json", *run, "--fsdp_activation_checkpointing", "true")[1])
    assert saved["training_step"]["rank"]["activations"] < step["rank"]["activations"]
    code, out, _ = typed(capsys, gpt2, *run, "--fsdp_offload_params", "true")
    assert code == 0 and "│ Weights     │" in out and "memory │" in out and "device │" in out


@needs_transformers
def test_the_map_is_a_table(gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--device_map", "sequential", "--max_memory", "0=600KB,1=450KB", "cpu=210KB", "--dtypes", "float32")
    code, out, err = typed(capsys, gpt2, *flags)
    assert (code, err) == (0, "") and "The map 'sequential' of GPT2Model in float32" in out
    whole = json.loads(typed(capsys, gpt2, "--json", *flags)[1])
    report = whole["device_map"]
    assert list(report) == ["0", "1", "cpu", "disk"] and report["0"]["limit"] == 600_000
    assert sum(device["size"] for device in report.values()) == whole["dtypes"]["float32"]["total"]
    assert all(device["limit"] is None or device["size"] <= device["limit"] for device in report.values())
    balanced = json.loads(typed(capsys, gpt2, "--json", "--device_map", "auto", "--max_memory", "0=1GB", "1=1GB")[1])
    assert abs(balanced["device_map"]["0"]["size"] - balanced["device_map"]["1"]["size"]) < 250_000


@needs_transformers
def test_parts_that_stay_together(gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--device_map", "sequential", "--max_memory", "0=600KB", "1=450KB", "--dtypes", "float32", "--json")
    kept, split = (
        typed(capsys, gpt2, *flags, "--no_split_module_classes", name)[1] for name in ("GPT2Block", "Nothing")
    )
    assert json.loads(kept)["device_map"] != json.loads(split)["device_map"]


@needs_transformers
def test_a_folder_that_does_not_say_for_which_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "--library_name {timm,transformers}" in typed(capsys, str(tmp_path))[2]
    assert "--library_name" not in typed(capsys, str(tmp_path), "--library_name", "transformers")[2]


OWN_CODE = """
import torch, transformers

class Config(transformers.PretrainedConfig):
    model_type = "mine"

class Model(transformers.PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(8, 8)
        self.post_init()
"""


@needs_transformers
def test_code_that_a_model_brings_is_run_if_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    auto_map = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    (tmp_path / "mine.py").write_text(OWN_CODE)
    code, _, err = typed(capsys, str(tmp_path), "--json")
    assert code == 2 and "custom code" in err
    code, out, err = typed(capsys, str(tmp_path), "--json", "--trust_remote_code")
    assert code == 0, err
    assert json.loads(out)["dtypes"]["float32"]["total"] == 4 * (8 * 8 + 8)


WRONG = {
    ("--max_memory", "0=1GB"): "--max_memory is about a map: add --device_map {auto",
    ("--device_map", "auto", "--max_memory", "0=much"): "'0=much': expected a size such as 10GiB",
    (
        "--device_map",
        "auto",
        "--max_memory",
        "gpu=1GB",
    ): "expected the number of an accelerator (0, 1 ...), mps, cpu or disk",
    ("--device_map", "auto", "--max_memory", "10GB"): "expected DEVICE=SIZE, as in 0=10GiB",
    ("--device_map", "auto", "--max_memory", "0=1GB", "0=2GB"): "device 0 two limits",
    ("--device_map", "somehow"): "invalid choice: 'somehow'",
    ("--num_processes", "none"): "expected a whole number, found 'none'",
    ("--fsdp_version", "3"): "expected one of 1, 2",
    (
        "--num_processes",
        "2",
        "--fsdp_version",
        "2",
        "--fsdp_reshard_after_forward",
        "FULL_SHARD",
    ): "is a sharding strategy",
    ("--num_processes", "6", "--use_fsdp", "--parallelism_config_dp_shard_size", "4"): "6 processes cannot be divided",
    ("--config_file", "nothing.yaml"): "configuration file nothing.yaml does not exist",
}


@pytest.mark.parametrize("words, message", WRONG.items(), ids=lambda value: " ".join(value)[:40])
def test_bad_values_are_one_message(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = typed(capsys, str(tmp_path), *words)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err, err


@needs_transformers
def test_what_fits_nowhere_or_is_not_there(gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = typed(capsys, gpt2, "--device_map", "auto", "--max_memory", "0=1MB", "disk=10KB")
    assert code == 2 and "cannot be placed" in err and "disk: 9.77 KB" in err
    named = ("--num_processes", "2", *WRAP, "--fsdp_transformer_layer_cls_to_wrap", "Nothing")
    code, _, err = typed(capsys, gpt2, *named)
    assert code == 2 and "has no Nothing" in err


def test_names_are_shortened() -> None:
    assert device_map.abbreviate(["wte", "h.0", "h.1", "h.2", "h.3.attn", "h.3.ln_1", "h.4", "h.5", "ln_f"]) == [
        "wte",
        "h.0-2",
        "h.3.attn",
        "h.3.ln_1",
        "h.4-5",
        "ln_f",
    ]
    assert device_map.abbreviate(["a.0.mlp", "a.1.mlp", "a.9"]) == ["a.0-1.mlp", "a.9"]
    assert device_map.abbreviate([""]) == ["(all)"] and device_map.abbreviate([]) == []
