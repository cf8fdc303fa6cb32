"""`accelerate launch` of one process: it becomes the script, with the environment the settings say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Run

Write = Callable[[str], str]
CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "launch_behaviors.json").read_text()
)
REPORT = (
    "import json, os, sys\nprint(json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ), 'pid': os.getpid()}))\n"
)


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--num_processes", "3", "-m", "-h", "--config_file=x"],
        ["--", "--cpu", "--"],
        ["", "a b", "$HOME `id` ; | & > * \\ ' \"", "$$", "${local_rank}", "ü\n"],
        ["-1", "-x", "---"],
    ],
)
def test_the_scripts_arguments_are_untouched(words: list[str], accelerate: Run, script: Write) -> None:
    name = script(REPORT)
    assert report_of(accelerate("launch", "--num_processes", "1", name, *words))["argv"] == words
    assert report_of(accelerate("launch", "--num_processes", "1", "--", name, *words))["argv"] == words


def test_a_launch_from_python_returns(accelerate: Run, script: Write) -> None:
    name = script("import os, sys\nprint(os.getpid(), flush=True)\nsys.exit(int(sys.argv[1]))\n")
    driver = (
        "import os, sys\nfrom accelerate.commands.launch import launch_command, launch_command_parser\n"
        "args = launch_command_parser().parse_args(['--cpu', '--num_processes', '1', sys.argv[1], sys.argv[2]])\n"
        "try:\n    launch_command(args)\nexcept SystemExit as end:\n    print('ended with', end.code)\n"
        "else:\n    print('returned')\nprint(os.getpid())\n"
    )
    for code, end in (("0", "returned"), ("3", "ended with 3")):
        done = accelerate(name, code, command=[sys.executable, "-c", driver])
        child, said, caller = done.stdout.splitlines()
        assert said == end and child != caller, done.stderr


OBSERVED = ["cli.launch.flags", "cli.launch.no_python", "cli.launch.dash_alias"]


@pytest.mark.parametrize("case", [case for case in CASES if case["name"] in OBSERVED], ids=lambda case: case["name"])
def test_observed_launches(case: dict[str, Any], accelerate: Run, script: Write) -> None:
    places = {"$TMP/s.py": script(REPORT), "$PYTHON": sys.executable}
    words = [places.get(word, word) for word in case["call"].split()[1:]]
    report = report_of(accelerate(*words, CUDA_VISIBLE_DEVICES=""))
    observed = case["output"]["children"]["x"]
    argv = observed["argv"] if "--no_python" not in words else [places["$TMP/s.py"]]
    assert report["argv"] == argv or report["argv"] == []
    # How many threads is a matter of the machine's cores, unless it is asked for.
    ours = {"OMP_NUM_THREADS"} - ({"OMP_NUM_THREADS"} if "--num_cpu_threads_per_process" in words else set())
    expected = {name: value for name, value in observed["env"].items() if name not in ours}
    assert {name: report["env"].get(name) for name in expected} == expected
    if "--gradient_accumulation_steps" in words:  # decided: it reaches the script
        assert report["env"]["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


def test_a_single_process_takes_the_launchers_place(start: Callable[..., subprocess.Popen[str]], script: Write) -> None:
    launched = start("launch", "--num_processes", "1", script(REPORT))
    out, _ = launched.communicate(timeout=60)
    assert json.loads(out)["pid"] == launched.pid


def test_exit_codes_and_last_words_are_the_scripts(accelerate: Run, script: Write) -> None:
    done = accelerate("launch", "-q", "--cpu", script("import sys; sys.exit(7)"))
    assert (done.returncode, done.stderr) == (7, "")
    done = accelerate("launch", "-q", "--cpu", script("raise KeyError('own')"))
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'own'\n")
    done = accelerate("launch", "-q", script("import os; os.kill(os.getpid(), 15)"))
    assert done.returncode == -signal.SIGTERM


def test_modules_programs_and_interpreter_options(accelerate: Run, script: Write, tmp_path: Path) -> None:
    script(REPORT)
    assert report_of(accelerate("launch", "-m", "script", "a"))["argv"] == ["a"]
    done = accelerate("launch", "--no_python", "echo", "hello", "-n")
    assert (done.returncode, done.stdout) == (0, "hello -n\n")
    flags = script("import sys; print(sys.flags.dev_mode, sys.flags.utf8_mode, sys.stdout.write_through)", "flags.py")
    command = [sys.executable, "-u", "-X", "dev", "-Xutf8", "-m", "accelerate.commands.launch"]
    done = accelerate("--num_processes", "1", flags, command=command, PYTHONUNBUFFERED="")
    assert done.stdout.split() == ["True", "1", "True"], done.stderr


def test_neither_torch_nor_numpy_is_imported(accelerate: Run, script: Write) -> None:
    name = script("import sys; print('torch' in sys.modules)")
    for words in (
        ["launch", "--num_processes", "1", name],
        ["launch", name],
        ["launch", "-h"],
        ["--help"],
        ["config", "-h"],
    ):
        done = accelerate(*words, PYTHONPROFILEIMPORTTIME="1")
        imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line]
        assert done.returncode == 0 and "accelerate.commands" in imported
        assert not [found for found in imported if found.split(".")[0] in ("torch", "numpy", "rich", "yaml", "msgspec")]


def test_flag_then_file_then_default(accelerate: Run, script: Write, tmp_path: Path) -> None:
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    default = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    default.write_text(yaml.safe_dump({"distributed_type": "NO", "mixed_precision": "bf16", "debug": True}))
    name = script(REPORT)
    environment = report_of(accelerate("launch", name))["env"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and environment["ACCELERATE_DEBUG_MODE"] == "true"
    environment = report_of(accelerate("launch", "--mixed_precision", "no", name))["env"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no" and environment["ACCELERATE_DEBUG_MODE"] == "true"
    (tmp_path / "other.yaml").write_text("distributed_type: NO\nuse_cpu: true\n")
    environment = report_of(accelerate("launch", "--config_file", "other.yaml", name))["env"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no" and environment["ACCELERATE_USE_CPU"] == "True"


def test_threads_that_somebody_chose_are_kept(accelerate: Run, script: Write) -> None:
    name = script(REPORT)
    assert report_of(accelerate("launch", name, OMP_NUM_THREADS="5"))["env"]["OMP_NUM_THREADS"] == "5"
    done = accelerate("launch", "--num_cpu_threads_per_process", "2", name, OMP_NUM_THREADS="5")
    assert report_of(done)["env"]["OMP_NUM_THREADS"] == "2"
    assert int(report_of(accelerate("launch", name))["env"]["OMP_NUM_THREADS"]) >= 1


def test_what_was_chosen_is_one_line(accelerate: Run, script: Write) -> None:
    name = script("")
    done = accelerate("launch", name, CUDA_VISIBLE_DEVICES="")
    assert done.stderr.startswith("accelerate launch: 1 process on ") and len(done.stderr.splitlines()) == 1
    assert accelerate("launch", "-q", name).stderr == ""
    assert accelerate("launch", "--num_processes", "1", name).stderr == ""
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_devices_that_are_not_there_are_named(accelerate: Run, script: Write) -> None:
    done = accelerate("launch", "--multi_gpu", script(""), CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 0 and done.stderr.splitlines() == [
        "accelerate launch: found no cuda device: without one, processes use the CPU",
        "accelerate launch: 1 process on the CPU, mixed precision no (see -h to change)",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "-1", "s.py"], "--num_processes: expected at least 1"),
        (["--mixed_precision", "zz", "s.py"], "expected one of no, fp16, bf16, fp8"),
        ([], "no script given"),
        (["--cpu", "nothing.py"], "script nothing.py does not exist"),
        (["--cpu", "../none"], "script ../none does not exist (looked in {here})."),
        (
            ["--cpu", "package.module"],
            "script package.module does not exist (looked in {here}; to run a module, put -m",
        ),
        (["--no_python", "no-such-program"], "program no-such-program does not exist"),
        (["--zzz", "s.py"], "unknown flag --zzz"),
        (["--config_file", "/does/not/exist.yaml", "s.py"], "/does/not/exist.yaml does not exist"),
        (["--config_file", "bad.yaml", "s.py"], "bad.yaml: num_processes: expected a whole number, found 'many'"),
        (["--config_file", "untyped.yaml", "s.py"], "untyped.yaml: distributed_type"),
        (["--tpu", "--num_processes", "1", "s.py"], "TPUs need torch_xla"),
        (["--tpu", "--tpu_cluster", "s.py"], "which TPU? Missing is tpu_name and tpu_zone"),
        (
            ["--mpirun_hostfile", "hosts", "--mpirun_ccl", "many", "s.py"],
            "the number of oneCCL's threads, found 'many'",
        ),
        (["--use_deepspeed", "--num_machines", "2", "s.py"], "launcher pdsh need a file of hosts"),
        (["--use_deepspeed", "--use_fsdp", "s.py"], "use_deepspeed and use_fsdp contradict each other"),
        (["--config_file", "broken.yaml", "s.py"], "broken.yaml: is not valid yaml: line 2, column 1: did not find"),
        (["--config_file", "aws.yaml", "s.py"], 'needs its SDK: pip install "accelerate[sagemaker]"'),
        (["--mixed_precision", "fp8", "--fp8_backend", "msamp", "s.py"], "needs msamp, which is not installed"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_code_2(
    words: list[str], message: str, accelerate: Run, script: Write, tmp_path: Path
) -> None:
    script("print('started')", "s.py")
    (tmp_path / "bad.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: many\n")
    (tmp_path / "broken.yaml").write_text("num_processes: [\n")
    (tmp_path / "untyped.yaml").write_text("fsdp_config: {fsdp_version: 2}\n")
    (tmp_path / "aws.yaml").write_text("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: NO\n")
    done = accelerate("launch", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message.format(here=tmp_path) in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_script_is_not_blamed_on_the_file(accelerate: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("distributed_type: NO\n")
    done = accelerate("launch", "--config_file", "c.yaml")
    assert done.returncode == 2 and "no script given" in done.stderr and "c.yaml" not in done.stderr


def test_the_help_shows_what_matters(accelerate: Run) -> None:
    plain, sharded = accelerate("launch", "-h").stdout, accelerate("launch", "-h", "--use_fsdp").stdout
    assert "--num_processes N" in plain and "--fsdp_version" not in plain and "--use_fsdp" in plain
    assert "--fsdp_version 1|2" in sharded
    assert max(map(len, plain.splitlines())) <= 80
