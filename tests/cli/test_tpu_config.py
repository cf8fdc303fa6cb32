"""``accelerate tpu-config``, and the start on a pod, with a gcloud that notes what it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Run
from tests.helpers.programs import shebang

Script = Callable[[str], str]
WHERE = ["--tpu_name", "pod", "--tpu_zone", "us-central1-a"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-central1-a", "--command"]


class Gcloud:
    """A program of that name, first on the PATH, which notes its arguments and ends with a code of one's choice."""

    def __init__(self, folder: Path) -> None:
        self.log, self.codes = folder / "gcloud.log", folder / "codes"
        program = folder / "bin" / "gcloud"
        program.parent.mkdir()
        program.write_text(
            shebang() + "import json, os, sys, time\n"
            f"with open({str(self.log)!r}, 'a') as log: log.write(json.dumps(sys.argv[1:]) + '\\n')\n"
            "if 'wait-for-ever' in sys.argv: time.sleep(600)\n"
            f"sys.exit(int(open({str(self.codes)!r}).read()) if os.path.exists({str(self.codes)!r}) else 0)\n"
        )
        program.chmod(0o755)
        self.path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"

    @property
    def told(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def gcloud(tmp_path: Path) -> Gcloud:
    return Gcloud(tmp_path)


def test_commands_reach_gcloud_as_one_text(accelerate: Run, gcloud: Gcloud) -> None:
    words = ["--command", "echo 'a b'; $(reboot)", "--command", "ls", "x y"]
    done = accelerate("tpu-config", *WHERE, *words, PATH=gcloud.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert gcloud.told == [[*SSH, "set -e\necho 'a b'; $(reboot)\nls x y", "--worker", "all"]]


def test_alpha(accelerate: Run, gcloud: Gcloud) -> None:
    assert accelerate("tpu-config", *WHERE, "--use_alpha", "--command", "ls", PATH=gcloud.path).returncode == 0
    assert gcloud.told == [["alpha", *SSH, "ls", "--worker", "all"]]


def test_debug_prints_what_a_shell_takes(accelerate: Run, gcloud: Gcloud, tmp_path: Path) -> None:
    done = accelerate("tpu-config", *WHERE, "--command", "echo 'a b'", "--debug", PATH=gcloud.path)
    assert done.returncode == 0 and gcloud.told == []
    same = accelerate(command=["sh", "-c", done.stdout], PATH=gcloud.path)
    assert same.returncode == 0 and gcloud.told == [[*SSH, "echo 'a b'", "--worker", "all"]]


def test_the_configuration_file_says_it_too(accelerate: Run, gcloud: Gcloud, tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text("# first\ncd /tmp\n")
    content = {
        "distributed_type": "XLA",
        "tpu_name": "other",
        "tpu_zone": "us-central1-a",
        "commands": ["echo one", "echo two"],
        "command_file": "setup.sh",
    }
    (tmp_path / "tpu.yaml").write_text(yaml.safe_dump(content))
    file = ["--config_file", "tpu.yaml", "--tpu_name", "pod"]
    assert accelerate("tpu-config", *file, PATH=gcloud.path).returncode == 0
    assert accelerate("tpu-config", *file, "--command", "ls", PATH=gcloud.path).returncode == 0
    assert accelerate("tpu-config", *file, "--command-file", "setup.sh", PATH=gcloud.path).returncode == 0
    texts = [words[len(SSH)] for words in gcloud.told]
    assert texts == ["set -e\n# first\ncd /tmp\necho one\necho two", "ls", "set -e\n# first\ncd /tmp"]


def test_gclouds_exit_code_is_ours(accelerate: Run, gcloud: Gcloud) -> None:
    gcloud.codes.write_text("7")
    assert accelerate("tpu-config", *WHERE, "--command", "ls", PATH=gcloud.path).returncode == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to run: give --command, --command_file or --install_accelerate"),
        (["--command", "ls"], "which TPU? Missing is tpu_name and tpu_zone: give --tpu_name and --tpu_zone"),
        (["--command", "ls", "--tpu_name", "a"], "Missing is tpu_zone"),
        ([*WHERE, "--command_file", "none.sh"], "file of commands none.sh cannot be read"),
        ([*WHERE, "--install_accelerate", "--accelerate_version", "new"], "expected latest, dev or a version"),
        ([*WHERE, "--config_file", "none.yaml", "--command", "ls"], "configuration file none.yaml does not exist"),
        ([*WHERE, "--config_file", "bad.yaml"], "bad.yaml: commands: expected a list of words, found 3"),
        ([*WHERE, "--command", "ls"], "gcloud is not installed, or not on the PATH"),
        ([*WHERE, "--zone", "x"], "unrecognized arguments: --zone x"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(
    words: list[str], message: str, accelerate: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("distributed_type: XLA\ncommands: 3\n")
    done = accelerate("tpu-config", *words, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


class TestAPod:
    def file(self, folder: Path) -> list[str]:
        content = {
            "distributed_type": "XLA",
            "tpu_name": "pod",
            "tpu_zone": "us-central1-a",
            "tpu_use_cluster": True,
            "mixed_precision": "bf16",
        }
        (folder / "pod.yaml").write_text(yaml.safe_dump(content))
        return ["--config_file", "pod.yaml"]

    def test_one_ssh_to_all_workers(self, accelerate: Run, gcloud: Gcloud, tmp_path: Path) -> None:
        done = accelerate("launch", *self.file(tmp_path), "train.py", "--text", "a 'b'", PATH=gcloud.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        script = (
            "env ACCELERATE_MIXED_PRECISION=bf16 XLA_USE_BF16=1 "
            "python3 -m accelerate.launch.engines.tpu_worker --function main "
            "train.py --text 'a '\"'\"'b'\"'\"''"
        )
        assert gcloud.told == [[*SSH, script, "--worker", "all"]]

    def test_the_vm_that_fails_ends_the_others(self, accelerate: Run, gcloud: Gcloud, tmp_path: Path) -> None:
        gcloud.codes.write_text("3")
        vms = ["--vm", "wait-for-ever", "--vm", "one"]
        done = accelerate("launch", *self.file(tmp_path), *vms, "train.py", PATH=gcloud.path)
        assert done.returncode == 3
        # The other may be ended before it has noted that it was called.
        assert {words[2] for words in gcloud.told} | {"wait-for-ever"} == {"one", "wait-for-ever"}


def test_one_host_needs_the_function_and_torch_xla(accelerate: Run, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("def other(): pass\n")
    done = accelerate("launch", "--tpu", "train.py")
    assert done.returncode == 2 and "script train.py has no function main" in done.stderr
    (tmp_path / "train.py").write_text("def main(): pass\n")
    done = accelerate("launch", "--tpu", "train.py")
    assert done.returncode == 2 and "TPUs need torch_xla" in done.stderr and len(done.stderr.splitlines()) == 1
