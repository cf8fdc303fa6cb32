"""Plans for TPUs: the command of one host, gcloud's commands for a pod, and what the host's command makes of its words."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands.launch import launch_command_parser
from accelerate.launch import parse
from accelerate.launch.engines import tpu, tpu_worker
from accelerate.launch.plan import LaunchPlan, build_plan
from accelerate.settings.option import SettingsError
from accelerate.utils import prepare_tpu

NAME = {"tpu_name": "pod", "tpu_zone": "us-central1-a"}


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


def planned(words: str, folder: Path | None = None, **content: object) -> LaunchPlan:
    file = []
    if folder is not None:
        (folder / "tpu.yaml").write_text(yaml.safe_dump({"distributed_type": "XLA", **content}))
        file = ["--config_file", str(folder / "tpu.yaml")]
    return build_plan(parse.parse([*file, *words.split()]).replace(python=("PY",)))


class TestOneHost:
    @pytest.mark.parametrize(
        ("words", "command"),
        [
            ("--tpu s.py a", "PY -m accelerate.launch.engines.tpu_worker --function main s.py a"),
            ("--tpu --num_processes 1 s.py a", "PY s.py a"),
            (
                "--tpu --num_processes 8 --main_training_function train s.py --processes 3",
                "PY -m accelerate.launch.engines.tpu_worker --function train --processes 8 s.py --processes 3",
            ),
            ("--tpu -m package.s -m", "PY -m accelerate.launch.engines.tpu_worker --function main -m package.s -m"),
        ],
    )
    def test_commands(self, words: str, command: str) -> None:
        plan = planned(words)
        assert (plan.launcher, plan.command) == ("tpu", command.split())

    def test_from_a_file(self, tmp_path: Path) -> None:
        plan = planned(
            "s.py", tmp_path, num_processes=4, main_training_function="go", mixed_precision="bf16", downcast_bf16=True
        )
        assert plan.command == [
            "PY",
            "-m",
            "accelerate.launch.engines.tpu_worker",
            "--function",
            "go",
            "--processes",
            "4",
            "s.py",
        ]
        assert plan.environment["XLA_DOWNCAST_BF16"] == "1" and "XLA_USE_BF16" not in plan.environment

    def test_a_program_has_no_function(self) -> None:
        with pytest.raises(SettingsError, match="--no_python does not go with --tpu"):
            planned("--tpu --no_python s.sh")

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            ("def main(): pass", True),
            ("async def main(): pass", True),
            ("if True:\n    from x import y as main", True),
            ("main = lambda: None", True),
            ("from x import *", True),
            ("def other():\n    main()", False),
            ("", False),
        ],
    )
    def test_the_function_is_looked_for_without_running_the_script(
        self, source: str, found: bool, tmp_path: Path
    ) -> None:
        script = tmp_path / "s.py"
        script.write_text("raise SystemExit('ran')\n" + source)
        settings = parse.parse(["--tpu", str(script)])
        if found:
            tpu.check_function(settings)
        else:
            with pytest.raises(SettingsError, match=f"script {script} has no function main.*--main_training_function"):
                tpu.check_function(settings)

    def test_a_script_that_is_no_python(self, tmp_path: Path) -> None:
        (tmp_path / "s.py").write_text("def (")
        with pytest.raises(SettingsError, match="is not valid Python"):
            tpu.check_function(parse.parse(["--tpu", str(tmp_path / "s.py")]))


class TestAPod:
    def test_all_workers_at_once(self, tmp_path: Path) -> None:
        plan = planned(
            "train.py --text a$b",
            tmp_path,
            **NAME,
            tpu_use_cluster=True,
            tpu_use_sudo=True,
            tpu_env=["A=b c"],
            mixed_precision="bf16",
        )
        assert plan.launcher == "tpu-pod" and plan.environment == {}
        assert plan.command[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-central1-a"]
        assert plan.command[8] == "--command" and plan.command[10:] == ["--worker", "all"]
        there = shlex.split(plan.command[9])
        assert there[:2] == ["sudo", "env"]
        assert {"ACCELERATE_MIXED_PRECISION=bf16", "XLA_USE_BF16=1", "A=b c"} <= set(there)
        assert there[-8:] == [
            "python3", "-m", "accelerate.launch.engines.tpu_worker", "--function", "main", "train.py", "--text", "a$b"
        ]  # fmt: skip

    def test_a_command_for_each_vm(self, tmp_path: Path) -> None:
        plan = planned("--vm a --vm b train.py", tmp_path, **NAME, tpu_use_cluster=True)
        start = ["gcloud", "compute", "ssh"]
        zone = ["--zone", "us-central1-a", "--command"]
        assert [plan.command[:-1], *(list(each[:-1]) for each in plan.parallel_commands)] == [
            [*start, "a", *zone],
            [*start, "b", *zone],
        ]
        assert plan.parallel_commands[0][-1] == plan.command[-1]

    def test_what_is_missing_is_said_at_once(self) -> None:
        with pytest.raises(SettingsError, match="Missing is tpu_name and tpu_zone"):
            planned("--tpu --tpu_cluster s.py")
        with pytest.raises(SettingsError, match="--env: expected NAME=value, found 'A'"):
            planned("--tpu --tpu_cluster --env A --vm v s.py")
        with pytest.raises(SettingsError, match="--env: expected NAME=value, found 'a b=c'"):
            build_plan(parse.parse(["--tpu", "--tpu_cluster", "--env", "a b=c", "--vm", "v", "s.py"]))


def installed_from(origin: dict[str, Any] | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a distribution of this name in front of the installed one, with what pip notes of its origin (PEP 610)."""
    facts = folder / "accelerate-2.0.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 2.0.0\n")
    if origin is not None:
        (facts / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(folder)


class TestRemoteScripts:
    def test_one_command_is_itself(self) -> None:
        assert tpu.remote_script(["echo 'a b'"]) == "echo 'a b'"

    def test_several_stop_at_the_first_that_fails(self, tmp_path: Path) -> None:
        text = tpu.remote_script(["echo one # a comment", "", "if true\nthen echo two\nfi", "false", "echo three"])
        done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (1, "one\ntwo\n")

    @pytest.mark.parametrize(
        ("version", "requirement"),
        [
            ("latest", "accelerate @ git+https://host/accelerate.git@0123abc"),
            ("dev", "accelerate @ git+https://host/accelerate.git"),
            ("2.0.1", "accelerate @ git+https://host/accelerate.git@v2.0.1"),
        ],
    )
    def test_installing(self, version: str, requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        origin = {"url": "https://host/accelerate.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
        installed_from(origin, tmp_path, monkeypatch)
        line = f"python3 -m pip install --upgrade '{requirement}'"
        assert tpu.remote_script([], version) == line
        assert tpu.remote_script(["ls"], version) == f"set -e\n{line}\nls"

    def test_installing_from_a_file_on_the_web(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wheel = "https://host/accelerate-2.0.0-py3-none-any.whl"
        installed_from({"url": wheel, "archive_info": {}}, tmp_path, monkeypatch)
        assert tpu.remote_script([], "latest") == f"python3 -m pip install --upgrade 'accelerate @ {wheel}'"
        with pytest.raises(SettingsError, match="not installed from an address"):
            tpu.remote_script([], "2.0.1")

    @pytest.mark.parametrize("origin", [None, {"url": "file:///home/me/accelerate", "dir_info": {"editable": True}}])
    def test_another_distribution_is_not_installed(
        self, origin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        installed_from(origin, tmp_path, monkeypatch)
        with pytest.raises(SettingsError, match="the name accelerate on PyPI is another distribution's"):
            tpu.remote_script([], "latest")

    def test_a_version_is_no_other_text(self) -> None:
        with pytest.raises(SettingsError, match="expected latest, dev or a version such as 1.0.1, found '1; reboot'"):
            tpu.remote_script([], "1; reboot")

    def test_nothing_to_run(self) -> None:
        with pytest.raises(SettingsError, match="nothing to run: give"):
            tpu.remote_script([" "])


class TestTheHostsProcess:
    def test_words(self) -> None:
        words = ["--function", "go", "--processes", "8", "s.py", "--function", "x", "-m"]
        assert tpu_worker.parse(words) == tpu_worker.TpuWorker("s.py", False, "go", 8, ("--function", "x", "-m"))
        assert tpu_worker.parse(["-m", "package.s"]) == tpu_worker.TpuWorker("package.s", True, "main", None, ())
        rank = tpu_worker.parse(words)
        assert pickle.loads(pickle.dumps(rank)) == rank

    def test_the_script_is_imported_not_run_as_main(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "beside_it.py").write_text("value = 3")
        script = tmp_path / "a script.py"
        script.write_text("from beside_it import value\nassert __name__ == 'a script'\nclass Kept: pass\n")
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "a script", raising=False)
        loaded = tpu_worker.TpuWorker(str(script), False, "main", None, ()).load()
        assert loaded.value == 3
        assert isinstance(pickle.loads(pickle.dumps(loaded.Kept())), loaded.Kept)
        del sys.modules["a script"], sys.modules["beside_it"]

    def test_without_torch_xla(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.launch.engines.tpu_worker", "s.py"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 1 and "TPUs need torch_xla" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_documented_helper_for_a_host_and_for_a_pod() -> None:
    words = ["--tpu", "--tpu_cluster", "--mixed_precision", "bf16", "--downcast_bf16", "s.py"]
    args, environment = prepare_tpu(launch_command_parser().parse_args(words), {"KEPT": "1"})
    assert environment["XLA_DOWNCAST_BF16"] == "1" and environment["KEPT"] == "1" and not args.env
    args, environment = prepare_tpu(launch_command_parser().parse_args(words), {"KEPT": "1"}, pod=True)
    assert args.env == [f"{name}={value}" for name, value in environment.items()] and "KEPT=1" in args.env
