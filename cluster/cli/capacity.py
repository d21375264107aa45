"""The options of `plan` that ask for hardware, and the plan that they make."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config.quantization import PLAIN
from cluster.errors import SetupError
from cluster.inputs import shown

if TYPE_CHECKING:
    from cluster.checkpoint.sizes import ModelSizes
    from cluster.config import EngineConfig, ModelConfig
    from cluster.planning.capacity import Capacity, Hardware

PLANNED_ALONE = {
    "quantization": PLAIN, "expert_quantization": None, "speculative_config": None, "tensor_parallel_size": 1,
}  # fmt: skip
MOST = 1_000_000.0  # of tokens, of seconds: far beyond use
LEAST_RATE = 1e-6  # requests/s: one in twelve days
DEFAULTS: dict[str, Any] = {"input": 1000, "output": 300, "ttft": 1.0, "itl": 0.1}  # with --rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "hardware", "how many GPUs or machines a load needs; give --gpu or --calibration, and --rate"
    )
    group.add_argument("--gpu", metavar="NAME", help="of the table in docs/planning.md: h200, h100 …")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="machines of the kind that `bench calibrate` has measured"
    )
    group.add_argument("--rate", type=float, metavar="R", help="requests/s, at random moments (unset: no hardware)")
    for name, kind, unit, text in (
        ("input", int, "N", "tokens of a prompt"),
        ("output", int, "N", "tokens of an answer"),
        ("ttft", float, "SECONDS", "to the first token, of 90 %% of the requests"),
        ("itl", float, "SECONDS", "between two tokens, the mean of an answer, of 90 %% of them"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar=unit, help=f"{text} (default: {DEFAULTS[name]:g})")
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="sequences in a step of an engine (default: 64, as of `serve`)"
    )


def check(args: argparse.Namespace) -> None:
    """Raises SetupError for options that make no plan of hardware."""
    asked = args.rate is not None
    given = [option for option in ("gpu", "calibration") if getattr(args, option) is not None]
    if asked and len(given) != 1:
        raise SetupError("--rate is of a plan of hardware: give --gpu NAME or --calibration FILE, one of the two")
    if given and not asked and args.trace is None:
        raise SetupError(f"--{given[0]} is of a plan of hardware: give --rate too, in requests/s")
    if asked and args.shards is not None:
        raise SetupError("--shards and --rate are two questions: with --rate the plan finds the shards")
    check_needed(args, (*DEFAULTS,), "rate")
    if args.max_num_seqs is not None and not asked and args.trace is None:
        raise SetupError("--max-num-seqs is of a plan of hardware: give --rate or --trace too")
    for name, plain in PLANNED_ALONE.items() if asked or args.trace else ():
        if getattr(args, name) != plain:
            raise SetupError(
                f"{option(name)} was not measured for a plan of hardware: leave it out, or --rate and --trace"
            )
    for name in (*DEFAULTS, "max_num_seqs"):
        check_number(args, name, MOST)
    if args.rate is not None:
        check_rate(args.rate)


def check_rate(rate: float) -> None:
    """Raises SetupError."""
    from cluster.planning.search import MIN_S, MOST_RATE, MOST_REQUESTS

    if not LEAST_RATE <= rate <= MOST_RATE:
        raise SetupError(
            f"--rate is {rate:g}, {LEAST_RATE:g} to {MOST_RATE:,.0f} are possible: {MIN_S:g} s and at most "
            f"{MOST_REQUESTS:,} requests are simulated; plan a part of a greater load"
        )


def check_number(args: argparse.Namespace, name: str, most: float) -> None:
    """Raises SetupError."""
    value = getattr(args, name)
    if value is not None and not 0 < value <= most:
        raise SetupError(f"{option(name)} is {shown(value)}, above 0 and at most {most:,.0f} is needed")


def check_needed(args: argparse.Namespace, names: Sequence[str], other: str) -> None:
    """Raises SetupError for options that are given without the one that they belong to."""
    if getattr(args, other) is None:
        for name in names:
            if getattr(args, name) is not None:
                raise SetupError(f"{option(name)} does nothing without {option(other)}: give both, or leave it out")


def option(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"


def capacity(
    args: argparse.Namespace, config: "ModelConfig", sizes: "ModelSizes", engine: "EngineConfig"
) -> "Capacity | None":
    """The hardware for the load; None where none was asked for. Raises SetupError."""
    if args.rate is None:
        return None
    from cluster.console import Working
    from cluster.planning.capacity import plan_capacity
    from cluster.planning.load import Lengths
    from cluster.planning.search import Goal

    chosen = {name: plain if getattr(args, name) is None else getattr(args, name) for name, plain in DEFAULTS.items()}
    goal = Goal(
        rate=args.rate,
        lengths=Lengths(prompt_tokens=chosen["input"], output_tokens=chosen["output"]),
        first_token_s=chosen["ttft"],
        per_token_s=chosen["itl"],
    )
    hardware = hardware_of(args, config, sizes)
    with Working("planning …"):
        return plan_capacity(hardware, config, sizes, engine, goal)


def hardware_of(args: argparse.Namespace, config: "ModelConfig", sizes: "ModelSizes") -> "Hardware":
    """Raises SetupError."""
    from cluster.planning.calibration import check_model, read_calibration
    from cluster.planning.capacity import gpu_hardware, measured_hardware
    from cluster.planning.hardware import find_gpu

    if args.gpu is not None:
        return gpu_hardware(find_gpu(args.gpu), config, sizes)
    found = read_calibration(args.calibration)
    check_model(found, config, sizes.dtype, args.calibration)
    return measured_hardware(found)
