"""The options of `moe-cluster bench serve` and `bench prefixes`."""

import argparse
from pathlib import Path

from cluster.bench.sampling import CHECKPOINT, SAMPLINGS
from cluster.client import options
from cluster.inputs import shown

LOADS = ("turns", "shared")  # of `bench prefixes`


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="in all (default: 64)")
    parser.add_argument(
        "--concurrency", type=int, default=32, metavar="N",
        help="closed loop: streams at a time, each followed by the next (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=float, metavar="R",
        help="open loop instead: R requests/s at random moments, whether earlier ones are through or not",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="tokens to generate (default: 32)")
    parser.add_argument(
        "--sampling", choices=SAMPLINGS, default="greedy",
        help=f"how tokens are chosen (default: greedy): {listed_samplings()}",
    )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of prompts and moments; a run with the same finds its prompts in the server's cache (default: 0)",
    )
    parser.add_argument(
        "--http", metavar="HOST:PORT",
        help="the server's HTTP, by address or URL: stream as many requests there too, in turns, and print the ratio",
    )  # fmt: skip
    parser.add_argument(
        "--offline", type=Path, metavar="MODEL",
        help="then compute the same requests without a server, from this checkpoint, and print the ratio",
    )  # fmt: skip
    parser.add_argument("--shards", type=int, default=2, metavar="N", help="expert shards for --offline (default: 2)")
    parser.add_argument(
        "--server-pid", type=int, metavar="PID",
        help="of `moe-cluster serve` on this machine: print the memory of its processes before and after",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def add_prefix_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument(
        "--against", action="append", default=[], metavar="HOST:PORT",
        help="another gRPC server, which gets as many requests in turns; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--loads", type=_loads, default=LOADS, metavar="NAMES",
        help="turns, conversations that go on with their answers; shared, questions that begin with one of a few texts "
        f"(default: {','.join(LOADS)})",
    )  # fmt: skip
    for name, default, text in (
        ("conversations", 32, "of a round"),
        ("turns", 4, "of each conversation; and so many questions of shared for each"),
        ("concurrency", 8, "conversations at a time, each followed by the next"),
        ("prompt-tokens", 64, "new tokens of a turn"),
        ("output-tokens", 16, "tokens to generate"),
        ("systems", 8, "beginnings that the questions of shared have"),
        ("system-tokens", 512, "of each beginning"),
        ("repeat", 3, "rounds, each with new tokens"),
        ("seed", 0, "of all tokens; a run with the same finds them in the servers' caches"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def _loads(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in LOADS:
            raise argparse.ArgumentTypeError(f"{shown(name)}: known are {', '.join(LOADS)}")
    return names


def listed_samplings() -> str:
    """For help texts; argparse reads % as a format's."""
    listed = "; ".join(sampling.describe() for sampling in SAMPLINGS.values())
    return f"{listed}; {CHECKPOINT}, as its generation_config.json has it"
