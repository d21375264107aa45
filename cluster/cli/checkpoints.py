"""The commands that make a checkpoint from another one: convert, upcycle."""

import argparse
from typing import TYPE_CHECKING

from cluster.cli.arguments import Commands, add_command, byte_size

if TYPE_CHECKING:
    from cluster.checkpoint.writing.model import Written


def add_commands(commands: Commands) -> None:
    convert = add_command(
        commands, "convert", _convert, "write a checkpoint again in the published layout, in another dtype if you like"
    )
    _add_folders(convert, "MODEL", "directory of a checkpoint, or its name on the hub")
    convert.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto: the checkpoint's (default)"
    )
    convert.add_argument(
        "--from-pickle",
        action="store_true",
        help="read pytorch_model.bin, its parts or one .pt file in place of safetensors; no code in it is run",
    )

    upcycle = add_command(
        commands, "upcycle", _upcycle, "make a Qwen2-MoE checkpoint from a dense Qwen2 one, to be trained further"
    )
    _add_folders(upcycle, "DENSE", "directory of a dense Qwen2 checkpoint, or its name on the hub")
    _add_recipe(upcycle)
    upcycle.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto: the dense checkpoint's (default)"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    for name, default, help_text in (
        ("--experts", 64, "routed experts of each layer, a multiple of --granularity"),
        (
            "--granularity",
            8,
            "experts that a copy of the dense FFN is cut into; there are experts / granularity copies",
        ),
        ("--shared", 4, "size of the shared expert, which every token passes, in experts"),
        ("--seed", 0, "of the shuffling and of all numbers drawn; the same seed makes the same bytes"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{help_text} (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="N", help="experts of a token (default: the granularity)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of each routed expert, and of its row in the router, that is drawn anew with initializer_range as "
        "deviation, so that copies learn different things; 0 keeps the dense model's answers (default: %(default)s)",
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
    from cluster.console import CountProgress, Working

    with Working("loading torch …"):
        from cluster.checkpoint.writing.convert import convert

    with CountProgress(f"writing {args.out}") as bar:
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


def _upcycle(args: argparse.Namespace) -> int:
    from cluster.console import CountProgress, Working

    with Working("loading torch …"):
        from cluster.checkpoint.writing.upcycle import Recipe, upcycle

    recipe = Recipe(
        experts=args.experts,
        granularity=args.granularity,
        shared=args.shared,
        noise=args.noise,
        seed=args.seed,
        top_k=args.top_k,
    )
    with CountProgress(f"writing {args.out}") as bar:
        written = upcycle(
            args.source, args.out, recipe, dtype=args.dtype, max_file_bytes=args.max_shard_size, progress=bar.update
        )
    _report(written)
    return 0


def _report(written: "Written") -> None:
    from cluster.console import size

    files = "1 file" if written.num_files == 1 else f"{written.num_files} files"
    print(f"{written.path}: {size(written.num_bytes)} of weights in {files}, {written.dtype}")
