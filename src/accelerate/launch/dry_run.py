"""Formats a plan for a shell: variables, then the command, quoted so that pasting it starts the same run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ..settings.launcher import LaunchSettings
from .plan import LaunchPlan


def format_plan(plan: LaunchPlan, settings: LaunchSettings, here: Mapping[str, str]) -> str:
    """Formats `plan` as a ``NAME=value`` line for each variable, then the command.

    Args:
        plan: The plan.
        settings: The settings of which it was built.
        here: The environment of the shell; variables that it overrides are left out.

    Raises:
        SettingsError: if a file that the settings name cannot be read.
    """
    if plan.launcher == "sagemaker":
        from .engines.sagemaker import format_job, prepare_job

        return format_job(prepare_job(settings, plan.environment))
    added = {name: value for name, value in plan.environment.items() if not (name in plan.overridable and name in here)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in sorted(added.items())]
    command = plan.command
    if plan.launcher == "torch":
        # torch.distributed.run replaces $-macros in the script's name and arguments, and two $ stand for one.
        start = len(command) - len(settings.script_args) - (0 if settings.no_python else 1)
        command = [*command[:start], *(word.replace("$", "$$") for word in command[start:])]
    typed = " \\\n".join([*lines, shlex.join(command)])
    return " &\n".join([typed, *map(shlex.join, plan.parallel_commands), "wait"]) if plan.parallel_commands else typed
