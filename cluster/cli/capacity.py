"""The options of `plan` that ask for hardware, and the plan that they make."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config.quantization import PLAIN
from cluster.errors import SetupError

if TYPE_CHECKING:
    from cluster.checkpoint.sizes import ModelSizes
    from cluster.config import EngineConfig, ModelConfig
    from cluster.planning.capacity import Capacity, Hardware

PLANNED_ALONE = {
    "quantization": PLAIN, "expert_quantization": None, "speculative_config": None, "tensor_parallel_size": 1,
}  # fmt: skip
MOST = 1_000_000.0  # of a rate, of tokens, of seconds: far beyond use


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "hardware", "how many GPUs or machines a load needs; give --gpu or --calibration, and --rate"
    )
    group.add_argument("--gpu", metavar="NAME", help="of the table in docs/planning.md: h200, h100 …")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="machines of the kind that `bench calibrate` has measured"
    )
    group.add_argument("--rate", type=float, metavar="R", help="requests/s, at random moments (unset: no hardware)")
    group.add_argument("--input", type=int, default=1000, metavar="N", help="tokens of a prompt (default: 1000)")
    group.add_argument("--output", type=int, default=300, metavar="N", help="tokens of an answer (default: 300)")
    group.add_argument(
        "--ttft", type=float, default=1.0, metavar="SECONDS",
        help="to the first token, of 90 %% of the requests (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--itl", type=float, default=0.1, metavar="SECONDS",
        help="between two tokens, the mean of an answer, of 90 %% of them (default: 0.1)",
    )  # fmt: skip
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
    for name, plain in PLANNED_ALONE.items() if asked or args.trace else ():
        if getattr(args, name) != plain:
            option = name.replace("_", "-")
            raise SetupError(f"--{option} was not measured for a plan of hardware: leave it out, or --rate and --trace")
    for name in ("rate", "input", "output", "ttft", "itl", "max_num_seqs"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= MOST:
            option = name.replace("_", "-")
            raise SetupError(f"--{option} is {value:g}, above 0 and at most {MOST:,.0f} is needed")


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

    goal = Goal(
        rate=args.rate,
        lengths=Lengths(prompt_tokens=args.input, output_tokens=args.output),
        first_token_s=args.ttft,
        per_token_s=args.itl,
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
