"""``accelerate config`` without a subcommand: asks the questions and writes the file atomically."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from ...launch import config_file, config_io
from ...settings.clouds import SageMakerSettings
from ...settings.option import SettingsError
from . import questions
from .flow import Answers, ask_all
from .prompts import Prompter, prompter
from .role import KEYS_NOTE, make_role

# Defaults of every file, overridden by answers.
_LOCAL = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "NO",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
_SAGEMAKER = {
    "base_job_name": SageMakerSettings.base_job_name,
    "compute_environment": "AMAZON_SAGEMAKER",
    "debug": False,
    "num_machines": 1,
    "py_version": SageMakerSettings.py_version,
    "pytorch_version": SageMakerSettings.pytorch_version,
    "transformers_version": SageMakerSettings.transformers_version,
    "use_cpu": False,
}
# Engines, which override the `distributed_type` of the machine.
_ENGINES = {"use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "use_megatron_lm": "MEGATRON_LM"}


def fill_in(ask: Prompter) -> tuple[dict[str, Any], Answers]:
    """Asks all questions.

    Returns:
        The content of the file, and the answers by name.
    """
    file: dict[str, Any] = {}
    answers: Answers = {}
    ask_all(questions.FIRST, ask, answers, file)
    if answers["compute_environment"] == "AMAZON_SAGEMAKER":
        ask_all(questions.SAGEMAKER, ask, answers, file)
        return {**_SAGEMAKER, **file}, answers
    ask_all(questions.LOCAL, ask, answers, file)
    for engine, kind in _ENGINES.items():
        if answers.get(engine):
            file["distributed_type"] = kind
    return {**_LOCAL, **file}, answers


def run(path: str | None) -> int:
    """Asks on the terminal, or reads piped answers, and writes the file.

    Args:
        path: The file, JSON if it ends in .json, else YAML; None for the default one.

    Returns:
        The exit code: 0, 2 if an answer is missing or the file cannot be written, 130 after Ctrl-C.
    """
    target = path or config_file.default_path()
    try:
        _check_target(target)
        content, answers = fill_in(prompter())
        if content["compute_environment"] == "AMAZON_SAGEMAKER":
            _configure_aws(answers)
        config_io.write(target, config_io.dump(content, as_json=target.endswith(".json")))
    except KeyboardInterrupt:
        print("\naccelerate config: interrupted, nothing was written.", file=sys.stderr)
        return 130
    except (SettingsError, OSError) as error:
        print(f"accelerate config: {error} Nothing was written.", file=sys.stderr)
        return 2
    print(f"accelerate configuration saved at {target}")
    return 0


def _check_target(target: str) -> None:
    """Checks, before any question is asked, that the file can be written.

    Raises:
        SettingsError: if it cannot.
    """
    if os.path.exists(target) and not os.path.isfile(target):  # a folder, /dev/null
        raise SettingsError(f"{target} is not a file: name one, such as config.yaml.")
    folder = os.path.dirname(os.path.realpath(target))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise SettingsError(f"{target} cannot be written: {folder} is not a writable folder.")
    if os.path.exists(target):
        print(f"{target} exists. It is replaced after the last answer; Ctrl-C keeps it unchanged.")


def _configure_aws(answers: Mapping[str, Any]) -> None:
    if answers["iam_role"] == "create":
        print(make_role(answers))
    if answers["authorization"] == "keys":
        print(KEYS_NOTE)
