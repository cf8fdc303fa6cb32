"""``accelerate config`` as a person uses it: keys in a pseudo-terminal, and answers through a pipe."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands.config.prompts import Prompt
from accelerate.commands.config.questionnaire import fill_in
from accelerate.launch import config_file
from tests.cli.conftest import COMMAND
from tests.helpers.questionnaire import CASES, Case, Typist, flat

pexpect: Any = pytest.importorskip("pexpect", reason="needs pexpect, and pseudo-terminals")

DOWN, UP, ENTER = "\x1b[B", "\x1b[A", "\r"
WITHOUT_QUESTIONARY = """
import sys
sys.modules["questionary"] = None
from accelerate.commands.accelerate_cli import main
sys.exit(main())
"""
Terminal = Callable[..., Any]


@pytest.fixture
def terminal(tmp_path: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    """Starts `accelerate config` in a terminal of 80 columns and 24 lines."""
    started: list[Any] = []

    def start(*words: str, command: list[str] | None = None) -> Any:
        program, *arguments = command or COMMAND
        started.append(
            pexpect.spawn(
                program,
                [*arguments, "config", "--config_file", "c.yaml", *words],
                cwd=str(tmp_path),
                # The cursor's position is asked for by an escape sequence; this terminal has nobody to answer it.
                env={**environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": "/home/user"},
                dimensions=(24, 80),
                encoding="utf-8",
                timeout=30,
            )
        )
        started[-1].delaybeforesend = None  # keys are sent when the question is on the screen
        return started[-1]

    yield start
    for process in started:
        process.close(force=True)


@pytest.fixture
def pipe(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `accelerate config` with its answers on standard input."""

    def run(*lines: str, name: str = "c.yaml") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, "config", "--config_file", name],
            cwd=tmp_path,
            env={**environment, "HOME": "/home/user"},
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def played(case: Case) -> list[tuple[Prompt, str]]:
    """What is asked when a case is gone through, and what is typed."""
    typist = Typist(case.answers)
    fill_in(typist)
    return typist.asked


def first_words(prompt: Prompt) -> str:
    """The beginning of a question, as it must be on the screen."""
    return re.escape(prompt.text[:30])


def keys(prompt: Prompt, line: str) -> str:
    """The keys that give the answer `line`: arrows to a choice, letters otherwise."""
    if not prompt.choices:
        return line + ENTER
    spelled = [{choice.label.lower(), str(choice.value).lower(), str(choice.number)} for choice in prompt.choices]
    here = next((i for i, choice in enumerate(prompt.choices) if choice.value == prompt.default), 0)
    there = next(i for i, words in enumerate(spelled) if line.lower() in words) if line else here
    return (DOWN * (there - here) if there >= here else UP * (here - there)) + ENTER


# The documented questionnaires ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.example)
def test_with_keys_in_a_terminal(case: Case, terminal: Terminal, tmp_path: Path) -> None:
    screen = terminal()
    for prompt, line in played(case):
        screen.expect(first_words(prompt))
        screen.send(keys(prompt, line))
    screen.expect("accelerate configuration saved at c.yaml")
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0
    assert flat(yaml.safe_load((tmp_path / "c.yaml").read_text())) == case.expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.example)
