"""Refuses what `moe-cluster bench` cannot carry out, before anything is measured. Imports no torch."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import SetupError
from cluster.inputs import shown

MOST: Mapping[str, int] = {  # by option; far beyond any use, and what a machine still takes up
    **dict.fromkeys(
        ("context", "chunk", "window", "prompt_tokens", "output_tokens", "system_tokens"), 1 << 24
    ),  # longest known: 10 M
    **dict.fromkeys(("batch", "concurrency"), 1 << 16),  # sequences; streams, each with a thread
    **dict.fromkeys(("shards", "attention_replicas"), 1 << 10),  # processes of 200 MB and more
    "threads": 1 << 10,  # of one process
    **dict.fromkeys(("rows", "hidden_size"), 1 << 20),
    "adapters": 256,  # in memory; served are 16 by default
    "layers": 1 << 10,  # the deepest published models have 126
    "repeat": 100_000,  # all runs are planned before the first
    **dict.fromkeys(("requests", "conversations", "turns", "systems"), 1_000_000),
}
MAX_PROMPT_TOKENS = 1 << 27  # of all requests, drawn before the first is sent: about 36 bytes each, 5 GB
MAX_ROW_BYTES = 1 << 30  # of one round trip to one shard
RATES = 0.001, 1_000_000.0  # requests/s: one in 17 minutes; what no process sends
PICTURES = (".png", ".svg", ".pdf")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises SetupError for a number beyond all use, and for files that cannot be written."""
    for name, most in MOST.items():
        given = getattr(args, name, None)
        numbers = given if isinstance(given, tuple) else (given or 0,)
        largest = max((number for number in numbers if not isinstance(number, str)), default=0)  # a name is no number
        if largest > most:
            raise SetupError(f"--{name.replace('_', '-')} has {shown(largest)}, at most {most} is possible")
    if min(getattr(args, "adapters", None) or (0,)) < 0:
        raise SetupError(f"--adapters has {min(args.adapters)}, numbers from 0 are needed")
    if args.json is not None:
        check_output("--json", args.json)
    plot = getattr(args, "plot", None)
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            raise SetupError(
                f"--plot {plot} has no name of a picture: one that ends with {', '.join(PICTURES)} is needed"
            )
        check_output("--plot", plot)
    if getattr(args, "layers", None) is not None and args.bench != "gpu":
        _check_depth(args)


def check_output(option: str, path: Path) -> None:
    """Raises SetupError for a file that cannot be written."""
    try:
        if path.is_dir():
            raise SetupError(f"{option} {path} is a directory: name a file")
        if not path.parent.is_dir():
            raise SetupError(f"{option} {path}: its directory does not exist")
    except OSError as error:
        raise SetupError(f"{option} {path} cannot be written: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SetupError(f"{option} {path} cannot be written: this user may not")


def _check_depth(args: argparse.Namespace) -> None:
    """Raises SetupError for a number of layers that nothing would take."""
    if getattr(args, "model_dir", None) is not None:
        raise SetupError(f"--layers is of a made checkpoint, and {args.model_dir} has its own: leave it out")
    if args.shapes == "demo":
        raise SetupError("--layers is not of the demo's checkpoint, which has one depth: leave it out")
