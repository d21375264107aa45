"""The options of the planner's benches."""

import argparse
from pathlib import Path

from cluster.bench.argument_types import numbers
from cluster.client import options


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("calibration.json"), metavar="FILE",
        help="for `plan --calibration` (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(json=None)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of `bench calibrate`, of this model (default: it is made now)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a calibration that is made now there")
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="S", help="that each setting takes, about (default: %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser, address=None)
    parser.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="the Ray cluster of the server at --address (default: $RAY_ADDRESS, else that of `serve` here)",
    )  # fmt: skip
    for option, what in (("--attention-replicas", "attention replicas"), ("--shards", "expert shards")):
        parser.add_argument(
            option, type=numbers, default=(1, 2, 3, 4), metavar="NUMBERS", help=f"{what} (default: 1,2,3,4)"
        )
    for option, default, text in (
        ("--concurrency", 32, "streams at a time"),
        ("--prompt-tokens", 64, "tokens of a prompt"),
        ("--output-tokens", 32, "tokens to generate"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="S", help="that each setting takes, about (default: %(default)g)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of `bench calibrate`: the planner's answers stand beside"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")
