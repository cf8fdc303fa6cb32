"""``accelerate to-fsdp2``: converts a configuration file for FSDP 1 to FSDP 2, and lists options without a counterpart."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..launch import config_file
from ..launch.config_io import dump, load, read, write
from ..launch.parse import merge_values
from ..settings.enums import FSDP_SHARDING_STRATEGY
from ..settings.option import OptionSpec, SettingsError
from .parsers import add, make_parser

# Sharding strategy -> reshard_after_forward.
_RESHARDS = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "NO_SHARD": False,
    "HYBRID_SHARD": True,
    "HYBRID_SHARD_ZERO2": False,
}
# Notes on strategies.
_STRATEGY_NOTES = {
    "NO_SHARD": "FSDP 2 always shards; to keep whole replicas, use distributed_type MULTI_GPU instead",
    "HYBRID_SHARD": "replicas across nodes are set by parallelism_config_dp_replicate_size",
    "HYBRID_SHARD_ZERO2": "replicas across nodes are set by parallelism_config_dp_replicate_size",
}
# Options without a counterpart, and the reason.
_DROPPED = {
    "fsdp_backward_prefetch": "FSDP 2 always prefetches the next unit before the gradients of the current one are reduced",
    "fsdp_forward_prefetch": "FSDP 2 sets it per module, by set_modules_to_forward_prefetch",
    "fsdp_sync_module_states": "FSDP 2 broadcasts only with cpu_ram_efficient_loading",
    "fsdp_use_orig_params": "FSDP 2 keeps the original parameters always",
}


class Conversion(NamedTuple):
    """Converted content.

    Attributes:
        content: The new content; the old one if there was nothing to convert.
        notes: A line for each change and for each option without a counterpart.
        converted: Whether anything was converted.
    """

    content: dict[str, Any]
    notes: tuple[str, ...]
    converted: bool


def convert(content: Mapping[str, Any], path: str) -> Conversion:
    """Converts a file's content to FSDP 2.

    Args:
        content: The content, as returned by `launch.config_io.load`.
        path: The file's path, for messages.

    Raises:
        SettingsError: when the content cannot be understood.
    """
    understood = config_file.parse_content(content, path)
    old = content.get("fsdp_config") or {}
    if understood.values.get("fsdp_version") == 2:
        return Conversion(dict(content), ("is for FSDP 2 already",), False)
    if "use_fsdp" not in merge_values({}, understood) and not old:
        return Conversion(dict(content), ("is not about FSDP: there is nothing to convert",), False)
    table = config_file.key_tables()[1]["fsdp_config"]
    section: dict[str, Any] = {}
    notes = ["fsdp_version is 2"]
    for key, value in old.items():
        name, new, note = _converted(table[key], value)
        if name is not None:
            section[name] = new
        if note is not None:
            notes.append(f"{key}: {note}")
    section.setdefault("fsdp_version", 2)
    if list(old) == sorted(old):
        section = dict(sorted(section.items()))
    return Conversion({**content, "fsdp_config": section}, tuple(notes), True)


def _converted(entry: OptionSpec, value: Any) -> tuple[str | None, Any, str | None]:
    """Returns an option's key and value in FSDP 2 (None for an option without a counterpart), and a note."""
    if entry.dest == "fsdp_version":
        return entry.key, 2, None
    if entry.dest in _DROPPED:
        return None, None, f"dropped: {_DROPPED[entry.dest]}"
    if value is not None and entry.dest in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"):
        strategy = str(entry.convert(value, entry.dest))
        strategy = FSDP_SHARDING_STRATEGY[int(strategy) - 1] if strategy.isdigit() else strategy
        if strategy in _RESHARDS:
            note = f"{strategy} is fsdp_reshard_after_forward: {str(_RESHARDS[strategy]).lower()}"
            more = _STRATEGY_NOTES.get(strategy)
            return "fsdp_reshard_after_forward", _RESHARDS[strategy], f"{note}; {more}" if more else note
    if entry.dest == "fsdp_state_dict_type" and str(value).upper() == "LOCAL_STATE_DICT":
        return entry.key, "SHARDED_STATE_DICT", "FSDP 2 has no LOCAL_STATE_DICT: SHARDED_STATE_DICT instead"
    return entry.key, value, None


def convert_config_to_fsdp2(config: dict[str, Any]) -> dict[str, Any]:
    """Converts the content of a configuration file for FSDP 1 to FSDP 2.

    Raises:
        ValueError: when it cannot be understood.
    """
    return convert(config, "given").content


# The command ---------------------------------------------------------------------------------------------------------


def to_fsdp2_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser(
        "to-fsdp2",
        "Converts a configuration file for FSDP 1 to FSDP 2, and lists options without a counterpart.",
        subparsers,
    )
    add(parser, "--config_file", required=True, help="the file to convert")
    add(parser, "--overwrite", action="store_true", help="write over it, or over the output file")
    add(parser, "--output_file", help="file for the result (.json for json)")
    parser.set_defaults(func=to_fsdp2_command)
    return parser


def to_fsdp2_command(args: argparse.Namespace) -> None:
    """Converts the file.

    Raises:
        SystemExit: with code 2 when a file cannot be read, understood or written.
    """
    try:
        _run(args.config_file, args.output_file, args.overwrite)
    except (SettingsError, OSError) as error:
        print(f"accelerate to-fsdp2: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(source: str, output: str | None, overwrite: bool) -> None:
    from .config.rewrite import rewritten

    target = source if output is None else output
    if output is None and not overwrite:
        raise SettingsError("where to? Give --output_file FILE, or --overwrite to change the file itself.")
    if os.path.exists(target) and not overwrite:
        raise SettingsError(f"{target} exists already: give another --output_file, or --overwrite.")
    content, notes, converted = convert(load(source), source)
    data, kept_comments = read(source), True
    as_json = target.endswith(".json")
    if as_json != source.endswith(".json"):
        write(target, dump(content, as_json, sort=False))
        kept_comments = b"#" not in data
    elif converted:
        renamed = {"fsdp_sharding_strategy": "fsdp_reshard_after_forward"}
        text, kept_comments = rewritten(data, content, as_json, renamed)
        write(target, text)
    elif target != source:
        write(target, data)
    print(f"{source} {notes[0]}" if not converted else f"converted {source} to {target}:")
    for note in notes if converted else ():
        print(f"  {note}")
    if not kept_comments:
        print("comments in the file could not be kept")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    to_fsdp2_command(to_fsdp2_command_parser().parse_args(sys.argv[1:] if argv is None else list(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
