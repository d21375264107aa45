"""The commands that make a checkpoint from another one: convert."""

import argparse
from typing import TYPE_CHECKING

from cluster.cli.arguments import Commands, add_command, byte_size

if TYPE_CHECKING:
    from cluster.checkpoint.writing.model import Written


def add_commands(commands: Commands) -> None:
    convert = add_command(
        commands, "convert", _convert, "write a checkpoint again in the published layout, in another dtype if you like"
    )
    _add_folders(convert, "MODEL_DIR", "directory of a checkpoint")
    convert.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto: the checkpoint's (default)"
    )
    convert.add_argument(
        "--from-pickle",
        action="store_true",
        help="read pytorch_model.bin, its parts or one .pt file in place of safetensors; no code in it is run",
    )


def _add_folders(parser: argparse.ArgumentParser, source: str, help_text: str) -> None:
    parser.add_argument("source", metavar=source, help=help_text)
    parser.add_argument("out", metavar="OUT", help="folder to write it into: a new one, or an empty one")
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        default="5GB",
        metavar="BYTES",
        help="of a file of weights (5GB, 512MiB …; default: %(default)s); a larger tensor has a file of its own",
    )


def _convert(args: argparse.Namespace) -> int:
    from cluster.checkpoint.writing.convert import convert
    from cluster.console import WriteProgress

    with WriteProgress(f"writing {args.out}") as bar:
        written = convert(
            args.source,
            args.out,
            dtype=args.dtype,
            max_file_bytes=args.max_shard_size,
            from_pickle=args.from_pickle,
            progress=bar.update,
        )
    _report(written)
    return 0


def _report(written: "Written") -> None:
    from cluster.console import size

    files = "1 file" if written.num_files == 1 else f"{written.num_files} files"
    print(f"{written.path}: {size(written.num_bytes)} of weights in {files}, {written.dtype}")
