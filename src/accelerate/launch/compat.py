"""Documented functions of ``accelerate.utils`` that return commands and variables, for programs that launch themselves.

Each builds a `LaunchPlan` and returns a part of it.

`args` comes from the parser of `accelerate.commands.launch.launch_command_parser`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..settings import env
from ..settings.launcher import LaunchSettings
from .parse import from_namespace, resolve_args
from .plan import build_plan

if TYPE_CHECKING:
    import argparse


def _settings(args: argparse.Namespace) -> LaunchSettings:
    return resolve_args(from_namespace(args))[0]


def prepare_simple_launcher_cmd_env(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Returns command and whole environment of a launch.

    Raises:
        ValueError: if the settings cannot be used.
    """
    plan = build_plan(_settings(args))
    return plan.command, plan.merged_environment(env.snapshot())


def prepare_multi_gpu_env(args: argparse.Namespace) -> dict[str, str]:
    """Returns the whole environment of a launch of several processes.

    Raises:
        ValueError: if the settings cannot be used.
    """
    return build_plan(_settings(args)).merged_environment(env.snapshot())


def prepare_deepspeed_cmd_env(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Returns command and whole environment of a launch with DeepSpeed.

    Raises:
        ValueError: if the settings cannot be used.
    """
    plan = build_plan(_settings(args).replace(use_deepspeed=True))
    return plan.command, plan.merged_environment(env.snapshot())


def prepare_tpu(
    args: argparse.Namespace, current_env: dict[str, str], pod: bool = False
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns `args`, and `current_env` with the variables for TPUs; for a pod, sets `args.env` to that environment."""
    settings = _settings(args)
    host = settings.replace(tpu=True, tpus=settings.tpus.replace(tpu_use_cluster=False))
    current_env = build_plan(host).merged_environment(current_env)
    if pod:
        args.env = [f"{name}={value}" for name, value in current_env.items()]
    return args, current_env


def prepare_sagemager_args_inputs(
    sagemaker_config: Any, args: argparse.Namespace
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the arguments of Amazon SageMaker's estimator, and the location of the data.

    Sets the AWS variables of this process from `sagemaker_config` and `args`.

    Args:
        sagemaker_config: A `SageMakerConfig`.
        args: The launcher's flags, the script and its arguments; a configuration file that they name is ignored.

    Raises:
        ValueError: if they cannot be used.
    """
    import argparse

    from . import config_file, parse
    from .engines import sagemaker

    words = from_namespace(args)
    file = config_file.parse_content(sagemaker_config.to_dict(), type(sagemaker_config).__name__)
    settings = parse.merge_settings(words.flags, file, words.script, words.script_args)
    job = sagemaker.prepare_job(settings, build_plan(settings).environment)
    env.publish(sagemaker.credentials(settings))
    return argparse.Namespace(**job.estimator), dict(job.inputs or {})


class PrepareForLaunch:
    """Wraps a function as the target of a forked rank: sets the rank's variables, then calls the function.

    Args:
        launcher: The function.
        distributed_type: Kept as an attribute.
        debug: Whether to join a group of CPU processes, with the file ACCELERATE_DEBUG_RDV_FILE as rendezvous.
    """

    def __init__(self, launcher: Callable[..., Any], distributed_type: str = "NO", debug: bool = False) -> None:
        self.launcher = launcher
        self.distributed_type = distributed_type
        self.debug = debug

    def __call__(self, index: int, *args: Any) -> None:
        """Runs as process `index` of the NPROC processes on machine NODE_RANK."""
        rank = env.integer("NODE_RANK", 0) * env.integer("NPROC", 1) + index
        env.publish({"LOCAL_RANK": index, "RANK": rank, "FORK_LAUNCHED": 1})
        if self.debug:
            from ..runtime import world

            world.join(cpu=True, init_method=f"file://{env.get('ACCELERATE_DEBUG_RDV_FILE')}")
        self.launcher(*args)
