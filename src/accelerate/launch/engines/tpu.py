"""TPUs: a host starts one process per device; the hosts of a pod are reached through gcloud's ssh.

`remote_script` and the `…_command` functions are pure. A remote command is one string, because ssh passes it to a shell on
the host; no local shell takes part.
"""

from __future__ import annotations

import json
import os.path
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError

INSTALL = "TPUs need torch_xla, of the version of your torch: pip install 'torch_xla[tpu]'."
_WORKER = "accelerate.launch.engines.tpu_worker"


# One host ------------------------------------------------------------------------------------------------------------


def host_command(settings: LaunchSettings, python: Sequence[str] = ()) -> list[str]:
    """Returns the command that starts the training function on each device of a host.

    A single process runs the script itself, and needs no training function.

    Args:
        settings: The settings of the launch.
        python: The interpreter on the host, if it is not this one.

    Raises:
        SettingsError: if the script is not Python.
    """
    if settings.no_python:
        raise SettingsError("--no_python does not go with --tpu: each process imports the script and calls a function.")
    python = python or settings.python
    script = [*(["-m"] if settings.module else []), settings.script, *settings.script_args]
    if settings.num_processes == 1:
        return [*python, *script]
    count = [] if settings.num_processes is None else ["--processes", str(settings.processes_here)]
    return [*python, "-m", _WORKER, "--function", training_function(settings), *count, *script]


def training_function(settings: LaunchSettings) -> str:
    """Returns the name of the script's function that each process calls."""
    return settings.tpus.main_training_function or "main"


def check_function(settings: LaunchSettings) -> None:
    """Checks that the script defines the training function, without running it.

    Raises:
        SettingsError: if the script is not valid Python, or binds no such name.
    """
    if settings.module or settings.num_processes == 1:
        return
    import ast

    name = training_function(settings)
    with open(settings.script, "rb") as file:
        try:
            tree = ast.parse(file.read())
        except (SyntaxError, ValueError) as error:
            raise SettingsError(f"script {settings.script} is not valid Python: {error}") from None
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    if name not in bound and "*" not in bound:
        raise SettingsError(
            f"script {settings.script} has no function {name}: each TPU process imports the script and calls it. Name "
            "the function with --main_training_function (in a configuration file: main_training_function)."
        )


# Pods ----------------------------------------------------------------------------------------------------------------


def ssh_command(name: str | None, zone: str | None, script: str, alpha: bool = False) -> list[str]:
    """Returns gcloud's command that runs a shell script on all workers of a TPU.

    Raises:
        SettingsError: if the name or the zone is missing.
    """
    missing = [key for key, value in (("tpu_name", name), ("tpu_zone", zone)) if not value]
    if missing:
        raise SettingsError(
            f"which TPU? Missing is {' and '.join(missing)}: give {' and '.join(f'--{key}' for key in missing)} to "
            "`accelerate tpu-config`, or write the key into the configuration file."
        )
    track = ["alpha"] if alpha else []
    where = [str(name), "--zone", str(zone)]
    return ["gcloud", *track, "compute", "tpus", "tpu-vm", "ssh", *where, "--command", script, "--worker", "all"]


def pod_commands(settings: LaunchSettings, environment: Mapping[str, str]) -> list[list[str]]:
    """Returns the commands that start the script on a pod: one for all its workers, or one for each VM given by --vm.

    Args:
        settings: The settings of the launch.
        environment: Variables of the remote processes.

    Raises:
        SettingsError: if the TPU's name or zone is missing, or a variable is not NAME=value.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    for word in settings.tpus.env:
        name, equals, _ = word.partition("=")
        if not equals or not name.isidentifier():
            raise SettingsError(f"--env: expected NAME=value, found {word!r}.")
        variables.append(word)
    sudo = ["sudo"] if settings.tpus.tpu_use_sudo else []
    script = shlex.join([*sudo, "env", *variables, *host_command(settings, ("python3",))])
    pod = settings.pod
    if not settings.tpus.vm:
        return [ssh_command(pod.tpu_name, pod.tpu_zone, script)]
    zone = ["--zone", pod.tpu_zone] if pod.tpu_zone else []
    return [["gcloud", "compute", "ssh", vm, *zone, "--command", script] for vm in settings.tpus.vm]


def remote_script(commands: Iterable[str], install: str | None = None) -> str:
    """Joins commands into one script for the shell of each worker, which stops at the first that fails.

    Args:
        commands: The commands, in order.
        install: The version of accelerate to install first: ``latest`` (the one installed here), ``dev`` or a number.

    Raises:
        SettingsError: if there is nothing to run, or no such version.
    """
    lines = [command for command in commands if command.strip()]
    if install is not None:
        lines.insert(0, shlex.join(["python3", "-m", "pip", "install", "--upgrade", _requirement(install)]))
    if not lines:
        raise SettingsError(
            "nothing to run: give --command, --command_file or --install_accelerate, or write commands or "
            "command_file into the configuration file."
        )
    return "\n".join(["set -e", *lines]) if len(lines) > 1 or "\n" in lines[0] else lines[0]


def _requirement(version: str) -> str:
    """Returns the requirement for pip: this distribution, from where it was installed here.

    The name alone would install another distribution: on PyPI, ``accelerate`` is the project whose interface this one has.
    """
    from packaging.version import InvalidVersion, Version

    try:
        tag = "" if version in ("latest", "dev") else f"v{Version(version)}"
    except InvalidVersion:
        raise SettingsError(
            f"--accelerate_version: expected latest, dev or a version such as 1.0.1, found {version!r}."
        ) from None
    origin = _origin()
    repository = origin.get("vcs_info", {})
    url = origin.get("url", "")
    if repository.get("vcs") == "git" and not url.startswith("file:"):
        revision = repository.get("commit_id", "") if version == "latest" else tag
        return f"accelerate @ git+{url}" + (f"@{revision}" if revision else "")
    if version == "latest" and url.startswith(("https://", "http://")):
        return f"accelerate @ {url}"
    raise SettingsError(
        "--install_accelerate: this distribution was not installed from an address that other hosts can reach, and the "
        "name accelerate on PyPI is another distribution's. Put a wheel where they find it, and install it with "
        "--command 'pip install URL'."
    )


def _origin() -> dict[str, Any]:
    """Returns where pip has installed this distribution from (PEP 610); empty for an index."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution("accelerate").read_text("direct_url.json")
        found = json.loads(text or "{}")
    except (PackageNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_commands(path: str) -> str:
    """Reads a file of commands.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            return file.read().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"file of commands {path} cannot be read: {error}") from None


# Action --------------------------------------------------------------------------------------------------------------


def run_remotely(commands: Sequence[Sequence[str]]) -> int:
    """Runs gcloud's commands in parallel; if one fails, terminates the others.

    Returns:
        0, or the exit code of the first failure that was detected.

    Raises:
        SettingsError: if gcloud is not installed.
    """
    program = shutil.which("gcloud")
    if program is None:
        raise SettingsError("gcloud is not installed, or not on the PATH: https://cloud.google.com/sdk/docs/install")
    running = [subprocess.Popen([program, *command[1:]]) for command in commands]
    code = 0
    try:
        while running:
            for process in list(running):
                try:
                    ended = process.wait(timeout=0.2 if len(running) > 1 else None)
                except subprocess.TimeoutExpired:
                    continue
                running.remove(process)
                if ended and not code:
                    code = ended if ended > 0 else 128 - ended
                    for other in running:
                        other.terminate()
    finally:
        for process in running:  # interrupted: they have received Ctrl-C as well
            process.terminate()
            process.wait()
    return code
