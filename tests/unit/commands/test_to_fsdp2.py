"""From FSDP 1 to FSDP 2: the observed conversions, what has no counterpart, and what is never written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands.to_fsdp2 import convert, convert_config_to_fsdp2, main
from accelerate.launch.parse import parse
from accelerate.settings.option import SettingsError

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "data" / "to_fsdp2_behaviors.json").read_text()
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_observed_conversions(case: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    write = yaml.safe_dump if suffix == "yaml" else json.dumps
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"o.{suffix}"
    before = write(case["input"]["in.yaml"])
    source.write_text(before)
    assert main(["--config_file", str(source), "--output_file", str(target)]) == case["output"]["rc"]
    assert yaml.safe_load(target.read_text()) == case["output"]["o.yaml"]
    assert source.read_text() == before


def test_what_has_no_counterpart_is_named_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: 4  # across nodes\n"
        "  fsdp_backward_prefetch_policy: BACKWARD_PRE\n  fsdp_forward_prefetch: true\n  fsdp_sync_module_states: true\n"
        "  fsdp_use_orig_params: true\n  fsdp_cpu_offload: true\n  fsdp_state_dict_type: LOCAL_STATE_DICT\n# the end\n"
    )
    assert main(["--config_file", str(path), "--overwrite"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"converted {path} to {path}:"
    told = {line.split(":")[0].strip(): line for line in lines[1:]}
    for key in ("backward_prefetch_policy", "forward_prefetch", "sync_module_states", "use_orig_params"):
        assert "dropped: FSDP 2" in told[f"fsdp_{key}"]
    assert "parallelism_config_dp_replicate_size" in told["fsdp_sharding_strategy"]
    assert "SHARDED_STATE_DICT instead" in told["fsdp_state_dict_type"]
    assert path.read_text() == (
        "distributed_type: FSDP\nfsdp_config:\n  fsdp_reshard_after_forward: true  # across nodes\n"
        "  fsdp_offload_params: true\n  fsdp_state_dict_type: SHARDED_STATE_DICT\n  fsdp_version: 2\n# the end\n"
    )
    assert parse(["--config_file", str(path), "s.py"]).fsdp.version == 2


def test_a_strategy_under_the_newer_key(tmp_path: Path) -> None:
    section = {"fsdp_version": 1, "fsdp_reshard_after_forward": "SHARD_GRAD_OP"}
    content = convert_config_to_fsdp2({"distributed_type": "FSDP", "fsdp_config": section})
    assert content["fsdp_config"] == {"fsdp_version": 2, "fsdp_reshard_after_forward": False}
    assert convert({"distributed_type": "FSDP"}, "f").content["fsdp_config"] == {"fsdp_version": 2}


def test_nothing_is_written_over_unasked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.json"
    source.write_text("distributed_type: FSDP\n")
    target.write_text("mine")
    for words, message in (
        (["--config_file", str(source)], "--output_file"),
        (["--config_file", str(source), "--output_file", str(target)], f"{target} exists already"),
        (
            ["--config_file", str(tmp_path / "none.yaml"), "--output_file", str(tmp_path / "c")],
            "none.yaml cannot be read",
        ),
        (["--config_file", str(source), "--output_file", str(source / "c")], "a.yaml"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capsys.readouterr().err
        assert caught.value.code == 2 and message in said and len(said.splitlines()) == 1
    assert (source.read_text(), target.read_text()) == ("distributed_type: FSDP\n", "mine")
    assert main(["--config_file", str(source), "--output_file", str(target), "--overwrite"]) == 0
    assert json.loads(target.read_text())["fsdp_config"] == {"fsdp_version": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.json"]


def test_a_file_with_mistakes_is_refused_whole(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"the/file has 2 problems:\n  unknown key fsdp_config.x.\n  unknown key y."
    ):
        convert({"distributed_type": "FSDP", "fsdp_config": {"x": 1}, "y": 2}, "the/file")
