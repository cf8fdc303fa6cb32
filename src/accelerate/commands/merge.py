"""``accelerate merge-weights``: merges sharded weights into one safetensors file, or several with an index."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .parsers import add, make_parser

description = (
    "Merges the weights that several processes saved in shards (SHARDED_STATE_DICT): model.safetensors in the output "
    "folder, or several files with an index. Weights that lie there already are replaced."
)


def merge_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser("merge-weights", description, subparsers)
    add(parser, "checkpoint_directory", help="folder of the shards, such as checkpoint_3/pytorch_model_fsdp_0")
    add(parser, "output_path", help="folder for the merged weights, made if it is not there")
    add(
        parser,
        "--unsafe_serialization",
        action="store_true",
        help="write pytorch_model.bin with torch.save instead of safetensors",
    )
    add(
        parser,
        "--remove_checkpoint_dir",
        action="store_true",
        help="remove the folder of the shards when the merged weights are on disk",
    )
    add(parser, "--max_shard_size", default="10GB", help="largest size of an output file (10GB)")
    parser.set_defaults(func=merge_command)
    return parser


def merge_command(args: argparse.Namespace) -> None:
    """Merges the weights.

    Raises:
        CheckpointError: when the shards cannot be read, or the merged weights not written.
        ValueError: for a size that is none.
    """
    from ..checkpointing.merge import merge_fsdp_weights

    merge_fsdp_weights(
        args.checkpoint_directory,
        args.output_path,
        safe_serialization=not args.unsafe_serialization,
        remove_checkpoint_dir=args.remove_checkpoint_dir,
        max_shard_size=args.max_shard_size,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    args = merge_command_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    from ..checkpointing import CheckpointError

    try:
        merge_command(args)
    except (CheckpointError, ValueError) as error:
        print(f"accelerate merge-weights: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
