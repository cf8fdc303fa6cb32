"""``accelerate config explain``: the values that a launch would use, and the source of each."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...launch import parse
from ...launch.config_file import ConfigFile
from ...settings import env
from ...settings.launcher import LaunchSettings
from ...settings.option import OptionSpec, SettingsError, format_value, option_specs

if TYPE_CHECKING:
    from ...launch.host import HostInfo
    from ...launch.plan import LaunchPlan

description = "Shows the values that a launch with these flags would use, and the source of each; starts nothing."

_USAGE = """\
usage: accelerate config explain [--all] [--json] [flags of launch] [script]

Shows the values that a launch with these flags would use, and the source of
each; starts nothing.

  --all       include values that have their defaults
  --json      print JSON
  -h, --help  this text

`accelerate launch --dry_run` prints the command, as a shell takes it."""
_OWN = ("--all", "--json", "-h", "--help")
_NAME, _VALUE, _SOURCE = 29, 20, 27  # widths of the columns; 80 with the gaps
_DEFAULT = "default"


class Row(NamedTuple):
    """An option's value and its source.

    Attributes:
        entry: The option.
        value: Its value, as the launcher or the child reads it.
        source: ``flag``, ``file``, ``variable``, ``machine`` or ``default``.
        detail: The file's key, the variable's name, or the scheduler that started this process.
    """

    entry: OptionSpec
    value: Any
    source: str
    detail: str = ""


class Explanation(NamedTuple):
    """The values that a launch would use."""

    rows: tuple[Row, ...]
    settings: LaunchSettings
    plan: LaunchPlan
    file: ConfigFile | None
    device: str


def explain(argv: Sequence[str]) -> Explanation:
    """Resolves a launch on this machine.

    Args:
        argv: Arguments of ``accelerate launch``; the script may be missing.

    Raises:
        SettingsError: if they are invalid.
    """
    from ...launch.host import detect_host, resolve_settings
    from ...launch.plan import build_plan

    words = parse.split_args(argv)
    asked, file = parse.resolve_args(words)
    chosen = parse.merge_values(words.flags, file)
    machine = detect_host(asked)
    resolved = resolve_settings(asked, machine)
    plan = build_plan(resolved if words.script else resolved.replace(script="script.py"))
    here = env.snapshot()
    rows = [_row(entry, asked, resolved, chosen, plan, here) for entry in option_specs(LaunchSettings)]
    rows += _cloud_rows(resolved, chosen)
    if (scheduler := _scheduler(machine)) is not None:
        rows = [row._replace(detail=scheduler) if row.source == "machine" else row for row in rows]
    return Explanation(tuple(rows), resolved, plan, file, machine.device)


def _scheduler(machine: HostInfo) -> str | None:
    """Returns the scheduler that started this process and assigned its rank, or None."""
    if machine.rank_info is not None:
        return machine.rank_info.source
    return "SLURM" if machine.slurm_step is not None else None


def _row(
    entry: OptionSpec,
    asked: LaunchSettings,
    resolved: LaunchSettings,
    chosen: Mapping[str, parse.SourcedValue],
    plan: LaunchPlan,
    here: Mapping[str, str],
) -> Row:
    value = entry.get(resolved)
    if value != entry.get(asked):
        return Row(entry, value, "machine")
    if entry.dest in chosen:
        return Row(entry, value, chosen[entry.dest].source, chosen[entry.dest].detail)
    name = entry.variable
    if name is not None and name in here and (name in plan.overridable or name not in plan.environment):
        return Row(entry, here[name], "variable", name)
    if name is not None and name in plan.overridable:
        return Row(entry, entry.convert(plan.environment[name], name), "machine")
    return Row(entry, value, _DEFAULT)


def _cloud_rows(settings: LaunchSettings, chosen: Mapping[str, parse.SourcedValue]) -> Iterator[Row]:
    """Yields rows of file keys without a flag: of Amazon SageMaker, or of a TPU pod."""
    on_sagemaker = settings.compute_environment == "AMAZON_SAGEMAKER"
    values = settings.sagemaker if on_sagemaker else settings.pod
    for entry in option_specs(type(values)):
        if on_sagemaker or entry.dest in chosen:
            source = chosen.get(entry.dest, parse.SourcedValue(None, _DEFAULT))
            titled = entry._replace(group="Amazon SageMaker" if on_sagemaker else "TPU")
            yield Row(titled, entry.get(values), source.source, source.detail)


# As text -------------------------------------------------------------------------------------------------------------


def _table(found: Explanation, everything: bool) -> Iterator[str]:
    settings, plan = found.settings, found.plan
    yield f"configuration file  {found.file.path if found.file is not None else 'none'}"
    yield f"starts              {_summary(settings, plan, found.device)}"
    shown = [row for row in found.rows if everything or row.source != _DEFAULT]
    group = ""
    for row in sorted(shown, key=lambda row: [row.entry.group for row in shown].index(row.entry.group)):
        if row.entry.group != group:
            group = row.entry.group
            yield from ("", group)
        yield from _cells(row)
    if not everything:
        yield from ("", f"{len(found.rows) - len(shown)} more have their defaults: --all shows them.")


def _summary(settings: LaunchSettings, plan: LaunchPlan, device: str) -> str:
    count = f"{settings.processes} process{'' if settings.processes == 1 else 'es'}"
    if plan.launcher == "sagemaker":
        instances = f"{settings.machines} instance{'' if settings.machines == 1 else 's'}"
        return f"{instances} of {settings.sagemaker.ec2_instance_type} on Amazon SageMaker"
    if plan.launcher in ("tpu", "tpu-pod"):
        count = "a process for each device" if settings.num_processes is None else count
        return f"{count} on {'a pod of TPUs' if plan.launcher == 'tpu-pod' else 'TPUs'}"
    machines = "" if settings.machines == 1 else f" on {settings.machines} machines"
    where = "cpu" if settings.on_cpu else settings.device
    if where != "cpu" and device == "cpu" and settings.machines == 1:
        where = f"cpu (this machine has no {where} device)"
    how = {"python": "in the launcher's place", "torch": "through torch.distributed.run"}
    return f"{count}{machines} on {where}, {how.get(plan.launcher, f'through {plan.launcher}')}"


def _cells(row: Row) -> Iterator[str]:
    source = {"variable": f"variable {row.detail}", "machine": row.detail or "this machine"}.get(row.source, row.source)
    if row.source == "file" and (key := row.detail.rpartition(".")[2]) != row.entry.dest:
        source = f"file: {key}"
    name = row.entry.dest
    if len(name) > _NAME:
        yield f"  {name}"
        name = ""
    values = textwrap.wrap(_text(row), _VALUE) or ["''"]
    sources = textwrap.wrap(source, _SOURCE)
    for line in range(max(len(values), len(sources))):
        cells = [column[line] if line < len(column) else "" for column in ([name], values, sources)]
        yield f"  {cells[0]:<{_NAME}} {cells[1]:<{_VALUE}} {cells[2]}".rstrip()


def _text(row: Row) -> str:
    value = _public(row)
    if value is None or value == ():
        return "-"
    return format_value(value)


def _public(row: Row) -> Any:
    return "(not shown)" if row.entry.option.secret and row.value is not None else row.value


def _as_json(found: Explanation, everything: bool) -> str:
    import json

    values = {
        row.entry.dest: {"value": _public(row), "source": row.source} | ({"where": row.detail} if row.detail else {})
        for row in found.rows
        if everything or row.source != _DEFAULT
    }
    there = found.plan.merged_environment(env.snapshot())
    facts = {
        "config_file": found.file.path if found.file is not None else None,
        "starter": found.plan.launcher,
        "command": found.plan.command,
        "environment": {name: there[name] for name in found.plan.environment},
        "values": values,
    }
    return json.dumps(facts, indent=2)


# The command ---------------------------------------------------------------------------------------------------------


def explain_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``explain`` to the subcommands of ``accelerate config``."""
    # Launch's flags are read as launch reads them; to argparse they are words, since no prefix means a flag.
    made: argparse.ArgumentParser = parser.add_parser(
        "explain",
        parents=parents,
        description=description,
        prefix_chars="\0",
        add_help=False,
        help="show what a launch would use, and why",
    )
    made.add_argument("words", nargs=argparse.REMAINDER, help="flags of launch, --all, --json")
    made.set_defaults(func=explain_command)
    return made


def explain_command(args: argparse.Namespace) -> None:
    """Prints the table, or JSON.

    Raises:
        SystemExit: with code 2 when flags or file cannot be used.
    """
    own = {word for word in args.words if word in _OWN}
    if own & {"-h", "--help"}:
        print(_USAGE)
        return
    try:
        found = explain([word for word in args.words if word not in own])
    except SettingsError as error:
        print(f"accelerate config explain: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(_as_json(found, "--all" in own) if "--json" in own else "\n".join(_table(found, "--all" in own)))
