"""`moe-cluster bench`: its arguments, and one run from the checkpoint to the report.

Imports of torch and the cluster happen in `run`, through `session`: `--help` answers at once.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        nargs="?",
        type=Path,
        help="checkpoint to measure on; without it one with random weights is made (see --shapes)",
    )
    parser.add_argument(
        "--shapes",
        choices=("a2.7b", "demo"),
        default="a2.7b",
        help="shapes of the made checkpoint: Qwen1.5-MoE-A2.7B's (5.8 GB with 4 layers) or the tiny demo's "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--layers", type=int, default=4, metavar="N", help="layers of a made a2.7b checkpoint (default: 4)"
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="where made checkpoints are kept for the next time (default: ~/.cache/moe-cluster/checkpoints)",
    )
    parser.add_argument(
        "--transports",
        type=_names("local", "ray"),
        default=("local", "ray"),
        metavar="NAMES",
        help="what to measure: local (one process), ray (experts on Ray actors) (default: local,ray)",
    )
    parser.add_argument(
        "--compare",
        choices=("transformers",),
        help="measure this system in the same run and give the others as ratios to it",
    )
    parser.add_argument("--shards", type=int, default=2, metavar="N", help="expert shards with ray (default: 2)")
    parser.add_argument(
        "--batch",
        type=_numbers,
        default=(1, 8, 32),
        metavar="NUMBERS",
        help="prompts at a time (default: 1,8,32)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="tokens to generate (default: 32)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs after one warm-up (default: 3)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of the weights (default: auto, the checkpoint's own)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the report to stdout and returns the exit code: 1 when a system failed.

    Raises SetupError for arguments that cannot be carried out.
    """
    from cluster.bench.session import measure_all

    return measure_all(args)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between are needed") from None


class _names:
    """An argparse type: some of the given names, with commas between."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in self.known:
                raise argparse.ArgumentTypeError(f"{name!r}: known are {', '.join(self.known)}")
        return names
