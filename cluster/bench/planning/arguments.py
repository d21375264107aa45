"""The options of the planner's benches."""

import argparse
from pathlib import Path


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