def test_through_a_pipe(case: Case, pipe: Callable[..., Any], tmp_path: Path) -> None:
    asked = played(case)
    done = pipe(*(line for _, line in asked), name="c.json" if case.example == "fsdp_2" else "c.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("accelerate configuration saved at c.")
    assert max(map(len, done.stdout.splitlines())) <= 160 and "\x1b" not in done.stdout
    written = next(tmp_path.glob("c.*"))
    assert (written.read_text()[0] == "{") == (written.suffix == ".json")
    assert flat(config_file.load(str(written))) == case.expected


# The dialogs that the guide prints, line by line; + marks what was not asked yet when they were printed.
DIALOGS = {
    "deepspeed_file": """
        In which compute environment are you running? | This machine
        Which type of machine are you using? | multi-GPU
        How many different machines will you use (use more than 1 for multi-node training)? |
        + Should collective operations be checked |
        Do you wish to optimize your script with torch dynamo? |
        Do you want to use DeepSpeed? | yes
        Do you want to specify a json file to a DeepSpeed config? | yes
        Please enter the path to the json DeepSpeed config file | ds_config.json
        Do you want to enable `deepspeed.zero.Init` when using ZeRO Stage-3 for constructing massive models? | yes
        + Do you want to train a Mixture-of-Experts model |
        + Do you want to combine kinds of parallelism |
        How many GPU(s) should be used for distributed training? | 4
        + Which GPU(s) of this machine should be used? |
        + Should each process be bound to the processor cores |
    """,
    "megatron_lm": """
        In which compute environment are you running? | 0
        Which type of machine are you using? | 2
        How many different machines will you use (use more than 1 for multi-node training)? |
        + Should collective operations be checked |
        + Do you wish to optimize your script with torch dynamo? |
        Do you want to use DeepSpeed? |
        Do you want to use FullyShardedDataParallel? |
        Do you want to use Megatron-LM? | yes
        What is the Tensor Parallelism degree/size? | 2
        Do you want to enable Sequence Parallelism? |
        What is the Pipeline Parallelism degree/size? | 2
        What is the number of micro-batches? | 2
        Do you want to enable selective activation recomputation? |
        Do you want to use distributed optimizer which shards optimizer state and gradients across data parallel ranks? |
        What is the gradient clipping value based on global L2 Norm (0 to disable)? |
        How many GPU(s) should be used for distributed training? | 4
        + Which GPU(s) of this machine should be used? |
        + Should each process be bound to the processor cores |
        Do you wish to use FP16 or BF16 (mixed precision)? | bf16
    """,
    "one_cpu": """
        In which compute environment are you running? | This machine
        Which type of machine are you using? | No distributed training
        Do you want to run your training on CPU only (even if a GPU / Apple Silicon device is available)? | yes
        Do you wish to optimize your script with torch dynamo? | NO
        Do you want to use DeepSpeed? | NO
        Do you wish to use FP16 or BF16 (mixed precision)? | bf16
    """,
    "cpus_with_mpirun": """
        In which compute environment are you running? | This machine
        Which type of machine are you using? | multi-CPU
        How many different machines will you use (use more than 1 for multi-node training)? | 4
        What is the rank of this machine? | 0
        What is the IP address of the machine that will host the main process? | 36.112.23.24
        What is the port you will use to communicate with the main process? | 29500
        Are all the machines on the same local network? Answer `no` if nodes are on the cloud | yes
        + Should collective operations be checked |
        Do you want accelerate to launch mpirun? | yes
        Please enter the path to the hostfile to use with mpirun [~/hostfile] | ~/hostfile
        Enter the number of oneCCL worker threads [1] | 1
        Do you wish to optimize your script with torch dynamo? | NO
        How many processes should be used for distributed training? | 16
        Do you wish to use FP16 or BF16 (mixed precision)? | bf16
    """,
}


@pytest.mark.parametrize("example", DIALOGS)
def test_the_printed_dialogs(example: str, pipe: Callable[..., Any], tmp_path: Path) -> None:
    lines = [line.strip().removeprefix("+ ").rpartition("|") for line in DIALOGS[example].strip().splitlines()]
    done = pipe(*(typed.strip() for _, _, typed in lines))
    assert (done.returncode, done.stderr) == (0, "")
    rest = " ".join(done.stdout.split())
    for question, _, _ in lines:
        before, found, rest = rest.partition(question.strip())
        assert found, f"{question.strip()} is not asked after: {before}"
    expected = next(case for case in CASES if case.example == example).expected
    assert flat(yaml.safe_load((tmp_path / "c.yaml").read_text())) == expected


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_the_file_as_it_was(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("distributed_type: 'NO'\n")
    screen = terminal()
    screen.expect("c.yaml exists. It is replaced after the last answer")
    screen.expect("In which compute environment")
    screen.send(ENTER)
    screen.expect("Which type of machine")
    screen.sendintr()
    screen.expect("accelerate config: interrupted, nothing was written.")
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 130 and "Traceback" not in screen.before
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
    assert (tmp_path / "c.yaml").read_text() == "distributed_type: 'NO'\n"


def test_an_interrupted_pipe_writes_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "config", "--config_file", "c.yaml"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("0\n")
    process.stdin.flush()
    for line in process.stdout:
        if "Which type of machine" in line:
            break
    time.sleep(0.1)  # let it reach the answer
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\naccelerate config: interrupted, nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_a_wrong_answer_is_asked_for_again_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    screen = terminal()
    screen.expect("In which compute environment")
    screen.send(ENTER)
    screen.expect("Which type of machine")
    screen.send(DOWN + ENTER)
    screen.expect("How many different machines")
    screen.send("many" + ENTER)
    screen.expect("expected a whole number, found 'many'")
    screen.send("\x7f" * 4 + "2" + ENTER)
    screen.expect("What is the rank")
    screen.send("7" + ENTER)
    screen.expect("expected a number from 0 to 1, found 7")
    screen.sendintr()
    screen.expect("nothing was written")
    screen.expect(pexpect.EOF)
    assert not list(tmp_path.iterdir())


def test_a_wrong_answer_is_asked_for_again_in_a_pipe(pipe: Callable[..., Any], tmp_path: Path) -> None:
    done = pipe("moon", "0", "12", "0", "perhaps", "yes", "", "", "fp32", "bf16")
    assert done.returncode == 0, done.stderr
    for said in ("found 'moon'", "expected 0 to 10", "expected yes or no, found 'perhaps'", "found 'fp32'"):
        assert said in done.stdout
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["mixed_precision"] == "bf16"


def test_answers_that_end_too_early(pipe: Callable[..., Any], tmp_path: Path) -> None:
    done = pipe("0", "2")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == (
        'accelerate config: the answers end before "How many different machines will you use (use more than 1 for '
        'multi-node training)?" (num_machines) has one. Nothing was written.\n'
    )


def test_a_terminal_without_questionary(terminal: Terminal, tmp_path: Path) -> None:
    screen = terminal(command=[sys.executable, "-c", WITHOUT_QUESTIONARY])
    screen.expect(re.escape('Arrow keys come with questionary: pip install "accelerate[config]"'))
    for line in ("0", "0", "yes", "", "", "2"):
        screen.expect(r"\]: ")
        screen.sendline(line)
    screen.expect("accelerate configuration saved at c.yaml")
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert (written["use_cpu"], written["mixed_precision"]) == (True, "bf16")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", ". is not a file: name one"),
        ("/dev/null", "/dev/null is not a file"),
        ("file/c.yaml", "file is not a writable folder"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_the_first_question(
    name: str, said: str, pipe: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = pipe(name=name)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_default_file_is_where_it_is_documented_to_be(tmp_path: Path, environment: dict[str, str]) -> None:
    places = {
        "HF_HOME": "accelerate",
        "XDG_CACHE_HOME": "huggingface/accelerate",
        "HOME": ".cache/huggingface/accelerate",
    }
    bare = {name: value for name, value in environment.items() if name not in places}
    for name, below in places.items():
        here = {**bare, "HOME": str(tmp_path / "nobody"), name: str(tmp_path / name)}
        done = subprocess.run(
            [*COMMAND, "config"], env=here, input="\n" * 20, capture_output=True, text=True, timeout=60
        )
        path = tmp_path / name / below / "default_config.yaml"
        assert done.stdout.splitlines()[-1] == f"accelerate configuration saved at {path}", done.stderr
        assert path.is_file()


def test_secrets_go_nowhere(pipe: Callable[..., Any], tmp_path: Path) -> None:
    done = pipe("1", "1", "", "", "role", "", "", "", "", "", "", "")
    assert done.returncode == 0, done.stderr
    assert "The keys are not stored" in done.stdout
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert written["iam_role_name"] == "role" and not [key for key in written if "key" in key]


@pytest.mark.parametrize(
    ("words", "answers", "absent"),
    [
        (["config", "--help"], "", ["torch", "yaml", "questionary", "accelerate.commands.config.questions"]),
        (["config", "default"], "", ["torch", "numpy", "rich", "questionary"]),
        (["config"], "\n" * 20, ["torch", "numpy", "rich", "questionary", "boto3"]),
    ],
    ids=["help", "default", "piped"],
)
def test_nothing_is_imported_before_it_is_needed(
    words: list[str], answers: str, absent: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    code = (
        "import sys\n"
        "from accelerate.commands.accelerate_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {absent!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        input=answers,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n"), done.stdout
